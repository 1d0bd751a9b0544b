"""Pearlmutter's R-operator as a program: export, four sweeps, one rule per op."""

from . import rules as rules
from .export import UnsupportedModelError as UnsupportedModelError
from .export import export as export
from .program import Program as Program
from .recompute import RecomputedProgram as RecomputedProgram
from .recording.replayed import ReplayedProgram as ReplayedProgram
from .rules.fallback import UnsupportedOpError as UnsupportedOpError
