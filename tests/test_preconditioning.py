"""P from live optimizers, against the steps those optimizers really take."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sharpkern as sk
from sharpkern.optimizers.preconditioner import is_adaptive

SHAPES = [(3, 5), (7,), (), (2, 1, 4)]
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]


def draw_gradients(params: list[nn.Parameter]) -> None:
    for p in params:
        p.grad = torch.randn_like(p) * torch.logspace(-3, 1, p.numel(), dtype=p.dtype).reshape(p.shape)


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:2], "lr": 0.03}, {"params": params[2:], "lr": 0.007, "betas": (0.8, 0.97)}]


ADAMS: dict[str, Make] = {
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.03, betas=(0.9, 0.99), eps=1e-3),
    "loop": lambda ps: torch.optim.Adam(ps, lr=0.03, eps=1e-3, foreach=False),
    "foreach": lambda ps: torch.optim.Adam(ps, lr=0.03, eps=1e-3, foreach=True),
    "fused": lambda ps: torch.optim.Adam(ps, lr=0.03, eps=1e-3, fused=True),
    "tensor lr and betas": lambda ps: torch.optim.Adam(
        ps,
        lr=torch.tensor(0.03),
        betas=(torch.tensor(0.9), torch.tensor(0.99)),
        foreach=False,
        capturable=False,
    ),
    "amsgrad": lambda ps: torch.optim.Adam(ps, lr=0.03, betas=(0.9, 0.6), eps=1e-3, amsgrad=True),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.03, weight_decay=0.0, eps=1e-3),
    "coupled decay": lambda ps: torch.optim.Adam(ps, lr=0.03, weight_decay=0.3, eps=1e-3),
    "maximize": lambda ps: torch.optim.Adam(ps, lr=0.03, weight_decay=0.3, maximize=True),
    "groups": lambda ps: torch.optim.Adam(groups(ps), eps=1e-3),
    "gi-adam": lambda ps: sk.GIAdam(ps, lr=0.03, betas=(0.9, 0.95), eps=1e-3),
    "gi-adam, coupled decay": lambda ps: sk.GIAdam(ps, lr=0.03, weight_decay=0.3),
    "gi-adam, amsgrad": lambda ps: sk.GIAdam(ps, lr=0.03, betas=(0.9, 0.6), amsgrad=True),
}


@pytest.mark.parametrize("name", ADAMS)
def test_adam_really_steps_by_the_first_moment_over_p(name: str) -> None:
    params = parameters()
    optimizer = ADAMS[name](params)
    lr = 0.03  # of the first group: P carries the rest
    for _ in range(5):
        draw_gradients(params)
        promised = sk.preconditioner(optimizer, gradients="next")
        before = flat(params)
        optimizer.step()
        P = sk.preconditioner(optimizer).diagonal()
        m = flat([optimizer.state[p]["exp_avg"] for p in params])
        step = flat(params) - before
        torch.testing.assert_close(step, -lr * m / P, rtol=1e-6, atol=1e-14)
        torch.testing.assert_close(promised.diagonal(), P, rtol=1e-6, atol=0.0)
        torch.testing.assert_close(promised.inv_sqrt(), P**-0.5, rtol=1e-6, atol=0.0)


def test_first_moment_correction_is_a_factor_of_one_minus_beta1_to_the_t() -> None:
    params = parameters()
    optimizer = torch.optim.Adam(params, betas=(0.85, 0.9))
    for t in range(1, 4):
        draw_gradients(params)
        optimizer.step()
        ratio = (
            sk.preconditioner(optimizer).diagonal()
            / sk.preconditioner(optimizer, first_moment_correction=False).diagonal()
        )
        torch.testing.assert_close(ratio, torch.full_like(ratio, 1 - 0.85**t))


def test_adamw_steps_by_decay_and_the_first_moment_over_p() -> None:
    params = parameters()
    optimizer = torch.optim.AdamW(params, lr=0.02, weight_decay=0.4)
    for _ in range(3):
        draw_gradients(params)
        promised = sk.preconditioner(optimizer, gradients="next").diagonal()
        before = flat(params)
        optimizer.step()
        P = sk.preconditioner(optimizer).diagonal()
        m = flat([optimizer.state[p]["exp_avg"] for p in params])
        torch.testing.assert_close(flat(params), (1 - 0.02 * 0.4) * before - 0.02 * m / P)
        torch.testing.assert_close(promised, P)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_rmsprop_really_steps_by_the_gradient_over_p(centered: bool, weight_decay: float) -> None:
    params = parameters()
    optimizer = torch.optim.RMSprop(params, lr=0.03, alpha=0.8, eps=1e-3, centered=centered, weight_decay=weight_decay)
    for _ in range(4):
        draw_gradients(params)
        promised = sk.preconditioner(optimizer, gradients="next").diagonal()
        g = flat([p.grad for p in params]) + weight_decay * flat(params)
        before = flat(params)
        optimizer.step()
        P = sk.preconditioner(optimizer).diagonal()
        torch.testing.assert_close(flat(params) - before, -0.03 * g / P)
        torch.testing.assert_close(promised, P)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_not_preconditioned(momentum: float) -> None:
    params = parameters()
    P = sk.preconditioner(torch.optim.SGD(params, lr=0.1, momentum=momentum))
    assert torch.equal(P.diagonal(), torch.ones(sum(p.numel() for p in params), dtype=torch.float64))
    assert P.inv_sqrt().dtype == torch.float64


def test_a_group_with_another_learning_rate_is_rescaled() -> None:
    params = parameters()
    optimizer = torch.optim.SGD([{"params": params[:2], "lr": 0.1}, {"params": params[2:], "lr": 0.3}])
    P = sk.preconditioner(optimizer)
    draw_gradients(params)
    before = flat(params)
    optimizer.step()
    torch.testing.assert_close(flat(params) - before, -0.1 * flat([p.grad for p in params]) / P.diagonal())


def test_a_frozen_group_has_no_curvature() -> None:
    params = parameters()
    optimizer = torch.optim.SGD([{"params": params[:2], "lr": 0.1}, {"params": params[2:], "lr": 0.0}])
    assert torch.equal(sk.preconditioner(optimizer).inv_sqrt(params[2:]), torch.zeros(9, dtype=torch.float64))
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.param_groups[1]["lr"] = 0.2
    with pytest.raises(RuntimeError, match=r"the first group's lr is 0 and another's is 0\.2"):
        sk.preconditioner(optimizer)


def test_a_mapping_of_gradients_equals_next_and_needs_no_grad() -> None:
    params = parameters()
    for make in (ADAMS["gi-adam"], ADAMS["amsgrad"], ADAMS["groups"]):
        optimizer = make(params)
        for _ in range(2):
            draw_gradients(params)
            want = sk.preconditioner(optimizer, gradients="next").inv_sqrt()
            mapping = {p: p.grad for p in params}
            optimizer.zero_grad()
            assert torch.equal(sk.preconditioner(optimizer, gradients=mapping).inv_sqrt(), want)
            for p, g in mapping.items():
                p.grad = g
            optimizer.step()


def test_reading_changes_neither_the_optimizer_nor_the_gradients() -> None:
    for name, make in ADAMS.items():
        params = parameters()
        optimizer = make(params)
        draw_gradients(params)
        sk.preconditioner(optimizer, gradients="next")
        assert not optimizer.state, name
        optimizer.step()
        state = copy.deepcopy(optimizer.state_dict())
        grads = [p.grad.clone() for p in params]
        sk.preconditioner(optimizer, gradients="next").diagonal()
        sk.preconditioner(optimizer).inv_sqrt().zero_()
        for i, entries in state["state"].items():
            for key, value in entries.items():
                assert torch.equal(value, optimizer.state_dict()["state"][i][key]), (name, key)
        assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True))


def test_the_preconditioner_is_a_snapshot() -> None:
    params = parameters()
    optimizer = ADAMS["adam"](params)
    draw_gradients(params)
    optimizer.step()
    P = sk.preconditioner(optimizer)
    before = P.inv_sqrt().clone()
    P.inv_sqrt().zero_()
    draw_gradients(params)
    optimizer.step()
    assert torch.equal(P.inv_sqrt(), before)
    assert not torch.equal(sk.preconditioner(optimizer).inv_sqrt(), before)


def test_any_order_and_selection_of_parameters() -> None:
    params = parameters()
    optimizer = ADAMS["adam"](params)
    draw_gradients(params)
    optimizer.step()
    P = sk.preconditioner(optimizer)
    assert P.params == params
    pieces = P.inv_sqrt().split([p.numel() for p in params])
    order = [2, 0, 3]
    assert torch.equal(P.inv_sqrt([params[i] for i in order]), torch.cat([pieces[i] for i in order]))
    with pytest.raises(ValueError, match=r"parameter 1 of shape \[2\] is not one of the optimizer's"):
        P.inv_sqrt([params[0], torch.zeros(2)])
    with pytest.raises(ValueError, match="at least one"):
        P.inv_sqrt([])


def test_a_mapping_may_cover_a_part_of_the_model() -> None:
    params = parameters()
    draw_gradients(params)
    optimizer = ADAMS["adam"](params)
    P = sk.preconditioner(optimizer, gradients={params[1]: params[1].grad})
    assert P.inv_sqrt().shape == (7,)
    with pytest.raises(RuntimeError, match=r"P is unknown for parameter 0 of shape \[3, 5\]"):
        P.inv_sqrt(params)


def test_frozen_parameters_are_left_out() -> None:
    params = parameters()
    params[1].requires_grad_(False)
    optimizer = ADAMS["adam"](params)
    draw_gradients([params[0], *params[2:]])
    optimizer.step()
    assert sk.preconditioner(optimizer).inv_sqrt().numel() == sum(p.numel() for p in params) - 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lower_precision_gives_single_precision(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = torch.optim.Adam(params, eps=1e-3)
    draw_gradients(params)
    got = sk.preconditioner(optimizer, gradients="next").diagonal()
    g = flat([p.grad for p in params]).float()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, 0.1 * (g.abs() + 1e-3), rtol=1e-5, atol=0.0)


def test_channels_last_parameters_are_read_in_their_logical_order() -> None:
    p = nn.Parameter(torch.randn(2, 3, 4, 5, dtype=torch.float64).to(memory_format=torch.channels_last))
    optimizer = torch.optim.Adam([p], eps=1e-3)
    p.grad = torch.randn_like(p)
    promised = sk.preconditioner(optimizer, gradients="next").diagonal()
    torch.testing.assert_close(promised, 0.1 * (p.grad.reshape(-1).abs() + 1e-3))
    optimizer.step()
    torch.testing.assert_close(sk.preconditioner(optimizer).diagonal(), promised)


def test_without_a_step_the_error_says_what_to_do() -> None:
    params = parameters()
    for optimizer in (ADAMS["adam"](params), torch.optim.RMSprop(params), sk.GIAdam(params)):
        with pytest.raises(RuntimeError, match=r"has taken no step.*\[3, 5\].*gradients='next'"):
            sk.preconditioner(optimizer)
        with pytest.raises(RuntimeError, match=r"needs p\.grad.*\[3, 5\] has none.*backward"):
            sk.preconditioner(optimizer, gradients="next")
    draw_gradients(params)
    started = sk.GIAdam(params)
    started.initialize()
    with pytest.raises(RuntimeError, match="has taken no step"):
        sk.preconditioner(started)
    assert sk.preconditioner(started, gradients="next").inv_sqrt().isfinite().all()


def test_one_parameter_without_a_gradient_is_an_error_under_next() -> None:
    params = parameters()
    draw_gradients(params[:3])
    with pytest.raises(RuntimeError, match=r"a parameter of shape \[2, 1, 4\] has none"):
        sk.preconditioner(ADAMS["adam"](params), gradients="next")


def test_zero_p_and_bad_gradients_are_errors() -> None:
    params = parameters()
    draw_gradients(params)
    params[0].grad[1, 2] = 0.0
    with pytest.raises(RuntimeError, match=r"zero or not finite for 1 of 15 .*\[3, 5\] \(eps=0\.0\)"):
        sk.preconditioner(torch.optim.Adam(params, eps=0.0), gradients="next")
    params[1].grad[3] = float("nan")
    with pytest.raises(RuntimeError, match=r"zero or not finite for 1 of 7"):
        sk.preconditioner(torch.optim.Adam(params), gradients="next")
    with pytest.raises(ValueError, match=r"shape \[3, 5\] has shape \[15\]"):
        sk.preconditioner(torch.optim.Adam(params), gradients={params[0]: torch.ones(15)})
    with pytest.raises(ValueError, match="none of the optimizer's"):
        sk.preconditioner(torch.optim.Adam(params), gradients={})
    with pytest.raises(ValueError, match="got 'last'"):
        sk.preconditioner(torch.optim.Adam(params), gradients="last")


def test_adaptive_is_what_has_a_p() -> None:
    params = parameters()
    assert not is_adaptive(torch.optim.SGD(params, lr=1.0, momentum=0.5))
    assert is_adaptive(torch.optim.AdamW(params))
    assert is_adaptive(torch.optim.RMSprop(params))
