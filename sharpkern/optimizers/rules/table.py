"""The one table, from an optimizer's class to its rule.

A rule says how P^-1/2 is read from the optimizer's state, where the optimizer turns unstable, what its moments are
called, and how far the loss may rise at the critical learning rate. Everything else in this package asks ``rule_of``.
To add an optimizer, add its entry to the table at the end of this file, or call ``register`` from your own code.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from ..gi_adam import GIAdam
from .adafactor import HUGGING_FACE_ADAFACTOR, TORCH_ADAFACTOR
from .adam import ADAM, ADAMAX, NADAM, RADAM, SCHEDULE_FREE_ADAMW
from .rule import Optimizer, Rule
from .sgd import SCHEDULE_FREE_SGD, SGD
from .squares import ADADELTA, ADAGRAD, RMSPROP


def register(cls: type[Optimizer], rule: Rule) -> None:
    """Make an optimizer class known, or replace its rule, for the whole process.

    Args:
        cls: the class. Subclasses that override neither ``step`` nor ``_init_group`` follow it.
        rule: check it as tests/test_optimizer_rules.py does: step the optimizer, and compare.
    """
    _RULES[cls] = rule


def rule_of(optimizer: Optimizer) -> Rule:
    """Return an optimizer's rule.

    Raises:
        TypeError: its class is not in the table, or overrides a part of the step of one that is, or is another version
            of it; or no rule is possible for the class, and the message says why.
    """
    optimizer = inner_optimizer(optimizer)
    cls = type(optimizer)
    base, rule = next(((c, _entry(c)) for c in cls.__mro__ if _entry(c) is not None), (cls, None))
    if not isinstance(rule, Rule):
        what = f"no preconditioner and no stability threshold is known for {cls.__name__}"
        raise TypeError(f"{what}: {rule}" if rule else f"{what}; {_hint()}")
    changed = [name for name in ("step", "_init_group") if _body(cls, name) is not _body(base, name)]
    if changed:
        raise TypeError(
            f"{cls.__name__} overrides {' and '.join(changed)} of {base.__name__}, so no rule is known for "
            f"{cls.__name__}; {_hint()}"
        )
    # A copied or loaded optimizer has gained this option from torch.
    options = set(optimizer.defaults) - {"differentiable"}
    if rule.options and options != set(rule.options.split()):
        raise TypeError(
            f"{cls.__module__}.{cls.__name__} has other options than the version that its rule was written for: "
            f"{sorted(options.symmetric_difference(rule.options.split()))}. Its step may differ; "
            "use another version of the package, or sharpkern.optimizers.rules.register(cls, rule)."
        )
    return rule


def diagonal_rule_of(optimizer: Optimizer) -> Rule:
    """Return the rule of an optimizer that has a diagonal P, and with it a threshold.

    Raises:
        TypeError: see ``rule_of``; or the step has a fixed length in another norm (Lion, Muon).
    """
    rule = rule_of(optimizer)
    if rule.geometry != "diagonal":
        raise TypeError(
            f"{type(inner_optimizer(optimizer)).__name__} has no diagonal preconditioner and no threshold for lr times "
            "a curvature: the length of its step does not depend on the gradient's. Use "
            "sharpkern.update_curvature for the curvature along its step, or sharpkern.generalised_sharpness "
            "for the largest curvature in its norm."
        )
    return rule


def inner_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that a wrapper steps: Accelerate's, Lightning's, or ``ZeroRedundancyOptimizer``.

    State and class are the inner optimizer's. Groups are to be read from the wrapper: ``ZeroRedundancyOptimizer`` hands
    a changed lr on at the next step only. Others that hold an optimizer may change its step (Lookahead), and are
    returned as they are.

    Raises:
        TypeError: a ``ZeroRedundancyOptimizer`` that holds the state of some parameters only.
    """
    module = type(optimizer).__module__
    if module == _ZERO:
        return _unsharded(optimizer)
    inner = getattr(optimizer, "optimizer", None)
    if module.partition(".")[0] in _WRAPPERS and isinstance(inner, Optimizer):
        return inner_optimizer(inner)  # a trainer may wrap a sharded optimizer
    return optimizer


