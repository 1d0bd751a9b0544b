"""The guard for neurons that have just become active under an adaptive optimizer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from problems import Problem, dense_hessian
from torch import nn

import sharpkern as sk
from sharpkern.tracking.popups import PopUps


def test_points_at_the_weights_whose_preconditioner_collapsed() -> None:
    watch = PopUps()
    s, g = 1 + torch.rand(40).double(), torch.randn(40).double()
    g[3] = 0
    assert watch.look(SimpleNamespace(inv_sqrt=s, space=None), g) is None  # nothing to compare with
    assert watch.look(SimpleNamespace(inv_sqrt=s / 1.4, space=None), g) is None
    fallen = s / 1.4
    fallen[:10] /= 1.6
    (found,) = watch.look(SimpleNamespace(inv_sqrt=fallen, space=None), g)
    want = torch.where(torch.arange(40) < 10, fallen**2 * g, 0)
    assert torch.allclose(found, want, rtol=1e-12, atol=0) and found[3] == 0
    few = fallen.clone()
    few[:8] /= 1.6  # one of the eight has no gradient
    assert watch.look(SimpleNamespace(inv_sqrt=few, space=None), g) is None
    enough = few.clone()
    enough[:9] /= 1.6
    found = watch.look(SimpleNamespace(inv_sqrt=enough, space=None), g)
    assert found is not None and int((found != 0).sum()) == 8
    few = enough
    assert watch.look(SimpleNamespace(inv_sqrt=few[:20], space=None), g[:20]) is None  # other parameters


@pytest.mark.parametrize("block", [None, 3])
def test_a_neuron_that_becomes_active_is_seen_in_that_step(block: int | None) -> None:
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 4)).double()
    x, y = torch.randn(40, 8).double(), torch.randint(0, 4, (40,))
    with torch.no_grad():  # one neuron sees the first input alone, which is negative at first
        model[0].weight[0] = torch.tensor([1.0, *[0.0] * 7])
        model[0].bias[0] = 0.0
        model[2].weight[:, 0] = 120 * torch.tensor([1.0, -1.0, 1.0, -1.0])
    x[:, 0] = -x[:, 0].abs()
    awake = x.clone()
    awake[:1, 0] = 0.001
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001, betas=(0.9, 0.999))
    tracker = sk.SharpnessTracker(model, F.cross_entropy, optimizer, tol=0.02, block=block)
    for _ in range(30):
        tracker.step((x, y))
        optimizer.step()
    dense = dense_hessian(Problem(model, F.cross_entropy, (awake, y)))
    rec = tracker.step((awake, y))
    optimizer.step()
    s = sk.preconditioner(optimizer).inv_sqrt(list(model.parameters()))
    values, vectors = torch.linalg.eigh(s[:, None] * dense * s)
    assert rec.preconditioned_sharpness == pytest.approx(float(values[-1]), rel=0.02)
    # The neuron's weights carry the vector, of which no earlier step knew anything.
    own = torch.cat([(torch.arange(24) == 0)[:, None].expand(24, 8).flatten(), torch.arange(24) == 0])
    assert float(vectors[: len(own), -1][own].square().sum()) > 0.5
