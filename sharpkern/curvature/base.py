"""What all operators share: shape checks, and the spellings of a product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..eigen.common import Space


class BaseOperator:
    """Shape checks and the spellings of a product, on top of ``apply_rows``: ``[k, n] -> [k, n]``."""

    n: int
    dtype: torch.dtype
    device: torch.device
    space: Space | None = None  # of operators that several processes share, see ``curvature.distributed``

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

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, n)``."""
        return self.n, self.n

    def matvec(self, v: Tensor) -> Tensor:
        """Multiply with one vector.

        Args:
            v: ``[n]``, the operator's dtype and device, in the flat order of ``model.parameters()``.

        Returns:
            ``[n]``.

        Raises:
            ValueError: shape, dtype or device of v is wrong.
            RuntimeError: the parameters changed since the last ``refresh``.
        """
        self._check(v, "v", (self.n,))
        return self.apply_rows(v[None].contiguous())[0]

    def matmat(self, V: Tensor) -> Tensor:
        """Multiply with the columns of V, all at once.

        Args:
            V: ``[n, k]``; the transpose of a contiguous ``[k, n]`` block is used without a copy.

        Returns:
            ``[n, k]``, the transpose of a contiguous ``[k, n]`` block.

        Raises:
            ValueError: shape, dtype or device of V is wrong.
            RuntimeError: the parameters changed since the last ``refresh``.
        """
        self._check(V, "V", (self.n, V.shape[-1] if V.ndim == 2 else "k"))
        if V.shape[1] == 0:
            return torch.empty_like(V)
        return self.apply_rows(_rows(V)).t()

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.matvec(v) if v.ndim == 1 else self.matmat(v)

    def quadratic_form(self, V: Tensor) -> Tensor:
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
        self._check(V, "V", (self.n, *V.shape[1:2]))
        values = self.form_rows(V[None].contiguous() if V.ndim == 1 else _rows(V))
        return values[0] if V.ndim == 1 else values

    def _check(self, v: Tensor, name: str, shape: tuple[int | str, ...]) -> None:
        if v.shape != shape:
            raise ValueError(f"{name} must be {list(shape)} for this operator, got {list(v.shape)}.")
        if v.dtype != self.dtype or v.device != self.device:
            raise ValueError(
                f"{name} must be {self.dtype} on {self.device}, got {v.dtype} on {v.device}: "
                f"use {name}.to(device, dtype)."
            )

    def to_scipy(self) -> Any:
        """Return a ``scipy.sparse.linalg.LinearOperator`` on NumPy vectors (copied to the device and back)."""
        from scipy.sparse.linalg import LinearOperator

        def product(array: Any) -> Any:
            V = torch.as_tensor(array, dtype=self.dtype, device=self.device)
            return (self.matvec(V.reshape(-1)) if V.ndim == 1 or V.shape[1] == 1 else self.matmat(V)).cpu().numpy()

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(self.shape, matvec=product, matmat=product, rmatvec=product, dtype=dtype)


class ParameterOperator(BaseOperator):
    """An operator on the space of named parameters."""

    params: dict[str, Tensor]


def _rows(V: Tensor) -> Tensor:
    # viewed anew: with one column the stride over it may be 1, and torch then copies it 80 times slower (transposing)
    return V.t().contiguous().view(V.shape[1], V.shape[0])
