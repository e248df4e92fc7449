"""One name per operation; the only file that chooses between a kernel and plain torch."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lowrank_optim import reference, reference_apply, reference_matrix
from lowrank_optim._types import Factored, Scaled, Update, dense

Backend = Literal["auto", "torch", "triton"]

_backend: ContextVar[Backend] = ContextVar("lowrank_optim_backend", default="auto")

Halves = reference_matrix.Halves
adam_direction_ = reference.adam_direction_
almost_orthogonal = reference_matrix.almost_orthogonal
gram_newton_schulz = reference_matrix.gram_newton_schulz
newton_schulz = reference_matrix.newton_schulz
normalized = reference_matrix.normalized
normal = reference.normal
orthonormalize = reference.orthonormalize
dct = reference.dct
half_spectrum = reference.half_spectrum
signs = reference.signs
stacks = reference.stacks
spectrum_places = reference.spectrum_places
quantize_ = reference.quantize_
dequantize_ = reference.dequantize_
dither = reference.dither
pack_ = reference.pack_
part_size = reference.part_size
polar = reference_matrix.polar
unpack = reference.unpack
rounded_ = reference.rounded_
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


def symmetric(
    a: Tensor, b: Tensor, c: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0, gamma: float = 0.0
) -> Tensor:
    """Return alpha·A Bᵀ + beta·C + gamma·I for matrices (b, n, k) and (b, n, n) that make it symmetric."""
    if not _takes_triton(a):
        return reference_matrix.symmetric(a, b, c, alpha=alpha, beta=beta, gamma=gamma)
    from lowrank_optim.kernels import symmetric as kernel

    if a.dtype not in kernel.DTYPES:
        raise RuntimeError(f"backend('triton'): a symmetric product of {a.dtype} needs float32, bfloat16 or float16")
    return kernel.symmetric(a, b, c, alpha=alpha, beta=beta, gamma=gamma)


class Whole(reference_matrix.Whole):
    """Products of whole matrices, the symmetric ones by whoever `backend` names."""

    def symmetric(
        self, a: Tensor, b: Tensor, c: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0
    ) -> Tensor:
        """Do as `symmetric`."""
        return symmetric(a, b, c, alpha=alpha, beta=beta)

    def advanced(self, r: Tensor, w: Tensor) -> Tensor:
        """Return R W², or W R W where one triangle of it is computed.

        As R and W, rounded, do not commute, neither R W nor R W² is symmetric, and a mirrored triangle of either is
        wrong where R has small eigenvalues. W R W is symmetric whatever rounding has done.
        """
        return self.symmetric(w, (r @ w).mT) if _takes_triton(r) else super().advanced(r, w)


def apply_(
    param: Tensor,
    update: Update,
    *,
    lr: float | Tensor,
    weight_decay: float,
    seed: int | None = None,
    cautious: bool = False,
) -> None:
    """param ← (1 − lr·wd)·param − lr·update: the only place where a weight is written.

    With a `seed`, bfloat16 and float16 weights are rounded stochastically. With `cautious`, only those elements decay
    that the update takes the same way, or leaves alone.
    """
    cautious = cautious and weight_decay != 0
    if isinstance(update, Factored | Scaled):
        if not cautious and (param.dim() == 2 or param.is_contiguous()):
            product = update if isinstance(update, Factored) else update.plus
            scaled = (update.matrix, update.factors) if isinstance(update, Scaled) else None
            whole = param.flatten(1)
            reference_apply.apply_sum_(whole, product, scaled, lr=lr, weight_decay=weight_decay, seed=seed)
            return
        # signs are those of the whole; and in channels_last, flatten(1) of a convolution would be a copy
        update = dense(update)
    elif seed is not None and hasattr(param, "_local_tensor"):
        # bits are looked at, so each rank rounds its own part
        param, update = _local(param, param), _local(update, param)
    update = update.view_as(param)
    reference_apply.apply_(param, update, lr=lr, weight_decay=weight_decay, seed=seed, cautious=cautious)


def _local(x: Any, like: Any) -> Tensor:
    """Return this rank's part of a DTensor, cut as `like` is."""
    part: Tensor = x.redistribute(like.device_mesh, like.placements).to_local()
    return part


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
    memory = torch.contiguous_format
    # together where the gradients are: one fill, and what comes after takes them at once
    directions = [d for some in stacks(grads) for d in torch.zeros_like(some, memory_format=memory).unbind()]
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


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """Keep the products of a step in the dtype of the mathematics when a step is made inside autocast."""
    on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else contextlib.nullcontext()
