"""The mathematics in plain torch. Kernels are tested against this file; nothing here knows of kernels.

A trailing underscore marks what is written in place. Scalars are Python numbers, so nothing here waits for a device.
"""

import torch
from torch import Tensor

# rows of a low-precision weight are updated in blocks of this many float32 elements
_BLOCK = 1 << 20


def adam_direction_(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, betas: tuple[float, float], eps: float, step: int
) -> Tensor:
    """Advance both moments in place and return m̂ / (√v̂ + ε); one temporary of the size of `grad`."""
    beta1, beta2 = betas
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    direction = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(eps)
    return direction.reciprocal_().mul_(exp_avg).mul_(1 / (1 - beta1**step))


def apply_(param: Tensor, update: Tensor, *, lr: float | Tensor, weight_decay: float) -> None:
    """param ← (1 − lr·wd)·param − lr·update, rounded once; `update` is scratch afterwards."""
    decay = 1 - lr * weight_decay
    if param.dtype == update.dtype:
        _decay_(param, decay)
        if isinstance(lr, Tensor):
            param.sub_(update.mul_(lr))
        else:
            param.add_(update, alpha=-lr)
    else:
        update.mul_(-lr)
        if isinstance(decay, Tensor):
            update.add_(param.to(update.dtype).mul_(decay))
        else:
            update.add_(param, alpha=decay)
        param.copy_(update)


def apply_factored_(param: Tensor, left: Tensor, right: Tensor, *, lr: float | Tensor, weight_decay: float) -> None:
    """param ← (1 − lr·wd)·param − lr·(left @ right) without forming the product.

    `param` (m, n) may be in a lower precision than the factors; then it is updated in blocks of rows, each rounded
    once, so that the float32 temporary stays small whatever m is.
    """
    decay, alpha = 1 - lr * weight_decay, -1.0
    if isinstance(lr, Tensor):
        # a tensor stays on its device: `alpha` and `beta` of addmm would be read by the host
        left = left * lr
    else:
        alpha = -lr
    if param.dtype == left.dtype:
        beta = 1.0
        if isinstance(decay, Tensor):
            _decay_(param, decay)
        else:
            beta = decay
        param.addmm_(left, right, beta=beta, alpha=alpha)
        return
    rows = max(1, _BLOCK // max(1, param.size(1)))
    for block, part in zip(torch.split(param, rows), torch.split(left, rows), strict=True):
        block.copy_(block.to(left.dtype).mul_(decay).addmm_(part, right, alpha=alpha))


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


def _decay_(param: Tensor, decay: float | Tensor) -> None:
    if isinstance(decay, Tensor) or decay != 1:
        param.mul_(decay)
