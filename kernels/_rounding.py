"""How float32 numbers become those of a shorter format: to the nearest, or up or down by chance; see `reference`."""

import torch
import triton
import triton.language as tl

# what kernels read and write
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# the constants of `reference.noise`, as int32 has them
_FIRST = tl.constexpr(0x9E3779B1 - (1 << 32))
_SECOND = tl.constexpr(0x7FEB352D)


def wrapped(seed: int) -> int:
    """Return the int32 that is `seed` modulo 2³²: all that `noise` sees of it, and of one type for every seed."""
    return (seed + (1 << 31)) % (1 << 32) - (1 << 31)


@triton.jit
def noise(seed, index):
    """Return int32 that look random in bits 0 to 22: the bits of `reference.noise` at element `index` of `seed`."""
    bits = (seed + index).to(tl.int32) * _FIRST
    # the sign is shifted in, as it is there
    return (bits ^ (bits >> 15)) * _SECOND


@triton.jit
def nearest(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """Round float32 to the nearest number of `dtype`, to even where two are as near."""
    if INTERPRETED and dtype == tl.bfloat16:
        # the interpreter cuts bits off where hardware rounds
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # rounding would carry the bits of some NaN into the sign
        return tl.where(x == x, bits, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def _dropped(x, bits, LOW: tl.constexpr):
    """Return the bits of `x` after those of noise were added to the ones in LOW, which then are zero; Inf stays."""
    own = x.to(tl.int32, bitcast=True)
    low = tl.where((own & 0x7F800000) == 0x7F800000, 0, LOW)
    return (own + (bits & low)) & ~low


@triton.jit
def stochastic(x, dtype: tl.constexpr, seed, index):
    """Round float32 up or down to a neighbour in `dtype` as `reference.rounded_` does; float32 stays as it is."""
    if dtype == tl.bfloat16:
        bits = _dropped(x, noise(seed, index), 0xFFFF) >> 16
        # a NaN whose payload is cut off would be Inf; and a cast is no way out: the interpreter's loses small numbers
        return tl.where(x == x, bits, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    elif dtype == tl.float16:
        # below the smallest normal number, float16 has the spacing of the next binade: there, add it and take it off
        # again
        shift = tl.where(tl.abs(x) < 6.103515625e-05, tl.where(x < 0, -6.103515625e-05, 6.103515625e-05), 0.0)
        bits = _dropped(x + shift, noise(seed, index), 0x1FFF)
        return (bits.to(tl.float32, bitcast=True) - shift).to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def rounded(x, dtype: tl.constexpr, seed, index, STOCHASTIC: tl.constexpr, INTERPRETED: tl.constexpr):
    """Round float32 to `dtype`, by chance or to the nearest."""
    if STOCHASTIC:
        return stochastic(x, dtype, seed, index)
    else:
        return nearest(x, dtype, INTERPRETED)
