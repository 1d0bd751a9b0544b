"""Ways to multiply with a Hessian, one file each; those whose package is missing say so and are left out."""

from __future__ import annotations

from importlib import import_module

from .common import Peer

MODULES = {
    "sharpkern": "fused",
    "autograd, graph kept": "autograd_kept",
    "autograd, from scratch": "autograd_scratch",
    "jvp(jacrev)": "jvp_jacrev",
    "jvp(jacrev), compiled": "jvp_compiled",
    "curvlinops": "curvlinops_hessian",
    "hessian-eigenthings": "eigenthings_hessian",
    "JAX jit(jvp(grad))": "jax_jvp",
    "JAX jit(linearize)": "jax_linearize",
}
KEEPS_PRIMAL = ("sharpkern", "autograd, graph kept", "JAX jit(linearize)")  # the others redo it in every product


def load(names: list[str] | None = None) -> tuple[dict[str, type[Peer]], dict[str, str]]:
    """Import peers.

    Returns:
        name -> class; name -> why it is missing.
    """
    found: dict[str, type[Peer]] = {}
    missing: dict[str, str] = {}
    for name in names or MODULES:
        try:
            found[name] = import_module(f"peers.{MODULES[name]}").PEER
        except ImportError as error:
            missing[name] = str(error)
    return found, missing
