"""Adam on projected coordinates: one elementwise pass over gradient and moments that writes the direction."""

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch_shape
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

# added to a seed, so that the second moment is not rounded as the first one is
_APART = tl.constexpr(0x2545F491)
# of a matrix in the table: five pointers, the seed, and two float32 in one word
_LAYOUT, _WORDS = "6q2f", tl.constexpr(7)


@triton.jit(do_not_specialize=["seed"])
def adam_direction_kernel(
    grad_ptr,
    first_ptr,
    first_scale_ptr,
    second_ptr,
    second_scale_ptr,
    direction_ptr,
    table_ptr,
    numel,
    seed,
    beta1,
    beta2,
    weight1,
    weight2,
    ratio,
    eps,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    STORAGE: tl.constexpr,
    TABLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Advance both moments in place; direction = m / (√(v·ratio) + eps), the ratio and eps being those of `_unbiased`.

    With TABLE the program finds where its matrix is, its seed and both there, and the pointers tell types only.
    """
    # int64, so that coordinates of more than 2³¹ elements are addressed right
    start = tl.program_id(0).to(tl.int64) * (ROWS * SIZE)
    if TABLE:
        matrix = tl.program_id(1)
        row = table_ptr + matrix * _WORDS
        grad_ptr = tl.load(row).to(grad_ptr.dtype)
        first_ptr = tl.load(row + 1).to(first_ptr.dtype)
        second_ptr = tl.load(row + 2).to(second_ptr.dtype)
        first_scale_ptr = tl.load(row + 3).to(first_scale_ptr.dtype)
        second_scale_ptr = tl.load(row + 4).to(second_scale_ptr.dtype)
        if ALIGNED:
            grad_ptr = tl.multiple_of(grad_ptr, 16)
            first_ptr = tl.multiple_of(first_ptr, 16)
            second_ptr = tl.multiple_of(second_ptr, 16)
        seed = tl.load(row + 5).to(tl.int32)
        numbers = (row + 6).to(tl.pointer_type(tl.float32))
        ratio, eps = tl.load(numbers), tl.load(numbers + 1)
        direction_ptr += matrix.to(tl.int64) * numel
    left = tl.minimum(numel - start, ROWS * SIZE).to(tl.int32)
    inside = elements(ROWS, SIZE) < left
    grad = tl.load(grad_ptr + start + elements(ROWS, SIZE), mask=inside, other=0.0).to(tl.float32)
    first = read_moment(first_ptr, first_scale_ptr, start, left, beta1, ROWS, SIZE, STORAGE, True)
    second = read_moment(second_ptr, second_scale_ptr, start, left, beta2, ROWS, SIZE, STORAGE, False)
    # said which product is not rounded: two launches of other shapes get the same bits
    first = tl.fma(grad, weight1, first)
    second = tl.fma(weight2 * grad, grad, second)
    # a reciprocal is a square of this in a third of a division's instructions
    root = tl.rsqrt(tl.sqrt(second * ratio) + eps)
    direction = first * root * root
    direction = nearest(direction, direction_ptr.dtype.element_ty, INTERPRETED)
    tl.store(direction_ptr + start + elements(ROWS, SIZE), direction, mask=inside)
    write_moment(first_ptr, first_scale_ptr, first, start, left, seed, ROWS, SIZE, STORAGE, True)
    write_moment(second_ptr, second_scale_ptr, second, start, left, seed + _APART, ROWS, SIZE, STORAGE, False)


def adam_direction_(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    step: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Do as `reference.adam_direction_`, with a direction rounded once to `dtype`.

    `grad` may be of any strides and float dtype, the moments are contiguous float32.

    Raises:
        ValueError: for moments that are not contiguous float32 tensors of the gradient's shape, and another `dtype`
            than float32, bfloat16 or float16.
    """
    for moment in (exp_avg, exp_avg_sq):
        if moment.shape != grad.shape or moment.dtype != torch.float32 or not moment.is_contiguous():
            raise ValueError(
                f"the Triton Adam needs contiguous float32 moments of shape {tuple(grad.shape)}, "
                f"not {moment.dtype} of shape {tuple(moment.shape)} and strides {moment.stride()}"
            )
    direction = _room(grad.shape, dtype, grad)
    moments = (exp_avg, exp_avg, exp_avg_sq, exp_avg_sq)
    _launch(
        (grad.contiguous(), *moments, direction), None, grad.numel(), 0, betas, _unbiased(betas, eps, step), "float32"
    )
    return direction


def stored_adam_directions_(
    grads: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    *,
    state_dtype: str,
    betas: tuple[float, float],
    eps: float,
    steps: Sequence[int],
    seeds: Sequence[int],
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    launch: tuple[int, int] | None = None,
) -> list[Tensor]:
    """Do as `reference_moments.stored_adam_directions_`, for all matrices in one launch.

    Args:
        grads: of one shape and dtype (float32, bfloat16 or float16), and of any strides.
        states: of each, "exp_avg" and "exp_avg_sq" as `storage` keeps them, with their scales; updated in place.
        state_dtype: how: "float32", "bfloat16", "int8" or "int4".
        betas: decay of the two moments.
        eps: is added to the root of the second one.
        steps: of each, counting this one.
        seeds: of each, for what is rounded stochastically.
        scale: what directions are multiplied by, greater than 0.
        dtype: of the directions, which are rounded to it once: float32, bfloat16 or float16.
        launch: elements, a power of two from 256 on, and warps of one program; None goes by the table.

    Returns:
        The directions, contiguous and in one piece of memory.

    Raises:
        ValueError: for tensors that the kernel would misread.
    """
    kept = gradients(grads, len(states), len(steps), len(seeds))
    like = kept[0]
    firsts = moment_tensors(states, "exp_avg", like, state_dtype)
    seconds = moment_tensors(states, "exp_avg_sq", like, state_dtype, signed=False)
    directions = _room((len(kept), *like.shape), dtype, like)
    table, whole, count = None, True, len(kept)
    if count > 1:
        places, whole = pointers(kept, firsts[0], seconds[0])
        # scales are read one by one
        places += places[1:] if firsts[1] is firsts[0] else pointers(firsts[1], seconds[1])[0]
        of_step = {step: _unbiased(betas, eps, step, scale) for step in set(steps)}
        numbers = [of_step[step] for step in steps]
        table = device_table(
            zip(*places, map(wrapped, seeds), *zip(*numbers, strict=True), strict=True), _LAYOUT, like.device
        )
    tensors = (like, firsts[0][0], firsts[1][0], seconds[0][0], seconds[1][0], directions)
    unbiased = _unbiased(betas, eps, steps[0], scale)
    _launch(tensors, table, like.numel(), seeds[0], betas, unbiased, state_dtype, count, whole, launch)
    return list(directions.unbind())


def _launch(
    tensors: tuple[Tensor, ...],
    table: Tensor | None,
    numel: int,
    seed: int,
    betas: tuple[float, float],
    unbiased: tuple[float, float],
    state_dtype: str,
    count: int = 1,
    whole: bool = True,
    launch: tuple[int, int] | None = None,
) -> None:
    """Launch the kernel for the matrices in the table, or without one for these tensors."""
    if numel == 0:
        return
    grad = tensors[0]
    block, warps = launch or launch_shape(numel, interpreted=not grad.is_cuda, packed=state_dtype == "int4")
    size = ROWS_OF[state_dtype]
    # a kernel goes to the current device, which need not be the tensor's
    with torch.cuda.device(grad.get_device()):
        adam_direction_kernel[(triton.cdiv(numel, block), count)](
            *tensors,
            grad if table is None else table,
            numel,
            wrapped(seed),
            *betas,
            # the weights as the host rounds them: in float32 1 − 0.999 is off by 1e-5
            1 - betas[0],
            1 - betas[1],
            *unbiased,
            ROWS=block // size,
            SIZE=size,
            STORAGE=state_dtype,
            TABLE=table is not None,
            ALIGNED=whole,
            INTERPRETED=not grad.is_cuda,
            num_warps=warps,
        )


def _unbiased(betas: tuple[float, float], eps: float, step: int, scale: float = 1.0) -> tuple[float, float]:
    """Return c and e such that m / (√(c·v) + e) = scale · m̂ / (√v̂ + eps)."""
    mass = (1 - betas[0] ** step) / scale
    return mass * mass / (1 - betas[1] ** step), eps * mass


def _room(shape: Sequence[int], dtype: torch.dtype, like: Tensor) -> Tensor:
    if dtype not in DTYPES:
        raise ValueError(f"the Triton Adam needs a direction of float32, bfloat16 or float16, not {dtype}")
    return torch.empty(shape, dtype=dtype, device=like.device)
