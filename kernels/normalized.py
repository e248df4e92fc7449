"""Matrices over their Frobenius norms, in the dtype that they are multiplied in: read twice and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from ._launch import MOMENTUM_PARTS, WIDE, launch_shape, traced
from ._rounding import DTYPES as DTYPES
from ._rounding import nearest


@triton.jit
def inverse_norm(sums_ptr, parts, eps, PARTS: tl.constexpr):
    """Return two float32 numbers whose product is 1 / max(norm, eps), of sums of squares in float64.

    Float32 has no 1e40: the first is about the root of it as a power of two, which rounds nothing, the second the rest.
    """
    # always in the same order
    part = tl.arange(0, PARTS)
    norm = tl.sqrt(tl.sum(tl.load(sums_ptr + part, mask=part < parts, other=0.0), axis=0))
    # a norm that is NaN stays
    factor = 1.0 / tl.where(norm <= eps, eps, norm)
    half = ((factor.to(tl.int64, bitcast=True) >> 52) - 1023) >> 1
    half = tl.minimum(tl.maximum(half, -100), 100).to(tl.int32)
    power = ((half + 127) << 23).to(tl.float32, bitcast=True)
    return power, (factor / power.to(tl.float64)).to(tl.float32)


@triton.jit(do_not_specialize=["parts", "steps"])
def squares_kernel(x_ptr, sums_ptr, numel, parts, steps, BLOCK: tl.constexpr):
    """Store the sum of squares over one part of a matrix.

    In float64 the squares of all float32 numbers are there, and none is infinite.
    """
    program = tl.program_id(0)
    x_ptr += (program // parts).to(tl.int64) * numel
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for step in range(steps):
        # int64, so that matrices of more than 2³¹ elements are addressed right
        at = (program % parts * steps + step).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        wide = tl.load(x_ptr + at, mask=at < numel, other=0.0).to(tl.float64)
        total += wide * wide
    tl.store(sums_ptr + program, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["parts", "steps"])
def normalized_kernel(
    x_ptr,
    sums_ptr,
    out_ptr,
    numel,
    parts,
    steps,
    eps,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Write one part of x / max(‖x‖, eps)."""
    # backwards, as the last that was read before is still in the cache
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    matrix = (program // parts).to(tl.int64)
    # a compiler of torch's passes numbers in float64
    power, rest = inverse_norm(sums_ptr + matrix * parts, parts, tl.cast(eps, tl.float32), PARTS)
    for step in range(steps):
        at = (program % parts * steps + steps - 1 - step).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + matrix * numel + at, mask=at < numel, other=0.0).to(tl.float32)
        out = nearest(x * power * rest, out_ptr.dtype.element_ty, INTERPRETED)
        tl.store(out_ptr + matrix * numel + at, out, mask=at < numel)


def normalized(
    x: Tensor,
    *,
    eps: float,
    dtype: torch.dtype,
    launch: tuple[int, int] | None = None,
    parts: int = MOMENTUM_PARTS,
) -> Tensor:
    """Do as `reference_matrix.normalized`, in two launches.

    Norms are those of exact sums whatever the magnitudes. The result is contiguous.

    Args:
        x: (b, m, n) of float32, bfloat16 or float16 and any strides.
        eps: the least norm that is divided by.
        dtype: of the result, which is rounded to it once: float32, bfloat16 or float16.
        launch: elements and warps of one program; None goes by the table.
        parts: into how many programs a matrix is cut at most.

    Raises:
        ValueError: for tensors that the kernels would misread.
    """
    if x.dim() != 3 or x.dtype not in DTYPES or dtype not in DTYPES:
        raise ValueError(
            "the Triton normalization needs (b, m, n) of float32, bfloat16 or float16, and a result of these, "
            f"not {x.dtype} of shape {tuple(x.shape)} and {dtype}"
        )
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    count, numel = len(x), x.size(1) * x.size(2)
    block, warps = launch or (WIDE if x.is_cuda else launch_shape(numel, interpreted=True))
    blocks = triton.cdiv(numel, block)
    steps = triton.cdiv(blocks, min(parts, MOMENTUM_PARTS))
    parts = triton.cdiv(blocks, steps)
    sums = torch.empty(count * parts, dtype=torch.float64, device=x.device)
    # a norm of float32 numbers is 0 or at least the smallest of them
    least = float(max(eps, 2.0**-149))
    constants = {"BLOCK": block, "num_warps": warps}
    squares, kernel, device = squares_kernel, normalized_kernel, x.get_device()
    if traced(x):
        squares, kernel, device = wrap_triton(squares_kernel), wrap_triton(normalized_kernel), -1
    # a kernel goes to the current device, which need not be the tensor's
    with torch.cuda.device(device):
        squares[(count * parts,)](x, sums, numel, parts, steps, **constants)
        constants |= {"PARTS": MOMENTUM_PARTS, "INTERPRETED": not x.is_cuda}
        kernel[(count * parts,)](x, sums, out, numel, parts, steps, least, **constants)
    return out
