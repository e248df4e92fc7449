"""Matrix functions in plain torch: normalization, Newton–Schulz in its standard and its Gram form, the polar factor.

Matrices come in batches (b, m, n) and are seen from their short side: with m <= n the Gram matrix is X Xᵀ and functions
of it multiply X from the left, else it is Xᵀ X and they multiply from the right. Everything made of the Gram matrix is
symmetric, and how such matrices are multiplied is a part of its own: `Whole`, or `Halves` where computing one triangle
pays.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Triple = tuple[float, float, float]

# a norm this far from underflow is a square root of a sum of squares without scaling first
_PLAIN_EPS = 1e-12


class Arithmetic(Protocol):
    """Symmetric matrices that are polynomials of one Gram matrix."""

    def gram(self, x: Tensor) -> Any:
        """Return R, the Gram matrix of the short side of `x`."""
        ...

    def polynomial(self, r: Any, a: float, b: float, c: float) -> Any:
        """Return W = a + b·R + c·R², perhaps in two parts: `Sum`."""
        ...

    def whole(self, w: Any) -> Any:
        """Return W in one part."""
        ...

    def product(self, q: Any, w: Any) -> Any:
        """Return Q W."""
        ...

    def advanced(self, r: Any, w: Any) -> Any:
        """Return R W², of a W in one part."""
        ...

    def times(self, w: Any, x: Tensor) -> Tensor:
        """Return W X."""
        ...


class Sum(NamedTuple):
    """a + Z, not added: their sum, rounded, would lose what a sum of products rounded once keeps."""

    z: Any
    a: float


def newton_schulz(x: Tensor, triples: Sequence[Triple], arithmetic: Arithmetic) -> Tensor:
    """Return U p(S) Vᵀ for x = U S Vᵀ, where p is the composition of the steps x·(a + b·x² + c·x⁴)."""
    for a, b, c in triples:
        x = arithmetic.times(arithmetic.polynomial(arithmetic.gram(x), a, b, c), x)
    return x


def gram_newton_schulz(x: Tensor, triples: Sequence[Triple], restarts: Sequence[int], arithmetic: Arithmetic) -> Tensor:
    """Return what `newton_schulz` does, iterating on the Gram matrix R and on Q, which X is multiplied by in the end.

    A step takes W = a + b·R + c·R² and then Q ← Q W, R ← R W². What rounding has made of the small eigenvalues of R
    grows by a² a step, and what it has made of the large ones parts R from X: before the steps in `restarts`
    X ← Q X, and R is made again.
    """
    for start, stop in pairwise((0, *restarts, len(triples))):
        if stop - start == 1:
            x = newton_schulz(x, triples[start:stop], arithmetic)
            continue
        r, q = arithmetic.gram(x), None
        for step in range(start, stop):
            w = arithmetic.polynomial(r, *triples[step])
            whole = arithmetic.whole(w) if q is None or step + 1 < stop else None
            q = whole if q is None else arithmetic.product(q, w)
            if step + 1 < stop:
                # with the W that Q has, rounded as it is: R goes with what X will be
                r = arithmetic.advanced(r, whole)
        x = arithmetic.times(q, x)
    return x


def polar(x: Tensor) -> Tensor:
    """Return U Vᵀ for x = U S Vᵀ by the eigenvalues of the Gram matrix; singular values that are rounding stay 0.

    Where `x` is not finite the result is NaN.
    """
    r = _gram(x)
    finite = r.isfinite().all(dim=(-2, -1), keepdim=True) if r.numel() else torch.ones_like(r, dtype=torch.bool)
    # LAPACK raises for NaN
    values, vectors = torch.linalg.eigh(torch.where(finite, r, 0.0))
    least = values[..., -1:] * (values.size(-1) * torch.finfo(x.dtype).eps)
    inverse = torch.where(values > least, values, 1.0).rsqrt().where(values > least, 0.0)
    root = (vectors * inverse.unsqueeze(-2)) @ vectors.mT
    return _times(root, x, 0.0).where(finite, torch.nan)


def normalized(x: Tensor, *, eps: float, dtype: torch.dtype) -> Tensor:
    """Return x / max(‖x‖_F, eps) in `dtype`, computed in float32 or better."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    tiny = torch.finfo(wide.dtype).tiny
    if eps < _PLAIN_EPS:
        # squares of elements near 1e-20 would be 0, and of those near 1e20 infinite
        peak = wide.abs().amax(dim=(-2, -1), keepdim=True).clamp_(min=tiny)
        wide = wide / peak
        least = torch.clamp(eps / peak, min=tiny)
    else:
        least = torch.full((), eps, dtype=wide.dtype, device=wide.device)
    norm = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True)
    scale = torch.maximum(norm, least).reciprocal_()
    if dtype == wide.dtype or type(wide) is not Tensor:
        return wide.mul(scale).to(dtype)
    # in one pass
    return torch.mul(wide, scale, out=torch.empty(wide.shape, dtype=dtype, device=wide.device))


