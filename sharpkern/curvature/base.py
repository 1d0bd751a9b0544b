"""What all operators share: shape checks, and the spellings of a product."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import kernels
from ..eigen.common import Space, check_whole
from ..rop.layout import Layout

Vector = TypeVar("Vector", Tensor, NDArray[Any])
_DENSE_AT_ONCE = 64  # rows of the identity: enough to fill a block of any engine, few enough to need little memory


class BaseOperator:
    """Shape checks and the spellings of a product, on top of ``apply_rows``: ``[k, n] -> [k, n]``.

    Every product takes tensors, or NumPy arrays of the operator's dtype, and gives back what it was given.

    Threads may share an operator: they wait for each other, also in what a subclass defines of ``apply_rows``,
    ``form_rows``, ``refresh`` and ``gradient``.
    """

    n: int
    dtype: torch.dtype
    device: torch.device
    space: Space | None = None  # of operators that several processes share, see ``curvature.distributed``

    # NumPy would otherwise take ``array @ operator`` apart element by element instead of refusing it.
    __array_ufunc__ = None

    _lock: AbstractContextManager[Any]  # reentrant, for an operator's methods call each other

    def __new__(cls, *_: Any, **__: Any) -> Any:
        operator = super().__new__(cls)
        operator._lock = threading.RLock()
        return operator

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        # Here and not at every definition, where a new operator could forget it: sweeps write over what earlier ones
        # have saved, so that two threads at a time would get wrong numbers.
        for name in _ALONE & vars(cls).keys():
            method = vars(cls)[name]
            is_property = isinstance(method, property)
            alone = _alone(method.fget if is_property else method)
            setattr(cls, name, property(alone) if is_property else alone)

    def apply_rows(self, block: Tensor) -> Tensor:
        """Multiply with the rows of a contiguous block, ``[k, n] -> [k, n]``; nothing is checked."""
        raise NotImplementedError

    def form_rows(self, block: Tensor) -> Tensor:
        """Return ``v'Av`` for the rows of a contiguous block, ``[k, n] -> [k]`` float64; nothing is checked."""
        raise NotImplementedError

    def __reduce__(self) -> Any:
        raise TypeError(
            f"{type(self).__name__} cannot be pickled or copied: it holds a program for the memory of one model's "
            "parameters. Keep model and batch, and make it again from them."
        )

    @functools.cached_property
    def product_rounding(self) -> float:
        """Relative rounding of a product that its dtype does not tell: one of the narrowest parameters' numbers.

        Products of bfloat16 parameters are float32 vectors of bfloat16's precision. 0 for float32 and wider.
        """
        # of an operator made of another one, that one's
        params = getattr(getattr(self, "operator", self), "params", {})
        return max((torch.finfo(p.dtype).eps for p in params.values() if p.dtype.itemsize < 4), default=0.0)

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, n)``."""
        return self.n, self.n

    def matvec(self, v: Vector) -> Vector:
        """Multiply with one vector.

        Args:
            v: ``[n]``, the operator's dtype and device, in the flat order of ``model.parameters()``; or a NumPy array
                of that dtype, which is copied to the device.

        Returns:
            ``[n]``, a tensor or an array as v is.

        Raises:
            ValueError: shape, dtype or device of v is wrong.
            RuntimeError: the parameters changed since the last ``refresh``.
        """
        rows = self._checked(v, "v", (self.n,))[None].contiguous()
        return _like(v, self.apply_rows(rows)[0])

    def matmat(self, V: Vector) -> Vector:
        """Multiply with the columns of V, all at once.

        Args:
            V: ``[n, k]``, a tensor or an array; the transpose of a contiguous ``[k, n]`` tensor is used without a copy.

        Returns:
            ``[n, k]``, the transpose of a contiguous ``[k, n]`` block.

        Raises:
            ValueError: shape, dtype or device of V is wrong.
            RuntimeError: the parameters changed since the last ``refresh``.
        """
        columns = self._checked(V, "V", (self.n, V.shape[-1] if V.ndim == 2 else "k"))
        if columns.shape[1] == 0:
            return _like(V, torch.empty_like(columns))
        return _like(V, self.apply_rows(kernels.transpose(columns)).t())

    def __matmul__(self, v: Vector) -> Vector:
        return self.matvec(v) if v.ndim == 1 else self.matmat(v)

    def quadratic_form(self, V: Vector) -> Vector:
        """Return ``v'Av`` of this operator A, without Av: about half the multiplications of a product.

        Args:
            V: ``[n]`` or ``[n, k]``, as for ``matvec`` and ``matmat``.

        Returns:
            float64, 0-d or ``[k]``.

        Raises:
            ValueError: shape, dtype or device of V is wrong.
            RuntimeError: the parameters changed since the last ``refresh``.

        Source: the second directional derivative of the loss; Griewank and Walther, Evaluating Derivatives (2008),
        chapter 13.
        """
        columns = self._checked(V, "V", (self.n, *V.shape[1:2]))
        values = self.form_rows(columns[None].contiguous() if V.ndim == 1 else kernels.transpose(columns))
        return _like(V, values[0] if V.ndim == 1 else values)

    def _checked(self, v: Tensor | NDArray[Any], name: str, shape: tuple[int | str, ...]) -> Tensor:
        """Return v as a tensor on the operator's device; nothing is converted to another dtype."""
        if not isinstance(v, Tensor | np.ndarray):
            raise TypeError(f"{name} must be a tensor or a NumPy array, got a {type(v).__name__}.")
        if v.shape != shape:
            raise ValueError(f"{name} must be {list(shape)} for this operator, got {list(v.shape)}.")
        if isinstance(v, np.ndarray):
            # Strict, as for tensors: silently rounding NumPy's float64 would hide where digits are lost.
            if v.dtype != (dtype := self._numpy_dtype()):
                raise ValueError(f"{name} must be {dtype} for this operator, got {v.dtype}: use {name}.astype.")
            return torch.tensor(np.ascontiguousarray(v), device=self.device)
        if v.dtype != self.dtype or v.device != self.device:
            raise ValueError(
                f"{name} must be {self.dtype} on {self.device}, got {v.dtype} on {v.device}: "
                f"use {name}.to(device, dtype)."
            )
        return v

    def _numpy_dtype(self) -> np.dtype[Any]:
        return torch.empty(0, dtype=self.dtype).numpy().dtype

    def to_dense(self, limit: int = 10_000) -> Tensor:
        """Return the whole matrix, from products with the identity.

        Args:
            limit: the largest n to accept.

        Returns:
            ``[n, n]``, the operator's dtype and device; as the products are, symmetric up to rounding only.

        Raises:
            ValueError: n is above ``limit``, or the vectors are sharded over processes.
            RuntimeError: the parameters changed since the last ``refresh``.

        Cost: n products, and n^2 numbers of memory.
        """
        check_whole(self, "to_dense()")
        if self.n > limit:
            size = self.n**2 * self.dtype.itemsize / 1e9
            raise ValueError(
                f"a dense matrix of n = {self.n:,} takes {size:,.1f} GB and {self.n:,} products; the limit is "
                f"{limit:,}: select fewer parameters with params=, or raise limit=."
            )
        dense = torch.empty(self.n, self.n, dtype=self.dtype, device=self.device)
        # Column i is written to row i: they are the same but for rounding, and rows are contiguous.
        for start in range(0, self.n, _DENSE_AT_ONCE):
            stop = min(start + _DENSE_AT_ONCE, self.n)
            rows = torch.zeros(stop - start, self.n, dtype=self.dtype, device=self.device)
            rows[:, start:].fill_diagonal_(1)
            dense[start:stop] = self.apply_rows(rows)
        return dense.t()

    def to_scipy(self) -> Any:
        """Return a ``scipy.sparse.linalg.LinearOperator`` on NumPy vectors (copied to the device and back)."""
        check_whole(self, "to_scipy()")
        from scipy.sparse.linalg import LinearOperator

        def product(array: Any) -> Any:
            V = torch.as_tensor(array, dtype=self.dtype, device=self.device)
            return (self.matvec(V.reshape(-1)) if V.ndim == 1 or V.shape[1] == 1 else self.matmat(V)).cpu().numpy()

        return LinearOperator(self.shape, matvec=product, matmat=product, rmatvec=product, dtype=self._numpy_dtype())


