"""A weight written from a dense update in one pass: decayed, moved and rounded once."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from ._launch import STRIDED_TILE, launch_shape, traced
from ._rounding import DTYPES as DTYPES
from ._rounding import rounded, wrapped


@triton.jit
def rates(lr, decay, LR_ON_DEVICE: tl.constexpr):
    """Return lr and 1 − lr·wd; `decay` is that one already, or wd where `lr` points to the number."""
    if LR_ON_DEVICE:
        lr = tl.load(lr).to(tl.float32)
        decay = 1.0 - lr * tl.cast(decay, tl.float32)
    # a compiler of torch's passes numbers in float64
    return tl.cast(lr, tl.float32), tl.cast(decay, tl.float32)


@triton.jit(do_not_specialize=["seed"])
def apply_kernel(
    param_ptr,
    update_ptr,
    lr,
    decay,
    seed,
    m,
    n,
    param_row,
    param_column,
    update_row,
    update_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CAUTIOUS: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One tile of W ← decay·W − lr·U; if CAUTIOUS, without decay where U and W differ in sign."""
    lr, decay = rates(lr, decay, LR_ON_DEVICE)
    across = tl.cdiv(n, COLUMNS)
    # int64, so that weights of more than 2³¹ elements are addressed right
    rows = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = (tl.program_id(0) % across).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    update_at = update_ptr + (rows * update_row)[:, None] + (columns * update_column)[None, :]
    param_at = param_ptr + (rows * param_row)[:, None] + (columns * param_column)[None, :]
    update = tl.load(update_at, mask=inside, other=0.0).to(tl.float32)
    param = tl.load(param_at, mask=inside, other=0.0).to(tl.float32)
    if CAUTIOUS:
        decay = tl.where(update * param >= 0, decay, 1.0)
    value = decay * param - lr * update
    index = (rows * n)[:, None] + columns[None, :]
    value = rounded(value, param_ptr.dtype.element_ty, seed, index, STOCHASTIC, INTERPRETED)
    tl.store(param_at, value, mask=inside)


def apply_(
    param: Tensor,
    update: Tensor,
    *,
    lr: float | Tensor,
    weight_decay: float,
    seed: int | None = None,
    cautious: bool = False,
    shape: tuple[int, int] | None = None,
) -> None:
    """Do as `reference_apply.apply_` in float32, rounded once whatever the dtypes are; `update` is left alone.

    Args:
        param: of float32, bfloat16 or float16 and any strides; of more than two dimensions if it can be viewed as a
            matrix.
        update: of one of these dtypes, any strides and the same shape.
        lr: a number, or a tensor of no dimensions on the same device, which the host does not read.
        weight_decay: per unit of lr.
        seed: of the rounding of bfloat16 and float16; None rounds to the nearest.
        cautious: whether wd is 0 where update and weight differ in sign.
        shape: elements and warps of one program where both are contiguous; None goes by the table.

    Raises:
        ValueError: for tensors that the kernel would misread.
    """
    check_param(param, lr)
    if update.shape != param.shape or update.dtype not in DTYPES or update.device != param.device:
        raise ValueError(
            f"the Triton weight update needs an update of shape {tuple(param.shape)} and float32, bfloat16 or float16 "
            f"on {param.device}, not {update.dtype} of shape {tuple(update.shape)} on {update.device}"
        )
    if param.numel() == 0:
        return
    flat = param.is_contiguous() and update.is_contiguous()
    if flat:
        columns, warps = shape or launch_shape(param.numel(), interpreted=not param.is_cuda)
        rows = 1
        x, y = param.view(1, -1), update.view(1, -1)
    else:
        rows, columns, warps = STRIDED_TILE
        x = _matrix(param)
        y = update.reshape(x.shape)
    rate, decay = rate_and_decay(lr, weight_decay)
    kernel, device = (wrap_triton(apply_kernel), -1) if traced(param) else (apply_kernel, param.get_device())
    # a kernel goes to the current device, which need not be the tensor's
    with torch.cuda.device(device):
        kernel[(triton.cdiv(x.size(0), rows) * triton.cdiv(x.size(1), columns),)](
            x,
            y,
            rate,
            decay,
            wrapped(seed or 0),
            *x.shape,
            *x.stride(),
            *y.stride(),
            ROWS=rows,
            COLUMNS=columns,
            CAUTIOUS=cautious,
            LR_ON_DEVICE=isinstance(lr, Tensor),
            STOCHASTIC=seed is not None,
            INTERPRETED=not param.is_cuda,
            num_warps=warps,
        )


def rate_and_decay(lr: float | Tensor, weight_decay: float) -> tuple[float | Tensor, float]:
    """Return what `rates` makes lr and 1 − lr·wd of; of a number the host has the second in double precision."""
    if isinstance(lr, Tensor):
        return lr, float(weight_decay)
    return float(lr), 1 - float(lr) * weight_decay


def check_param(param: Tensor, lr: float | Tensor) -> None:
    """Refuse a weight that cannot be written in place, and a rate that is elsewhere.

    Raises:
        ValueError: says what was needed and what came.
    """
    if param.dtype not in DTYPES:
        raise ValueError(
            f"the Triton weight update needs a weight of float32, bfloat16 or float16, not of {param.dtype}"
        )
    if any(stride == 0 and size > 1 for size, stride in zip(param.shape, param.stride(), strict=True)):
        raise ValueError(
            "the Triton weight update needs a weight with a place for each element, "
            f"not one of shape {tuple(param.shape)} and strides {param.stride()}"
        )
    if isinstance(lr, Tensor) and (lr.dim() != 0 or lr.device != param.device or not lr.is_floating_point()):
        raise ValueError(
            f"the Triton weight update needs lr as a number or a float tensor of no dimensions on {param.device}, "
            f"not {lr.dtype} of shape {tuple(lr.shape)} on {lr.device}"
        )


def _matrix(param: Tensor) -> Tensor:
    """Return a weight that is not contiguous as a view of two dimensions."""
    if param.dim() == 2:
        return param
    try:
        return param.view(1 if param.dim() == 1 else param.size(0), -1)
    except RuntimeError as error:
        raise ValueError(
            "the Triton weight update needs a weight that can be viewed as a matrix, "
            f"not one of shape {tuple(param.shape)} and strides {param.stride()}"
        ) from error
