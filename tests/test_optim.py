"""GIAdam against an explicit float64 loop in numpy, and against torch's Adam; RI-Adam; signs of failure."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sharpkern as sk

SHAPES = [(3, 5), (7,), (2, 1, 4)]


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]


def clones(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def set_gradients(params: list[nn.Parameter], gradients: list[torch.Tensor]) -> None:
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.clone()


def draw(params: list[nn.Parameter]) -> list[torch.Tensor]:
    return [torch.randn_like(p) for p in params]


def reference(
    theta: np.ndarray,
    gradients: list[np.ndarray],
    g0: np.ndarray,
    lr: float,
    b1: float,
    b2: float,
    eps: float,
    decay: float = 0.0,
    decoupled: bool = False,
) -> np.ndarray:
    """The algorithm as the paper states it, one line per line."""
    m, v = np.zeros_like(theta), (g0 if decoupled else g0 + decay * theta) ** 2
    for t, g in enumerate(gradients, start=1):
        if decoupled:
            theta = theta * (1 - lr * decay)
        else:
            g = g + decay * theta
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        theta = theta - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    return theta


@pytest.mark.parametrize("foreach", [False, True, None])
@pytest.mark.parametrize("separate", [False, True], ids=["own first gradient", "initialize"])
@pytest.mark.parametrize(("decay", "decoupled"), [(0.0, False), (0.2, False), (0.2, True)])
def test_ten_steps_agree_with_an_explicit_loop(
    foreach: bool | None, separate: bool, decay: float, decoupled: bool
) -> None:
    params = parameters()
    start = [p.detach().numpy().copy() for p in params]
    optimizer = sk.GIAdam(
        params, lr=0.03, betas=(0.8, 0.95), eps=1e-3, weight_decay=decay, decoupled=decoupled, foreach=foreach
    )
    steps = [draw(params) for _ in range(10)]
    first = steps[0]
    if separate:
        first = draw(params)
        set_gradients(params, first)
        optimizer.initialize()
    for gradients in steps:
        set_gradients(params, gradients)
        optimizer.step()
    for i, p in enumerate(params):
        want = reference(
            start[i], [g[i].numpy() for g in steps], first[i].numpy(), 0.03, 0.8, 0.95, 1e-3, decay, decoupled
        )
        np.testing.assert_allclose(p.detach().numpy(), want, rtol=1e-12, atol=1e-14)


def test_first_update_is_the_root_of_one_minus_beta2_of_adams() -> None:
    for beta2 in (0.9, 0.999):
        params = parameters()
        others = clones(params)
        gradients = draw(params)
        set_gradients(params, gradients)
        set_gradients(others, gradients)
        before = [p.detach().clone() for p in params]
        sk.GIAdam(params, lr=0.1, betas=(0.9, beta2), eps=0.0).step()
        torch.optim.Adam(others, lr=0.1, betas=(0.9, beta2), eps=0.0).step()
        for p, q, b in zip(params, others, before, strict=True):
            torch.testing.assert_close((p - b) / (q - b), torch.full_like(b, math.sqrt(1 - beta2)))


def test_weights_without_a_first_gradient_are_plain_adams() -> None:
    params = parameters()
    others = clones(params)
    optimizers = sk.GIAdam(params, lr=0.1), torch.optim.Adam(others, lr=0.1)
    gradients = [torch.zeros_like(p) for p in params]
    for _ in range(3):
        for ps, optimizer in zip((params, others), optimizers, strict=True):
            set_gradients(ps, gradients)
            optimizer.step()
        gradients = draw(params)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q)


def test_state_has_adams_keys_and_shapes() -> None:
    params = parameters()
    gi, adam = sk.GIAdam(params), torch.optim.Adam(clones(params))
    for ps, optimizer in ((params, gi), (adam.param_groups[0]["params"], adam)):
        set_gradients(ps, draw(ps))
        optimizer.step()
    for ours, theirs in zip(gi.state.values(), adam.state.values(), strict=True):
        assert list(ours) == list(theirs) == ["step", "exp_avg", "exp_avg_sq"]
        assert float(ours["step"]) == 1.0
        for key in ours:
            assert ours[key].shape == theirs[key].shape
            assert ours[key].dtype == theirs[key].dtype
    assert gi.param_groups[0].keys() == adam.param_groups[0].keys()


@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_state_dict_resumes_identically(at: int, tmp_path: Any) -> None:
    params = parameters()
    optimizer = sk.GIAdam(params, lr=0.05, betas=(0.8, 0.9))
    steps = [draw(params) for _ in range(8)]
    set_gradients(params, draw(params))
    optimizer.initialize()
    for gradients in steps[:at]:
        set_gradients(params, gradients)
        optimizer.step()
    torch.save([optimizer.state_dict(), params], tmp_path / "state.pt")
    state, others = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = sk.GIAdam(others, lr=99.0)
    resumed.load_state_dict(state)
    for gradients in steps[at:]:
        for ps, o in ((params, optimizer), (others, resumed)):
            set_gradients(ps, gradients)
            o.step()
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)


def test_groups_have_their_own_rates_and_parameters_may_arrive_late() -> None:
    params = parameters()
    start = [p.detach().numpy().copy() for p in params]
    optimizer = sk.GIAdam([{"params": params[:1], "lr": 0.01}, {"params": params[1:], "betas": (0.5, 0.7)}], lr=0.1)
    steps = [draw(params) for _ in range(4)]
    for t, gradients in enumerate(steps):
        set_gradients(params, gradients)
        if t == 0:
            params[2].grad = None  # joins at the second step, with that step's gradient as g_0
        optimizer.step()
    plan = [(steps, 0.01, 0.9, 0.999), (steps, 0.1, 0.5, 0.7), (steps[1:], 0.1, 0.5, 0.7)]
    for i, (used, lr, b1, b2) in enumerate(plan):
        want = reference(start[i], [g[i].numpy() for g in used], used[0][i].numpy(), lr, b1, b2, 1e-8)
        np.testing.assert_allclose(params[i].detach().numpy(), want, rtol=1e-12)


def test_a_closure_is_called_once_and_its_loss_returned() -> None:
    params = parameters()
    others = clones(params)
    calls = 0

    def closure() -> torch.Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in params)
        loss.backward()
        return loss

    optimizer = sk.GIAdam(params, lr=0.1)
    assert optimizer.step(closure).item() == pytest.approx(sum((q.detach() ** 2).sum().item() for q in others))
    assert calls == 1
    other = sk.GIAdam(others, lr=0.1)
    set_gradients(others, [2 * q.detach() for q in others])
    other.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q)
    fresh = sk.GIAdam(params, lr=0.1)
    optimizer = fresh
    assert fresh.initialize(closure).item() > 0
    for p in params:
        torch.testing.assert_close(fresh.state[p]["exp_avg_sq"], 4 * p.detach() ** 2)
        assert float(fresh.state[p]["step"]) == 0


def test_hooks_run_once_per_step() -> None:
    params = parameters()
    torch.optim.Adam(clones(params))
    optimizer = sk.GIAdam(params)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    set_gradients(params, draw(params))
    optimizer.step()
    assert seen == ["pre", "post"]


def test_maximize_climbs() -> None:
    params = parameters()
    others = clones(params)
    up, down = sk.GIAdam(params, weight_decay=0.3, maximize=True), sk.GIAdam(others, weight_decay=0.3)
    for _ in range(3):
        gradients = draw(params)
        set_gradients(params, gradients)
        set_gradients(others, [-g for g in gradients])
        up.step()
        down.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q)


def test_a_copied_optimizer_steps_alike() -> None:
    params = parameters()
    optimizer = sk.GIAdam(params, lr=0.1)
    set_gradients(params, draw(params))
    optimizer.step()
    copied = copy.deepcopy(optimizer)
    others = copied.param_groups[0]["params"]
    gradients = draw(params)
    for ps, o in ((params, optimizer), (others, copied)):
        set_gradients(ps, gradients)
        o.step()
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)


def test_initialize_at_the_wrong_time_is_an_error() -> None:
    params = parameters()
    optimizer = sk.GIAdam(params)
    with pytest.raises(RuntimeError, match="needs gradients"):
        optimizer.initialize()
    set_gradients(params, draw(params))
    optimizer.initialize()
    with pytest.raises(RuntimeError, match="3 of 3 parameters are initialised already"):
        optimizer.initialize()


@pytest.mark.parametrize(
    "options",
    [{"lr": -1.0}, {"eps": -1.0}, {"betas": (1.0, 0.9)}, {"betas": (0.9, 1.0)}, {"weight_decay": -0.1}],
)
def test_bad_arguments_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"-1\.0|1\.0|-0\.1"):
        sk.GIAdam(parameters(), **options)


def test_random_start_has_the_norm_of_the_gradient_and_nothing_else_of_it() -> None:
    params = parameters()
    optimizer = sk.GIAdam([{"params": params[:1]}, {"params": params[1:], "lr": 0.5}], v0="random")
    gradients = [10.0**i * g for i, g in enumerate(draw(params))]
    set_gradients(params, gradients)
    torch.manual_seed(3)
    optimizer.initialize()
    z = [optimizer.state[p]["exp_avg_sq"].sqrt() for p in params]
    flat, g = sk.flatten(z), sk.flatten(gradients)
    assert float(flat.norm() / g.norm()) == pytest.approx(1, rel=1e-12)
    assert abs(float(torch.corrcoef(torch.stack([flat, g.abs()]))[0, 1])) < 0.9
    rms = [float(t.square().mean().sqrt()) for t in z]
    assert max(rms) < 5 * min(rms)  # the gradients' differ by 100
    other = sk.GIAdam(clones(params), v0="random")
    for p, gradient in zip(other.param_groups[0]["params"], gradients, strict=True):
        p.grad = gradient
    torch.manual_seed(3)
    other.initialize()
    for p, want in zip(other.param_groups[0]["params"], z, strict=True):
        torch.testing.assert_close(other.state[p]["exp_avg_sq"].sqrt(), want)


@pytest.mark.parametrize("separate", [False, True], ids=["own first gradient", "initialize"])
def test_random_start_agrees_with_an_explicit_loop(separate: bool) -> None:
    params = parameters()
    start = [p.detach().numpy().copy() for p in params]
    optimizer = sk.GIAdam(params, lr=0.03, betas=(0.8, 0.95), eps=1e-3, v0="random")
    steps = [draw(params) for _ in range(6)]
    set_gradients(params, steps[0])
    torch.manual_seed(11)
    if separate:
        optimizer.initialize()
    for gradients in steps:
        set_gradients(params, gradients)
        optimizer.step()
    torch.manual_seed(11)
    z = [torch.randn_like(g) for g in steps[0]]
    scale = float(sk.flatten(steps[0]).norm() / sk.flatten(z).norm())
    for i, p in enumerate(params):
        want = reference(start[i], [g[i].numpy() for g in steps], scale * z[i].numpy(), 0.03, 0.8, 0.95, 1e-3)
        np.testing.assert_allclose(p.detach().numpy(), want, rtol=1e-10, atol=1e-13)


def test_random_start_survives_copies_and_its_first_preconditioner_needs_the_draw() -> None:
    params = parameters()
    optimizer = sk.GIAdam(params, v0="random")
    assert copy.deepcopy(optimizer).v0 == "random"
    set_gradients(params, draw(params))
    with pytest.raises(RuntimeError, match="call the optimizer's initialize"):
        sk.preconditioner(optimizer, gradients="next")
    optimizer.initialize()
    before = sk.preconditioner(optimizer, gradients="next").diagonal()
    optimizer.step()
    torch.testing.assert_close(before, sk.preconditioner(optimizer).diagonal())


def test_norms_of_moments() -> None:
    for make in (sk.GIAdam, torch.optim.Adam, torch.optim.RMSprop, lambda p: torch.optim.SGD(p, momentum=0.5)):
        params = parameters()
        optimizer = make(params)
        for _ in range(2):
            set_gradients(params, draw(params))
            optimizer.step()
        states = [optimizer.state[p] for p in params]
        got = sk.optimizer_norms(optimizer)
        assert got["g"] == pytest.approx(float(sk.flatten([p.grad for p in params]).norm()))
        assert got["theta"] == pytest.approx(float(sk.flatten(params).detach().norm()))
        for name, keys in (("m", ("exp_avg", "momentum_buffer")), ("v", ("exp_avg_sq", "square_avg"))):
            tensors = [s[key] for s in states for key in keys if s.get(key) is not None]
            assert got[name] == (pytest.approx(float(sk.flatten(tensors).norm())) if tensors else 0.0)


def test_dead_units_are_counted_where_they_were_planted() -> None:
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.abs_()
            layer.bias.fill_(1.0)
        model[0].bias[:7] = -1e3  # off for every example
    loss = model(torch.rand(30, 6)).square().mean()
    with pytest.raises(RuntimeError, match="run backward"):
        sk.dead_units(model)
    loss.backward()
    assert sk.dead_units(model) == pytest.approx(7 / 27)
    with torch.no_grad():
        model[2].bias.fill_(-1e3)  # the second layer is 0: no gradient but to the last bias
    model.zero_grad()
    model(torch.rand(30, 6)).square().mean().backward()
    assert sk.dead_units(model) == 1.0


def test_unknown_starts_are_refused() -> None:
    with pytest.raises(ValueError, match="v0 must be 'gradient' or 'random', got 'zero'"):
        sk.GIAdam(parameters(), v0="zero")
