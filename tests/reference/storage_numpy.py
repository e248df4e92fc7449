"""Blockwise codes, packing, stochastic rounding and their noise in NumPy, from the formulas; no code of the package."""

import numpy as np


def noise(numel, seed):
    """Return uint32: the counters seed, seed + 1, ..., times a constant, xor-shifted, times another, modulo 2³².

    The shift is that of signed numbers.
    """
    out = []
    for i in range(numel):
        x = (seed + i) * 0x9E3779B1 % 2**32
        signed = x - 2**32 if x >= 2**31 else x
        out.append((x ^ (signed >> 15) % 2**32) * 0x7FEB352D % 2**32)
    return np.array(out, dtype=np.uint32)


def dither(numel, seed):
    """Return bits 11 to 22 of the noise as numbers in [0, 1), in the middles of steps of 2⁻¹²."""
    return ((noise(numel, seed) >> 11 & 0xFFF) + 0.5) / 2**12


def grid(bits, signed):
    """Return the values of the nonnegative codes of a block whose largest magnitude is 1."""
    largest = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    power = 4 if bits == 8 and not signed else 2
    return (np.arange(largest + 1) / largest) ** power


def first_moment(block, bits):
    """Return (codes, scale): for each number the code of the nearest value of the grid."""
    values, scale = grid(bits, signed=True), np.abs(block).max()
    if scale == 0:
        return np.zeros(len(block), dtype=int), 0.0
    distance = np.abs(np.abs(block)[:, None] / scale - values)
    return np.argmin(distance, axis=1) * np.sign(block).astype(int), scale


def second_moment(block, bits, up):
    """Return (codes, scale): the code below each number plus one where the rest of the way exceeds 1 − `up`."""
    values, scale = grid(bits, signed=False), block.max()
    if scale == 0:
        return np.zeros(len(block), dtype=int), 0.0
    place = (block / scale) ** (1 / (4 if bits == 8 else 2)) * (len(values) - 1)
    codes = np.floor(place + up).astype(int)
    return np.where((block > 0) & (codes == 0), 1, codes), scale


def place(block, bits, signed):
    """Return where between codes each number of a block is, as a float."""
    power = 4 if bits == 8 and not signed else 2
    return (np.abs(block) / np.abs(block).max()) ** (1 / power) * (len(grid(bits, signed)) - 1)


def decode(codes, scale, bits, signed):
    """Return the numbers that codes stand for."""
    return grid(bits, signed)[np.abs(codes)] * np.sign(codes) * scale


def pack(codes):
    """Return bytes: two codes of four bits in each, in two's complement, the first one low."""
    nibbles = [int(code) % 16 for code in codes] + [0] * (len(codes) % 2)
    return np.array([low + 16 * high for low, high in zip(nibbles[::2], nibbles[1::2], strict=True)], dtype=np.uint8)


def blocks(flat, size):
    """Yield the blocks of a flat moment; the last one may be shorter."""
    for start in range(0, len(flat), size):
        yield flat[start : start + size]


def state_bytes(numel, state_dtype):
    """Return the bytes of one moment of `numel` float32 elements."""
    full, rest = divmod(numel, {"int8": 256, "int4": 64}.get(state_dtype, 1))
    scales = 4 * (full + (rest > 0))
    return {
        "float32": 4 * numel,
        "bfloat16": 2 * numel,
        "int8": numel + scales,
        "int4": (numel + 1) // 2 + scales,
    }[state_dtype]


def bfloat16_neighbours(x):
    """Return (below, above) in magnitude, equal where x is a bfloat16."""
    bits = x.astype(np.float32).view(np.uint32)
    below = (bits & 0xFFFF0000).view(np.float32)
    above = ((bits & 0xFFFF0000) + np.where(bits & 0xFFFF, 0x10000, 0).astype(np.uint32)).view(np.float32)
    return below, above


def adam(gradients, betas, eps):
    """Return the sum of Adam's directions."""
    b1, b2 = betas
    m = v = total = 0.0
    for t, g in enumerate(gradients, start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        total = total + (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    return total
