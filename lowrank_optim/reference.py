"""The mathematics in plain torch. Kernels are tested against this file; nothing here knows of kernels.

A trailing underscore marks what is written in place. Scalars are Python numbers, so nothing here waits for a device.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

# odd constants that mix well: the golden ratio's, and one of Wellons' lowbias32
_MIX = (0x9E3779B1, 0x7FEB352D)
# counters are made in rows of this length, from one sum of a column and a row
_ROW = 256


def adam_direction_(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, betas: tuple[float, float], eps: float, step: int | Tensor
) -> Tensor:
    """Advance both moments in place and return m̂ / (√v̂ + ε); one temporary of the size of `grad`.

    `step` is a number, or a tensor of them that is broadcast: each row or column with its own.
    """
    beta1, beta2 = betas
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    direction = (exp_avg_sq / _unbias(beta2, step)).sqrt_().add_(eps)
    return direction.reciprocal_().mul_(exp_avg).mul_(1 / _unbias(beta1, step))


def _unbias(beta: float, step: int | Tensor) -> float | Tensor:
    """Return 1 − βᵗ; of tensors without the cancellation that it has in float32."""
    if isinstance(step, Tensor):
        return torch.expm1(step * math.log(beta)).neg_() if beta else torch.ones_like(step)
    return 1 - beta**step


def signs(count: int, seed: int, like: Tensor) -> Tensor:
    """Return random numbers ±1 from a generator of our own."""
    source = torch.Generator(like.device).manual_seed(seed)
    bits = torch.randint(2, (count,), generator=source, dtype=like.dtype, device=like.device)
    return bits.mul_(2).sub_(1)


def normal(shape: tuple[int, ...], seed: int, like: Tensor) -> Tensor:
    """Return standard normal numbers from a generator of our own, so that nobody else's numbers change."""
    source = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(shape, generator=source, dtype=like.dtype, device=like.device)


def stacks(xs: list[Tensor]) -> list[Tensor]:
    """Return tensors whose parts along a new first dimension are these, in order, without a copy.

    Where all parts of a tensor follow one another it is that one, so that one operation does for all of them.
    """
    found: list[Tensor] = []
    while xs:
        base = xs[0]._base
        count = base.size(0) if base is not None and base.dim() == xs[0].dim() + 1 else 0
        whole = base if base is not None and count and _parts_of(base, xs[:count]) else xs[0].unsqueeze(0)
        found.append(whole)
        xs = xs[len(whole) :]
    return found


def _parts_of(base: Tensor, xs: list[Tensor]) -> bool:
    """Tell whether these are the parts of a tensor along its first dimension, all of them and in order."""
    start, step = base.storage_offset(), base.stride(0)
    like = base.shape[1:], base.stride()[1:]
    parts = ((x._base is base, (x.shape, x.stride()), x.storage_offset()) for x in xs)
    return len(xs) == base.size(0) and all(part == (True, like, start + i * step) for i, part in enumerate(parts))


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return A B in float32; where one is of 16 bits the other is rounded to those first."""
    dtype = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    return a.to(dtype).to(torch.float32) @ b.to(dtype).to(torch.float32)


def orthonormalize(x: Tensor) -> Tensor:
    """Return Q of the QR decomposition of `x` (..., m, r) whose R has a nonnegative diagonal.

    That choice makes Q unique, so a basis that hardly moves is not told so with flipped signs.
    """
    q, r = torch.linalg.qr(x)
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
    return torch.mul(q, signs.unsqueeze(-2))


def unit(x: Tensor) -> Tensor:
    """Return `x` over its Frobenius norm, so that products of tiny gradients do not underflow."""
    tiny = torch.finfo(x.dtype).tiny
    return torch.div(x, torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=tiny))


def dct(x: Tensor, dim: int) -> Tensor:
    """Return the orthonormal DCT-II of `x` along one dimension of n elements."""
    waves = half_spectrum(x, dim)
    # the upper half are the imaginary parts, backwards
    upper = waves.imag.narrow(dim, 1, (x.size(dim) - 1) // 2).flip(dim).neg_()
    return torch.cat([waves.real, upper], dim)


def half_spectrum(x: Tensor, dim: int, out: Tensor | None = None) -> Tensor:
    """Return the DCT-II as one real FFT of n has it (Makhoul, 1980), n//2 + 1 numbers; see `spectrum_places`."""
    order, turns = _makhoul(x.size(dim), x.dtype, x.device)
    shape = [1] * x.dim()
    shape[dim] = -1
    return torch.mul(torch.fft.rfft(x.index_select(dim, order), dim=dim), turns.view(shape), out=out)


