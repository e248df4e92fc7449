"""Adam along chosen columns of a fixed basis: one pass that moves both moments, advances them, writes the direction."""

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import ChosenTile, architecture, chosen_tile
from ._rounding import nearest
from .adam import _room, _unbiased
from .moments import DTYPES, device_table, moment_tensors, pointers

# of a matrix in the table: four pointers, and two float32 in one word
_LAYOUT, _WORDS = "4q2f", tl.constexpr(5)


@triton.jit
def _spread(along, others, DOWN: tl.constexpr):
    """Return a vector of the rank and one of the other side as they are broadcast to a tile."""
    if DOWN:
        return along[:, None], others[None, :]
    else:
        return along[None, :], others[:, None]


@triton.jit
def chosen_adam_kernel(
    value_ptr,
    first_ptr,
    second_ptr,
    index_ptr,
    place_ptr,
    direction_ptr,
    table_ptr,
    r,
    others,
    value_along,
    value_others,
    beta1,
    beta2,
    weight1,
    weight2,
    ratio,
    eps,
    scale,
    ALONG: tl.constexpr,
    OTHERS: tl.constexpr,
    DOWN: tl.constexpr,
    SPLIT: tl.constexpr,
    TABLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Advance the moments of OTHERS rows, or columns if DOWN; direction = scale·m / (√(v·ratio) + eps).

    Columns keep their order. So where not all are there at once (SPLIT), first those that move towards the front, or
    nowhere, are gone through from the front; then those that move back, and new ones, from the back: whatever is
    overwritten has been read, or is not wanted.

    With TABLE the program finds where its matrix is and both numbers there, and the pointers tell types only.
    """
    # int64, as are all products of scalars with a stride
    begin = tl.program_id(0).to(tl.int64) * OTHERS
    if TABLE:
        matrix = tl.program_id(1)
        row = table_ptr + matrix * _WORDS
        value_ptr = tl.load(row).to(value_ptr.dtype)
        first_ptr = tl.load(row + 1).to(first_ptr.dtype)
        second_ptr = tl.load(row + 2).to(second_ptr.dtype)
        index_ptr = tl.load(row + 3).to(index_ptr.dtype)
        if ALIGNED:
            value_ptr = tl.multiple_of(value_ptr, 16)
            first_ptr = tl.multiple_of(first_ptr, 16)
            second_ptr = tl.multiple_of(second_ptr, 16)
            index_ptr = tl.multiple_of(index_ptr, 16)
        numbers = (row + 4).to(tl.pointer_type(tl.float32))
        ratio, eps = tl.load(numbers), tl.load(numbers + 1)
        place_ptr += matrix.to(tl.int64) * r
        direction_ptr += matrix.to(tl.int64) * others * r
    other = tl.arange(0, OTHERS)
    left = tl.minimum(others - begin, OTHERS).to(tl.int32)
    value_ptr += begin * value_others
    start = begin if DOWN else begin * r
    first_ptr += start
    second_ptr += start
    direction_ptr += start
    tiles = tl.cdiv(r, ALONG)
    for turn in range(0, 2 * tiles if SPLIT else 1):
        back = turn >= tiles
        j = tl.where(back, 2 * tiles - 1 - turn, turn) * ALONG + tl.arange(0, ALONG)
        here = j < r
        place = tl.load(place_ptr + j, mask=here, other=-1)
        if SPLIT:
            here = here & ((place < j) == back)
        index = tl.load(index_ptr + j, mask=here, other=0)
        here_j, here_other = _spread(here, other < left, DOWN)
        inside = here_j & here_other
        stays, _ = _spread(here & (place >= 0), other, DOWN)
        if DOWN:
            source, _ = _spread(place.to(tl.int64) * others, other, DOWN)
            target, along_other = _spread(j.to(tl.int64) * others, other, DOWN)
        else:
            source, along_other = _spread(place, other * r, DOWN)
            target, _ = _spread(j, other, DOWN)
        first = tl.load(first_ptr + (source + along_other), mask=stays & here_other, other=0.0)
        second = tl.load(second_ptr + (source + along_other), mask=stays & here_other, other=0.0)
        value_j, value_other = _spread(index.to(tl.int64) * value_along, other.to(tl.int64) * value_others, DOWN)
        grad = tl.load(value_ptr + (value_j + value_other), mask=inside, other=0.0)
        grad = grad.to(tl.float32)
        # said which product is not rounded: two launches of other shapes get the same bits
        first = tl.fma(grad, weight1, beta1 * first)
        second = tl.fma(weight2 * grad, grad, beta2 * second)
        # a reciprocal is a square of this in a third of a division's instructions
        root = tl.rsqrt(tl.sqrt(second * ratio) + eps)
        direction = scale * (first * root * root)
        direction = nearest(direction, direction_ptr.dtype.element_ty, INTERPRETED)
        # all of the program have read what it is about to overwrite
        tl.debug_barrier()
        tl.store(first_ptr + (target + along_other), first, mask=inside)
        tl.store(second_ptr + (target + along_other), second, mask=inside)
        tl.store(direction_ptr + (target + along_other), direction, mask=inside)


def chosen_adam_directions_(
    coefficients: Sequence[Tensor] | Tensor,
    states: Sequence[Mapping[str, Tensor]],
    places: Tensor,
    *,
    dim: int,
    betas: tuple[float, float],
    eps: float,
    steps: Sequence[int],
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    tile: ChosenTile | None = None,
) -> list[Tensor]:
    """Do as `reference_columns.chosen_adam_directions_`, for all matrices in one launch.

    Args:
        coefficients: of one shape and dtype, float32, bfloat16 or float16; or all of them, (k, m, n). Copied if they
            differ in strides, or are contiguous along neither dimension, or with dim -1 not along the last one.
        states: of each, "basis_index", int32, and "exp_avg" and "exp_avg_sq", float32, all contiguous; both moments are
            updated in place.
        places: (k, r) of int32, contiguous. Along it what is not -1 increases, and is below r.
        dim: -1 where the rank is the columns of coordinates, -2 where it is the rows.
        betas: decay of the two moments.
        eps: is added to the root of the second one.
        steps: of each, counting this one.
        scale: of the directions.
        dtype: of the directions, which are rounded to it once: float32, bfloat16 or float16.
        tile: what one program does at once, powers of two; None goes by the table.

    Returns:
        The directions, contiguous and in one piece of memory.

    Raises:
        ValueError: for tensors that the kernel would misread.
    """
    count = len(coefficients)
    _check(coefficients, states, places, dim, steps)
    r, down = places.size(1), dim == -2
    others = coefficients[0].size(1 if down else 0)
    directions = _room((count, r, others) if down else (count, others, r), dtype, places)
    firsts, _ = moment_tensors(states, "exp_avg", directions[0], "float32")
    seconds, _ = moment_tensors(states, "exp_avg_sq", directions[0], "float32")
    if directions.numel() == 0:
        return list(directions.unbind())
    indices = [state["basis_index"] for state in states]
    values = _readable(coefficients, dim)
    table, whole = None, True
    if count > 1:
        found, whole = pointers(values, firsts, seconds, indices)
        numbers = [_unbiased(betas, eps, step) for step in steps]
        table = device_table(zip(*found, *zip(*numbers, strict=True), strict=True), _LAYOUT, places.device)
    tile = tile or chosen_tile(r, dim, 64 if architecture(places.device) == "gfx942" else 32)
    # a kernel goes to the current device, which need not be the tensor's
    with torch.cuda.device(places.get_device()):
        chosen_adam_kernel[(triton.cdiv(others, tile.others), count)](
            values[0],
            firsts[0],
            seconds[0],
            indices[0],
            places,
            directions,
            places if table is None else table,
            r,
            others,
            values[0].stride(dim),
            values[0].stride(-3 - dim),
            *betas,
            # the weights as the host rounds them: in float32 1 − 0.999 is off by 1e-5
            1 - betas[0],
            1 - betas[1],
            *_unbiased(betas, eps, steps[0]),
            float(scale),
            ALONG=tile.along,
            OTHERS=tile.others,
            DOWN=down,
            SPLIT=r > tile.along,
            TABLE=table is not None,
            ALIGNED=whole,
            INTERPRETED=not places.is_cuda,
            num_warps=tile.warps,
            # nothing is read before what is before it is written
            num_stages=1,
        )
    return list(directions.unbind())


def _readable(coefficients: Sequence[Tensor] | Tensor, dim: int) -> Sequence[Tensor] | Tensor:
    """Return coefficients of the same strides that are contiguous along one dimension, these or copies."""
    strides = coefficients[0].stride()
    contiguous = strides[-1] == 1 or (dim == -2 and strides[0] == 1)
    if isinstance(coefficients, Tensor):
        return coefficients if contiguous else coefficients.contiguous()
    if contiguous and all(x.stride() == strides for x in coefficients):
        return coefficients
    return [x.contiguous() for x in coefficients]


def _check(
    coefficients: Sequence[Tensor] | Tensor,
    states: Sequence[Mapping[str, Tensor]],
    places: Tensor,
    dim: int,
    steps: Sequence[int],
) -> None:
    count = len(coefficients)
    if count == 0 or {len(states), len(steps)} != {count} or dim not in (-1, -2):
        raise ValueError(
            "the Triton Adam of chosen columns needs as much of everything, and some, and dim -1 or -2, "
            f"not {count}, {len(states)}, {len(steps)} and {dim}"
        )
    like = coefficients[0]
    shape, device, r = like.shape, like.device, states[0]["basis_index"].numel()
    # parts of one tensor are alike
    for x in [like] if isinstance(coefficients, Tensor) else coefficients:
        if x.dim() != 2 or x.shape != shape or x.dtype != like.dtype or x.dtype not in DTYPES or x.device != device:
            raise ValueError(
                "the Triton Adam of chosen columns needs matrices of one shape and of float32, bfloat16 or float16, "
                f"not {x.dtype} of shape {tuple(x.shape)} on {x.device} after {tuple(shape)} on {device}"
            )
    wanted = [("basis_index", state["basis_index"], (r,)) for state in states] + [("places", places, (count, r))]
    for name, x, size in wanted:
        if x.shape != size or x.dtype != torch.int32 or x.device != device or not x.is_contiguous():
            raise ValueError(
                f"the Triton Adam of chosen columns needs contiguous torch.int32 {name} of shape {tuple(size)} on "
                f"{device}, not {x.dtype} of shape {tuple(x.shape)} and strides {x.stride()} on {x.device}"
            )
