"""The Gram form of Newton–Schulz in one launch: each program takes one small matrix through all steps."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import RECURSIONS, Tiles, recursion_tiles
from ._rounding import DTYPES as DTYPES
from ._rounding import nearest

# the largest n: a product of larger matrices does not fit the registers of one program
LARGEST = RECURSIONS[-1].side
# matrices that a program keeps in memory: R, W, R W, and two for Q, which changes places at each step
_KEPT = tl.constexpr(5)

Triple = tuple[float, float, float]
Precision = Literal["ieee", "tf32x3"]


@triton.jit
def _product(a_ptr, b_ptr, SIDE: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    """Return A B for matrices of SIDE rows that are kept."""
    side, depth = tl.arange(0, SIDE), tl.arange(0, DEPTH)
    a_at = a_ptr + side[:, None] * SIDE + depth[None, :]
    b_at = b_ptr + depth[:, None] * SIDE + side[None, :]
    product = tl.zeros((SIDE, SIDE), dtype=tl.float32)
    for start in range(0, SIDE, DEPTH):
        a = tl.load(a_at + start)
        b = tl.load(b_at + start * SIDE)
        product = tl.dot(a, b, product, input_precision=PRECISION)
    return product


@triton.jit
def recursion_kernel(
    r_ptr,
    triples_ptr,
    kept_ptr,
    out_ptr,
    n,
    r_batch,
    r_row,
    r_column,
    STEPS: tl.constexpr,
    SIDE: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Compute Q of one matrix R, padded with zeros to SIDE.

    Beside one product no matrix is in registers: R, W and Q go through memory of the program's own, which stays in the
    cache, and a barrier parts what writes there from what reads. Where R is padded W is a on the diagonal and 0 beside
    it, so that R stays 0 there.

    All are polynomials of R whether or not rounding has left it symmetric, and so they commute. Where X is of rank 1,
    W R W would make errors 10 times as large, and transposes in the place of matrices 50 times.
    """
    # int64, so that stacks of more than 2³¹ elements are addressed right
    batch = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, SIDE)
    whole = rows[:, None] * SIDE + rows[None, :]
    kept_r = kept_ptr + batch * (_KEPT * SIDE * SIDE)
    kept_w = kept_r + SIDE * SIDE
    kept_rw = kept_w + SIDE * SIDE
    kept_q = kept_rw + SIDE * SIDE
    r_ptr += batch * r_batch
    for start in range(0, SIDE, DEPTH):
        columns = start + tl.arange(0, DEPTH)
        inside = (rows[:, None] < n) & (columns[None, :] < n)
        at = (rows.to(tl.int64) * r_row)[:, None] + (columns.to(tl.int64) * r_column)[None, :]
        r = tl.load(r_ptr + at, mask=inside, other=0.0)
        tl.store(kept_r + rows[:, None] * SIDE + columns[None, :], r)
    for step in range(STEPS):
        a = tl.load(triples_ptr + 3 * step)
        b = tl.load(triples_ptr + 3 * step + 1)
        c = tl.load(triples_ptr + 3 * step + 2)
        q_before = kept_q + step % 2 * (SIDE * SIDE)
        q_after = kept_q + (1 - step % 2) * (SIDE * SIDE)
        tl.debug_barrier()
        w = c * _product(kept_r, kept_r, SIDE, DEPTH, PRECISION) + b * tl.load(kept_r + whole)
        w = tl.where(rows[:, None] == rows[None, :], w + a, w)
        tl.store(kept_w + whole, w)
        if step == 0:
            tl.store(q_after + whole, w)
        tl.debug_barrier()
        if step > 0:
            tl.store(q_after + whole, _product(q_before, kept_w, SIDE, DEPTH, PRECISION))
        if step + 1 < STEPS:
            tl.store(kept_rw + whole, _product(kept_r, kept_w, SIDE, DEPTH, PRECISION))
            tl.debug_barrier()
            tl.store(kept_r + whole, _product(kept_rw, kept_w, SIDE, DEPTH, PRECISION))
    tl.debug_barrier()
    kept_q += STEPS % 2 * (SIDE * SIDE)
    out_ptr += batch * n * n
    for start in range(0, SIDE, DEPTH):
        columns = start + tl.arange(0, DEPTH)
        inside = (rows[:, None] < n) & (columns[None, :] < n)
        q = tl.load(kept_q + rows[:, None] * SIDE + columns[None, :])
        q = nearest(q, out_ptr.dtype.element_ty, INTERPRETED)
        tl.store(out_ptr + rows[:, None] * n + columns[None, :], q, mask=inside)


