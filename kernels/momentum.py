"""Momentum as it is kept, advanced and made into the normalized matrix that Newton–Schulz reads, in two passes."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import MOMENTUM_PARTS, launch_shape
from ._rounding import nearest, wrapped
from .moments import (
    DTYPES,
    ROWS_OF,
    device_table,
    elements,
    gradients,
    moment_tensors,
    pointers,
    read_moment,
    write_moment,
)
from .normalized import inverse_norm

# of a matrix in the table: three pointers and the seed
_LAYOUT, _WORDS = "4q", tl.constexpr(4)


@triton.jit
def _matrix(table_ptr, matrix, grad_ptr, kept_ptr, scale_ptr, ALIGNED: tl.constexpr):
    """Return where a matrix is, as pointers of the types of these."""
    row = table_ptr + matrix * _WORDS
    grad_ptr = tl.load(row).to(grad_ptr.dtype)
    kept_ptr = tl.load(row + 1).to(kept_ptr.dtype)
    if ALIGNED:
        grad_ptr = tl.multiple_of(grad_ptr, 16)
        kept_ptr = tl.multiple_of(kept_ptr, 16)
    return grad_ptr, kept_ptr, tl.load(row + 2).to(scale_ptr.dtype)


@triton.jit
def _advanced(
    grad_ptr,
    kept_ptr,
    scale_ptr,
    start,
    left,
    momentum,
    weight,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    STORAGE: tl.constexpr,
    NESTEROV: tl.constexpr,
):
    """Return M ← momentum·M + weight·G and the update: M, or momentum·M + weight·G once more."""
    inside = elements(ROWS, SIZE) < left
    grad = tl.load(grad_ptr + start + elements(ROWS, SIZE), mask=inside, other=0.0).to(tl.float32)
    moment = read_moment(kept_ptr, scale_ptr, start, left, momentum, ROWS, SIZE, STORAGE, True)
    # said which product is not rounded: both passes, and launches of other shapes, get the same bits
    moment = tl.fma(grad, weight, moment)
    return moment, tl.fma(grad, weight, momentum * moment) if NESTEROV else moment


@triton.jit(do_not_specialize=["parts", "steps"])
def momentum_squares_kernel(
    grad_ptr,
    kept_ptr,
    scale_ptr,
    sums_ptr,
    table_ptr,
    numel,
    parts,
    steps,
    momentum,
    weight,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    STORAGE: tl.constexpr,
    NESTEROV: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Store the sum of squares of the update over one part of a matrix; nothing is advanced yet.

    In float64 the squares of all float32 numbers are there, and none is infinite.
    """
    program = tl.program_id(0)
    grad_ptr, kept_ptr, scale_ptr = _matrix(table_ptr, program // parts, grad_ptr, kept_ptr, scale_ptr, ALIGNED)
    total = tl.zeros((ROWS, SIZE), dtype=tl.float64)
    for step in range(steps):
        # int64, so that matrices of more than 2³¹ elements are addressed right
        start = (program % parts * steps + step).to(tl.int64) * (ROWS * SIZE)
        left = tl.minimum(numel - start, ROWS * SIZE).to(tl.int32)
        _, update = _advanced(
            grad_ptr, kept_ptr, scale_ptr, start, left, momentum, weight, ROWS, SIZE, STORAGE, NESTEROV
        )
        wide = update.to(tl.float64)
        total += wide * wide
    tl.store(sums_ptr + program, tl.sum(tl.sum(total, axis=1), axis=0))


@triton.jit(do_not_specialize=["parts", "steps"])
def momentum_kernel(
    grad_ptr,
    kept_ptr,
    scale_ptr,
    sums_ptr,
    out_ptr,
    table_ptr,
    numel,
    parts,
    steps,
    momentum,
    weight,
    eps,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    STORAGE: tl.constexpr,
    NESTEROV: tl.constexpr,
    ALIGNED: tl.constexpr,
    PARTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Keep the momentum of one part of a matrix; out = U / max(‖U‖, eps) of its update U."""
    # backwards, as the last that was read before is still in the cache
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    matrix = program // parts
    grad_ptr, kept_ptr, scale_ptr = _matrix(table_ptr, matrix, grad_ptr, kept_ptr, scale_ptr, ALIGNED)
    seed = tl.load(table_ptr + matrix * _WORDS + 3).to(tl.int32)
    out_ptr += matrix.to(tl.int64) * numel
    power, rest = inverse_norm(sums_ptr + matrix * parts, parts, eps, PARTS)
    for step in range(steps):
        start = (program % parts * steps + steps - 1 - step).to(tl.int64) * (ROWS * SIZE)
        left = tl.minimum(numel - start, ROWS * SIZE).to(tl.int32)
        moment, update = _advanced(
            grad_ptr, kept_ptr, scale_ptr, start, left, momentum, weight, ROWS, SIZE, STORAGE, NESTEROV
        )
        out = nearest(update * power * rest, out_ptr.dtype.element_ty, INTERPRETED)
        tl.store(out_ptr + start + elements(ROWS, SIZE), out, mask=elements(ROWS, SIZE) < left)
        write_moment(kept_ptr, scale_ptr, moment, start, left, seed, ROWS, SIZE, STORAGE, True)


def normalized_momenta_(
    grads: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    *,
    state_dtype: str,
    momentum: float,
    nesterov: bool,
    form: Literal["ema", "sum"],
    eps: float,
    seeds: Sequence[int],
    dtype: torch.dtype,
    launch: tuple[int, int] | None = None,
    parts: int = MOMENTUM_PARTS,
) -> Tensor:
    """Do as `reference_moments.normalized_momenta_`, for all matrices in two launches.

    Norms are those of exact sums whatever the magnitudes, and are never infinite for a finite update; an infinite one
    is NaN in the result, among zeros.

    Args:
        grads: of one shape and dtype (float32, bfloat16 or float16), and of any strides.
        states: of each, "momentum_buffer" as `storage` keeps it, with its scales; updated in place.
        state_dtype: how: "float32", "bfloat16", "int8" or "int4".
        momentum: β.
        nesterov: whether to look ahead.
        form: M ← βM + (1−β)G ("ema") or M ← βM + G ("sum").
        eps: the least norm that is divided by.
        seeds: of each, for what is rounded stochastically.
        dtype: of the result, which is rounded to it once: float32, bfloat16 or float16.
        launch: elements, a power of two from 256 on, and warps of one program's tile; None goes by the table.
        parts: into how many programs a matrix is cut at most, no more than by the table.

    Returns:
        The updates over their norms, (number of matrices, *shape).

    Raises:
        ValueError: for tensors that the kernels would misread, and another `form`.
    """
    if form not in ("ema", "sum"):
        raise ValueError(f"form must be 'ema' or 'sum', not {form!r}")
    if dtype not in DTYPES:
        raise ValueError(f"the Triton momentum needs a result of float32, bfloat16 or float16, not {dtype}")
    contiguous = gradients(grads, len(states), len(seeds))
    like = contiguous[0]
    numel, count = like.numel(), len(contiguous)
    kept = moment_tensors(states, "momentum_buffer", like, state_dtype)
    out = torch.empty((count, *like.shape), dtype=dtype, device=like.device)
    if numel == 0:
        return out
    places, whole = pointers(contiguous, kept[0])
    scales, _ = pointers(kept[1])
    table = device_table(zip(*places, *scales, map(wrapped, seeds), strict=True), _LAYOUT, like.device)
    block, warps = launch or launch_shape(numel, interpreted=not like.is_cuda)
    blocks = triton.cdiv(numel, block)
    steps = triton.cdiv(blocks, min(parts, MOMENTUM_PARTS))
    parts = triton.cdiv(blocks, steps)
    sums = torch.empty(count * parts, dtype=torch.float64, device=like.device)
    cut = (table, numel, parts, steps, momentum, 1 - momentum if form == "ema" else 1.0)
    constants = {"ROWS": block // ROWS_OF[state_dtype], "SIZE": ROWS_OF[state_dtype], "STORAGE": state_dtype}
    constants |= {"NESTEROV": nesterov, "ALIGNED": whole}
    grid = (count * parts,)
    # a kernel goes to the current device, which need not be the tensor's
    with torch.cuda.device(like.get_device()):
        momentum_squares_kernel[grid](like, kept[0][0], kept[1][0], sums, *cut, **constants, num_warps=warps)
        # a norm of float32 numbers is 0 or at least the smallest of them
        least = max(eps, 2.0**-149)
        constants |= {"PARTS": MOMENTUM_PARTS, "INTERPRETED": not like.is_cuda}
        momentum_kernel[grid](like, kept[0][0], kept[1][0], sums, out, *cut, least, **constants, num_warps=warps)
    return out