@functools.cache
def spectrum_places(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return where each DCT-II coefficient is among the numbers of `half_spectrum` and the sign that it needs there.

    Coefficient k ≤ n/2 is the real part of number k, coefficient n − k less its imaginary part.
    """
    k = torch.arange(n, device="cpu")
    upper = 2 * k > n
    place = torch.where(upper, 2 * (n - k) + 1, 2 * k)
    return place.to(device), torch.where(upper, -1.0, 1.0).to(device, dtype)


def part_size(device: torch.device) -> int:
    """Return how many elements of a large tensor to work on at once: temporaries stay small, on a CPU in its cache."""
    return min(torch.get_num_threads(), 2) << 18 if device.type == "cpu" else 1 << 21


def noise(numel: int, seeds: Sequence[int], device: torch.device) -> Tensor:
    """Return (len(seeds), numel) int32 that look random in bits 0 to 22: counters that start at the seeds, hashed.

    No generator is kept or read, every device gives the same bits, and a tensor may be taken in parts: element i of
    `seed` is element 0 of `seed + i`.
    """
    first, second = _MIX
    rows = torch.arange(-(-numel // _ROW), dtype=torch.int32, device=device).mul_(_wrapped(_ROW * first))
    starts = [rows + _wrapped(seed * first) for seed in seeds]
    counts = torch.stack(starts) if len(starts) > 1 else starts[0].unsqueeze(0)
    bits = counts.unsqueeze(-1) + torch.arange(_ROW, dtype=torch.int32, device=device).mul_(_wrapped(first))
    return bits.bitwise_xor_(bits >> 15).mul_(_wrapped(second)).flatten(1)[:, :numel]


def rounded_(x: Tensor, dtype: torch.dtype, seeds: Sequence[int]) -> Tensor:
    """Round float32 `x` up or down to a neighbour in bfloat16 or float16, so that the mean is `x`; may work in place.

    What `dtype` holds exactly, infinities and NaN stay as they are, and so does all of `x` for another `dtype`. Each
    `x[i]` is rounded by `seeds[i]`, or all of it by the only one.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return x
    x = x.contiguous()
    size = part_size(x.device)
    flat = x.view(len(seeds), -1)
    for start in range(0, flat.size(1), size):
        part = flat[:, start : start + size]
        (_round_bfloat16_ if dtype == torch.bfloat16 else _round_float16_)(part, [seed + start for seed in seeds])
    return x


def quantize_(codes: Tensor, scale: Tensor, x: Tensor, *, dither: Tensor | None, levels: int, root: int) -> None:
    """codes ← levels·(|x| / scale)^(1/root), rounded, with the sign of x; scale ← max |x|; `x` is scratch afterwards.

    Without a dither codes are signed (int8, root 2), those whose numbers are nearest to x. With it they are unsigned
    (uint8, for x ≥ 0) and rounded stochastically, and what is not zero does not become zero. Where there is a NaN or
    Inf among the numbers that share a scale, they all read back as NaN and Inf.

    Args:
        codes: (..., size).
        scale: (...), float32.
        x: (..., size), float32.
        dither: (..., size), numbers in [0, 1), scratch afterwards; see `dither`.
        levels: the largest code.
        root: 2 or 4. Small magnitudes get finer steps: Adam divides each by its own root mean square.
    """
    y = x.abs() if dither is None else x
    torch.amax(y, dim=-1, out=scale)
    # no division by zero, and none by numbers that a device may take for zero
    largest = scale.clamp_(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    if dither is None:
        # the middle of k² and (k + 1)² is (k + 1/2)² + 1/4
        quarter = torch.full((), -0.25, device=x.device)
        torch.add(quarter, y.div_(largest), alpha=levels**2, out=y)
        y.clamp_(min=0).sqrt_().add_(0.5)
        sign = x.view(torch.int32).bitwise_and_(-1 << 31)
        y.view(torch.int32).bitwise_or_(sign)
        # towards zero
        codes.copy_(y)
        return
    # reciprocal roots are the fast ones, and take zero to infinity and back
    if root == 2:
        torch.div(largest, y, out=y).rsqrt_()
    else:
        y.div_(largest).rsqrt_().rsqrt_()
    torch.add(dither, y, alpha=levels, out=dither)
    torch.maximum(dither, y.ceil_(), out=y)
    # by way of int16: on a CPU that is faster than straight to uint8
    codes.copy_(y.to(torch.int16))


def dither(numel: int, seeds: Sequence[int], device: torch.device) -> Tensor:
    """Return (len(seeds), numel) float32 of `noise`, uniform in [0, 1) in steps of 2⁻¹².

    They keep 2⁻¹³ away from both ends: codes that are read and kept again stay, whatever the last bits of a float are.
    """
    bits = noise(numel, seeds, device).bitwise_and_(0x7FF800).bitwise_or_(0x3F800400)
    return bits.view(torch.float32).sub_(1)


def dequantize_(out: Tensor, codes: Tensor, scale: Tensor, *, root: int, levels: int) -> None:
    """out ← scale·(codes / levels)^root, with the sign of the codes; shapes as in `quantize_`."""
    if codes.dtype == torch.int8:
        # magnitudes of at most 127, whose squares int16 holds
        squares = codes.to(torch.int16)
        out.copy_(squares.mul_(squares.abs())).mul_(1 / levels**2)
    else:
        out.copy_(codes).mul_(1 / levels)
        for _ in range(root // 2):
            out.mul_(out)
    out.mul_(scale.unsqueeze(-1))


def pack_(packed: Tensor, codes: Tensor) -> None:
    """Put each two 4-bit codes of (..., n) into one byte, the even one into the low half; an odd last one is alone."""
    if not codes.numel():
        # nothing has no strides that two codes could share
        return
    if codes.size(-1) % 2:
        codes = torch.cat([codes, torch.zeros_like(codes[..., :1])], dim=-1)
    pairs = codes.view(torch.int16) & 0x0F0F
    packed.view(torch.uint8).copy_(pairs.bitwise_or_(pairs >> 4).bitwise_and_(0xFF))


def unpack(packed: Tensor, numel: int) -> Tensor:
    """Return the `numel` codes of each row that `pack_` has packed, signed ones if `packed` is int8."""
    pairs = packed.view(torch.uint8).to(torch.int16)
    codes = pairs.bitwise_or_(pairs << 4).bitwise_and_(0x0F0F).view(packed.dtype)[..., :numel]
    # -8 to 7 in two's complement of 4 bits
    return codes.bitwise_xor_(8).sub_(8) if packed.dtype == torch.int8 else codes


def _wrapped(x: int) -> int:
    """Return the int32 that is `x` modulo 2³²."""
    return (x + (1 << 31)) % (1 << 32) - (1 << 31)


def _round_bfloat16_(x: Tensor, seeds: Sequence[int]) -> None:
    bits, low = x.view(torch.int32), _droppable(x, 0xFFFF)
    bits.add_(noise(x.size(1), seeds, x.device).bitwise_and_(low)).bitwise_and_(low.bitwise_not_())


def _round_float16_(x: Tensor, seeds: Sequence[int]) -> None:
    # below the smallest normal number, float16 has the spacing of the next binade: there, add it and take it off again
    tiny = torch.finfo(torch.float16).tiny
    shift = torch.where(x.abs() < tiny, tiny, 0.0).copysign_(x)
    x.add_(shift)
    bits, low = x.view(torch.int32), _droppable(x, 0x1FFF)
    bits.add_(noise(x.size(1), seeds, x.device).bitwise_and_(low)).bitwise_and_(low.bitwise_not_())
    x.sub_(shift)


def _droppable(x: Tensor, mask: int) -> Tensor:
    """Return the low bits of float32 that a shorter format lacks, and none for NaN and Inf."""
    exponent = 0x7F800000
    return (x.view(torch.int32) & exponent).sub_(exponent).bitwise_right_shift_(31).bitwise_and_(mask)


@functools.cache
def _makhoul(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the order of the input, even elements and then odd ones backwards, and the turns of the output."""
    order = torch.cat([torch.arange(0, n, 2, device="cpu"), torch.arange(1, n, 2, device="cpu").flip(0)])
    k = torch.arange(n // 2 + 1, dtype=torch.float64, device="cpu")
    turns = torch.polar(torch.full_like(k, math.sqrt(2 / n)), -math.pi * k / (2 * n))
    turns[0] = math.sqrt(1 / n)
    return order.to(device), turns.to(device, torch.complex128 if dtype == torch.float64 else torch.complex64)
