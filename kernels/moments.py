"""Moments as `lowrank_optim.storage` keeps them: read into registers as float32 and written back, for any kernel."""

import struct
from collections.abc import Iterable, Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rounding import DTYPES as DTYPES
from ._rounding import noise, stochastic

# by what a moment is kept in: how many elements are a row of a program's tile, which where there are scales share one
ROWS_OF = {"float32": 256, "bfloat16": 256, "int8": 256, "int4": 64}

_KEPT = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "int8": (torch.int8, torch.uint8),
    "int4": (torch.int8, torch.uint8),
}
# from here to its double float32 are the whole numbers: its bits plus a small one are that much more, and something
# added to it is rounded. GPUs convert at a quarter of the rate, or an eighth
_WHOLE, _WHOLE_BITS = tl.constexpr(8388608.0), tl.constexpr(0x4B000000)
# the bits of the smallest normal float32
_TINY = tl.constexpr(0x00800000)


@triton.jit
def elements(ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Return the numbers of a tile's elements, (ROWS, SIZE)."""
    return tl.arange(0, ROWS)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]


@triton.jit
def read_moment(
    kept_ptr,
    scale_ptr,
    start,
    left,
    factor,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    STORAGE: tl.constexpr,
    SIGNED: tl.constexpr,
):
    """Return float32 (ROWS, SIZE), `factor` times the moment from element `start` on, zeros from `start + left` on.

    What is computed is that of `reference.dequantize_` and `reference.unpack`.
    """
    inside = elements(ROWS, SIZE) < left
    if STORAGE == "float32":
        return tl.load(kept_ptr + start + elements(ROWS, SIZE), mask=inside, other=0.0) * factor
    elif STORAGE == "bfloat16":
        kept = tl.load(kept_ptr + start + elements(ROWS, SIZE), mask=inside, other=0.0)
        # a cast is no more than this, but the interpreter's loses the smallest numbers
        return (kept.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True) * factor
    else:
        if STORAGE == "int8":
            codes = tl.load(kept_ptr + start + elements(ROWS, SIZE), mask=inside, other=0).to(tl.int32) & 255
        else:
            pairs, left_pairs = elements(ROWS, SIZE // 2), left - left // 2
            pair = tl.load(kept_ptr + start // 2 + pairs, mask=pairs < left_pairs, other=0)
            # without a sign nothing comes down that would have to be cut off
            pair = pair.to(tl.uint8, bitcast=True).to(tl.int32)
            # the even code is the low half
            codes = tl.reshape(tl.join(pair & 15, pair >> 4), (ROWS, SIZE))
        rows = tl.arange(0, ROWS)
        scale = tl.load(scale_ptr + start // SIZE + rows, mask=rows * SIZE < left, other=0.0)
        # the largest code
        levels: tl.constexpr = (256 if STORAGE == "int8" else 16) // (2 if SIGNED else 1) - 1
        if SIGNED:
            # from -half on, as numbers from 0 on
            half: tl.constexpr = levels + 1
            value = ((codes ^ half) | _WHOLE_BITS).to(tl.float32, bitcast=True) - (_WHOLE + half)
            value = value * tl.abs(value) * (1.0 / (levels * levels))
        else:
            value = (codes | _WHOLE_BITS).to(tl.float32, bitcast=True) - _WHOLE
            value *= 1.0 / levels
            value *= value
            if STORAGE == "int8":
                value *= value
        # once for all that share the scale; the largest of them is exactly that times the factor
        return value * (scale * factor)[:, None]


@triton.jit
def write_moment(
    kept_ptr,
    scale_ptr,
    value,
    start,
    left,
    seed,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    STORAGE: tl.constexpr,
    SIGNED: tl.constexpr,
):
    """Keep float32 `value` (ROWS, SIZE) as the moment's elements from `start` on, of which there are `left`.

    What is computed is that of `reference.quantize_`, `reference.pack_` and `reference.rounded_`.
    """
    inside = elements(ROWS, SIZE) < left
    at = start + elements(ROWS, SIZE)
    if STORAGE == "float32":
        tl.store(kept_ptr + at, value, mask=inside)
    elif STORAGE == "bfloat16":
        rounded = stochastic(value, tl.bfloat16, seed, start.to(tl.int32) + elements(ROWS, SIZE))
        tl.store(kept_ptr + at, rounded, mask=inside)
    else:
        # beyond the end there are zeros, or NaN in a block that is not finite before it either; as unsigned integers
        # magnitudes have the same order, and NaN is the largest, with any sign
        bits = value.to(tl.uint32, bitcast=True)
        if SIGNED:
            bits = bits & 0x7FFFFFFF
        scale = tl.maximum(tl.max(bits, axis=1), _TINY).to(tl.float32, bitcast=True)
        rows = tl.arange(0, ROWS)
        tl.store(scale_ptr + start // SIZE + rows, scale, mask=rows * SIZE < left)
        ratio = bits.to(tl.float32, bitcast=True) * (1.0 / scale)[:, None]
        # the largest code
        levels: tl.constexpr = (256 if STORAGE == "int8" else 16) // (2 if SIGNED else 1) - 1
        # a maximum with NaN is the other number: where the scale says NaN or Inf, the code says nothing
        if SIGNED:
            # the middle of k² and (k + 1)² is (k + 1/2)² + 1/4; what is below 0 has a root below 1/2, if not by much
            size = tl.sqrt(tl.abs(ratio * (levels * levels) - 0.249999))
            sign = value.to(tl.int32, bitcast=True) & -0x80000000
            size = (size.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
            # half more, so that the sum with a negative one is whole too
            size += _WHOLE * 1.5
        else:
            root = tl.sqrt(ratio)
            if STORAGE == "int8":
                root = tl.sqrt(root)
            # uniform in [-1/2, 1/2), away from both ends: `reference.dither`, and rounding to nearest for rounding down
            up = noise(seed, start.to(tl.int32) + elements(ROWS, SIZE)) & 0x7FF800 | 0x3F800400
            size = root * levels + (up.to(tl.float32, bitcast=True) - 1.5)
            # what is not zero does not become zero
            size = tl.maximum(size, tl.where(ratio > 0, 1.0, 0.0))
            if STORAGE == "int8":
                # by less than what there is to the next one, a device's root may lead past the last of so many
                size = tl.minimum(size, levels)
            size += _WHOLE
        # the low bits, in two's complement
        codes = size.to(tl.int32, bitcast=True)
        if STORAGE == "int8":
            tl.store(kept_ptr + at, codes.to(kept_ptr.dtype.element_ty), mask=inside)
        else:
            pairs, left_pairs = elements(ROWS, SIZE // 2), left - left // 2
            low, high = tl.split(tl.reshape(codes, (ROWS, SIZE // 2, 2)))
            if SIGNED:
                low = low & 15
            # of the others nothing but the code is in the lowest eight bits
            pair = (low + (high << 4)).to(kept_ptr.dtype.element_ty)
            tl.store(kept_ptr + start // 2 + pairs, pair, mask=pairs < left_pairs)


def moment_tensors(
    states: Sequence[Mapping[str, Tensor]], name: str, like: Tensor, state_dtype: str, *, signed: bool = True
) -> tuple[list[Tensor], list[Tensor]]:
    """Return what is kept of each state's moment `name` of the shape of `like`, and its scales or the same again.

    Raises:
        ValueError: for another `state_dtype`, or tensors that a kernel would misread.
    """
    if state_dtype not in _KEPT:
        raise ValueError(f"state_dtype must be one of {', '.join(map(repr, _KEPT))}, not {state_dtype!r}")
    numel, device = like.numel(), like.device
    shape = like.shape if state_dtype != "int4" else torch.Size((-(-numel // 2),))
    wanted = [(name, shape, _KEPT[state_dtype][not signed])]
    if state_dtype in ("int8", "int4"):
        wanted.append((f"{name}_scale", torch.Size((-(-numel // ROWS_OF[state_dtype]),)), torch.float32))
    found = []
    for key, shape, dtype in wanted:
        column = [state[key] for state in states]
        for x in column:
            if x.shape != shape or x.dtype != dtype or x.device != device or not x.is_contiguous():
                raise ValueError(
                    f"a Triton kernel of {state_dtype} moments needs contiguous {dtype} {key} of shape {tuple(shape)} "
                    f"on {device}, not {x.dtype} of shape {tuple(x.shape)} and strides {x.stride()} on {x.device}"
                )
        found.append(column)
    return found[0], found[-1]


def gradients(grads: Sequence[Tensor], *lengths: int) -> list[Tensor]:
    """Return the gradients contiguous.

    Raises:
        ValueError: for none, for other than `lengths` of them, or where shapes, dtypes or devices differ.
    """
    if not grads or any(length != len(grads) for length in lengths):
        raise ValueError(
            f"a Triton kernel of moments needs as much of everything, and some, not {len(grads)}, {lengths}"
        )
    like = grads[0]
    shape, dtype, device = like.shape, like.dtype, like.device
    for grad in grads:
        if grad.shape != shape or grad.dtype != dtype or grad.device != device:
            raise ValueError(
                f"a Triton kernel of many moments needs gradients of shape {tuple(shape)}, {dtype} and on "
                f"{device}, not {grad.dtype} of shape {tuple(grad.shape)} on {grad.device}"
            )
    if like.dtype not in DTYPES:
        raise ValueError(f"a Triton kernel of moments needs float32, bfloat16 or float16 gradients, not {like.dtype}")
    return [grad.contiguous() for grad in grads]


def pointers(*columns: Sequence[Tensor] | Tensor) -> tuple[list[list[int]], bool]:
    """Return where tensors are, or the parts of one, and whether all of them can be read 16 bytes at a time."""
    found = [_parts_at(column) if isinstance(column, Tensor) else [x.data_ptr() for x in column] for column in columns]
    return found, not any(pointer % 16 for column in found for pointer in column)


def _parts_at(x: Tensor) -> list[int]:
    start, step = x.data_ptr(), x.stride(0) * x.itemsize
    return [start + i * step for i in range(len(x))]


def device_table(rows: Iterable[tuple[int | float, ...]], layout: str, device: torch.device) -> Tensor:
    """Return rows of `layout`, a format of `struct` in words of 8 bytes, as int64 on the device, without waiting."""
    pack = struct.Struct("=" + layout).pack
    table = torch.frombuffer(bytearray().join(pack(*row) for row in rows), dtype=torch.int64)
    # pinned memory is not used again before the copy is done
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
