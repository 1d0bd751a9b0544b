"""Every registered kernel at sizes of zero and one, on every backend: right, and no signal; wrong calls are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cuda_on_cpu import emulate
from kernel_shapes import CASES, FAMILIES, check, given, registered, tensors

from sharpkern.kernels import dispatch, reference
from sharpkern.kernels.cpu import native

compiled = pytest.mark.skipif(native.REASON is not None, reason=str(native.REASON))


def test_every_registered_kernel_has_cases() -> None:
    assert registered() == sorted(CASES), "a new kernel needs a line in kernel_shapes.CASES"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kernel", registered())
@pytest.mark.parametrize("backend", ["reference", "cpu", "cuda"])
def test_sizes_of_zero_and_one(backend: str, kernel: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend not in dispatch._versions[kernel] and backend != "reference":
        pytest.skip(f"no {backend} version")
    if backend == "cuda":
        emulate.install(monkeypatch)
    else:
        monkeypatch.setenv("SHARPKERN_BACKEND", backend)
    assert check(kernel, dtype) >= 3


@pytest.mark.parametrize("kernel", registered())
def test_sums_over_nothing_are_zero(kernel: str) -> None:
    """The definition itself: finite at every size, but for the score of a query that sees no key."""
    for args, keywords, shapes in given(kernel):
        results = tensors(getattr(reference, kernel)(*args, **keywords))
        for t, shape in zip(results, shapes, strict=True):
            assert bool(t.isfinite().all()) or (kernel == "attention" and shape == shapes[1]), (kernel, shapes)
    empty = {"gram": lambda k, m, n: n, "combine": lambda m, k, n: k, "norm_backward_tangent": lambda k, r, w: r}
    if kernel in empty:
        make, options = CASES[kernel]
        for option in options:
            sizes = (2, 0, 3) if kernel != "gram" else (2, 3, 0)
            args, keywords, _ = make(*sizes, **option)
            assert all(bool((t == 0).all()) for t in tensors(getattr(reference, kernel)(*args, **keywords)))


# Operands that the rules pass as they come, transposed or expanded; the others are contiguous by the kernels' contract.
MAY_HAVE_GAPS = {
    "norm_tangent": (2, 3, 4), "norm_backward_tangent": (2, 5, 6), "slope_product": (1, 3), "activation_slope": (1, 2),
    "activation_curvature": (1, 2), "softmax_jacobian": (1,), "softmax_backward_tangent": (1, 3),
    "log_softmax_jacobian": (1,), "log_softmax_backward_tangent": (1, 2, 3), "transpose": (0,),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=compiled)])
@pytest.mark.parametrize("kernel", MAY_HAVE_GAPS)
def test_operands_with_gaps(backend: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARPKERN_BACKEND", backend)
    public = next(getattr(f, kernel) for f in FAMILIES if callable(getattr(f, kernel, None)))
    make, options = CASES[kernel]
    vectors = (9,) if kernel.startswith("activation") else (2, 50)
    sizes = (2, 3, 20) if "softmax" in kernel or "norm" in kernel else vectors
    for option in options:
        args, _, _ = make(*sizes, **option)
        want = tensors(getattr(reference, kernel)(*args))
        for at in (i for i in MAY_HAVE_GAPS[kernel] if i < len(args)):
            gapped = torch.stack([args[at], args[at].new_full((), float("nan")).expand_as(args[at])], -1)[..., 0]
            got = tensors(public(*args[:at], gapped, *args[at + 1 :]))
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@compiled
@pytest.mark.parametrize("suffix", ["f32", "f64"])
def test_compiled_kernels_refuse_what_they_cannot_take(suffix: str) -> None:
    """Called by addresses: sizes below zero, absent operands, shapes that do not divide, modes that do not exist."""

    def call(kernel: str, **fields: int) -> Callable[[], None]:
        names = native._C.fields[kernel]
        return lambda: getattr(native._C, f"{kernel}_{suffix}")(*(fields.get(name, 0) for name in names), 1)

    norm = dict(k=1, rows=4, D=4, groups=1, inner=1, mode=1)
    for kernel in ("norm_tangent", "norm_backward_tangent"):
        for wrong, message in (
            ({}, "an operand is missing"),
            ({"groups": 0}, "groups and inner must be at least 1"),
            ({"inner": 0}, "groups and inner must be at least 1"),
            ({"inner": 3}, "rows are no multiple of groups, or D is none of inner"),
            ({"groups": 3}, "rows are no multiple of groups, or D is none of inner"),
            ({"mode": 9}, "mode is none of the known ones"),
        ):
            with pytest.raises(ValueError, match=f"{kernel}_{suffix}: {message}"):
                call(kernel, **norm | wrong)()
        call(kernel, **norm | {"rows": 0})()
    for kernel in ("activation_slope", "activation_curvature"):
        with pytest.raises(ValueError, match="activation is none of the known ones"):
            call(kernel, activation=len(native._C.activations), n=1)()
        with pytest.raises(ValueError, match="an operand is missing"):
            call(kernel, activation=0, n=1)()
        call(kernel, activation=0, n=0)()
    for kernel, sizes in (
        ("slope_product", ("k", "n")),
        ("softmax_jacobian", ("k", "rows", "C")),
        ("softmax_backward_tangent", ("k", "rows", "C")),
        ("log_softmax_jacobian", ("k", "rows", "C")),
        ("log_softmax_backward_tangent", ("k", "rows", "C")),
        ("transpose", ("n", "k")),
    ):
        with pytest.raises(ValueError, match="an operand is missing"):
            call(kernel, **dict.fromkeys(sizes, 2))()
        with pytest.raises(TypeError):  # an address is not below zero
            call(kernel, **dict.fromkeys(sizes, -1))()
        call(kernel, **dict.fromkeys(sizes, 0))()
    V = torch.ones(3, dtype=torch.float32 if suffix == "f32" else torch.float64)
    product = {"k": 1, "n": 3, "slope": V.data_ptr(), "d": V.data_ptr(), "out": V.data_ptr()}
    with pytest.raises(ValueError, match="an operand is missing"):
        call("slope_product", **product, curvature=V.data_ptr())()
    call("slope_product", **product, dz=V.data_ptr())()  # it meets a curvature of zero
    V = torch.ones(2, 3, dtype=torch.float32 if suffix == "f32" else torch.float64)
    out = torch.empty(2, 2, dtype=torch.float64)
    gram = getattr(native._C, f"gram_{suffix}")
    with pytest.raises(ValueError, match="gram_f.*: a size is negative"):
        gram(V.data_ptr(), -2, V.data_ptr(), 2, 3, out.data_ptr(), 1)
    with pytest.raises(ValueError, match="gram_f.*: an operand is missing"):
        gram(V.data_ptr(), 2, 0, 2, 3, out.data_ptr(), 1)
    gram(V.data_ptr(), 2, V.data_ptr(), 2, 3, out.data_ptr(), -5)  # as many threads as there are: one
    assert out.tolist() == [[3.0, 3.0], [3.0, 3.0]]
