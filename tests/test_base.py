"""What all operators share: dense matrices, NumPy arrays, vectors as named parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import Problem, cast, dense_hessian, double, mlp, operator, relative
from torch import Tensor

import sharpkern as sk
from sharpkern.curvature.base import BaseOperator

F64 = torch.float64


def test_to_dense_is_torchs_own_hessian() -> None:
    problem = double(mlp())
    model, loss_fn, (x, y) = problem
    names, shapes = zip(*[(name, p.shape) for name, p in model.named_parameters()], strict=True)

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([s.numel() for s in shapes])
        params = {name: t.view(s) for name, t, s in zip(names, parts, shapes, strict=True)}
        return loss_fn(torch.func.functional_call(model, params, (x,)), y)

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    H = operator(problem)
    dense = H.to_dense()
    assert dense.shape == (H.n, H.n) == (111, 111)
    assert relative(dense, torch.autograd.functional.hessian(loss, flat)) <= 1e-10
    low = operator(cast(problem, torch.float32)).to_dense()
    assert low.dtype == torch.float32
    assert relative(low.double(), dense) <= 1e-4


def test_columns_of_to_dense_are_products_also_where_the_operator_is_not_symmetric() -> None:
    class Rows(BaseOperator):
        n, dtype, device = 150, F64, torch.device("cpu")
        A = torch.randn(150, 150, dtype=F64)

        def apply_rows(self, block: Tensor) -> Tensor:
            assert block.is_contiguous()
            return block @ self.A.t()

    op = Rows()
    assert torch.allclose(op.to_dense(), op.A, rtol=0, atol=0)
    v = torch.randn(150, dtype=F64)
    assert torch.allclose(op.to_dense() @ v, op @ v)


def test_to_dense_is_refused_with_its_size_above_a_limit() -> None:
    H = operator(mlp())
    H.products = 0
    with pytest.raises(ValueError, match=r"n = 111 takes 0.0 GB and 111 products; the limit is 110: select fewer"):
        H.to_dense(limit=110)
    big = operator(Problem(torch.nn.Linear(200, 100), F.mse_loss, (torch.randn(2, 200), torch.randn(2, 100))))
    with pytest.raises(ValueError, match=r"n = 20,100 takes 1.6 GB and 20,100 products; the limit is 10,000"):
        big.to_dense()
    assert H.products == big.products == 0


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_arrays_give_arrays_with_the_tensors_numbers(dtype: torch.dtype) -> None:
    problem = cast(mlp(), dtype)
    H = operator(problem)
    P = sk.preconditioner(torch.optim.SGD(problem.model.parameters()))
    for op in (H, sk.GGNOperator(*problem), sk.PreconditionedOperator(H, P)):
        V = torch.randn(op.n, 3, dtype=dtype)
        array = V.numpy()
        assert isinstance(op @ array, np.ndarray)
        assert np.array_equal(op @ array, (op @ V).numpy())
        assert np.array_equal(op.matvec(array[:, 1]), op.matvec(V[:, 1]).numpy())  # with strides
        assert np.array_equal(op @ array[::-1, 0], (op @ V[:, 0].flip(0)).numpy())  # strides below zero
        assert np.array_equal(op @ np.asfortranarray(array), (op @ V).numpy())
        forms = op.quadratic_form(array)
        assert forms.dtype == np.float64
        assert np.array_equal(forms, op.quadratic_form(V).numpy())
        assert np.array_equal(op.quadratic_form(array[:, 0]), op.quadratic_form(V[:, 0]).numpy())
        assert (op @ array[:, :0]).shape == (op.n, 0)
        assert (op @ array).dtype == array.dtype


def test_arrays_are_not_changed_and_may_be_read_only() -> None:
    H = operator(double(mlp()))
    array = np.random.default_rng(0).standard_normal(H.n)
    array.setflags(write=False)
    before = array.copy()
    product = H @ array
    product[:] = 0
    assert np.array_equal(array, before)
    assert np.array_equal(H @ array, H @ torch.from_numpy(before))


def test_wrong_arrays_are_refused_and_nothing_is_rounded_silently() -> None:
    H = operator(mlp())
    with pytest.raises(ValueError, match=r"v must be float32 for this operator, got float64: use v.astype"):
        H @ np.zeros(H.n)
    with pytest.raises(ValueError, match=r"V must be float32 for this operator, got int64"):
        H.matmat(np.zeros((H.n, 2), dtype=np.int64))
    with pytest.raises(ValueError, match=r"V must be float32 for this operator, got object"):
        H.quadratic_form(np.zeros((H.n, 2), dtype=object))
    with pytest.raises(ValueError, match=rf"v must be \[{H.n}\] for this operator, got \[3\]"):
        H @ np.zeros(3, dtype=np.float32)
    with pytest.raises(TypeError, match="a tensor or a NumPy array, got a list"):
        H.matvec([0.0] * H.n)
    with pytest.raises(TypeError):  # not an array of objects
        np.zeros(H.n, dtype=np.float32) @ H


def test_eigenvectors_as_named_parts() -> None:
    problem = double(mlp())
    H = operator(problem)
    top = sk.lanczos(H, k=3, tol=1e-9, max_matvecs=400)
    parts = H.unflatten(top.eigenvectors)
    assert {name: part.shape[1:] for name, part in parts.items()} == {
        name: p.shape for name, p in problem.model.named_parameters()
    }
    # The quotient of a parameter's own direction: the second difference of the gradient along the named parts.
    A = dense_hessian(problem)
    for i in range(3):
        one = H.unflatten(top.eigenvectors[i])
        assert all(torch.equal(part[i], one[name]) for name, part in parts.items())
        v = sk.flatten(one)
        assert torch.equal(v, top.eigenvectors[i])
        assert float((A @ v - top.eigenvalues[i] * v).norm()) <= 1e-7
    array = H.unflatten(top.eigenvectors.numpy())
    assert np.array_equal(array["2.weight"], parts["2.weight"].numpy())
    assert array["2.weight"].shape == (3, 6, 7)
    parts["0.bias"].zero_()  # views
    assert not top.eigenvectors[:, 35:42].any()
    for wrong in (torch.zeros(3), torch.zeros(1, 1, H.n), torch.zeros(H.n, 3)):
        with pytest.raises(ValueError, match=rf"v must be \[{H.n}\] or \[k, {H.n}\]"):
            H.unflatten(wrong)


def test_both_ends_of_a_models_spectrum() -> None:
    problem = double(mlp())
    H, values = operator(problem), torch.linalg.eigvalsh(dense_hessian(problem))
    for k in (1, 4):
        bottom = sk.lanczos(H, k=k, tol=1e-8, max_matvecs=500, which="smallest")
        both = sk.lanczos(H, k=k, tol=1e-8, max_matvecs=500, which="both")
        assert bottom.converged
        assert both.converged
        assert relative(bottom.eigenvalues, values[:k].flip(0)) <= 1e-6
        assert relative(both.eigenvalues, torch.cat([values[-k:].flip(0), values[:k].flip(0)])) <= 1e-6