_ALONE = {"apply_rows", "form_rows", "refresh", "gradient"}


def _alone(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return the method with the operator's lock around it."""

    @functools.wraps(method)
    def locked(self: BaseOperator, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return method(self, *args, **kwargs)

    return locked


class ParameterOperator(BaseOperator):
    """An operator on the space of named parameters."""

    params: dict[str, Tensor]

    def unflatten(self, v: Vector) -> dict[str, Vector]:
        """Cut flat vectors, such as ``EigenResult.eigenvectors``, into named parts in the parameters' shapes.

        Args:
            v: ``[n]`` or ``[k, n]``, a tensor of any dtype and device, or an array.

        Returns:
            name -> ``[*shape]`` or ``[k, *shape]``, views of v where its memory allows.

        Raises:
            ValueError: v is neither ``[n]`` nor ``[k, n]``.
        """
        if v.ndim not in (1, 2) or v.shape[-1] != self.n:
            raise ValueError(f"v must be [{self.n}] or [k, {self.n}] for this operator, got {list(v.shape)}.")
        return _parts(v, Layout(self.params))


def _parts(v: Any, layout: Layout) -> dict[str, Any]:
    ends = zip(layout.names, layout.offsets, layout.offsets[1:], layout.shapes, strict=False)
    return {name: v[..., start:stop].reshape((*v.shape[:-1], *shape)) for name, start, stop, shape in ends}


def _like(v: Vector, result: Tensor) -> Vector:
    """Return a result as what the argument was."""
    return result if isinstance(v, Tensor) else result.cpu().numpy()