def almost_orthogonal(x: Tensor) -> Tensor:
    """Scale the rows of the short side so that ‖x‖₂ <= 1: each by 1 / √(its row sum of |Gram matrix|) (Turbo-Muon)."""
    sums = _gram(x).abs().sum(-1)
    scale = torch.where(sums > 0, sums, 1.0).rsqrt().where(sums > 0, 0.0)
    return torch.mul(x, scale.unsqueeze(-2 if _tall(x) else -1))


def symmetric(
    a: Tensor, b: Tensor, c: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0, gamma: float = 0.0
) -> Tensor:
    """Return alpha·A Bᵀ + beta·C + gamma·I, of which the caller knows that it is symmetric but for rounding.

    Args:
        a: (b, n, k).
        b: (b, n, k): A itself, or such that A Bᵀ is Q Z for polynomials of one symmetric matrix, or W R W.
        c: (b, n, n), symmetric; None is zeros.
        alpha: of A Bᵀ; where it is 0, neither is read.
        beta: of C.
        gamma: is added to the diagonal.
    """
    if alpha == 0:
        # torch 2.13 ignores beta where alpha is 0
        out = a.new_zeros(*a.shape[:-1], a.size(-2)) if c is None else beta * c
    elif c is not None:
        out = torch.baddbmm(c, a, b.mT, beta=beta, alpha=alpha)
    elif alpha == 1:
        out = a @ b.mT
    else:
        out = torch.baddbmm(a.new_zeros(1, 1, 1), a, b.mT, beta=0.0, alpha=alpha)
    return _shift_(out, gamma) if gamma != 0 else out


class Whole:
    """Plain products of whole matrices."""

    def symmetric(
        self,
        a: Tensor,
        b: Tensor,
        c: Tensor | None = None,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 0.0,
    ) -> Tensor:
        """Return alpha·A Bᵀ + beta·C + gamma·I, which is symmetric: what a subclass may compute one triangle of."""
        return symmetric(a, b, c, alpha=alpha, beta=beta, gamma=gamma)

    def gram(self, x: Tensor) -> Tensor:
        """Return X Xᵀ or Xᵀ X."""
        rows = x.mT if _tall(x) else x
        return self.symmetric(rows, rows)

    def polynomial(self, r: Tensor, a: float, b: float, c: float) -> Tensor | Sum:
        """Return a and b·R + c·R²."""
        # transposed twice: of whole matrices R is symmetric only but for rounding
        return Sum(self.symmetric(r, r.mT, r, alpha=c, beta=b), a)

    def whole(self, w: Tensor | Sum) -> Tensor:
        """Return the sum."""
        return _shift_(w.z.clone(), w.a) if isinstance(w, Sum) else w

    def product(self, q: Tensor, w: Tensor | Sum) -> Tensor:
        """Return a·Q + Q Z, rounded once."""
        return self.symmetric(q, w.z.mT, q, beta=w.a) if isinstance(w, Sum) else self.symmetric(q, w.mT)

    def advanced(self, r: Tensor, w: Tensor) -> Tensor:
        """Return R W²."""
        return r @ w @ w

    def times(self, w: Tensor | Sum, x: Tensor) -> Tensor:
        """Return a·X + Z X or a·X + X Z, rounded once."""
        return _times(w.z, x, w.a) if isinstance(w, Sum) else _times(w, x, 0.0)


class Slabs(NamedTuple):
    """A symmetric matrix less its upper right block: the rest as two contiguous slabs, which share the lower left."""

    left: Tensor  # (b, n, h)
    bottom: Tensor  # (b, n - h, n)


