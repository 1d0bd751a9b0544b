"""Imports point downwards only: docs/design.md, section Layers."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sharpkern"
# Lowest first. A module may import from its own layer and from every one below it.
LAYERS = [
    {"flat", "kernels"},
    {"rop", "preconditioning"},
    {"operators", "dataset"},
    {"eigen"},
    {"measure", "optim", "critical", "warmup", "persistent", "suggest", "dynamics", "budget", "tracker", "auditing"},
    {"train"},
    {"sweep"},
    {"bench", "cli", "doctor"},
]
LAYER_OF = {name: level for level, names in enumerate(LAYERS) for name in names}
EIGEN_MAY_IMPORT = {"eigen", "kernels"}  # a solver sees an operator's n, dtype, device, matmat; not the operators
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def family(path: Path) -> str:
    """The first component below the package: rop/linear.py -> rop, eigen.py -> eigen."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """Families of this package that a file imports, late imports inside functions included."""
    package = ["sharpkern", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names] if module else []
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("sharpkern.")}
    return found & LAYER_OF.keys()


def test_every_module_has_a_layer() -> None:
    assert {family(path) for path in FILES} == LAYER_OF.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = family(path)
    above = {name for name in imported(path) if LAYER_OF[name] > LAYER_OF[own]}
    assert not above, f"{path.name} ({own}) imports {sorted(above)}, which lie above it"
    if own == "eigen":
        assert imported(path) <= EIGEN_MAY_IMPORT


def test_upward_import_would_be_seen() -> None:
    assert {"operators", "eigen"} <= imported(PACKAGE / "measure.py")
    assert "kernels" in imported(PACKAGE / "rop" / "rules" / "norm.py")
