"""One name per operation; the only file that chooses between a kernel and plain torch."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lowrank_optim import reference
from lowrank_optim._types import Factored, Update

Backend = Literal["auto", "torch", "triton"]

_backend: ContextVar[Backend] = ContextVar("lowrank_optim_backend", default="auto")

orthonormalize = reference.orthonormalize
unit = reference.unit


@contextlib.contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Choose who computes within the block.

    Args:
        name: "auto" takes what is known to be fastest, "torch" and "triton" take that one or raise. Nothing has shown
            a kernel to be faster than torch's own fused ones yet, so today "auto" is "torch".

    Raises:
        ValueError: for another name.
        RuntimeError: "triton" where it cannot run; said when the block is entered or when it meets a CPU tensor.
    """
    if name not in ("auto", "torch", "triton"):
        raise ValueError(f"backend must be 'auto', 'torch' or 'triton', not {name!r}")
    if name == "triton" and not _has_triton():
        raise RuntimeError("backend('triton'): Triton is not installed (pip install triton)")
    token = _backend.set(name)
    try:
        yield
    finally:
        _backend.reset(token)


def adam_directions_(
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    betas: tuple[float, float],
    eps: float,
    steps: list[int],
) -> list[Tensor]:
    """Advance the moments of a bucket in place and return each m̂ / (√v̂ + ε)."""
    if _takes_triton(grads[0]):
        from lowrank_optim.kernels.adam import adam_direction_ as direction_
    elif type(grads[0]) is Tensor and grads[0].device.type in ("cpu", "cuda"):
        return _fused_directions_(grads, exp_avgs, exp_avg_sqs, betas=betas, eps=eps, steps=steps)
    else:
        direction_ = reference.adam_direction_
    return [
        direction_(g, m, v, betas=betas, eps=eps, step=t)
        for g, m, v, t in zip(grads, exp_avgs, exp_avg_sqs, steps, strict=True)
    ]


def apply_(param: Tensor, update: Update, *, lr: float | Tensor, weight_decay: float) -> None:
    """param ← (1 − lr·wd)·param − lr·update: the only place where a weight is written."""
    if not isinstance(update, Factored):
        reference.apply_(param, update.view_as(param), lr=lr, weight_decay=weight_decay)
    elif param.dim() == 2 or param.is_contiguous():
        reference.apply_factored_(param.flatten(1), *update, lr=lr, weight_decay=weight_decay)
    else:
        # a convolution in channels_last: flatten(1) would be a copy
        product = (update.left @ update.right).view(param.shape)
        reference.apply_(param, product, lr=lr, weight_decay=weight_decay)


def _fused_directions_(
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    betas: tuple[float, float],
    eps: float,
    steps: list[int],
) -> list[Tensor]:
    # torch's fused AdamW in one pass over memory; from zero weights with lr = −1 it leaves the direction itself
    directions = [torch.zeros_like(g, memory_format=torch.contiguous_format) for g in grads]
    adamw(
        directions,
        [g.contiguous() for g in grads],
        exp_avgs,
        exp_avg_sqs,
        [],
        [torch.full((), t - 1.0, dtype=torch.float32, device=g.device) for g, t in zip(grads, steps, strict=True)],
        fused=True,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=-1.0,
        weight_decay=0.0,
        eps=eps,
        maximize=False,
    )
    return directions


def _takes_triton(x: Tensor) -> bool:
    if _backend.get() != "triton":
        return False
    if type(x) is Tensor and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return True
    raise RuntimeError(
        f"backend('triton'): a {type(x).__name__} on {x.device} needs a CUDA device, "
        "or TRITON_INTERPRET=1 set before Triton is imported"
    )


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
