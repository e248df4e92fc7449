"""One name per operation; this file and `passes` choose between a kernel and plain torch."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lowrank_optim import reference, reference_apply, reference_matrix
from lowrank_optim._backend import called, fills, near, takes_triton
from lowrank_optim._backend import without_autocast as without_autocast
from lowrank_optim._half import HALF, multiplies
from lowrank_optim._types import Factored, Scaled, Update, dense

Halves = reference_matrix.Halves
Triple = reference_matrix.Triple
adam_direction_ = reference.adam_direction_
almost_orthogonal = reference_matrix.almost_orthogonal
gram_newton_schulz = reference_matrix.gram_newton_schulz
newton_schulz = reference_matrix.newton_schulz
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
    if type(grads[0]) is Tensor and grads[0].device.type in ("cpu", "cuda"):
        return _fused_directions_(grads, exp_avgs, exp_avg_sqs, betas=betas, eps=eps, steps=steps)
    rows = zip(grads, exp_avgs, exp_avg_sqs, steps, strict=True)
    return [adam_direction_(g, m, v, betas=betas, eps=eps, step=t) for g, m, v, t in rows]


def gram_recursion(x: Tensor, triples: Sequence[Triple]) -> Tensor:
    """Do as `newton_schulz` for float32 matrices (b, m, n) of a short side of at most 64: all steps in one kernel."""
    from lowrank_optim.kernels import recursion as kernel

    tall = x.size(-2) > x.size(-1)
    q = called(kernel.gram_recursion, x)(x.mT @ x if tall else x @ x.mT, triples)
    return x @ q if tall else q @ x


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `x` in `dtype`."""
    # torch's copy from one 16-bit format to the other does not read whole vectors
    if {x.dtype, dtype} != set(HALF) or torch.compiler.is_compiling() or not takes_triton(x, faster=x.is_contiguous()):
        return x.to(dtype)
    from lowrank_optim.kernels import cast as kernel

    return kernel.cast(x.contiguous(), dtype)


def normalized(x: Tensor, *, eps: float, dtype: torch.dtype) -> Tensor:
    """Return x / max(‖x‖_F, eps) of each matrix in `dtype`, computed in float32 or better."""
    if torch.float64 in (x.dtype, dtype) or not takes_triton(x, faster=True):
        return reference_matrix.normalized(x, eps=eps, dtype=dtype)
    from lowrank_optim.kernels import normalized as kernel

    return called(kernel.normalized, x)(x, eps=eps, dtype=dtype)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return A B; where one of two matrices is of 16 bits the other is rounded to those, and sums are in float32."""
    if a.dtype == b.dtype and a.dtype not in HALF:
        return a @ b
    if type(a) is Tensor and a.is_cuda:
        dtype = a.dtype if a.dtype in HALF else b.dtype
        return torch.mm(a.to(dtype), b.to(dtype), out_dtype=torch.float32)
    return reference.product(a, b)


def products(lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> list[Tensor]:
    """Return `product` of each, where all of one side are alike."""
    a, b = lefts[0], rights[0]
    if type(a) is Tensor and a.is_cuda and a.dtype == b.dtype and a.dtype in HALF:
        return [torch.mm(left, right, out_dtype=torch.float32) for left, right in zip(lefts, rights, strict=True)]
    return [product(left, right) for left, right in zip(lefts, rights, strict=True)]


def casts(xs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return tensors of one shape in `dtype`, in memory of their own, by one call."""
    if xs[0].numel() * dtype.itemsize % 16:
        # products read whole vectors
        return [x.to(dtype) for x in xs]
    made = list(torch.empty((len(xs), *xs[0].shape), dtype=dtype, device=xs[0].device).unbind())
    torch._foreach_copy_(made, xs)
    return made


def symmetric(
    a: Tensor, b: Tensor, c: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0, gamma: float = 0.0
) -> Tensor:
    """Return alpha·A Bᵀ + beta·C + gamma·I for matrices (b, n, k) and (b, n, n) that make it symmetric."""
    if not takes_triton(a, faster=fills(a, more=c is not None or gamma != 0)):
        return reference_matrix.symmetric(a, b, c, alpha=alpha, beta=beta, gamma=gamma)
    from lowrank_optim.kernels import symmetric as kernel

    if a.dtype not in kernel.DTYPES:
        raise RuntimeError(f"backend('triton'): a symmetric product of {a.dtype} needs float32, bfloat16 or float16")
    return called(kernel.symmetric, a)(a, b, c, alpha=alpha, beta=beta, gamma=gamma)