def gram_recursion(
    r: Tensor,
    triples: Sequence[Triple],
    *,
    dtype: torch.dtype = torch.float32,
    tiles: Tiles | None = None,
    precision: Precision | None = None,
) -> Tensor:
    """Do as `reference_recursion.gram_recursion` in float32, and return Q in `dtype`.

    Q X in float32 has errors of 2e-3 at most, with tables of which `restarts` says that they need none. Of an X with
    all entries alike those of Q are alike too, and what rounds them to half precision adds up to the size of Q X.

    The first call with some triples waits until they are on the device; later ones wait for nothing.

    Args:
        r: (b, n, n) of float32 with n <= `LARGEST` and any strides, symmetric.
        triples: (a, b, c) of each step, at least one.
        dtype: float32, bfloat16 or float16.
        tiles: what one program computes, with n <= `side`; None goes by the table.
        precision: of products. "tf32x3" has the tensor cores of NVIDIA's multiply what float32 is split into, with
            errors like those of float32; "ieee" is for hardware that multiplies float32 itself. None knows.

    Raises:
        ValueError: for what the kernel would misread.
    """
    _check(r, triples, dtype)
    batch, n, _ = r.shape
    out = torch.empty((batch, n, n), dtype=dtype, device=r.device)
    if out.numel() == 0:
        return out
    shape = tiles or recursion_tiles(n, r.device)
    if n > shape.side:
        raise ValueError(f"the Triton Gram recursion needs tiles of a side >= {n}, not {shape}")
    # AMD's matrix instructions have float32
    precision = precision or ("ieee" if torch.version.hip else "tf32x3")
    coefficients = _coefficients(tuple(map(tuple, triples)), r.device)
    kept = torch.empty((batch, _KEPT.value, shape.side, shape.side), dtype=torch.float32, device=r.device)
    # a kernel goes to the current device, which need not be the tensor's
    with torch.cuda.device(r.get_device()):
        recursion_kernel[(batch,)](
            r,
            coefficients,
            kept,
            out,
            n,
            *r.stride(),
            STEPS=len(triples),
            SIDE=shape.side,
            DEPTH=shape.depth,
            PRECISION=precision,
            INTERPRETED=not r.is_cuda,
            num_warps=shape.warps,
            num_stages=shape.stages,
        )
    return out


@lru_cache(maxsize=256)
def _coefficients(triples: tuple[Triple, ...], device: torch.device) -> Tensor:
    return torch.tensor(triples, dtype=torch.float32, device=device)


def _check(r: Tensor, triples: Sequence[Triple], dtype: torch.dtype) -> None:
    if r.dim() != 3 or r.size(1) != r.size(2) or r.size(1) > LARGEST or r.dtype != torch.float32:
        raise ValueError(
            f"the Triton Gram recursion needs r of shape (b, n, n), n <= {LARGEST}, and float32, "
            f"not {r.dtype} of shape {tuple(r.shape)}"
        )
    if not triples or any(len(triple) != 3 for triple in triples):
        raise ValueError(f"the Triton Gram recursion needs at least one triple (a, b, c), not {triples!r}")
    if dtype not in DTYPES:
        raise ValueError(f"the Triton Gram recursion returns float32, bfloat16 or float16, not {dtype}")
