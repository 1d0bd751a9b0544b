"""What each optimizer does to curvature: the one table is in ``table``, the formulas are beside it, by family."""

from .rule import Geometry as Geometry
from .rule import Group as Group
from .rule import Rule as Rule
from .rule import Step as Step
from .rule import learning_rate as learning_rate
from .table import diagonal_rule_of as diagonal_rule_of
from .table import inner_optimizer as inner_optimizer
from .table import register as register
from .table import rule_of as rule_of
