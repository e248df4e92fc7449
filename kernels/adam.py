"""Adam on projected coordinates: one elementwise pass over gradient and moments that writes the direction."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch_shape


@triton.jit
def adam_direction_kernel(
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    direction_ptr,
    numel,
    beta2,
    weight1,
    weight2,
    eps,
    correction1,
    correction2,
    BLOCK: tl.constexpr,
):
    """Advance both moments in place; direction = (m / correction1) / (√(v / correction2) + eps)."""
    # int64, so that coordinates of more than 2³¹ elements are addressed right
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    exp_avg = tl.load(exp_avg_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    exp_avg += weight1 * (grad - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + weight2 * grad * grad
    direction = (exp_avg / correction1) / (tl.sqrt(exp_avg_sq / correction2) + eps)
    tl.store(exp_avg_ptr + offsets, exp_avg, mask=mask)
    tl.store(exp_avg_sq_ptr + offsets, exp_avg_sq, mask=mask)
    tl.store(direction_ptr + offsets, direction, mask=mask)


def adam_direction_(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, betas: tuple[float, float], eps: float, step: int
) -> Tensor:
    """Do as `reference.adam_direction_`; `grad` of any strides and float dtype, the moments contiguous float32.

    Raises:
        ValueError: for moments that are not contiguous float32 tensors of the gradient's shape.
    """
    for moment in (exp_avg, exp_avg_sq):
        if moment.shape != grad.shape or moment.dtype != torch.float32 or not moment.is_contiguous():
            raise ValueError(
                f"the Triton Adam needs contiguous float32 moments of shape {tuple(grad.shape)}, "
                f"not {moment.dtype} of shape {tuple(moment.shape)} and strides {moment.stride()}"
            )
    grad = grad.contiguous()
    direction = torch.empty(grad.shape, dtype=torch.float32, device=grad.device)
    if grad.numel() == 0:
        return direction
    block, warps = launch_shape(grad.numel(), interpreted=not grad.is_cuda)
    beta1, beta2 = betas
    # the weights as the host rounds them: in float32 1 − 0.999 is off by 1e-5
    weight1, weight2 = 1 - beta1, 1 - beta2
    # a kernel goes to the current device, which need not be the tensor's
    with torch.cuda.device(grad.get_device()):
        adam_direction_kernel[(triton.cdiv(grad.numel(), block),)](
            grad,
            exp_avg,
            exp_avg_sq,
            direction,
            grad.numel(),
            beta2,
            weight1,
            weight2,
            eps,
            1 - beta1**step,
            1 - beta2**step,
            BLOCK=block,
            num_warps=warps,
        )
    return direction
