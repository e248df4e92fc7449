"""The constants of the two small transforms that the fast DCT is made of; see `dct`."""

import functools
import math

import torch
from torch import Tensor

from ._launch import DctSplit


@functools.cache
def tables(split: DctSplit, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return F, T and the matrices of the second transform, padded with zeros, and what the result is multiplied by."""
    n2, n1 = split[:2]
    n = n1 * n2
    j1, j2, q = (torch.arange(count, dtype=torch.float64, device="cpu") for count in (n1, n2, n1 // 2))
    odd = 2 * j1 + 1
    angles = torch.outer(j2, j2) * (math.pi / n2)
    imag = -angles.sin()
    imag[0] = (math.pi * j2).cos()
    first, by = _rounded(torch.stack([angles.cos(), imag]), dtype)
    turned = torch.outer(j2, odd) * (math.pi / (2 * n))
    # of these numbers Z is as large as X is
    turns = torch.stack([turned.cos(), -turned.sin()]) / (by * math.sqrt(n2))
    waves = torch.outer(odd, q) * (math.pi / n1)
    sines = waves.sin()
    sines[:, 0] = (odd * (math.pi / 2)).sin()
    between = torch.outer(odd, 2 * q + 1) * (math.pi / (2 * n1))
    second, by = _rounded(torch.stack([waves.cos(), sines, between.cos()]), dtype)
    side2, side1 = split.sides
    first = _padded(first, side2, side2).to(device, dtype)
    turns = _padded(turns, side2, side1).to(device, torch.float32)
    second = _padded(second, side1, side1 // 2).to(device, dtype)
    return first, turns, second, math.sqrt(2 / n1) / by


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, columns - x.size(2), 0, rows - x.size(1)))


def _rounded(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Return a multiple of `x` that `dtype` holds with the least error, and the factor."""
    # there are few different magnitudes, and these are most of them
    values = x.abs().flatten().sort().values[:: max(1, x.numel() // 512)]
    factors = 1 + torch.arange(1024, dtype=torch.float64, device="cpu") / 1024
    scaled = torch.outer(factors, values)
    errors = (scaled.to(dtype).double() - scaled).norm(dim=1) / factors
    best = float(factors[errors.argmin()])
    return x * best, best
