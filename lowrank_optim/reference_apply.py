"""How a weight is written, in plain torch; see `reference`."""

from collections.abc import Sequence

from torch import Tensor

from lowrank_optim.reference import adam_direction_, rounded_

# rows of a low-precision weight are updated in blocks of this many float32 elements
_BLOCK = 1 << 20


def apply_(
    param: Tensor,
    update: Tensor,
    *,
    lr: float | Tensor,
    weight_decay: float,
    seed: int | None = None,
    cautious: bool = False,
) -> None:
    """param ← (1 − lr·wd)·param − lr·update, rounded once; `update` is scratch afterwards.

    With a `seed`, a weight of lower precision than the update is rounded stochastically. With `cautious`, wd is 0 where
    update and weight differ in sign.
    """
    decay = 1 - lr * weight_decay
    if cautious:
        decay = (update * param >= 0).to(update.dtype).mul_(-lr * weight_decay).add_(1)
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
        param.copy_(update if seed is None else rounded_(update, param.dtype, [seed]))


def apply_sum_(
    param: Tensor,
    product: tuple[Tensor, Tensor] | None,
    scaled: tuple[Tensor, Tensor] | None,
    *,
    lr: float | Tensor,
    weight_decay: float,
    seed: int | None = None,
) -> None:
    """param ← (1 − lr·wd)·param − lr·(left @ right + matrix ∘ factors), forming neither; one of them may be None.

    `param` (m, n) may be in a lower precision than the rest; then it is updated in blocks of rows, each rounded
    once (stochastically with a `seed`), so that the float32 temporary stays small whatever m is.

    Args:
        param: (m, n).
        product: left (m, r) and right (r, n).
        scaled: matrix (m, n) and factors (m, 1), (1, n) or (1, 1).
        lr: a number or a tensor of no dimensions.
        weight_decay: per unit of lr.
        seed: of the rounding.
    """
    decay, alpha = 1 - lr * weight_decay, -1.0
    if isinstance(lr, Tensor):
        # a tensor stays on its device: `alpha` and `beta` of addmm would be read by the host
        product = None if product is None else (product[0] * lr, product[1])
        scaled = None if scaled is None else (scaled[0], scaled[1] * lr)
    else:
        alpha = -lr
    dtype = next(pair[0].dtype for pair in (product, scaled) if pair is not None)
    if param.dtype == dtype:
        beta = 1.0
        if isinstance(decay, Tensor) or product is None:
            _decay_(param, decay)
        else:
            beta = decay
        _add_(param, product, scaled, alpha, beta)
        return
    rows = max(1, _BLOCK // max(1, param.size(1)))
    for start in range(0, param.size(0), rows):
        some = slice(start, start + rows)
        value = param[some].to(dtype).mul_(decay)
        part = None if product is None else (product[0][some], product[1])
        if scaled is not None:
            matrix, factors = scaled
            scaled_part = matrix[some], factors if factors.size(0) == 1 else factors[some]
        _add_(value, part, None if scaled is None else scaled_part, alpha)
        param[some].copy_(value if seed is None else rounded_(value, param.dtype, [seed + start * param.size(1)]))


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[int],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    seeds: Sequence[int] | None = None,
) -> None:
    """Advance moments and weights as `torch.optim.AdamW`: param ← (1 − lr·wd)·param − lr·m̂ / (√v̂ + ε), rounded once.

    Args:
        params: in any precision up to that of the moments.
        grads: of their shapes.
        exp_avgs: of their shapes.
        exp_avg_sqs: the same.
        steps: of each, counted from 1.
        lr: a number or a tensor of no dimensions.
        betas: of the two moments.
        eps: is added to the root of the second.
        weight_decay: per unit of lr.
        seeds: of the rounding, one each; None rounds to the nearest.
    """
    for i, (param, grad, exp_avg, exp_avg_sq) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        grad = grad.to(exp_avg.dtype)
        update = adam_direction_(grad, exp_avg, exp_avg_sq, betas=betas, eps=eps, step=steps[i])
        apply_(param, update, lr=lr, weight_decay=weight_decay, seed=None if seeds is None else seeds[i])


def _add_(
    x: Tensor,
    product: tuple[Tensor, Tensor] | None,
    scaled: tuple[Tensor, Tensor] | None,
    alpha: float,
    beta: float = 1.0,
) -> None:
    if product is not None:
        x.addmm_(*product, beta=beta, alpha=alpha)
    if scaled is not None:
        x.addcmul_(*scaled, value=alpha)


def _decay_(param: Tensor, decay: float | Tensor) -> None:
    if isinstance(decay, Tensor) or decay != 1:
        param.mul_(decay)
