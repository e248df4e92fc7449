"""The tiles of one triangle of a symmetric matrix: in which order they are made, and how each is stored twice."""

import triton
import triton.language as tl

from ._rounding import nearest


@triton.jit
def _triangle(index):
    """Return (i, j) of the `index`-th tile on and below the diagonal, row by row."""
    i = ((tl.sqrt(8.0 * index + 1.0) - 1.0) * 0.5).to(tl.int32)
    # a square root in float32 may be off by one
    i = tl.where((i + 1) * (i + 2) // 2 <= index, i + 1, i)
    i = tl.where(i * (i + 1) // 2 > index, i - 1, i)
    return i, index - i * (i + 1) // 2


@triton.jit
def tile_at(index, count, BAND: tl.constexpr):
    """Return (i, j) of the `index`-th tile on and below the diagonal: BAND rows at a time, column by column."""
    i, j = _triangle(index)
    first = i // BAND * BAND
    rows = tl.minimum(count - first, BAND)
    index -= first * (first + 1) // 2
    # what all rows of the band have, and then the triangle on the diagonal
    wide = first * rows
    if index < wide:
        j = index // rows
        i = first + index % rows
    else:
        i, j = _triangle(index - wide)
        i += first
        j += first
    return i, j


@triton.jit
def start(
    c_ptr,
    batch,
    i,
    j,
    n,
    scale,
    c_batch,
    c_row,
    c_column,
    SIDE: tl.constexpr,
    HAS_C: tl.constexpr,
    EVEN: tl.constexpr,
    NEAR: tl.constexpr,
):
    """Return what a product is added to: tile (i, j) of scale·C, or zeros.

    There from the start, C takes no registers beside a product that is complete.
    """
    if HAS_C:
        # scalars in int64, as in `store`
        top, left = i.to(tl.int64) * SIDE, j.to(tl.int64) * SIDE
        inner = tl.arange(0, SIDE) if NEAR else tl.arange(0, SIDE).to(tl.int64)
        at = c_ptr + batch * c_batch + top * c_row + left * c_column
        inside = EVEN | ((inner < n - top)[:, None] & (inner < n - left)[None, :])
        c = tl.load(at + ((inner * c_row)[:, None] + (inner * c_column)[None, :]), mask=inside, other=0.0)
        return scale * c.to(tl.float32)
    else:
        return tl.zeros((SIDE, SIDE), dtype=tl.float32)


@triton.jit
def store(
    product,
    out_ptr,
    batch,
    i,
    j,
    n,
    alpha,
    gamma,
    SIDE: tl.constexpr,
    EVEN: tl.constexpr,
    NEAR: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Store alpha·product + gamma·I as tile (i, j) and its mirror image as tile (j, i)."""
    # scalars in int64, so that results of more than 2³¹ elements are addressed right
    top, left = i.to(tl.int64) * SIDE, j.to(tl.int64) * SIDE
    inner = tl.arange(0, SIDE) if NEAR else tl.arange(0, SIDE).to(tl.int64)
    row_fits, column_fits = inner < n - top, inner < n - left
    value = alpha * product
    if i == j:
        value += tl.where(inner[:, None] == inner[None, :], gamma, 0.0)
    value = nearest(value, out_ptr.dtype.element_ty, INTERPRETED)
    if i == j:
        # what lies above the diagonal was added up in another order, or comes from a product that does not commute
        value = tl.where(inner[:, None] >= inner[None, :], value, tl.trans(value))
    within = (inner * n)[:, None] + inner[None, :]
    out_ptr += batch * n * n
    tl.store(out_ptr + (top * n + left) + within, value, mask=EVEN | (row_fits[:, None] & column_fits[None, :]))
    if i != j:
        mirrored = EVEN | (column_fits[:, None] & row_fits[None, :])
        tl.store(out_ptr + (left * n + top) + within, tl.trans(value), mask=mirrored)
