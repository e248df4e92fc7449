"""The DCT-II of the rows of a matrix as two small dense transforms, both in one program on matrix instructions."""

from collections.abc import Sequence
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._dct_tables import tables
from ._launch import DctSplit, dct_rows, dct_split
from ._rounding import DTYPES as DTYPES
from ._rounding import nearest
from .moments import device_table, pointers

# side of the tiles that are transposed
_TILE = 64


@triton.jit
def _operand(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """Round float32 to an operand of `tl.dot`."""
    x = nearest(x, dtype, INTERPRETED)
    # the interpreter multiplies the bits of bfloat16 as integers
    return x.to(tl.float32) if INTERPRETED else x


@triton.jit
def _table(ptr, index: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Load one of several matrices that follow one another."""
    at = index * ROWS * COLUMNS + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    x = tl.load(ptr + at)
    return x.to(tl.float32) if INTERPRETED else x


@triton.jit
def _frequencies(SIDE1: tl.constexpr, SIDE2: tl.constexpr):
    """Return q and k of all coefficients 2·N2·q ± k, as vectors.

    The threads of a warp then have neighbouring k: of a matrix, compilers differ in which side they take.
    """
    i = tl.arange(0, SIDE1 // 2 * SIDE2)
    return i // SIDE2, i % SIDE2


@triton.jit
def _places(q, k, N1: tl.constexpr, N2: tl.constexpr):
    """Return where coefficients 2·N2·q ± k are, and whether there are any."""
    plus = 2 * N2 * q + k
    # in the place of what k = 0 has twice comes frequency N2, and in that of −k comes N1·N2 − k
    minus = tl.where(k == 0, plus + N2, tl.where(q == 0, N1 * N2 - k, plus - 2 * k))
    return plus, minus, (k < N2) & (q < N1 // 2)


@triton.jit
def _flat(x):
    """Return the numbers of a (k, q) matrix as `_frequencies` has them."""
    return tl.reshape(tl.trans(x), (x.shape[0] * x.shape[1],))


# what launches differ in, and programs would not
@triton.jit(do_not_specialize=["m", "rows"])
def dct_kernel(
    x_ptr,
    out_ptr,
    partial_ptr,
    first_ptr,
    turns_ptr,
    second_ptr,
    table_ptr,
    m,
    rows,
    stride,
    scale,
    N1: tl.constexpr,
    N2: tl.constexpr,
    SIDE1: tl.constexpr,
    SIDE2: tl.constexpr,
    SQUARES: tl.constexpr,
    PRECISION: tl.constexpr,
    TABLE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Transform `rows` rows, one after the other; store coefficients, and the sums of their squares or magnitudes.

    With TABLE the program finds there where its matrix is, and `x_ptr` tells the type only.

    A row is X (N2×N1), X[j2, j1] = x[j1 + N1·j2]. With F = exp(−iπ k j2 / N2), T = exp(−iπ k (2 j1 + 1) / 2n) and
    Z = T ∘ (F X), coefficient 2·N2·q ± k is Σ Re Z[k, j1] cos(π q (2 j1 + 1) / N1) ± Im Z[k, j1] sin(the same).
    F is real for k = 0 and k = N2: they share row 0, one as its real and one as its imaginary part.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    whole: tl.constexpr = (N1 == SIDE1) & (N2 == SIDE2)
    real = _table(first_ptr, 0, SIDE2, SIDE2, INTERPRETED)
    imag = _table(first_ptr, 1, SIDE2, SIDE2, INTERPRETED)
    turns_real = _table(turns_ptr, 0, SIDE2, SIDE1, INTERPRETED)
    turns_imag = _table(turns_ptr, 1, SIDE2, SIDE1, INTERPRETED)
    cosines = _table(second_ptr, 0, SIDE1, SIDE1 // 2, INTERPRETED)
    sines = _table(second_ptr, 1, SIDE1, SIDE1 // 2, INTERPRETED)
    between = _table(second_ptr, 2, SIDE1, SIDE1 // 2, INTERPRETED)
    j1, j2 = tl.arange(0, SIDE1)[None, :], tl.arange(0, SIDE2)[:, None]
    k, q = tl.arange(0, SIDE2)[:, None], tl.arange(0, SIDE1 // 2)[None, :]
    flat_q, flat_k = _frequencies(SIDE1, SIDE2)
    plus_at, minus_at, inside = _places(flat_q, flat_k, N1, N2)
    plus_sum = tl.zeros((SIDE2, SIDE1 // 2), dtype=tl.float32)
    minus_sum = tl.zeros((SIDE2, SIDE1 // 2), dtype=tl.float32)
    # int64, so that matrices of more than 2³¹ elements are addressed right
    program = tl.program_id(0).to(tl.int64)
    if TABLE:
        matrix = tl.program_id(1).to(tl.int64)
        x_ptr = tl.multiple_of(tl.load(table_ptr + matrix).to(x_ptr.dtype), 16)
        out_ptr += matrix * m * (N1 * N2)
        partial_ptr += matrix * tl.num_programs(0) * (N1 * N2)
    x_ptr += program * rows * stride
    out_ptr += program * rows * (N1 * N2)
    for _ in range(0, tl.minimum(m - program * rows, rows).to(tl.int32)):
        at = x_ptr + j2 * N1 + j1
        x = tl.load(at) if whole else tl.load(at, mask=(j2 < N2) & (j1 < N1), other=0.0)
        if INTERPRETED:
            x = x.to(tl.float32)
        y_real = tl.dot(real, x, input_precision=PRECISION)
        y_imag = tl.dot(imag, x, input_precision=PRECISION)
        z_real = _operand(turns_real * y_real - turns_imag * y_imag, dtype, INTERPRETED)
        z_imag = _operand(turns_real * y_imag + turns_imag * y_real, dtype, INTERPRETED)
        even = tl.dot(z_real, cosines, input_precision=PRECISION)
        odd = tl.dot(z_imag, sines, input_precision=PRECISION)
        middle = tl.dot(z_imag, between, input_precision=PRECISION)
        # the sines of q = 0, which are zero, give way to those of q = N1/2, where it is the cosines that are
        plus = tl.where((q == 0) | (k == 0), even, even + odd) * scale
        plus = tl.where((q == 0) & (k == 0), plus * 0.7071067811865476, plus)
        minus = tl.where(k == 0, middle, tl.where(q == 0, 0.0, even) - odd) * scale
        plus_sum += plus * plus if SQUARES else tl.abs(plus)
        minus_sum += minus * minus if SQUARES else tl.abs(minus)
        plus = _flat(nearest(plus, out_ptr.dtype.element_ty, INTERPRETED))
        minus = _flat(nearest(minus, out_ptr.dtype.element_ty, INTERPRETED))
        if whole:
            tl.store(out_ptr + plus_at, plus)
            tl.store(out_ptr + minus_at, minus)
        else:
            tl.store(out_ptr + plus_at, plus, mask=inside)
            tl.store(out_ptr + minus_at, minus, mask=inside)
        x_ptr += stride
        out_ptr += N1 * N2
    partial_ptr += program * (N1 * N2)
    tl.store(partial_ptr + plus_at, _flat(plus_sum), mask=inside)
    tl.store(partial_ptr + minus_at, _flat(minus_sum), mask=inside)


@triton.jit
def transpose_kernel(x_ptr, out_ptr, table_ptr, m, n, stride, TILE: tl.constexpr, TABLE: tl.constexpr):
    """Copy a tile of rows of m×n to columns of the n×m output; with TABLE of the matrix that is there."""
    if TABLE:
        matrix = tl.program_id(1).to(tl.int64)
        x_ptr = tl.load(table_ptr + matrix).to(x_ptr.dtype)
        out_ptr += matrix * m * n
    across = tl.cdiv(n, TILE)
    i = (tl.program_id(0) // across).to(tl.int64) * TILE + tl.arange(0, TILE)
    j = (tl.program_id(0) % across).to(tl.int64) * TILE + tl.arange(0, TILE)
    x = tl.load(x_ptr + i[:, None] * stride + j[None, :], mask=(i[:, None] < m) & (j[None, :] < n))
    tl.store(out_ptr + j[:, None] * m + i[None, :], tl.trans(x), mask=(j[:, None] < n) & (i[None, :] < m))


def supports(n: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether rows of n elements can be transformed: n is the product of two numbers that are small enough."""
    return dtype in DTYPES and dct_split(n, dtype.itemsize, device) is not None


def dct_energies(
    x: Tensor,
    dim: int,
    *,
    out_dtype: torch.dtype,
    ranking: Literal["l2", "l1"] = "l2",
    split: DctSplit | None = None,
    rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the orthonormal DCT-II of a matrix, as `reference.dct`, and what it has along each DCT column.

    Sums are in float32 and in the same order each time. Constants and what is between both transforms are rounded to
    the dtype of `x`. Of bfloat16, the error is 2.8e-3 of the Frobenius norm, where that of a product with the DCT
    matrix in bfloat16 is 2.4e-3.

    Args:
        x: (m, n), float32, bfloat16 or float16, any strides; fastest where the transformed dimension is contiguous.
        dim: -1 or -2, the dimension that is transformed.
        out_dtype: float32, bfloat16 or float16, of the coefficients.
        ranking: "l2" for sums of squares over the other dimension, "l1" for those of magnitudes.
        split: how the transformed dimension is; None goes by the table.
        rows: how many rows one program transforms; None goes by the table.

    Returns:
        Coefficients of the shape of `x`, contiguous along `dim`, and float32 energies, one of each index along `dim`.

    Raises:
        ValueError: for a tensor that the kernel would misread, and a size that `supports` does not hold for.
    """
    out, energies = all_dct_energies([x], dim, out_dtype=out_dtype, ranking=ranking, split=split, rows=rows)
    return out[0], energies[0]


def all_dct_energies(
    xs: Sequence[Tensor],
    dim: int,
    *,
    out_dtype: torch.dtype,
    ranking: Literal["l2", "l1"] = "l2",
    split: DctSplit | None = None,
    rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Do as `dct_energies` for matrices of one shape, dtype and device, in one launch, and return both stacked."""
    if not xs:
        raise ValueError("the Triton DCT needs some matrices")
    x = xs[0]
    alike = all(other.shape == x.shape and other.dtype == x.dtype and other.device == x.device for other in xs)
    if x.dim() != 2 or not alike or {x.dtype, out_dtype} - set(DTYPES) or dim not in (-1, -2):
        raise ValueError(
            "the Triton DCT needs matrices of one shape and an out_dtype of float32, bfloat16 or float16, and dim -1 "
            f"or -2, not {x.dtype} of shape {tuple(x.shape)}, {out_dtype} and {dim}"
        )
    m, n = x.shape if dim == -1 else x.mT.shape
    if ranking not in ("l2", "l1"):
        raise ValueError(f"the Triton DCT needs ranking 'l2' or 'l1', not {ranking!r}")
    split = split or dct_split(n, x.itemsize, x.device)
    if split is None:
        raise ValueError(f"the Triton DCT needs a size that is a product of two small numbers, not {n} of {x.dtype}")
    if split.first * split.second != n:
        raise ValueError(f"the Triton DCT needs a split of {n} elements, not {split}")
    out = torch.empty((len(xs), m, n), dtype=out_dtype, device=x.device)
    rows = rows or dct_rows(m, split.warps)
    count = triton.cdiv(m, rows)
    partial = torch.empty((len(xs), count, n), dtype=torch.float32, device=x.device)
    if m > 0:
        first, turns, second, scale = tables(split, x.dtype, x.device)
        # a kernel goes to the current device, which need not be the tensor's
        with torch.cuda.device(x.get_device()):
            read = _readable(xs if dim == -1 else [x.mT for x in xs])
            # one matrix is where it is
            table = device_table(zip(*pointers(read)[0], strict=True), "q", x.device) if len(xs) > 1 else first
            dct_kernel[(count, len(xs))](
                read[0],
                out,
                partial,
                first,
                turns,
                second,
                table,
                m,
                rows,
                read[0].stride(0),
                scale,
                N1=split.second,
                N2=split.first,
                SIDE1=split.sides[1],
                SIDE2=split.sides[0],
                SQUARES=ranking == "l2",
                # of NVIDIA's matrix instructions three make one of nearly float32; AMD's have it
                PRECISION="ieee" if x.itemsize == 2 or torch.version.hip else "tf32x3",
                TABLE=len(xs) > 1,
                INTERPRETED=not x.is_cuda,
                num_warps=split.warps,
                num_stages=split.stages,
            )
    return out if dim == -1 else out.mT, partial.sum(1)


def _readable(xs: Sequence[Tensor]) -> Sequence[Tensor] | Tensor:
    """Return matrices whose rows can be read in vectors and are as far apart in all of them, these or copies."""
    x = xs[0]
    strides = x.stride()
    alike = all(other.stride() == strides for other in xs)
    if alike and strides[1] == 1 and strides[0] % 16 == 0 and not any(other.data_ptr() % 16 for other in xs):
        return xs
    out = torch.empty((len(xs), *x.shape), dtype=x.dtype, device=x.device)
    if not alike or strides[0] != 1:
        for part, other in zip(out.unbind(), xs, strict=True):
            part.copy_(other)
        return out
    n, m = x.shape
    many = len(xs) > 1
    table = device_table(zip(*pointers(xs)[0], strict=True), "q", x.device) if many else x
    tiles = triton.cdiv(m, _TILE) * triton.cdiv(n, _TILE)
    transpose_kernel[(tiles, len(xs))](x, out, table, m, n, strides[1], TILE=_TILE, TABLE=many)
    return out