class Whole(reference_matrix.Whole):
    """Products of whole matrices, the symmetric ones by whoever `backend` names.

    On a GPU W is one matrix: a copy of X to add Z X to costs more than rounding W does.
    """

    def symmetric(
        self,
        a: Tensor,
        b: Tensor,
        c: Tensor | None = None,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 0.0,
    ) -> Tensor:
        """Do as `symmetric`."""
        return symmetric(a, b, c, alpha=alpha, beta=beta, gamma=gamma)

    def polynomial(self, r: Tensor, a: float, b: float, c: float) -> Tensor | reference_matrix.Sum:
        """Return W, in one part where a device is fast."""
        if multiplies(r):
            return self.symmetric(r, r.mT, r, alpha=c, beta=b, gamma=a)
        return super().polynomial(r, a, b, c)

    def advanced(self, r: Tensor, w: Tensor) -> Tensor:
        """Return R W², or W R W where one triangle of it is computed.

        As R and W, rounded, do not commute, neither R W nor R W² is symmetric, and a mirrored triangle of either is
        wrong where R has small eigenvalues. W R W is symmetric whatever rounding has done.
        """
        if takes_triton(r, faster=fills(r)):
            return self.symmetric(w, (r @ w).mT)
        return super().advanced(r, w)


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
    numbers: dict[str, Any] = {"lr": near(lr, param), "weight_decay": weight_decay, "seed": seed}
    # of a parameter the tensor; a sharded one stays one
    param = param.detach()
    if isinstance(update, Factored | Scaled):
        if not cautious and (param.dim() == 2 or param.is_contiguous()):
            product = update if isinstance(update, Factored) else update.plus
            scaled = (update.matrix, update.factors) if isinstance(update, Scaled) else None
            _apply_sum_(param.flatten(1), product, scaled, **numbers)
            return
        # signs are those of the whole; and in channels_last, flatten(1) of a convolution would be a copy
        update = dense(_widened(update) if isinstance(update, Factored) else update)
    elif seed is not None and hasattr(param, "_local_tensor"):
        # bits are looked at, so each rank rounds its own part
        param, update = _local(param, param), _local(update, param)
    update = update.view_as(param)
    # kernels see a matrix, which a convolution in channels_last is not
    plain = param.dim() <= 2 or param.is_contiguous()
    if plain and takes_triton(param, faster=multiplies(param) or update.dtype in HALF):
        from lowrank_optim.kernels import apply as kernel

        called(kernel.apply_, param)(param, update, **numbers, cautious=cautious)
    else:
        wide = torch.promote_types(update.dtype, torch.float32)
        reference_apply.apply_(param, update.to(wide), **numbers, cautious=cautious)


def _apply_sum_(
    param: Tensor,
    product: Factored | None,
    scaled: tuple[Tensor, Tensor] | None,
    *,
    lr: float | Tensor,
    weight_decay: float,
    seed: int | None,
) -> None:
    """Do as `reference_apply.apply_sum_`; a device multiplies factors that are rounded to the weight's 16 bits."""
    numbers: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "seed": seed}
    halves = None if product is None or not multiplies(param) else [x.to(param.dtype) for x in product]
    if halves is not None and scaled is None and seed is None and not isinstance(lr, Tensor):
        add_product_(param, Factored(*halves), lr=lr, weight_decay=weight_decay)
    elif takes_triton(param, faster=multiplies(param)):
        from lowrank_optim.kernels import factored_add as kernel

        product = product if halves is None else Factored(*halves)
        called(kernel.apply_sum_, param)(param, product, scaled, **numbers)
    else:
        reference_apply.apply_sum_(param, None if product is None else _widened(product), scaled, **numbers)


def adds_products(param: Tensor, updates: Iterable[Update | None], lr: float | Tensor) -> bool:
    """Return whether `add_product_` does for all of these updates of matrices like `param`."""
    if isinstance(lr, Tensor) or param.dim() != 2 or not multiplies(param.detach()) or not isinstance(updates, list):
        return False
    return all(isinstance(update, Factored) for update in updates)


def add_product_(param: Tensor, update: Any, *, lr: float, weight_decay: float) -> None:
    """Do as `apply_` of a factored update in one call: it decays, multiplies in float32, and rounds once."""
    left, right = update
    dtype = param.dtype
    param.addmm_(left.to(dtype), right.to(dtype), beta=1 - lr * weight_decay, alpha=-lr)


def _widened(product: Factored) -> Factored:
    """Return factors of one dtype: what a kernel has made may be of 16 bits where the other one is not."""
    wide = torch.promote_types(torch.promote_types(product.left.dtype, product.right.dtype), torch.float32)
    return Factored(product.left.to(wide), product.right.to(wide))


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
