"""One public function per kernel, which checks its arguments, chooses a backend, and calls it."""

from .dispatch import BACKENDS as BACKENDS
from .dispatch import why_not as why_not
from .saved import RankError as RankError
from .vectors import combine as combine
from .vectors import gram as gram
from .vectors import inv_sqrt_adam as inv_sqrt_adam
from .vectors import orthonormalise as orthonormalise
from .vectors import power_step as power_step
from .vectors import scale as scale
