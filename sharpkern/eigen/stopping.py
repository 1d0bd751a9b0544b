"""When a solver may stop, and the sentence in which it says why it did."""

from __future__ import annotations

import torch
from torch import Tensor


def allowed_norms(theta: Tensor, tol: float, rounding: float) -> Tensor:
    """Return the residual norm that each Ritz pair may have: ``tol |theta|``, but never less than rounding leaves.

    A residual norm r promises that *some* eigenvalue lies within r of theta. It does not promise that theta is the
    largest eigenvalue: a vector of the second eigenvalue has a small residual too. What makes that unlikely is the
    solver's business (a random start, a smaller ``tol``, guards), not the criterion's.

    Args:
        theta: ``[k]`` float64, Ritz values.
        tol: relative residual norm. A solver that wants more than the caller asked for passes a smaller one.
        rounding: absolute norm that rounding alone may leave, see ``rounding_level``. Without this floor a solve of
            a nearly singular operator would never end.

    Returns:
        ``[k]`` float64.
    """
    return (tol * theta.abs()).clamp(min=rounding)


def converged(norms: Tensor, theta: Tensor, tol: float, rounding: float) -> bool:
    """Say whether the residual norms of all Ritz pairs are allowed; arguments as for ``allowed_norms``."""
    return bool((norms <= allowed_norms(theta, tol, rounding)).all())


def reason_of(done: bool, norms: Tensor, theta: Tensor, tol: float, max_matvecs: int) -> str:
    """Say why a solver stopped, by its worst pair, and what to change where that was too early."""
    # Relative, as the criterion is; a Ritz value of exactly zero counts as the worst.
    worst = int((norms / theta.abs().clamp(min=torch.finfo(torch.float64).tiny)).argmax())
    pair = f"residual norm {float(norms[worst]):.1e} at eigenvalue {float(theta[worst]):.4g}; tol was {tol:.1e}"
    return f"converged: {pair}." if done else f"stopped at max_matvecs={max_matvecs}, {pair}: raise max_matvecs or tol."
