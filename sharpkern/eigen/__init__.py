"""Solvers for the extreme eigenvalues of a symmetric operator.

A solver sees ``n``, ``dtype``, ``device`` and ``matmat``, and works on blocks of vectors as rows ``[k, n]``.
All report Ritz values: for the largest eigenvalues, lower bounds up to rounding. A residual norm r certifies
that *some* eigenvalue lies within r of the Ritz value; that no larger one was missed is likely from a random
start, not certain.
"""

from .certificate import Certificate as Certificate
from .certificate import certify as certify
from .common import EigenResult as EigenResult
from .common import SymmetricOperator as SymmetricOperator
from .krylov import lanczos as lanczos
from .locally_optimal import lobpcg as lobpcg
from .power import power_iteration as power_iteration
from .short import ShortLanczos as ShortLanczos
from .warm import WarmLanczos as WarmLanczos
from .warm_block import WarmBlockLanczos as WarmBlockLanczos
