"""sharpkern: the sharpness of neural-network training, step by step.

Public names are loaded on first use, so that ``import sharpkern`` and the command line's ``--help`` do not wait for
torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .curvature.audit import AuditReport as AuditReport
    from .curvature.audit import audit as audit
    from .curvature.chunked import ChunkedHessian as ChunkedHessian
    from .curvature.chunked import MicroBatches as MicroBatches
    from .curvature.dataset import DatasetHessian as DatasetHessian
    from .curvature.distributed.choose import hessian_of as hessian_of
    from .curvature.distributed.group import DistributedError as DistributedError
    from .curvature.distributed.replicated import DataParallelGGN as DataParallelGGN
    from .curvature.distributed.replicated import DataParallelHessian as DataParallelHessian
    from .curvature.distributed.sharded import ShardedGGN as ShardedGGN
    from .curvature.distributed.sharded import ShardedHessian as ShardedHessian
    from .curvature.fisher import EmpiricalFisherOperator as EmpiricalFisherOperator
    from .curvature.losses import NonFiniteLossError as NonFiniteLossError
    from .curvature.operators import GGNOperator as GGNOperator
    from .curvature.operators import HessianOperator as HessianOperator
    from .curvature.parameters import flatten as flatten
    from .curvature.parameters import unflatten as unflatten
    from .curvature.preconditioned import PreconditionedOperator as PreconditionedOperator
    from .curvature.repeatable import ChangedLossError as ChangedLossError
    from .curvature.repeatable import NotRepeatableError as NotRepeatableError
    from .curvature.sharpness import Sharpness as Sharpness
    from .curvature.sharpness import preconditioned_sharpness as preconditioned_sharpness
    from .curvature.sharpness import sharpness as sharpness
    from .dynamics import Catapult as Catapult
    from .dynamics import EdgeOfStability as EdgeOfStability
    from .dynamics import Outcome as Outcome
    from .dynamics import Regime as Regime
    from .dynamics import classify_regime as classify_regime
    from .dynamics import crossings as crossings
    from .dynamics import detect_catapults as detect_catapults
    from .dynamics import edge_of_stability as edge_of_stability
    from .dynamics import first_crossing as first_crossing
    from .dynamics import training_outcome as training_outcome
    from .eigen import Certificate as Certificate
    from .eigen import EigenResult as EigenResult
    from .eigen import certify as certify
    from .eigen import lanczos as lanczos
    from .eigen import lobpcg as lobpcg
    from .eigen import power_iteration as power_iteration
    from .optimizers.geometry import GeneralisedSharpness as GeneralisedSharpness
    from .optimizers.geometry import UpdateCurvature as UpdateCurvature
    from .optimizers.geometry import generalised_sharpness as generalised_sharpness
    from .optimizers.geometry import generalised_threshold as generalised_threshold
    from .optimizers.geometry import update_curvature as update_curvature
    from .optimizers.gi_adam import GIAdam as GIAdam
    from .optimizers.norms import dead_units as dead_units
    from .optimizers.norms import optimizer_norms as optimizer_norms
    from .optimizers.preconditioner import Preconditioner as Preconditioner
    from .optimizers.preconditioner import preconditioner as preconditioner
    from .optimizers.threshold import stability_threshold as stability_threshold
    from .rop import UnsupportedOpError as UnsupportedOpError
    from .spectrum.density import SpectralDensity as SpectralDensity
    from .spectrum.density import spectral_density as spectral_density
    from .spectrum.diagonal import diagonal as diagonal
    from .spectrum.layers import BlockOperator as BlockOperator
    from .spectrum.layers import layer_sharpness as layer_sharpness
    from .spectrum.probes import Estimate as Estimate
    from .spectrum.trace import trace as trace
    from .tracking.cost import Cost as Cost
    from .tracking.record import Record as Record
    from .tracking.tracker import SharpnessTracker as SharpnessTracker
    from .warmup.critical import CriticalLR as CriticalLR
    from .warmup.critical import critical_learning_rate as critical_learning_rate
    from .warmup.formulas import steps_saved as steps_saved
    from .warmup.formulas import steps_to_target as steps_to_target
    from .warmup.persistent import PersistentCatapultLR as PersistentCatapultLR
    from .warmup.schedule import WarmupLR as WarmupLR
    from .warmup.suggest import WarmupSuggestion as WarmupSuggestion
    from .warmup.suggest import suggest_warmup as suggest_warmup

_HOME = {
    "curvature.audit": ("AuditReport", "audit"),
    "warmup.critical": ("CriticalLR", "critical_learning_rate"),
    "curvature.chunked": ("ChunkedHessian", "MicroBatches"),
    "curvature.dataset": ("DatasetHessian",),
    "dynamics": (
        "Catapult",
        "EdgeOfStability",
        "Outcome",
        "Regime",
        "classify_regime",
        "crossings",
        "detect_catapults",
        "edge_of_stability",
        "first_crossing",
        "training_outcome",
    ),
    "eigen": ("Certificate", "EigenResult", "certify", "lanczos", "lobpcg", "power_iteration"),
    "curvature.parameters": ("flatten", "unflatten"),
    "curvature.sharpness": ("Sharpness", "preconditioned_sharpness", "sharpness"),
    "curvature.distributed.choose": ("hessian_of",),
    "curvature.distributed.group": ("DistributedError",),
    "curvature.distributed.replicated": ("DataParallelGGN", "DataParallelHessian"),
    "curvature.distributed.sharded": ("ShardedGGN", "ShardedHessian"),
    "curvature.fisher": ("EmpiricalFisherOperator",),
    "curvature.losses": ("NonFiniteLossError",),
    "curvature.operators": ("GGNOperator", "HessianOperator"),
    "curvature.preconditioned": ("PreconditionedOperator",),
    "curvature.repeatable": ("ChangedLossError", "NotRepeatableError"),
    "optimizers.geometry": (
        "GeneralisedSharpness",
        "UpdateCurvature",
        "generalised_sharpness",
        "generalised_threshold",
        "update_curvature",
    ),
    "optimizers.gi_adam": ("GIAdam",),
    "optimizers.norms": ("dead_units", "optimizer_norms"),
    "warmup.persistent": ("PersistentCatapultLR",),
    "optimizers.preconditioner": ("Preconditioner", "preconditioner"),
    "rop": ("UnsupportedOpError",),
    "warmup.suggest": ("WarmupSuggestion", "suggest_warmup"),
    "spectrum.density": ("SpectralDensity", "spectral_density"),
    "spectrum.diagonal": ("diagonal",),
    "spectrum.layers": ("BlockOperator", "layer_sharpness"),
    "spectrum.probes": ("Estimate",),
    "spectrum.trace": ("trace",),
    "tracking.cost": ("Cost",),
    "tracking.record": ("Record",),
    "tracking.tracker": ("SharpnessTracker",),
    "optimizers.threshold": ("stability_threshold",),
    "warmup.schedule": ("WarmupLR",),
    "warmup.formulas": ("steps_saved", "steps_to_target"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'sharpkern' has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
