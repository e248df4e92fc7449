"""Products that are known to be symmetric: the tiles of one triangle, each stored with its mirror image."""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from ._launch import BAND, Tiles, parts_of, tiles_for, traced
from ._rounding import DTYPES as DTYPES
from ._triangle import start, store, tile_at


@triton.jit(do_not_specialize=["count", "tiles", "parts", "steps"])
def symmetric_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    out_ptr,
    n,
    k,
    count,
    tiles,
    parts,
    steps,
    alpha,
    scale,
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
    BAND: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_C: tl.constexpr,
    EVEN: tl.constexpr,
    NEAR: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Multiply `steps` pieces of K for one tile; store alpha·A Bᵀ + beta·C + gamma·I, or if SPLIT the part itself."""
    # a compiler of torch's passes numbers in float64
    alpha, scale, gamma = tl.cast(alpha, tl.float32), tl.cast(scale, tl.float32), tl.cast(gamma, tl.float32)
    # one axis for tile, part and matrix: the others end at 65535
    program = tl.program_id(0)
    i, j = tile_at(program % tiles, count, BAND)
    part = program // tiles % parts
    # int64, as are all products of scalars with a stride
    batch = (program // tiles // parts).to(tl.int64)
    top, left = i.to(tl.int64) * SIDE, j.to(tl.int64) * SIDE
    first = part * steps
    last = tl.minimum(first + steps, tl.cdiv(k, DEPTH))
    inner = tl.arange(0, SIDE) if NEAR else tl.arange(0, SIDE).to(tl.int64)
    along = tl.arange(0, DEPTH) if NEAR else tl.arange(0, DEPTH).to(tl.int64)
    skipped = first.to(tl.int64) * DEPTH
    stride = tl.full((), DEPTH, tl.int64)
    a_at = a_ptr + batch * a_batch + top * a_row + skipped * a_column
    b_at = b_ptr + batch * b_batch + left * b_row + skipped * b_column
    a_in = (inner * a_row)[:, None] + (along * a_column)[None, :]
    b_in = (along * b_column)[:, None] + (inner * b_row)[None, :]
    product = start(c_ptr, batch, i, j, n, scale, c_batch, c_row, c_column, SIDE, HAS_C and not SPLIT, EVEN, NEAR)
    for step in range(first, last):
        if EVEN:
            a = tl.load(a_at + a_in)
            b = tl.load(b_at + b_in)
        else:
            rest = along < k - step * DEPTH
            a = tl.load(a_at + a_in, mask=(inner < n - top)[:, None] & rest[None, :], other=0.0)
            b = tl.load(b_at + b_in, mask=rest[:, None] & (inner < n - left)[None, :], other=0.0)
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
        store(product, out_ptr, batch, i, j, n, alpha, gamma, SIDE, EVEN, NEAR, INTERPRETED)


@triton.jit(do_not_specialize=["count", "tiles", "parts"])
def sum_parts_kernel(
    parts_ptr,
    c_ptr,
    out_ptr,
    n,
    count,
    tiles,
    parts,
    alpha,
    scale,
    gamma,
    c_batch,
    c_row,
    c_column,
    SIDE: tl.constexpr,
    BAND: tl.constexpr,
    HAS_C: tl.constexpr,
    EVEN: tl.constexpr,
    NEAR: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Add up the parts of one tile, always in the same order, and store it as `symmetric_kernel` does."""
    alpha, scale, gamma = tl.cast(alpha, tl.float32), tl.cast(scale, tl.float32), tl.cast(gamma, tl.float32)
    program = tl.program_id(0)
    tile = program % tiles
    i, j = tile_at(tile, count, BAND)
    batch = (program // tiles).to(tl.int64)
    inner = tl.arange(0, SIDE)
    at = parts_ptr + (batch * parts * tiles + tile) * (SIDE * SIDE) + inner[:, None] * SIDE + inner[None, :]
    # a compiler of torch's makes any argument that is 1 a constant, which has no type to be cast from
    stride = tl.full((), SIDE * SIDE, tl.int64) * tiles
    product = start(c_ptr, batch, i, j, n, scale, c_batch, c_row, c_column, SIDE, HAS_C, EVEN, NEAR)
    for _ in range(parts):
        product += tl.load(at)
        at += stride
    store(product, out_ptr, batch, i, j, n, alpha, gamma, SIDE, EVEN, NEAR, INTERPRETED)


def symmetric(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 0.0,
    dtype: torch.dtype | None = None,
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
        dtype: of the result; None is that of `a`.
        tiles: what one program computes; None goes by the table.
        parts: into how many K is cut, whose products are kept in float32 and then added up; None goes by the table.

    Raises:
        ValueError: for tensors that the kernel would misread.
    """
    _check(a, b, c)
    batch, n, k = a.shape
    out = torch.empty((batch, n, n), dtype=dtype or a.dtype, device=a.device)
    if out.numel() == 0:
        return out
    if alpha == 0:
        k, alpha = 0, 1.0
    if beta == 0:
        c = None
    # C is added before alpha multiplies
    numbers = (float(alpha), beta / alpha, float(gamma))
    operands = (a, b) if c is None else (a, b, c)
    # without C nothing is loaded from where these point
    c_ptr, c_strides = (out, (0, 0, 0)) if c is None else (c, c.stride())
    strides = (*a.stride(), *b.stride(), *c_strides)
    kernel, sum_kernel, device = symmetric_kernel, sum_parts_kernel, a.get_device()
    if unseen := traced(a):
        kernel, sum_kernel, device = wrap_triton(symmetric_kernel), wrap_triton(sum_parts_kernel), -1
        # a plan is for numbers
        batch, n, k, *whole = map(int, (batch, n, k, *strides))
        strides = tuple(whole)
    begins = unseen or all(x.data_ptr() % 16 == 0 for x in operands)
    plan = _plan(batch, n, k, strides, a.itemsize, a.device, begins, c is not None, tiles, parts)
    target = out if plan.parts == 1 else torch.empty(plan.room, dtype=torch.float32, device=a.device)
    sizes = (n, k, plan.rows, plan.triangle, plan.parts, plan.steps)
    # a kernel goes to the current device, which need not be the tensor's
    with torch.cuda.device(device):
        kernel[plan.grid](a, b, c_ptr, target, *sizes, *numbers, *strides, **plan.own, **plan.constants)
        if plan.parts > 1:
            counts = (plan.rows, plan.triangle, plan.parts)
            where = (batch * plan.triangle,)
            sum_kernel[where](target, c_ptr, out, n, *counts, *numbers, *c_strides, **plan.constants)
    return out


class _Plan(NamedTuple):
    """How one product is launched."""

    grid: tuple[int]
    # of tiles, and tiles of the triangle
    rows: int
    triangle: int
    parts: int
    # pieces of K in a part
    steps: int
    # shape of the memory for parts
    room: tuple[int, int, int]
    # of both kernels, and of the first one alone
    constants: dict[str, Any]
    own: dict[str, Any]


@functools.lru_cache(maxsize=1024)
def _plan(
    batch: int,
    n: int,
    k: int,
    strides: tuple[int, ...],
    itemsize: int,
    device: torch.device,
    begins: bool,
    has_c: bool,
    tiles: Tiles | None,
    parts: int | None,
) -> _Plan:
    """Decide how a product is launched; remembered, as it takes longer than to launch one."""
    shape = tiles or tiles_for(n, itemsize, device, aligned=begins and _aligned(n, k, *strides))
    count = triton.cdiv(n, shape.side)
    triangle = count * (count + 1) // 2
    pieces = triton.cdiv(k, shape.depth)
    steps = triton.cdiv(pieces, parts or parts_of(n, k))
    # none without a piece
    parts = max(1, triton.cdiv(pieces, max(1, steps)))
    even = n % shape.side == 0 and k % shape.depth == 0
    # whether int32 reaches across a tile
    near = max(n, *strides) * max(shape.side, shape.depth) < 1 << 31
    constants = {"SIDE": shape.side, "BAND": BAND, "HAS_C": has_c, "EVEN": even, "NEAR": near}
    constants |= {"INTERPRETED": device.type != "cuda", "num_warps": shape.warps}
    own = {"DEPTH": shape.depth, "SPLIT": parts > 1, "num_stages": shape.stages}
    programs = batch * parts * triangle
    return _Plan((programs,), count, triangle, parts, steps, (programs, shape.side, shape.side), constants, own)


def _aligned(*numbers: int) -> bool:
    """Return whether Triton will find that operands with these sizes and strides can be read in vectors."""
    return all(number % 16 == 0 or number == 1 for number in numbers)


def _check(a: Tensor, b: Tensor, c: Tensor | None) -> None:
    if a.dim() != 3 or a.dtype not in DTYPES:
        raise ValueError(
            "the Triton symmetric product needs a of shape (b, n, k) and float32, bfloat16 or float16, "
            f"not {a.dtype} of shape {tuple(a.shape)}"
        )
    wanted = (("b", b, a.shape),) if c is None else (("b", b, a.shape), ("c", c, (*a.shape[:2], a.size(1))))
    for name, x, shape in wanted:
        if x.shape != shape or x.dtype != a.dtype or x.device != a.device:
            raise ValueError(
                f"the Triton symmetric product needs {name} of shape {tuple(shape)}, {a.dtype} and on {a.device}, "
                f"not {x.dtype} of shape {tuple(x.shape)} on {x.device}"
            )
