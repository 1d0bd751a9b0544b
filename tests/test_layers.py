"""Imports point downwards only, inside a folder too: docs/explain/design.md, section Layers."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sharpkern"
# Lowest first: a folder imports from the folders above its line, a module from the modules before it in its row.
LAYERS = {
    "kernels": "precision saved reference cholesky_qr cpu.native cpu.huge_pages cpu.blocked_attention cuda dispatch "
    "vectors attention embedding linear norm pointwise softmax triton.attention_tiles triton.attention_kernels "
    "triton.attention triton.embedding triton.linear triton.norm_kernels triton.norm triton.pointwise triton.softmax",
    "rop": "layout rule step sandbox rules.fallback rules.arithmetic rules.attention rules.conv rules.dropout "
    "rules.indexing rules.linear rules.loss rules.norm rules.pointwise rules.pool rules.reduce rules.selection "
    "rules.softmax rules.views rules.head decomposition_table decompositions export liveness sweeps program recompute "
    "conformance recording.bindings recording.common recording.cuda_graph recording.pool recording.tape "
    "recording.replayed double_backward",
    "eigen": "common stopping state basis certificate krylov locally_optimal power chain warm_start warm short "
    "warm_block",
    "optimizers": "parts held gi_adam rules.rule rules.sgd rules.adam rules.squares rules.adafactor rules.table norms "
    "threshold preconditioner next_update unit_ball geometry",
    "curvature": "losses parameters wrappers reading watch exports eager gate engines freshness base operators "
    "repeatable fisher dataset chunked memory negative preconditioned distributed.group distributed.shards "
    "distributed.blocks distributed.skeleton distributed.replicated distributed.sharded distributed.choose "
    "sharpness audit",
    "spectrum": "probes trace diagonal density layers",
    "dynamics": "",
    "tracking": "budget pace probe record popups block_width options failures followed gradients target following "
    "directions cost tracker",
    "warmup": "formulas critical schedule persistent trials suggest_text suggest",
    "train": "cifar idx text config metrics lock signals models batched checkpoint data moments plots summary losses "
    "own build loop",
    "integrations": "observer lightning transformers",
    "sweep": "grid collect diagrams run report stacked groups executors",
    "cli": "exits progress options train suggest sweep report audit bench doctor __main__",
}
ORDER = [f"{folder}.{name}" if name else folder for folder, row in LAYERS.items() for name in row.split() or [""]]
EIGEN_MAY_IMPORT = {"eigen", "kernels"}  # a solver sees an operator's n, dtype, device, matmat; not the operators
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")
IDS = [str(path.relative_to(PACKAGE)) for path in FILES]


def module_of(path: Path) -> str:
    """Name a file below the package: rop/linear.py is rop.linear, rop/__init__.py is rop."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def rank(module: str) -> int:
    """Place of a module in the order; a package stands with its last module."""
    if module in ORDER:
        return ORDER.index(module)
    return max(i for i, name in enumerate(ORDER) if name.startswith(f"{module}."))


def imports(path: Path) -> list[tuple[str, str]]:
    """List what a file imports of this package, as (module, name); late imports inside functions included."""
    package = ["sharpkern", *path.relative_to(PACKAGE).parts[:-1]]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            found += [(".".join([*base, *filter(None, [node.module])]), alias.name) for alias in node.names]
    below = [(module.partition(".")[2], name) for module, name in found if module.partition(".")[0] == "sharpkern"]
    joined = [(f"{module}.{name}".strip("."), module, name) for module, name in below]
    return [(whole, "") if whole in MODULES else (module, name) for whole, module, name in joined]


def test_every_module_has_its_place() -> None:
    packages = {module_of(path) for path in FILES if path.name == "__init__.py"}
    assert sorted(set(MODULES) - packages) == sorted(ORDER), "LAYERS must name every module once"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_imports_point_down(path: Path) -> None:
    own = module_of(path)
    targets = {module for module, _ in imports(path) if module}
    above = {module for module in targets if rank(module) > rank(own)}
    assert not above, f"{own} imports {sorted(above)}, which stand after it in LAYERS"
    if own.startswith("eigen"):
        assert {module.split(".")[0] for module in targets} <= EIGEN_MAY_IMPORT


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_private_names_stay_in_their_module(path: Path) -> None:
    private = [f"{module}.{name}" for module, name in imports(path) if name.startswith("_") and name not in PUBLIC]
    assert not private, f"{module_of(path)} imports private names: {private}"


PUBLIC = {"_C", "__version__"}


def test_upward_import_would_be_seen() -> None:
    assert {"curvature.distributed.choose", "eigen"} <= {
        module for module, _ in imports(PACKAGE / "curvature" / "sharpness.py")
    }
    assert "kernels.norm" in {module for module, _ in imports(PACKAGE / "rop" / "rules" / "norm.py")}
    assert rank("kernels") < rank("rop.layout") < rank("rop.program") < rank("rop") < rank("curvature.operators")
