"""Fixed orthonormal transforms of one side of a matrix: the DCT-II in its ways, and Walsh–Hadamard."""

import functools
import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lowrank_optim import ops

Way = Literal["auto", "matmul", "fft", "folded"]
WAYS: tuple[str, ...] = get_args(Way)

# folding ends where half the size is below: from there on a product takes no longer than the passes that save it
_LEAF = 64
# elements that an FFT along a dimension works on at once, for each thread
_PART = {-1: 1 << 18, -2: 1 << 17}
# Hadamard factors of 16 have exact entries, ±1/4; a product of 64 takes no longer than two of fewer
_SMALL, _FACTOR = 64, 16


def dct(x: Tensor, dim: int, way: Way = "auto") -> Tensor:
    """Return the orthonormal DCT-II of `x` along `dim`: x D for -1, Dᵀ x for -2, with D = `dct_matrix`.

    Args:
        x: (..., m, n), real, contiguous or not; it is not written to.
        dim: -1 or -2.
        way: how it is computed. For n elements along `dim`, each column or row takes
            "matmul" 2 n² operations: one product with D, in every dtype and on every device.
            "fft" some n log n: one real FFT of n, in float32 and float64.
            "folded" 2/3 n² to n², the less the more often 2 divides n: products with parts of D, in every dtype. An odd
            n is not folded.
            "auto" (the default) takes one of them, by size, dimension, dtype and device; see `choose`.

    Raises:
        ValueError: for an unknown way.
    """
    if way not in WAYS:
        raise ValueError(f"Invalid way: {way!r}, must be one of {', '.join(WAYS)}")
    if way == "auto":
        # a tensor that is more than one has its own ways to multiply
        way = choose(x.size(dim), dim, x.dtype, x.device.type if type(x) is Tensor else "other")
    # the FFT of nothing is an error
    if way == "fft" and x.numel() > 0:
        return _by_fft(x, dim)
    if way == "folded" and x.size(dim) % 2 == 0:
        return _folded(x, dim)
    return _product(x, dct_matrix(x.size(dim), x.dtype, x.device), dim)


def choose(size: int, dim: int, dtype: torch.dtype, device: str) -> Literal["matmul", "fft", "folded"]:
    """Choose how `size` elements along `dim` are transformed.

    On a CPU by measurement: milliseconds for 512 rows (-1) or columns (-2) on one core of a quiet AMD EPYC with AVX512,
    torch 2.13, the least of some 10 to 1,000 runs. A product takes the same along both dimensions.

    ====  =======  =======  =======  =======  =======  ========  ========  =======
          float32                                      bfloat16
    ====  =======  =======  =======  =======  =======  ========  ========  =======
       n  product   fft -1  fold -1   fft -2  fold -2   product   fold -1  fold -2
      64    0.048    0.102    0.086    0.168    0.074     0.036     0.101    0.091
      96    0.100    0.146    0.128    0.251    0.108     0.060     0.160    0.110
     128    0.171    0.164    0.180    0.310    0.152     0.092     0.162    0.134
     256    0.656    0.294    0.442    0.586    0.383     0.314     0.362    0.288
     344     1.21    0.800    0.809    0.977    0.662     0.566     0.587    0.407
     512     2.64    0.744     1.31     1.10     1.26      1.20     0.892    0.715
     688     4.83     1.86     2.44     2.23     2.24      2.28      1.61     1.23
    1024     10.8     1.56     4.72     2.19     4.90      5.08      2.93     2.65
    1376     19.6     3.75     8.48     4.53     8.03      9.85      5.92     4.59
    2048     44.5     3.46     17.8     4.71     17.3      21.4      9.79     8.66
    4096      184     7.21     71.0     10.4     66.2      84.6      33.4     31.8
    ====  =======  =======  =======  =======  =======  ========  ========  =======

    Two cores take 0.5 to 0.7 of the time from n = 344 on, and down to 64 rows and up to 2048, and in float64, the
    winners stay the same but for near ties and n = 128: with many rows or in float64 the others of the table gain up to
    a quarter there, with few rows or two cores they lose more. The FFT of an odd n below 512 is hardly faster than the
    product, and of primes slower.

    On a GPU nothing has been measured: there it is the product, as for tensors that are more than one.

    Args:
        size: n.
        dim: -1 or -2.
        dtype: of the elements.
        device: its type; "other" for tensors that are more than one.
    """
    # a fused kernel, once there is one, is chosen here
    if device != "cpu":
        return "matmul"
    if dtype not in (torch.float32, torch.float64):
        # torch has no FFT for them
        return "folded" if size >= 512 else "matmul"
    if size <= 128 or (size % 2 == 1 and size < 512):
        return "matmul"
    return "folded" if dim == -2 and size < 448 else "fft"


