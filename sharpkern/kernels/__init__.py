"""One public function per kernel, which chooses a backend and calls it.

Users call the vector kernels, which check their arguments. The kernels of the rules (norm, softmax, attention, ...) are
called at every op of a sweep and trust their callers: shapes, dtypes and contiguous tensors as their docstrings say.
Each raises a RuntimeError where ``SHARPKERN_BACKEND`` forces a backend that cannot run it.
"""

from . import attention as attention  # with the module its kernels are registered, here as below
from . import embedding as embedding
from . import linear as linear
from . import norm as norm
from . import pointwise as pointwise
from . import softmax as softmax
from .dispatch import BACKENDS as BACKENDS
from .dispatch import why_not as why_not
from .saved import RankError as RankError
from .vectors import combine as combine
from .vectors import gram as gram
from .vectors import inv_sqrt_adam as inv_sqrt_adam
from .vectors import orthonormalise as orthonormalise
from .vectors import power_step as power_step
from .vectors import scale as scale
from .vectors import transpose as transpose
