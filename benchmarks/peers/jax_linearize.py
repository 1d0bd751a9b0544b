"""JAX, ``jax.linearize`` once, jitted, its residuals kept; every product is a jitted call of the linear function."""

from __future__ import annotations

from . import jax_jvp


class PEER(jax_jvp.PEER):
    method = "linearize"
