"""Pearlmutter's R-operator as a program: export, four sweeps, one rule per op."""

from . import (  # noqa: F401  (each registers its rules)
    arithmetic,
    attention,
    conv,
    dropout,
    indexing,
    linear,
    loss,
    norm,
    pointwise,
    pool,
    reduce,
    selection,
    softmax,
    views,
)
from .export import FunctionalLoss as FunctionalLoss
from .export import LossModule as LossModule
from .export import UnsupportedModelError as UnsupportedModelError
from .export import export as export
from .fallback import UnsupportedOpError as UnsupportedOpError
from .program import Program as Program
from .replayed import ReplayedProgram as ReplayedProgram
