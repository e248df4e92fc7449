"""AdamW for many parameters in one launch: each program finds its tensors and its part of them in a table."""

import functools
import itertools
import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import ADAMW, ADAMW_INTERPRETED
from ._rounding import rounded, wrapped
from .apply import check_param, rate_and_decay, rates

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# numbers of a tensor in the table: four addresses, elements, first program, seed, and two float32 in one
_ROW = tl.constexpr(8)


@triton.jit
def _pointer(at, NAME: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the address in the table as a pointer, of which ALIGNED says that 16 bytes may be read at once."""
    address = tl.load(at)
    if NAME == "bf16":
        pointer = address.to(tl.pointer_type(tl.bfloat16))
    elif NAME == "fp16":
        pointer = address.to(tl.pointer_type(tl.float16))
    else:
        pointer = address.to(tl.pointer_type(tl.float32))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def adamw_kernel(
    table_ptr,
    owners_ptr,
    lr,
    decay,
    beta2,
    weight1,
    weight2,
    eps,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Advance one block of one tensor: m and v, then W ← decay·W − lr·m̂ / (√v̂ + eps)."""
    lr, decay = rates(lr, decay, LR_ON_DEVICE)
    row = table_ptr + tl.load(owners_ptr + tl.program_id(0)) * _ROW
    param_ptr = _pointer(row, PARAM, ALIGNED)
    grad_ptr = _pointer(row + 1, GRAD, ALIGNED)
    exp_avg_ptr = _pointer(row + 2, "fp32", ALIGNED)
    exp_avg_sq_ptr = _pointer(row + 3, "fp32", ALIGNED)
    numel = tl.load(row + 4)
    if ALIGNED:
        # or the mask would have to be asked for each element
        numel = tl.multiple_of(numel, 16)
    start = (tl.program_id(0) - tl.load(row + 5)) * BLOCK
    seed = tl.load(row + 6).to(tl.int32)
    corrections = tl.load(row + 7)
    correction1 = corrections.to(tl.int32).to(tl.float32, bitcast=True)
    correction2 = (corrections >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    offsets = start + tl.arange(0, BLOCK)
    mask = offsets < numel
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    exp_avg = tl.load(exp_avg_ptr + offsets, mask=mask, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offsets, mask=mask, other=0.0)
    param = tl.load(param_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    exp_avg += weight1 * (grad - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + weight2 * grad * grad
    direction = exp_avg * correction1 / (tl.sqrt(exp_avg_sq * correction2) + eps)
    value = decay * param - lr * direction
    value = rounded(value, param_ptr.dtype.element_ty, seed, offsets, STOCHASTIC, INTERPRETED)
    tl.store(exp_avg_ptr + offsets, exp_avg, mask=mask)
    tl.store(exp_avg_sq_ptr + offsets, exp_avg_sq, mask=mask)
    tl.store(param_ptr + offsets, value, mask=mask)


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
    shape: tuple[int, int] | None = None,
) -> None:
    """Do as `reference_apply.adamw_`, all tensors of the same dtypes in one launch; gradients are left alone.

    Args:
        params: contiguous, of float32, bfloat16 or float16, all on one device.
        grads: of their shapes, one of these dtypes and any strides.
        exp_avgs: contiguous float32.
        exp_avg_sqs: the same.
        steps: of each, counted from 1.
        lr: a number, or a tensor of no dimensions on the same device, which the host does not read.
        betas: of the two moments.
        eps: is added to the root of the second.
        weight_decay: per unit of lr.
        seeds: of the rounding of bfloat16 and float16, one each; None rounds to the nearest.
        shape: elements and warps of one program; None goes by the table.

    Raises:
        ValueError: for tensors that the kernel would misread.
    """
    lengths = [len(x) for x in (params, grads, exp_avgs, exp_avg_sqs, steps, params if seeds is None else seeds)]
    if len(set(lengths)) > 1:
        raise ValueError(f"the Triton AdamW needs as many of each as there are weights, not {lengths}")
    if not params:
        return
    check_param(params[0], lr)
    device = params[0].device
    interpreted = not params[0].is_cuda
    block, warps = shape or (ADAMW_INTERPRETED if interpreted else ADAMW)
    # by what is compiled: rows of the table one after the other, programs of each tensor
    groups: dict[tuple[torch.dtype, torch.dtype, bool], tuple[list[int], list[int]]] = {}
    # they live until the launch
    copies = []
    for i, (param, grad, exp_avg, exp_avg_sq) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        _check(param, grad, exp_avg, exp_avg_sq, device)
        if not grad.is_contiguous():
            grad = grad.contiguous()
            copies.append(grad)
        addresses = param.data_ptr(), grad.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr()
        numel = param.numel()
        if numel == 0:
            continue
        aligned = (addresses[0] | addresses[1] | addresses[2] | addresses[3] | numel) % 16 == 0
        rows, counts = groups.setdefault((param.dtype, grad.dtype, aligned), ([], []))
        seed = 0 if seeds is None else wrapped(seeds[i])
        # where its programs begin is known at the end
        rows += (*addresses, numel, 0, seed, _corrections(betas, steps[i]))
        counts.append(-(-numel // block))
    rate, decay = rate_and_decay(lr, weight_decay)
    beta1, beta2 = betas
    # a kernel goes to the current device, which need not be the tensors'
    with torch.cuda.device(params[0].get_device()):
        for (param_dtype, grad_dtype, aligned), (rows, counts) in groups.items():
            rows[5::8] = itertools.accumulate(counts[:-1], initial=0)
            # from pinned memory the host does not wait for the copy
            table = torch.tensor(rows, dtype=torch.int64, device="cpu", pin_memory=not interpreted)
            adamw_kernel[(sum(counts),)](
                table.to(device, non_blocking=True),
                _owners(tuple(counts), device),
                rate,
                decay,
                float(beta2),
                # the weights as the host rounds them: in float32 1 − 0.999 is off by 1e-5
                float(1 - beta1),
                float(1 - beta2),
                float(eps),
                PARAM=NAMES[param_dtype],
                GRAD=NAMES[grad_dtype],
                BLOCK=block,
                ALIGNED=aligned,
                LR_ON_DEVICE=isinstance(lr, Tensor),
                STOCHASTIC=seeds is not None,
                INTERPRETED=interpreted,
                num_warps=warps,
            )


def _check(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, device: torch.device) -> None:
    """Refuse tensors that are not as they should be; at each step of each tensor, and so in few words."""
    if (
        param.is_contiguous()
        and exp_avg.is_contiguous()
        and exp_avg_sq.is_contiguous()
        and param.shape == grad.shape == exp_avg.shape == exp_avg_sq.shape
        and exp_avg.dtype == exp_avg_sq.dtype == torch.float32
        and param.dtype in NAMES
        and grad.dtype in NAMES
        and param.device == grad.device == exp_avg.device == exp_avg_sq.device == device
    ):
        return
    came = ", ".join(
        f"{name} {x.dtype} of shape {tuple(x.shape)} and strides {x.stride()} on {x.device}"
        for name, x in {"weight": param, "gradient": grad, "moments": exp_avg, "and": exp_avg_sq}.items()
    )
    raise ValueError(
        "the Triton AdamW needs a contiguous weight and its gradient of float32, bfloat16 or float16 and contiguous "
        f"float32 moments, of one shape and all on one device, not {came}"
    )


@functools.lru_cache(maxsize=64)
def _owners(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the tensor that each program works on; the same sizes come at every step."""
    owners = torch.arange(len(counts), dtype=torch.int32, device="cpu")
    return owners.repeat_interleave(torch.tensor(counts, device="cpu")).to(device)


@functools.lru_cache(maxsize=64)
def _corrections(betas: tuple[float, float], step: int) -> int:
    """Return 1 / (1 − βᵗ) of both betas, the bits of two float32 in one number."""
    if step < 1:
        raise ValueError(f"the Triton AdamW needs steps that are counted from 1, not {step}")
    (packed,) = struct.unpack("<q", struct.pack("<ff", *(1 / (1 - beta**step) for beta in betas)))
    return int(packed)
