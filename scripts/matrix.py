"""Run the tests with other versions of Python and torch, each pair in a virtual environment of its own.

    python scripts/matrix.py             # every pair of PAIRS, all tests: about 15 minutes each on two cores
    python scripts/matrix.py 3.10 3.13   # the pairs with these versions of Python
    python scripts/matrix.py --newest    # this Python with the newest torch, and the tests that lean on torch most
    python scripts/matrix.py --newest --quick    # fewer of them, as CI runs them: two minutes

A Python that is not installed is skipped with a line that says so. The environments stay in .venv-matrix, 5 GB each
with torch's CUDA build; pip's own settings, such as PIP_INDEX_URL, lead to another build.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Python and torch, oldest pair first. 3.12 with 2.11 is what machines with a GPU often have.
PAIRS = [("3.10", "2.11.0"), ("3.12", "2.11.0"), ("3.13", "2.14.1"), ("3.14", "2.14.1")]
BUILD = ["numpy", "setuptools>=77", "wheel", "pybind11"]
# What new releases of torch have changed: the exporter and its graphs, derivatives, optimizers' states, warnings.
SUBSET = [
    "test_decompositions.py", "test_eager.py", "test_engines.py", "test_flat.py", "test_gate.py", "test_operators.py",
    "test_optimizer_rules.py", "test_program.py", "test_replayed.py",
    *(path.name for path in sorted((ROOT / "tests").glob("test_rules_*.py"))),
]  # fmt: skip
QUICK = [
    "test_decompositions.py", "test_gate.py", "test_rules_fallback.py", "test_rules_loss.py", "test_rules_norm.py",
    "test_optimizer_rules.py",
]  # fmt: skip


class Skipped(Exception):
    """A pair that cannot be tested here, with the reason."""


def interpreter(version: str) -> str:
    """Find a Python that starts and can make virtual environments, on PATH or among pyenv's."""
    name = f"python{version}"
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for path in [shutil.which(name), *pyenv.glob(f"{version}.*/bin/{name}")]:
        if path and not subprocess.run([path, "-c", "import ensurepip, venv"], capture_output=True).returncode:
            return str(path)
    raise Skipped(f"{name} is not installed: neither on PATH nor in {pyenv}, or without its venv module")


def install(python: str, torch: str, *, reuse: bool = False) -> Path:
    """Make an environment with the package and its extension, or bring it up to date; return its Python.

    Args:
        python: the interpreter.
        torch: version.
        reuse: leave a compiled module that is here for this Python as it is: it does not depend on torch.
    """
    version = subprocess.run([python, "-c", "import sys; print(*sys.version_info[:2], sep='.')"], text=True,
                             capture_output=True, check=True).stdout.strip()  # fmt: skip
    folder = ROOT / ".venv-matrix" / f"python{version}-torch{torch}"
    subprocess.run([python, "-m", "venv", folder], check=True)
    inside = folder / "bin" / "python"
    pip = [inside, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check", f"torch=={torch}"]
    if subprocess.run([*pip, *BUILD]).returncode:
        raise Skipped(f"pip could not install torch {torch} for Python {version}, and says why above")
    built = any((ROOT / "sharpkern").glob(f"_C.cpython-{version.replace('.', '')}-*"))
    environment = {**os.environ, **({"SHARPKERN_NO_NATIVE": "1"} if reuse and built else {})}
    subprocess.run([*pip, "--no-build-isolation", "--editable", f"{ROOT}[test]"], check=True, env=environment)
    return inside


def passes(python: Path, tests: list[Path], **environment: str) -> bool:
    """Run pytest as ``make test`` does."""
    command = [python, "-m", "pytest", "-q", "-n", "2", *tests]
    return not subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}).returncode


def newest(names: list[str]) -> bool:
    """Run test files on the running Python with the newest torch; one that cannot be installed is no failure."""
    torch = PAIRS[-1][1]
    try:
        python = install(sys.executable, torch, reuse=True)
    except Skipped as reason:
        print(f"newest torch: skipped, {reason}", flush=True)
        return True
    good = passes(python, [ROOT / "tests" / name for name in names])
    print(f"newest torch, {torch}: {'passed' if good else 'FAILED'}", flush=True)
    return good


def tested(version: str, torch: str) -> str:
    """Run all tests with one pair; return what came of it."""
    try:
        python = install(interpreter(version), torch)
    except Skipped as reason:
        return f"skipped, {reason}"
    good = passes(python, [])
    interpreted = passes(python, [ROOT / "tests" / "kernels_triton"], TRITON_INTERPRET="1")
    return "passed" if good and interpreted else "FAILED"


def matrix(versions: list[str]) -> bool:
    """Test the pairs with these versions of Python, and list how each went; if none could be tested, that is a failure.

    Args:
        versions: none for every pair.
    """
    outcomes = {pair: tested(*pair) for pair in PAIRS if not versions or pair[0] in versions}
    for (version, torch), outcome in outcomes.items():
        print(f"Python {version}, torch {torch}: {outcome}", flush=True)
    return "FAILED" not in outcomes.values() and "passed" in outcomes.values()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--newest", action="store_true", help="this Python, the newest torch, a subset of the tests")
    parser.add_argument("--quick", action="store_true", help="with --newest: fewer tests")
    parser.add_argument("versions", nargs="*", metavar="PYTHON")
    given = parser.parse_args()
    if unknown := sorted(set(given.versions) - {version for version, _ in PAIRS}):
        parser.error(f"no pair has Python {', '.join(unknown)}")
    sys.exit(not (newest(QUICK if given.quick else SUBSET) if given.newest else matrix(given.versions)))
