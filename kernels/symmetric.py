"""Products that are known to be symmetric: the tiles of one triangle, each stored with its mirror image."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Tiles, parts_of, tiles_for

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _triangle(index):
    """Return (i, j) of the `index`-th tile on and below the diagonal, row by row."""
    i = ((tl.sqrt(8.0 * index + 1.0) - 1.0) * 0.5).to(tl.int32)
    # a square root in float32 may be off by one
    i = tl.where((i + 1) * (i + 2) // 2 <= index, i + 1, i)
    i = tl.where(i * (i + 1) // 2 > index, i - 1, i)
    return i, index - i * (i + 1) // 2


@triton.jit
def _cast(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """Round float32 to the nearest number of `dtype`, to even where two are as near."""
    if INTERPRETED and dtype == tl.bfloat16:
        # the interpreter cuts bits off where hardware rounds
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # rounding would carry the bits of some NaN into the sign
        return tl.where(x == x, bits, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def _store(
    product,
    c_ptr,
    out_ptr,
    batch,
    i,
    j,
    n,
    alpha,
    beta,
    gamma,
    c_batch,
    c_row,
    c_column,
    SIDE: tl.constexpr,
    HAS_C: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Store alpha·product + beta·C + gamma·I as tile (i, j) and its mirror image as tile (j, i)."""
    # int64, so that results of more than 2³¹ elements are addressed right
    rows = i.to(tl.int64) * SIDE + tl.arange(0, SIDE)
    columns = j.to(tl.int64) * SIDE + tl.arange(0, SIDE)
    inside = (rows[:, None] < n) & (columns[None, :] < n)
    value = alpha * product
    if HAS_C:
        at = c_ptr + batch * c_batch + (rows * c_row)[:, None] + (columns * c_column)[None, :]
        value += beta * tl.load(at, mask=inside, other=0.0).to(tl.float32)
    value += tl.where(rows[:, None] == columns[None, :], gamma, 0.0)
    value = _cast(value, out_ptr.dtype.element_ty, INTERPRETED)
    if i == j:
        # what lies above the diagonal was added up in another order, or comes from a product that does not commute
        value = tl.where(rows[:, None] >= columns[None, :], value, tl.trans(value))
    out_ptr += batch * n * n
    tl.store(out_ptr + (rows * n)[:, None] + columns[None, :], value, mask=inside)
    if i != j:
        mirrored = (columns[:, None] < n) & (rows[None, :] < n)
        tl.store(out_ptr + (columns * n)[:, None] + rows[None, :], tl.trans(value), mask=mirrored)


