"""sharpkern: sharpness of neural-network training at every step, cheap enough to leave switched on.

Public names are loaded on first use, so that ``import sharpkern`` and the command line's ``--help`` do not wait for
torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .auditing import AuditReport as AuditReport
    from .auditing import audit as audit
    from .critical import CriticalLR as CriticalLR
    from .critical import critical_learning_rate as critical_learning_rate
    from .dataset import DatasetHessian as DatasetHessian
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
    from .flat import flatten as flatten
    from .flat import unflatten as unflatten
    from .measure import Sharpness as Sharpness
    from .measure import preconditioned_sharpness as preconditioned_sharpness
    from .measure import sharpness as sharpness
    from .operators import GGNOperator as GGNOperator
    from .operators import HessianOperator as HessianOperator
    from .operators import NonFiniteLossError as NonFiniteLossError
    from .operators import PreconditionedOperator as PreconditionedOperator
    from .optim import GIAdam as GIAdam
    from .optim import dead_units as dead_units
    from .optim import optimizer_norms as optimizer_norms
    from .persistent import PersistentCatapultLR as PersistentCatapultLR
    from .preconditioning import Preconditioner as Preconditioner
    from .preconditioning import preconditioner as preconditioner
    from .rop import UnsupportedOpError as UnsupportedOpError
    from .suggest import WarmupSuggestion as WarmupSuggestion
    from .suggest import suggest_warmup as suggest_warmup
    from .tracker import Record as Record
    from .tracker import SharpnessTracker as SharpnessTracker
    from .warmup import WarmupLR as WarmupLR
    from .warmup import stability_threshold as stability_threshold
    from .warmup import steps_saved as steps_saved
    from .warmup import steps_to_target as steps_to_target

_HOME = {
    "auditing": ("AuditReport", "audit"),
    "critical": ("CriticalLR", "critical_learning_rate"),
    "dataset": ("DatasetHessian",),
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
    "flat": ("flatten", "unflatten"),
    "measure": ("Sharpness", "preconditioned_sharpness", "sharpness"),
    "operators": ("GGNOperator", "HessianOperator", "NonFiniteLossError", "PreconditionedOperator"),
    "optim": ("GIAdam", "dead_units", "optimizer_norms"),
    "persistent": ("PersistentCatapultLR",),
    "preconditioning": ("Preconditioner", "preconditioner"),
    "rop": ("UnsupportedOpError",),
    "suggest": ("WarmupSuggestion", "suggest_warmup"),
    "tracker": ("Record", "SharpnessTracker"),
    "warmup": ("WarmupLR", "stability_threshold", "steps_saved", "steps_to_target"),
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
