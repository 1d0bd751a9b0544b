"""A sample of the sweep over torch's own ops and modules; ``make conformance`` runs the whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "conformance.py"


def test_a_sample_of_torchs_own_samples_is_right() -> None:
    pytest.importorskip("expecttest")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--samples", "1", "--every", "16"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'rule'" in done.stdout


def test_a_wrong_product_would_be_seen(tmp_path: Path) -> None:
    pytest.importorskip("expecttest")
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "import torch, conformance\n"
        "from sharpkern.rop.rule import RULES\n"
        "rule = RULES[torch.ops.aten.tanh.default]\n"
        "right = rule.backward_tangent\n"
        "rule.backward_tangent = lambda self, dg, g: tuple(1.001 * r for r in right(self, dg, g))\n"
        "sys.argv = ['conformance', '--samples', '1', '--only', 'tanh']\n"
        "sys.exit(conformance.main())\n"
    )
    done = subprocess.run([sys.executable, str(wrong)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "tanh: WRONG: Hv" in done.stdout


def test_a_wrong_gauss_newton_product_would_be_seen(tmp_path: Path) -> None:
    pytest.importorskip("expecttest")
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "import conformance\n"
        "from sharpkern.rop import ReplayedProgram\n"
        "right = ReplayedProgram.ggn\n"
        "ReplayedProgram.ggn = lambda self, block: 1.001 * right(self, block)\n"
        "conformance.op_samples = lambda most: []\n"
        "sys.argv = ['conformance', '--samples', '1', '--only', 'nn.Bilinear']\n"
        "sys.exit(conformance.main())\n"
    )
    done = subprocess.run([sys.executable, str(wrong)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "nn.Bilinear, GGN: WRONG: Gv" in done.stdout
    assert "nn.Bilinear: " not in done.stdout