@triton.jit
def symmetric_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    out_ptr,
    n,
    k,
    tiles,
    parts,
    steps,
    alpha,
    beta,
    gamma,
    a_batch,
    a_row,
    a_column,
    b_batch,
    b_row,
    b_column,
    c_batch,
    c_row,
    c_column,
    SIDE: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_C: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Multiply `steps` pieces of K for one tile; store alpha·A Bᵀ + beta·C + gamma·I, or if SPLIT the part itself."""
    # one axis for tile, part and matrix: the others end at 65535
    program = tl.program_id(0)
    i, j = _triangle(program % tiles)
    part = program // tiles % parts
    # int64, as are all products with a stride
    batch = (program // tiles // parts).to(tl.int64)
    rows = i.to(tl.int64) * SIDE + tl.arange(0, SIDE)
    columns = j.to(tl.int64) * SIDE + tl.arange(0, SIDE)
    first = part * steps
    last = tl.minimum(first + steps, tl.cdiv(k, DEPTH))
    along = tl.arange(0, DEPTH)
    start = first.to(tl.int64) * DEPTH + along
    a_at = a_ptr + batch * a_batch + (rows * a_row)[:, None] + (start * a_column)[None, :]
    b_at = b_ptr + batch * b_batch + (start * b_column)[:, None] + (columns * b_row)[None, :]
    stride = tl.full((), DEPTH, tl.int64)
    product = tl.zeros((SIDE, SIDE), dtype=tl.float32)
    for step in range(first, last):
        left = along < k - step * DEPTH
        a = tl.load(a_at, mask=(rows[:, None] < n) & left[None, :], other=0.0)
        b = tl.load(b_at, mask=left[:, None] & (columns[None, :] < n), other=0.0)
        if INTERPRETED:
            # the interpreter multiplies the bits of bfloat16 as integers
            a, b = a.to(tl.float32), b.to(tl.float32)
        product = tl.dot(a, b, product, input_precision="ieee")
        a_at += stride * a_column
        b_at += stride * b_column
    if SPLIT:
        inner = tl.arange(0, SIDE)
        at = out_ptr + program.to(tl.int64) * (SIDE * SIDE) + inner[:, None] * SIDE + inner[None, :]
        tl.store(at, product)
    else:
        _store(
            product,
            c_ptr,
            out_ptr,
            batch,
            i,
            j,
            n,
            alpha,
            beta,
            gamma,
            c_batch,
            c_row,
            c_column,
            SIDE,
            HAS_C,
            INTERPRETED,
        )


@triton.jit
def sum_parts_kernel(
    parts_ptr,
    c_ptr,
    out_ptr,
    n,
    tiles,
    parts,
    alpha,
    beta,
    gamma,
    c_batch,
    c_row,
    c_column,
    SIDE: tl.constexpr,
    HAS_C: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Add up the parts of one tile, always in the same order, and store it as `symmetric_kernel` does."""
    program = tl.program_id(0)
    tile = program % tiles
    i, j = _triangle(tile)
    batch = (program // tiles).to(tl.int64)
    inner = tl.arange(0, SIDE)
    at = parts_ptr + (batch * parts * tiles + tile) * (SIDE * SIDE) + inner[:, None] * SIDE + inner[None, :]
    # an argument that is 1 is a constant, and has no type to be cast from
    stride = tl.full((), SIDE * SIDE, tl.int64) * tiles
    product = tl.zeros((SIDE, SIDE), dtype=tl.float32)
    for _ in range(parts):
        product += tl.load(at)
        at += stride
    _store(
        product, c_ptr, out_ptr, batch, i, j, n, alpha, beta, gamma, c_batch, c_row, c_column, SIDE, HAS_C, INTERPRETED
    )


def symmetric(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 0.0,
    tiles: Tiles | None = None,
    parts: int | None = None,
) -> Tensor:
    """Do as `reference_matrix.symmetric`, with sums in float32 and a result that is symmetric to the last bit.

    Of the result, and so of `c`, the upper triangle is the mirror image of the lower one, whatever it would have been.

    Args:
        a: (b, n, k) of float32, bfloat16 or float16 and any strides.
        b: the same.
        c: (b, n, n) of the same dtype and any strides, or None.
        alpha: of A Bᵀ; where it is 0, neither is read.
        beta: of C; where it is 0, C is not read.
        gamma: is added to the diagonal.
        tiles: what one program computes; None goes by the table.
        parts: into how many K is cut, whose products are kept in float32 and then added up; None goes by the table.

    Raises:
        ValueError: for tensors that the kernel would misread.
    """
    _check(a, b, c)
    batch, n, k = a.shape
    out = torch.empty((batch, n, n), dtype=a.dtype, device=a.device)
    if out.numel() == 0:
        return out
    if alpha == 0:
        k = 0
    if beta == 0:
        c = None
    interpreted = not a.is_cuda
    shape = tiles or tiles_for(n, a.itemsize, aligned=_aligned(n, k, *(x for x in (a, b, c) if x is not None)))
    count = triton.cdiv(n, shape.side)
    count = count * (count + 1) // 2
    pieces = triton.cdiv(k, shape.depth)
    steps = triton.cdiv(pieces, parts or parts_of(n, k))
    # none without a piece
    parts = max(1, triton.cdiv(pieces, max(1, steps)))
    size = (batch * parts * count, shape.side, shape.side)
    target = out if parts == 1 else torch.empty(size, dtype=torch.float32, device=a.device)
    epilogue = (float(alpha), float(beta), float(gamma))
    # without C nothing is loaded from where these point
    c_ptr, c_strides = (out, (0, 0, 0)) if c is None else (c, c.stride())
    constants = {"SIDE": shape.side, "HAS_C": c is not None, "INTERPRETED": interpreted, "num_warps": shape.warps}
    # a kernel goes to the current device, which need not be the tensor's
    with torch.cuda.device(a.get_device()):
        symmetric_kernel[(batch * parts * count,)](
            a,
            b,
            c_ptr,
            target,
            n,
            k,
            count,
            parts,
            steps,
            *epilogue,
            *a.stride(),
            *b.stride(),
            *c_strides,
            DEPTH=shape.depth,
            SPLIT=parts > 1,
            num_stages=shape.stages,
            **constants,
        )
        if parts > 1:
            sum_parts_kernel[(batch * count,)](target, c_ptr, out, n, count, parts, *epilogue, *c_strides, **constants)
    return out


def _aligned(n: int, k: int, *operands: Tensor) -> bool:
    """Return whether Triton will find that the operands can be read in vectors."""
    numbers = [n, k, *(x.data_ptr() for x in operands), *(stride for x in operands for stride in x.stride())]
    return all(number % 16 == 0 or number == 1 for number in numbers)


def _check(a: Tensor, b: Tensor, c: Tensor | None) -> None:
    if a.dim() != 3 or a.dtype not in DTYPES:
        raise ValueError(
            "the Triton symmetric product needs a of shape (b, n, k) and float32, bfloat16 or float16, "
            f"not {a.dtype} of shape {tuple(a.shape)}"
        )
    wanted = {"b": (b, a.shape)} | ({} if c is None else {"c": (c, (*a.shape[:2], a.size(1)))})
    for name, (x, shape) in wanted.items():
        if x.shape != shape or x.dtype != a.dtype or x.device != a.device:
            raise ValueError(
                f"the Triton symmetric product needs {name} of shape {tuple(shape)}, {a.dtype} and on {a.device}, "
                f"not {x.dtype} of shape {tuple(x.shape)} on {x.device}"
            )
