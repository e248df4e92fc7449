"""The least that each method must do for one m×n matrix, from its formulas: operations, bytes of state, bytes held.

Newton–Schulz on a matrix with the short side n and the long side m = a·n, over T steps, in units of n³: the standard
form T(4a + 2), a product with itself and two more each step; the Gram form, which iterates on the n×n Gram matrix and
multiplies the matrix itself once, 4a(1 + s) + 2T + 6(T − 1 − s) with s restarts. Kernels that compute only one half of
a symmetric product would need T(3a + 1), and 3a(1 + s) + T + 3(T − 1 − s).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

Shape = tuple[int, int]
STEPS = 5


@dataclass(frozen=True)
class Cost:
    """Of one matrix and one step. What is not said here is the same for all: the weight and the gradient."""

    # operations in the dtype of the parameters, and those in bfloat16 whatever that is
    flops: int = 0
    bfloat16_flops: int = 0
    refresh_flops: int = 0
    first_flops: int = 0
    # bytes of state that every step reads and writes, and of state that it only reads
    moments: int = 0
    basis: int = 0
    # bytes that must be held beside the state, and while a basis is found
    extra: int = 0
    refresh_extra: int = 0


# of a shape, a rank and the parameters' dtype
CostOf = Callable[[Shape, int, torch.dtype], Cost]


def kept_bytes(numel: int, state_dtype: str) -> int:
    """Bytes of so many numbers, with a float32 scale for each block where they are quantized."""
    if state_dtype == "int8":
        return numel + 4 * -(-numel // 256)
    if state_dtype == "int4":
        return -(-numel // 2) + 4 * -(-numel // 64)
    return numel * getattr(torch, state_dtype).itemsize


def newton_schulz_flops(short: int, long: int, steps: int = STEPS, *, symmetric: bool = False) -> int:
    """Of the standard form."""
    if symmetric:
        return steps * (3 * short**2 * long + short**3)
    return steps * (4 * short**2 * long + 2 * short**3)


def gram_flops(short: int, long: int, steps: int = STEPS, *, restarts: int = 0, symmetric: bool = False) -> int:
    """Of the Gram form."""
    outer, inner = 1 + restarts, steps - 1 - restarts
    if symmetric:
        return 3 * short**2 * long * outer + short**3 * (steps + 3 * inner)
    return 4 * short**2 * long * outer + short**3 * (2 * steps + 6 * inner)


def cheapest_flops(short: int, long: int, steps: int = STEPS) -> int:
    """Of the cheaper form, without restarts and with symmetric products computed by half."""
    forms = (newton_schulz_flops, gram_flops)
    return min(form(short, long, steps, symmetric=True) for form in forms)


def qr_flops(rows: int, columns: int) -> int:
    """Householder QR of a tall matrix with Q formed."""
    return 4 * rows * columns**2 - 4 * columns**3 // 3


def svd_flops(long: int, short: int) -> int:
    """Golub and Van Loan's counts for singular values and the short side's vectors: with and without a QR first."""
    return min(4 * long * short**2 + 8 * short**3, 2 * long * short**2 + 11 * short**3)


def adamw(shape: Shape, rank: int, dtype: torch.dtype) -> Cost:
    """Two moments in the parameters' dtype."""
    m, n = shape
    return Cost(moments=2 * m * n * dtype.itemsize)


def fft_flops(size: int) -> int:
    """Of one real sequence, by the usual count, 2.5 n log₂ n; a cosine transform is one of these and O(n) more."""
    return math.ceil(2.5 * size * math.log2(size)) if size > 1 else 0


def galore(basis: str, *, stagger: bool = False, state_dtype: str | None = "float32") -> CostOf:
    """Down and up, two moments of rank × long side, one basis; `state_dtype` None is the parameters'."""

    def cost(shape: Shape, rank: int, dtype: torch.dtype) -> Cost:
        short, long, r = _sides(shape, rank)
        kept = state_dtype or str(dtype).removeprefix("torch.")
        item = dtype.itemsize if state_dtype is None else 4
        return Cost(
            flops=4 * short * long * r,
            refresh_flops=_refresh_flops(basis, short, long, r),
            # a staggered first step makes do with one product with a random matrix
            first_flops=_refresh_flops("sketch" if stagger else basis, short, long, r),
            moments=2 * kept_bytes(r * long, kept),
            basis=short * r * item,
            extra=r * long * item,
            refresh_extra=(short * r + r * long) * item,
        )

    return cost


def dct_adamw(*, state_dtype: str = "float32", ages: bool = False, error: str | None = None) -> CostOf:
    """A cosine transform down, a product up, two moments and indices; feeding back takes one more product."""

    def cost(shape: Shape, rank: int, dtype: torch.dtype) -> Cost:
        short, long, r = _sides(shape, rank)
        kept = 0 if error is None else kept_bytes(short * long, error)
        return Cost(
            flops=long * fft_flops(short) + 2 * short * long * r * (1 if error is None else 2),
            moments=2 * kept_bytes(r * long, state_dtype) + 4 * r * (1 + ages) + kept,
            extra=4 * (r * long if error is None else short * long),
        )

    return cost