class Halves:
    """Products of 2×2 blocks that leave the upper right one out: 3/4 of the work, without a copy of a block."""

    def gram(self, x: Tensor) -> Slabs:
        """Return X Xᵀ or Xᵀ X."""
        rows = x.mT if _tall(x) else x
        n, h = rows.size(-2), rows.size(-2) // 2
        out = _slabs(len(x), n, x)
        # one at a time, as batched products copy operands that are slices; and in strips, of which only what is on and
        # left of the diagonal is computed
        for i, matrix in enumerate(rows):
            for slab, start, stop in ((out.left[i, :h], 0, h), (out.bottom[i], h, n)):
                middle = (start + stop) // 2
                for low, high in ((start, middle), (middle, stop)):
                    torch.mm(matrix[low:high], matrix[:high].T, out=slab[low - start : high - start, :high])
                slab[: middle - start, middle:stop].copy_(slab[middle - start :, start:middle].T)
        out.left[:, h:].copy_(out.bottom[..., :h])
        return out

    def polynomial(self, r: Slabs, a: float, b: float, c: float) -> Sum:
        """Return a and b·R + c·R²."""
        return Sum(_half_product(r, r, r, b, c) if c != 0 else Slabs(b * r.left, b * r.bottom), a)

    def product(self, q: Slabs, w: Sum) -> Slabs:
        """Return a·Q + Q Z; Q and Z commute but for rounding, and here they do."""
        return _half_product(q, w.z, q, w.a, 1.0)

    def advanced(self, r: Slabs, w: Slabs) -> Slabs:
        """Return W R W, which is symmetric whatever rounding has done to R and W."""
        b, n, h = r.left.shape
        # R W is not symmetric to the last bit: all four blocks of it
        left, right = torch.empty_like(r.left), r.left.new_empty(b, n, n - h)
        torch.bmm(r.left.mT, w.left, out=left[:, :h])
        torch.bmm(r.bottom, w.left, out=left[:, h:])
        torch.bmm(r.left.mT, w.bottom.mT, out=right[:, :h])
        torch.bmm(r.bottom, w.bottom.mT, out=right[:, h:])
        out = _slabs(b, n, r.left)
        torch.bmm(w.left.mT, left, out=out.left[:, :h])
        torch.bmm(w.bottom, left, out=out.left[:, h:])
        torch.bmm(w.bottom, right, out=out.bottom[..., h:])
        out.bottom[..., :h].copy_(out.left[:, h:])
        return out

    def whole(self, w: Sum) -> Slabs:
        """Return the sum."""
        h, out = w.z.left.size(-1), Slabs(w.z.left.clone(), w.z.bottom.clone())
        _shift_(out.left[:, :h], w.a)
        _shift_(out.bottom[..., h:], w.a)
        return out

    def times(self, w: Sum | Slabs, x: Tensor) -> Tensor:
        """Return a·X + Z X or a·X + X Z."""
        z, a = w if isinstance(w, Sum) else (w, 0.0)
        h, out = z.left.size(-1), torch.empty_like(x)
        if _tall(x):
            torch.baddbmm(x[..., :h], x, z.left, beta=a, out=out[..., :h])
            torch.baddbmm(x[..., h:], x, z.bottom.mT, beta=a, out=out[..., h:])
        else:
            torch.baddbmm(x[:, :h], z.left.mT, x, beta=a, out=out[:, :h])
            torch.baddbmm(x[:, h:], z.bottom, x, beta=a, out=out[:, h:])
        return out


def _half_product(q: Slabs, z: Slabs, plus: Slabs, beta: float, alpha: float) -> Slabs:
    """Return beta·plus + alpha·Q Z for Q and Z that commute."""
    b, n, h = q.left.shape
    out = _slabs(b, n, q.left)
    torch.baddbmm(plus.left[:, :h], q.left.mT, z.left, beta=beta, alpha=alpha, out=out.left[:, :h])
    torch.baddbmm(plus.left[:, h:], q.bottom, z.left, beta=beta, alpha=alpha, out=out.left[:, h:])
    torch.baddbmm(plus.bottom[..., h:], q.bottom, z.bottom.mT, beta=beta, alpha=alpha, out=out.bottom[..., h:])
    out.bottom[..., :h].copy_(out.left[:, h:])
    return out


def _slabs(b: int, n: int, like: Tensor) -> Slabs:
    return Slabs(like.new_empty(b, n, n // 2), like.new_empty(b, n - n // 2, n))


def _shift_(z: Tensor, a: float) -> Tensor:
    diagonal = z.diagonal(dim1=-2, dim2=-1)
    # in low precision torch rounds the number before it adds it
    diagonal.copy_(diagonal.to(torch.promote_types(z.dtype, torch.float32)) + a)
    return z


def _tall(x: Tensor) -> bool:
    return x.size(-2) > x.size(-1)


def _gram(x: Tensor) -> Tensor:
    return x.mT @ x if _tall(x) else x @ x.mT


def _times(z: Tensor, x: Tensor, a: float) -> Tensor:
    left, right = (x, z) if _tall(x) else (z, x)
    return torch.baddbmm(x, left, right, beta=a) if a != 0 else left @ right
