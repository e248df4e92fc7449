"""The columns of most energy, and where among the columns of before each one was: one program for each matrix."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import SELECTABLE, select_warps
from .moments import device_table, pointers

# of a matrix in the table: two pointers
_LAYOUT, _WORDS = "2q", tl.constexpr(2)
# below all keys
_LEAST = tl.constexpr(-0x80000000)


@triton.jit
def _keys_at(energy_ptr, column, n):
    """Return int32 in the order of float32, none being least; both zeros are equal, and so are all NaN, the largest."""
    bits = tl.load(energy_ptr + column, mask=column < n, other=0.0).to(tl.int32, bitcast=True)
    bits = tl.where(bits == _LEAST, 0, bits)
    bits = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FFFFFFF, bits)
    # of negative numbers the larger magnitude is the smaller one
    return tl.where(column < n, bits ^ ((bits >> 31) & 0x7FFFFFFF), _LEAST)


@triton.jit(do_not_specialize=["r", "length"])
def select_kernel(
    energy_ptr,
    index_ptr,
    place_ptr,
    new_ptr,
    table_ptr,
    n,
    r,
    length,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    TABLE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Select r of n columns in place of those in `index_ptr`; `length` is the number of bits of r.

    With TABLE the program finds there where its matrix is, and the pointers tell types only.
    """
    if TABLE:
        matrix = tl.program_id(0)
        row = table_ptr + matrix * _WORDS
        energy_ptr = tl.load(row).to(energy_ptr.dtype)
        index_ptr = tl.load(row + 1).to(index_ptr.dtype)
        if ALIGNED:
            energy_ptr = tl.multiple_of(energy_ptr, 16)
        place_ptr += matrix.to(tl.int64) * r
        new_ptr += matrix.to(tl.int64) * r
    keys = _keys_at(energy_ptr, tl.arange(0, BLOCK), n)
    # bit by bit the largest key that at least r keys are not below
    threshold = tl.full((), _LEAST, tl.int32)
    bit = tl.full((), _LEAST, tl.int32)
    for _ in range(0, 32):
        raised = threshold ^ bit
        threshold = tl.where(tl.sum((keys >= raised).to(tl.int32)) >= r, raised, threshold)
        bit = (bit >> 1) & 0x7FFFFFFF
    # of those that are equal to it the first ones are taken
    left = r - tl.sum((keys > threshold).to(tl.int32))
    # what is larger is counted in the upper half, what is equal in the lower one
    seen = tl.full((), 0, tl.int32)
    for begin in range(0, n, CHUNK):
        column = begin + tl.arange(0, CHUNK)
        key = _keys_at(energy_ptr, column, n)
        larger, equal = key > threshold, key == threshold
        one = tl.where(larger, 1 << 16, equal.to(tl.int32))
        count = seen + tl.cumsum(one, 0)
        seen += tl.sum(one)
        position = (count >> 16) + tl.minimum(count & 0xFFFF, left) - 1
        tl.store(new_ptr + position, column, mask=larger | (equal & ((count & 0xFFFF) <= left)))
    # what follows is done for r columns and not for n
    tl.debug_barrier()
    for begin in range(0, r, CHUNK):
        j = begin + tl.arange(0, CHUNK)
        new = tl.load(new_ptr + j, mask=j < r, other=0)
        # how many of the old ones are below
        below = tl.zeros((CHUNK,), tl.int32)
        stride = tl.full((), 1, tl.int32) << length
        for _ in range(0, length):
            stride = stride >> 1
            ahead = below + stride
            inside = ahead <= r
            old = tl.load(index_ptr + (ahead - 1), mask=inside, other=0)
            below = tl.where(inside & (old < new), ahead, below)
        old = tl.load(index_ptr + below, mask=below < r, other=-1)
        tl.store(place_ptr + j, tl.where(old == new, below, -1), mask=j < r)
    # nothing is read any more of what is about to be written
    tl.debug_barrier()
    for begin in range(0, r, CHUNK):
        j = begin + tl.arange(0, CHUNK)
        tl.store(index_ptr + j, tl.load(new_ptr + j, mask=j < r), mask=j < r)


def select_columns_(
    energies: Sequence[Tensor] | Tensor, indices: Sequence[Tensor], *, warps: int | None = None
) -> Tensor:
    """Do as `reference_columns.select_columns_`, for all matrices in one launch.

    Args:
        energies: of each matrix (n,) of float32, contiguous; or all of them, (k, n).
        indices: of each, (r,) of int32, contiguous; updated in place.
        warps: of one program; None goes by the table.

    Returns:
        Where among the old indices each new one was, or -1: (k, r) of int32. Old indices that are not sorted give any
        place that they have, or -1.

    Raises:
        ValueError: for tensors that the kernel would misread, and more columns than a program can hold.
    """
    count = len(indices)
    n, r = _check(energies, indices)
    place, new = torch.empty((2, count, r), dtype=torch.int32, device=indices[0].device).unbind()
    if r == 0:
        return place
    table, whole = None, True
    if count > 1:
        first, whole = pointers(energies)
        second, _ = pointers(indices)
        table = device_table(zip(*first, *second, strict=True), _LAYOUT, place.device)
    block = max(128, triton.next_power_of_2(n))
    warps = warps or select_warps(block)
    # a kernel goes to the current device, which need not be the tensor's
    with torch.cuda.device(place.get_device()):
        select_kernel[(count,)](
            energies[0],
            indices[0],
            place,
            new,
            place if table is None else table,
            n,
            r,
            r.bit_length(),
            BLOCK=block,
            # four of a thread
            CHUNK=min(block, 128 * warps),
            TABLE=table is not None,
            ALIGNED=whole,
            num_warps=warps,
        )
    return place


def _check(energies: Sequence[Tensor] | Tensor, indices: Sequence[Tensor]) -> tuple[int, int]:
    """Return how many columns there are, and how many are selected."""
    if len(energies) == 0 or len(energies) != len(indices):
        raise ValueError(
            f"the Triton selection needs as many energies as indices, and some, not {len(energies)} and {len(indices)}"
        )
    like = energies[0]
    device, shape, kept = like.device, like.shape, indices[0].shape
    # rows of one tensor are alike
    rows = [like] if isinstance(energies, Tensor) else energies
    if len(shape) != 1 or len(kept) != 1 or not kept[0] <= shape[0] <= SELECTABLE:
        raise ValueError(
            f"the Triton selection needs energies (n,) and indices (r,), r ≤ n ≤ {SELECTABLE}, "
            f"not {tuple(shape)} and {tuple(kept)}"
        )
    for name, column, size, dtype in (
        ("energies", rows, shape, torch.float32),
        ("indices", indices, kept, torch.int32),
    ):
        for x in column:
            if x.shape != size or x.dtype != dtype or x.device != device or not x.is_contiguous():
                raise ValueError(
                    f"the Triton selection needs contiguous {name} of shape {tuple(size)}, {dtype} and on {device}, "
                    f"not {x.dtype} of shape {tuple(x.shape)} and strides {x.stride()} on {x.device}"
                )
    return shape[0], kept[0]