def columns(shape: Shape, rank: int, dtype: torch.dtype) -> Cost:
    """Columns of the gradient itself: nothing is multiplied."""
    _, long, r = _sides(shape, rank)
    return Cost(moments=8 * r * long + 4 * r, extra=4 * r * long)


def every_step(shape: Shape, rank: int, dtype: torch.dtype) -> Cost:
    """GaLore with one block power iteration at each step."""
    short, long, r = _sides(shape, rank)
    products = 4 * short * long * r + _refresh_flops("subspace", short, long, r)
    return Cost(flops=products, moments=8 * r * long + 4 * short * r, extra=4 * (short * r + r * long))


def ldadam(shape: Shape, rank: int, dtype: torch.dtype) -> Cost:
    """One power iteration on a matrix that is formed, down, up, and an error that is formed from three lifts."""
    short, long, r = _sides(shape, rank)
    products = 12 * short * long * r + _refresh_flops("subspace", short, long, r)
    moments = 8 * r * long + 4 * short * r + 4 * short * long
    return Cost(flops=products, moments=moments, extra=4 * short * long)


def apollo(shape: Shape, rank: int, dtype: torch.dtype) -> Cost:
    """A product down and two moments; the random matrix is drawn again at each step."""
    short, long, r = _sides(shape, rank)
    return Cost(flops=2 * short * long * r, moments=8 * r * long, extra=4 * (r * long + r * short))


def apollo_bfloat16(shape: Shape, rank: int, dtype: torch.dtype) -> Cost:
    """The same with the product in bfloat16."""
    cost = apollo(shape, rank, dtype)
    return replace(cost, flops=0, bfloat16_flops=cost.flops)


def muon(
    state_dtype: str = "float32", *, steps: int = STEPS, either_form: bool = False, row_averages: bool = False
) -> CostOf:
    """One momentum and Newton–Schulz in bfloat16: the standard form, or with `either_form` the least there is."""

    def cost(shape: Shape, rank: int, dtype: torch.dtype) -> Cost:
        short, long, _ = _sides(shape, rank)
        flops = (cheapest_flops if either_form else newton_schulz_flops)(short, long, steps)
        return Cost(
            bfloat16_flops=flops if steps else 0,
            moments=kept_bytes(short * long, state_dtype) + 4 * shape[0] * row_averages,
            extra=_iterate_bytes(short, long, steps),
        )

    return cost


def lowrank_muon(basis: str, *, residual: bool = False) -> CostOf:
    """One momentum of rank × long side, in float32 as Newton–Schulz is.

    With "dct" every step takes the cosine transform of the gradient, which gives its energy along all columns and its
    coordinates in the chosen ones; as a product with the DCT matrix that is 2mn² operations, by FFT far fewer.
    Completed to full rank, the matrix itself is orthogonalized.
    """

    def cost(shape: Shape, rank: int, dtype: torch.dtype) -> Cost:
        short, long, r = _sides(shape, rank)
        down = long * fft_flops(short) if basis == "dct" else 2 * short * long * r
        up = 2 * short * long * r
        flops = cheapest_flops(short, long) if residual else cheapest_flops(*sorted((r, long)))
        selects = basis == "dct"
        return Cost(
            flops=down + up + flops,
            refresh_flops=0 if selects else _refresh_flops(basis, short, long, r),
            first_flops=0 if selects else _refresh_flops("sketch", short, long, r),
            moments=4 * r * long + 4 * r * selects,
            basis=0 if selects else 4 * short * r,
            extra=4 * (short * long if residual else r * long),
            refresh_extra=4 * (short * r + r * long),
        )

    return cost


def trion(basis: str) -> CostOf:
    """A whole momentum; its coefficients along all columns, what is spent of it, and the update made of it.

    The columns of "identity" are those of the momentum, so nothing is multiplied but by Newton–Schulz.
    """

    def cost(shape: Shape, rank: int, dtype: torch.dtype) -> Cost:
        short, long, r = _sides(shape, rank)
        products = long * fft_flops(short) + 4 * short * long * r if basis == "dct" else 0
        return Cost(
            flops=products,
            bfloat16_flops=cheapest_flops(*sorted((r, long))),
            moments=4 * short * long,
            extra=4 * r * long,
        )

    return cost


def auon(steps: int = 0) -> CostOf:
    """One momentum and, with `steps` of Newton–Schulz, their products."""
    return muon(steps=steps, either_form=True)


def _sides(shape: Shape, rank: int) -> tuple[int, int, int]:
    short, long = sorted(shape)
    return short, long, min(rank, short)


def _iterate_bytes(short: int, long: int, steps: int) -> int:
    # the matrix, its Gram matrix and a polynomial of that, in bfloat16
    return 2 * (short * long + 2 * short**2) if steps else 0


def _refresh_flops(basis: str, short: int, long: int, rank: int) -> int:
    if basis == "sketch":
        return 2 * short * long * rank + qr_flops(short, rank)
    if basis == "subspace":
        # G (G' Q)
        return 4 * short * long * rank + qr_flops(short, rank)
    return svd_flops(long, short)