def _unsharded(optimizer: Any) -> Optimizer:
    """Return the local optimizer of a ``ZeroRedundancyOptimizer`` with one rank."""
    local: Optimizer = optimizer.optim
    held = {id(p) for group in local.param_groups for p in group["params"]}
    missing = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in held]
    if missing:
        raise TypeError(
            f"this rank's ZeroRedundancyOptimizer has no state for {len(missing)} of its parameters, which other ranks "
            "update: P of the whole model is on no rank. Use an optimizer that is not sharded."
        )
    return local


def _entry(cls: type) -> Rule | str | None:
    # By name where importing the package only to ask would be slow, or fail: module and name, as the class has them.
    return _RULES.get(cls, _RULES.get(f"{cls.__module__}.{cls.__qualname__}"))


def _hint() -> str:
    names = [key.__name__ if isinstance(key, type) else key for key, rule in _RULES.items() if isinstance(rule, Rule)]
    known = ", ".join(f"sharpkern.{name}" if name == "GIAdam" else name for name in names)
    return f"supported: {known}; others by sharpkern.optimizers.rules.register(cls, rule)."


def _body(cls: type[Optimizer], name: str) -> Any:
    """Return a method without its decorators: torch hooks ``step`` of every class at its first instance."""
    return inspect.unwrap(getattr(cls, name, None) or _body)


# Lightning and accelerate wrap an optimizer without changing what it does to the parameters.
_WRAPPERS = ("accelerate", "lightning", "pytorch_lightning")
_ZERO = "torch.distributed.optim.zero_redundancy_optimizer"
# Exact classes; a name instead of a class is its module and name. A subclass follows its parent only while it overrides
# no part of the step: see ``rule_of``. A sentence instead of a rule says why there is none.
_RULES: dict[type[Optimizer] | str, Rule | str] = {
    torch.optim.SGD: SGD,
    torch.optim.Adam: ADAM,
    torch.optim.AdamW: ADAM,
    GIAdam: ADAM,
    torch.optim.RMSprop: RMSPROP,
    torch.optim.NAdam: NADAM,
    torch.optim.RAdam: RADAM,
    torch.optim.Adamax: ADAMAX,
    torch.optim.Adagrad: ADAGRAD,
    torch.optim.Adadelta: ADADELTA,
    torch.optim.Adafactor: TORCH_ADAFACTOR,
    "transformers.optimization.Adafactor": HUGGING_FACE_ADAFACTOR,
    "schedulefree.sgd_schedulefree.SGDScheduleFree": SCHEDULE_FREE_SGD,
    "schedulefree.adamw_schedulefree.AdamWScheduleFree": SCHEDULE_FREE_ADAMW,
    torch.optim.Muon: Rule(None, moments=("momentum_buffer", ""), geometry="spectral"),
    "lion_pytorch.lion_pytorch.Lion": Rule(
        None, moments=("exp_avg", ""), geometry="sign", options="lr betas weight_decay"
    ),
    "timm.optim.lion.Lion": Rule(
        None,
        moments=("exp_avg", ""),
        geometry="sign",
        # Its corrected decay goes by the square of lr.
        scales_with_lr=False,
        options="lr betas weight_decay caution corrected_weight_decay max_lr_snapshot foreach maximize",
    ),
    torch.optim.SparseAdam: "its state is that of the rows that had a gradient, at their own last steps, so there is "
    "no one P. Use Adam, with sparse=False in the embedding.",
    torch.optim.ASGD: "its rate falls by a schedule of its own that starts from lr, and what it returns is an average "
    "of the parameters it visits. Use SGD with a schedule.",
    torch.optim.LBFGS: "its step needs a closure, several gradients and a line search, so it is no function of lr and "
    "one gradient.",
    torch.optim.Rprop: "its step is a sign times a step size of each element, which lr sets at the first step only, so "
    "no lr times a curvature can be compared with a threshold.",
}