class Spectrum(NamedTuple):
    """DCT-II coefficients of a matrix as an FFT leaves them, which is nearly half of the work: nobody sorts them."""

    values: Tensor  # (rows, n + 1 or n + 2), the rows being those of the matrix or, along -2, its columns
    energy: Tensor  # (n + 1 or n + 2,)
    size: int
    dim: int

    def energies(self) -> Tensor:
        """Return the sum of squares or of magnitudes along each DCT column."""
        place, _ = ops.spectrum_places(self.size, self.values.dtype, self.values.device)
        return self.energy[place]

    def take(self, index: Tensor) -> Tensor:
        """Return the coefficients along these DCT columns, in the orientation of the matrix."""
        place, sign = ops.spectrum_places(self.size, self.values.dtype, self.values.device)
        found = self.values.index_select(-1, place[index]).mul_(sign[index])
        return found if self.dim == -1 else found.mT.contiguous()


def spectrum(x: Tensor, dim: int, *, squares: bool = True) -> Spectrum | None:
    """Return the DCT-II of a matrix along `dim` unsorted, and its energies; None where `dct` takes another way.

    Args:
        x: (m, n), real; it is not written to.
        dim: -1 or -2.
        squares: sums of squares, else of magnitudes.
    """
    rows, size = (x, x.size(-1)) if dim == -1 else (x.mT, x.size(-2))
    if type(x) is not Tensor or x.numel() == 0 or choose(size, dim, x.dtype, x.device.type) != "fft":
        return None
    half = torch.empty(len(rows), size // 2 + 1, dtype=x.dtype.to_complex(), device=x.device)
    values = torch.view_as_real(half).flatten(1)
    energy = torch.zeros(values.size(1), dtype=x.dtype, device=x.device)
    count = max(1, ops.part_size(x.device) // size)
    # while a part is in the cache
    for start in range(0, len(rows), count):
        some = slice(start, start + count)
        ops.half_spectrum(rows[some], -1, out=half[some])
        part = values[some]
        energy += (part.square() if squares else part.abs()).sum(0)
    return Spectrum(values, energy, size, dim)


def hadamard(x: Tensor, dim: int) -> Tensor:
    """Return the orthonormal Walsh–Hadamard transform of `x` along `dim`, -1 or -2, in natural order.

    The matrix is a Kronecker product, Hₐᵦ = Hₐ ⊗ Hᵦ, so n = a·b elements are an a×b matrix whose sides are transformed
    one after the other: 2 n (a + b) operations and not 2 n². It is its own inverse.

    Raises:
        ValueError: unless n is a power of two.
    """
    size = _power_of_two(x.size(dim))
    if size <= _SMALL:
        return _product(x, hadamard_matrix(size, x.dtype, x.device), dim)
    factor, rest = hadamard_matrix(_FACTOR, x.dtype, x.device), size // _FACTOR
    # one factor is a product with all of x, whichever side of the small matrices is the wide one
    if dim == -1:
        inner = x.reshape(*x.shape[:-1], rest, _FACTOR) @ factor
        return hadamard(inner, -2).flatten(-2)
    *batch, _, others = x.shape
    outer = factor @ x.reshape(*batch, _FACTOR, rest * others)
    return hadamard(outer.view(*batch, _FACTOR, rest, others), -2).flatten(-3, -2)


@functools.cache
def dct_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the orthonormal DCT-II matrix with the basis vectors as columns; made once for the whole process.

    Each column is contiguous, so that some of them are selected in whole vectors.
    """
    return _cosines(size, size, 0, 1, dtype).mT.contiguous().to(device).mT


@functools.cache
def hadamard_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the orthonormal Walsh–Hadamard matrix in natural order, which is symmetric; made once for the process."""
    matrix = torch.full((1, 1), 1 / math.sqrt(_power_of_two(size)), dtype=dtype, device="cpu")
    while len(matrix) < size:
        rows = torch.cat([matrix, matrix], 1)
        matrix = torch.cat([rows, torch.cat([matrix, -matrix], 1)])
    return matrix.to(device)


def _power_of_two(size: int) -> int:
    if size < 1 or size & (size - 1):
        raise ValueError(f"Invalid size: {size}, must be a power of two")
    return size


def _product(x: Tensor, columns: Tensor, dim: int) -> Tensor:
    return x @ columns if dim == -1 else columns.mT @ x


def _by_fft(x: Tensor, dim: int) -> Tensor:
    """Transform in parts, so that temporaries stay in a CPU's cache: of 2048×2048, in less than half the time."""
    part_size = _PART[dim] * torch.get_num_threads()
    if x.device.type != "cpu" or x.dim() < 2 or x.numel() <= part_size:
        return ops.dct(x, dim)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # whole matrices, or parts of the side that is not transformed
    along = 0 if x.dim() > 2 else -3 - dim
    count = part_size * x.size(along) // x.numel()
    parts = zip(torch.split(x, max(count, 1), along), torch.split(out, max(count, 1), along), strict=True)
    for part, made in parts:
        made.copy_(_by_fft(part[0], dim) if x.dim() > 2 and count < 1 else ops.dct(part, dim))
    return out


def _folded(x: Tensor, dim: int) -> Tensor:
    """Fold `x` in the middle: its even coefficients are the transform of sums, its odd ones that of differences."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # coefficients that are left to compute are those at multiples of `step`
    step = 1
    *parts, last = _parts(x.size(dim), x.dtype, x.device)
    for part in parts:
        first, second = x.chunk(2, dim)
        second = second.flip(dim)
        _spread(out, dim, step, 2 * step).copy_(_product(first - second, part, dim))
        # flip made a copy
        x = second.add_(first)
        step *= 2
    _spread(out, dim, 0, step).copy_(_product(x, last, dim))
    return out


def _spread(x: Tensor, dim: int, start: int, step: int) -> Tensor:
    return x[..., start::step] if dim == -1 else x[..., start::step, :]


@functools.cache
def _parts(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Return the parts of the DCT matrix that folding multiplies by: odd columns at each fold, and the even rest."""
    parts, half, step = [], size, 1
    while half % 2 == 0 and (step == 1 or half // 2 >= _LEAF):
        half //= 2
        parts.append(_cosines(size, half, step, 2 * step, dtype).to(device))
        step *= 2
    return *parts, _cosines(size, half, 0, step, dtype).to(device)


def _cosines(size: int, rows: int, start: int, step: int, dtype: torch.dtype) -> Tensor:
    """Return the first rows of every `step`-th column of the DCT matrix."""
    # one period of the cosine holds every entry, and the angle is reduced as an integer, so that it is exact
    turns = torch.arange(4 * size, dtype=torch.float64, device="cpu") / (2 * size)
    wave = ((turns * math.pi).cos_() * math.sqrt(2 / size)).to(dtype)
    columns = torch.arange(start, size, step, device="cpu")
    matrix = torch.empty(rows, len(columns), dtype=dtype, device="cpu")
    # row by row, so that nothing is as large as the matrix but itself
    for row in range(rows):
        torch.index_select(wave, 0, (2 * row + 1) * columns % (4 * size), out=matrix[row])
    if start == 0:
        matrix[:, 0] = 1 / math.sqrt(size)
    return matrix
