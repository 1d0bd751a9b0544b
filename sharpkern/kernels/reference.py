"""The definition of every kernel, in plain torch. Each backend must agree with it; sums are float64 for any dtype."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .precision import wide
from .saved import CENTRED, FIXED, Heads, RankError, Standardised


def gram(V: Tensor, W: Tensor) -> Tensor:
    """``[k, n], [m, n] -> V W'``, float64 ``[k, m]``."""
    return V.double() @ W.double().t()


def transpose(V: Tensor) -> Tensor:
    """``[n, k] -> [k, n]``, contiguous."""
    return V.t().clone(memory_format=torch.contiguous_format)


def power_step(V: Tensor, HV: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """``theta = v.Hv``, ``residual = |Hv - theta v|``, ``v <- Hv / |Hv|`` for each row; a zero row stays zero."""
    v, h = V.double(), HV.double()
    theta = (v * h).sum(1)
    # From the difference itself: |h|^2 - theta^2 would lose half of the digits near an eigenvector.
    residual = torch.linalg.vector_norm(h - theta[:, None] * v, dim=1)
    norm = torch.linalg.vector_norm(h, dim=1)
    # ``where`` and no division by a floor: a zero product has no direction, and must not get one.
    following = torch.where(norm[:, None] > 0, h / norm[:, None], 0.0).to(V.dtype)
    return theta, residual, following if out is None else out.copy_(following)


def combine(C: Tensor, V: Tensor, out: Tensor | None = None) -> Tensor:
    """``[m, k], [k, n] -> C V``, ``[m, n]`` in V's dtype."""
    result = (C.double() @ V.double()).to(V.dtype)
    return result if out is None else out.copy_(result)


def scale(V: Tensor, d: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiply each row of ``[k, n]`` by the diagonal d ``[n]``."""
    return torch.mul(V, d, out=out)


def inv_sqrt_adam(
    v: Tensor, *, bias_correction2: float, eps: float, factor: float, out: Tensor | None = None
) -> Tensor:
    """Adam's second moment ``[n]`` to ``P^-1/2 = (factor (sqrt(v / bias_correction2) + eps))^-1/2``."""
    result = (factor * ((v.double() / bias_correction2).sqrt() + eps)).rsqrt().to(v.dtype)
    return result if out is None else out.copy_(result)


def orthonormalise(V: Tensor) -> Tensor:
    """The Gram-Schmidt basis of the rows of ``[k, n]``: Q with V = L Q, L lower triangular with a positive diagonal."""
    v = V.double()
    length = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    if not bool(length.isfinite().all()):
        raise ValueError("V holds numbers that are NaN, infinite, or too large to be squared.")
    # Unit rows: the rank is to count directions, and a short row is as good a direction as a long one.
    Q, R = torch.linalg.qr(torch.where(length > 0, v / length, 0.0).t())
    if (rank := rank_of(R, V.dtype)) < V.shape[0]:
        raise RankError(rank, V.shape[0])
    # LAPACK leaves the signs of R's diagonal open; with a positive one, Q is unique.
    return ((Q * R.diagonal().sign()).t() + 0.0).to(V.dtype).contiguous()  # -0 becomes 0


def rank_of(factor: Tensor, dtype: torch.dtype) -> int:
    """Count the singular values of unit rows' triangular factor that rounding in a dtype cannot explain."""
    # Rounding k unit rows moves a singular value by at most sqrt(k) eps / 2; the margin is for the factor's own.
    return int((torch.linalg.svdvals(factor) > 4 * factor.shape[-1] * torch.finfo(dtype).eps).sum())


def norm_tangent(
    s: Standardised, w: Tensor | None, dx: Tensor | None, dw: Tensor | None, db: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See ``kernels.norm.norm_tangent``."""
    k = next(d for d in (dx, dw, db) if d is not None).shape[0]
    dy = s.xhat.new_zeros(k, *s.xhat.shape)
    dxhat = along = None
    if dx is not None:
        dxhat = _jacobian(s, dx)
        # With fixed statistics r does not move: along is what r moves by, dr = -r^2 along.
        along = dx.new_zeros(dx.shape[:-1]) if s.mode == FIXED else _mean(s.xhat * dx)[..., 0]
        dy = dxhat if w is None else dxhat * _by_number(s, w)
    if dw is not None:
        dy = dy + s.xhat * _by_number(s, dw)
    if db is not None:
        dy = dy + _by_number(s, db)
    return dy, dxhat, along


def norm_backward_tangent(
    s: Standardised,
    w: Tensor | None,
    dw: Tensor | None,
    dxhat: Tensor | None,
    along: Tensor | None,
    g: Tensor | None,
    dg: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See ``kernels.norm.norm_backward_tangent``."""
    r = s.r[:, None]
    du = dg if w is None else dg * _by_number(s, w)
    by_channel = dg * s.xhat
    if g is not None and dw is not None:
        du = du + g * _by_number(s, dw)
    out = _jacobian(s, du)
    if g is not None and dxhat is not None and along is not None:
        by_channel = by_channel + g * dxhat
        if s.mode != FIXED:
            # dJ u as in ``kernels.norm``; its mean(xhat dx) is ``along``.
            u = g if w is None else g * _by_number(s, w)
            out = out - r * along[..., None] * _jacobian(s, u)
            out = out - r * (dxhat * _mean(s.xhat * u) + s.xhat * _mean(dxhat * u))
    return out if needs[0] else None, _sum(s, by_channel) if needs[1] else None, _sum(s, dg) if needs[2] else None


def slope_product(slope: Tensor, d: Tensor, curvature: Tensor | None = None, dz: Tensor | None = None) -> Tensor:
    """See ``kernels.pointwise``."""
    out = wide(slope) * wide(d)
    if curvature is not None and dz is not None:
        out = out + wide(curvature) * wide(dz)
    return out.to(d.dtype)


def activation_slope(name: str, x: Tensor, y: Tensor) -> Tensor:
    """See ``kernels.pointwise``."""
    z = wide(x)
    # Torch's own backward at a cotangent of one; expanded, for it is not worth a tensor.
    one, aten = z.new_ones(()).expand_as(z), torch.ops.aten
    slopes: dict[str, Callable[[], Tensor]] = {
        "gelu": lambda: aten.gelu_backward(one, z, approximate="none"),
        "gelu_tanh": lambda: aten.gelu_backward(one, z, approximate="tanh"),
        "silu": lambda: aten.silu_backward(one, z),
        # from x, as 1 - y^2 has few digits where y is close to 1
        "tanh": lambda: 4 * torch.sigmoid(2 * z) * torch.sigmoid(-2 * z),
        "sigmoid": lambda: torch.sigmoid(z) * torch.sigmoid(-z),
        "softplus": lambda: aten.softplus_backward(one, z, 1, 20),
        "mish": lambda: aten.mish_backward(one, z),
    }
    return slopes[name]().to(y.dtype).contiguous()


def activation_curvature(name: str, x: Tensor, g: Tensor) -> Tensor:
    """See ``kernels.pointwise``."""
    return (wide(g) * _SECOND[name](wide(x))).to(g.dtype).contiguous()


def _gelu_second(z: Tensor) -> Tensor:
    # y = x Phi(x) with Phi' = phi and phi' = -x phi: y'' = 2 phi + x phi' = (2 - x^2) phi.
    square = z.square()
    return torch.exp(-0.5 * square) * ((2 - square) / math.sqrt(2 * math.pi))


def _gelu_tanh_second(z: Tensor) -> Tensor:
    # y = x (1 + t) / 2 with t = tanh u,  u = c (x + a x^3):  y'' = (1 - t^2) (u' + x (u'' / 2 - t u'^2))
    a, c, square = 0.044715, math.sqrt(2 / math.pi), z.square()
    t, du = torch.tanh(c * z * (1 + a * square)), c * (1 + 3 * a * square)
    return (1 - t * t) * (du + z * (3 * a * c * z - t * du * du))


def _silu_second(z: Tensor) -> Tensor:
    # s' = s (1 - s), so y'' = 2 s' + x s'' with s'' = s' (1 - 2s).
    s = torch.sigmoid(z)
    return s * (1 - s) * (2 + z * (1 - 2 * s))


def _sigmoid_second(z: Tensor) -> Tensor:
    s, rest = torch.sigmoid(z), torch.sigmoid(-z)
    return s * rest * (rest - s)


def _softplus_second(z: Tensor) -> Tensor:
    # Above the threshold torch takes the line y = x.
    return (torch.sigmoid(z) * torch.sigmoid(-z)).masked_fill(z > 20, 0)


def _mish_second(z: Tensor) -> Tensor:
    # y = x t, t = tanh(softplus x), softplus' = s: t' = s (1 - t^2), t'' = t' (1 - s - 2 s t), y'' = 2 t' + x t''.
    s, t = torch.sigmoid(z), torch.tanh(torch.nn.functional.softplus(z))
    return s * (1 - t * t) * (2 + z * (1 - s - 2 * s * t))


_SECOND: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": _gelu_second,
    "gelu_tanh": _gelu_tanh_second,
    "silu": _silu_second,
    "tanh": lambda z: 8 * _sigmoid_second(2 * z),
    "sigmoid": _sigmoid_second,
    "softplus": _softplus_second,
    "mish": _mish_second,
}


def softmax_jacobian(p: Tensor, u: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See ``kernels.softmax``."""
    q, d = wide(p), wide(u)
    mean = (q * d).sum(-1)
    out = q * (d - mean[..., None])
    out = out if weight is None else out * wide(weight)[:, None]
    return out.to(u.dtype), mean.to(u.dtype)


def softmax_backward_tangent(p: Tensor, dp: Tensor, inner: Tensor, dg: Tensor) -> Tensor:
    """See ``kernels.softmax``."""
    w, dw, i, d = wide(p), wide(dp), wide(inner), wide(dg)
    return (w * (d - (w * d).sum(-1, True) - (dw * i).sum(-1, True)) + dw * i).to(dg.dtype)


def log_softmax_jacobian(p: Tensor, u: Tensor) -> Tensor:
    """See ``kernels.softmax``."""
    d = wide(u)
    return (d - (wide(p) * d).sum(-1, True)).to(u.dtype).contiguous()


def log_softmax_backward_tangent(p: Tensor, dl: Tensor, total: Tensor, dg: Tensor) -> Tensor:
    """See ``kernels.softmax``."""
    d = wide(dg)
    return (d - wide(p) * (d.sum(-1, True) + wide(dl) * wide(total)[:, None])).to(dg.dtype).contiguous()


def dual_gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    d: Tensor | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See ``kernels.linear``."""
    y = wide(a) @ wide(b)
    if c is not None and d is not None:
        y = y + wide(c) @ wide(d)
    if bias is not None:
        y = y + wide(bias)[:, None]
    return y.to(a.dtype) if out is None else out.copy_(y)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Heads:
    """See ``kernels.attention``."""
    scores = _scores(q, k, mask, causal, scale)
    lse = torch.logsumexp(scores, -1)
    # A row that sees nothing: with lse = +inf every exp(score - lse) is zero in all sweeps, where -inf - -inf is NaN.
    lse = torch.where(lse == -math.inf, math.inf, lse)
    o = torch.exp(scores - lse[..., None]) @ wide(v)
    return Heads(q, k, v, o.to(q.dtype), lse, mask, causal, scale)


def attention_tangent(h: Heads, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ``kernels.attention``."""
    P, dS = _probabilities(h), _score_tangent(h, dq, dk)
    k = next(d for d in (dq, dk, dv) if d is not None).shape[0]
    # Nothing moves the scores; m is returned all the same, since the backward tangent takes it.
    m = P.new_zeros(k, *P.shape[:-1]) if dS is None else (P * dS).sum(-1)
    do = torch.zeros(k, *h.o.shape, dtype=P.dtype, device=P.device)
    if dS is not None:
        do = (P * (dS - m[..., None])) @ wide(h.v)
    if dv is not None:
        do = do + P @ wide(dv)
    return do.to(h.q.dtype), m


def attention_backward(h: Heads, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See ``kernels.attention``."""
    P, g = _probabilities(h), wide(g)
    gS = P * (g @ wide(h.v).mT - (g * wide(h.o)).sum(-1, True)) * h.scale
    parts = gS @ wide(h.k), gS.mT @ wide(h.q), P.mT @ g
    return tuple(part.to(h.q.dtype) for part in parts)  # type: ignore[return-value]


def attention_backward_tangent(
    h: Heads,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    do: Tensor,
    m: Tensor,
    g: Tensor,
    dg: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``kernels.attention``."""
    P, dS, v, o = _probabilities(h), _score_tangent(h, dq, dk), wide(h.v), wide(h.o)
    g, dg, q, k = wide(g), wide(dg), wide(h.q), wide(h.k)
    # gP - <P, gP>, where <P, gP> = <g, o>: o is at hand, and a row of d numbers instead of S.
    inner = g @ v.mT - (g * o).sum(-1, True)
    gS = P * inner
    # The tangent of the line above, but for dv, which may be absent.
    dinner = dg @ v.mT - ((dg * o).sum(-1) + (g * wide(do)).sum(-1))[..., None]
    if dv is not None:
        dinner = dinner + g @ wide(dv).mT
    dgS, dgv = P * dinner, P.mT @ dg
    if dS is not None:
        dP = P * (dS - m[..., None])
        dgS = dgS + dP * inner
        dgv = dgv + dP.mT @ g
    dgq, dgk = dgS @ k, dgS.mT @ q
    if dk is not None:
        dgq = dgq + gS @ wide(dk)
    if dq is not None:
        dgk = dgk + gS.mT @ wide(dq)
    dtype = h.q.dtype
    # Scaled at the end, on d columns: gS and dgS above lack the factor.
    return (h.scale * dgq).to(dtype), (h.scale * dgk).to(dtype), dgv.to(dtype)


def embedding(tables: Tensor, index: Tensor) -> Tensor:
    """See ``kernels.embedding``."""
    return tables.index_select(1, index)


def embedding_backward(g: Tensor, index: Tensor, rows: int) -> Tensor:
    """See ``kernels.embedding``."""
    d = wide(g)
    # Float32 sums, rounded once: a frequent row has as many terms as it has tokens.
    return d.new_zeros(g.shape[0], rows, g.shape[2]).index_add_(1, index, d).to(g.dtype)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    scores = scale * (wide(q) @ wide(k).mT)
    if mask is not None:
        scores = scores + wide(mask)
    if causal:
        # Counted from the first query and key, also where there are more keys than queries, as torch does.
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~seen, -math.inf)
    return scores


def _probabilities(h: Heads) -> Tensor:
    return torch.exp(_scores(h.q, h.k, h.mask, h.causal, h.scale) - h.lse[..., None])


def _score_tangent(h: Heads, dq: Tensor | None, dk: Tensor | None) -> Tensor | None:
    dS = None if dq is None else wide(dq) @ wide(h.k).mT
    if dk is not None:
        other = wide(h.q) @ wide(dk).mT
        dS = other if dS is None else dS + other
    return None if dS is None else h.scale * dS


def _jacobian(s: Standardised, u: Tensor) -> Tensor:
    if s.mode == FIXED:
        return s.r[:, None] * u
    # RMS norm subtracts no mean, so J has no such term.
    centred = u - _mean(u) if s.mode == CENTRED else u
    return s.r[:, None] * (centred - s.xhat * _mean(s.xhat * u))


def _mean(t: Tensor) -> Tensor:
    """``[..., D]`` to ``[..., 1]``; zero where D is, not torch's NaN, which would spread to rows that have none."""
    return t.sum(-1, keepdim=True) / max(1, t.shape[-1])


def _by_number(s: Standardised, w: Tensor) -> Tensor:
    """``[..., channels]`` to ``[..., rows, D]``: each number its channel's value."""
    rows, D = s.xhat.shape
    # Channels repeat along inner within a row, and groups from row to row.
    spread = w.reshape(*w.shape[:-1], s.groups, D // s.inner, 1).expand(*w.shape[:-1], s.groups, D // s.inner, s.inner)
    return spread.reshape(*w.shape[:-1], s.groups, D).repeat(*[1] * (w.ndim - 1), rows // s.groups, 1)


def _sum(s: Standardised, t: Tensor) -> Tensor:
    """``[k, rows, D]`` to ``[k, channels]``."""
    k, rows, D = t.shape
    # All sizes by name: torch cannot find out one of an empty tensor.
    return t.reshape(k, rows // s.groups, s.groups, D // s.inner, s.inner).sum((1, 4)).reshape(k, s.channels)
