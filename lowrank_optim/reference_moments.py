"""What is done to moments between reading them as they are kept and keeping them again, in plain torch.

It is the composition of `storage` and a rule for one matrix after another. Kernels that do it in one pass are tested
against this file.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lowrank_optim import reference, reference_matrix

# added to a seed, so that the second moment is not rounded as the first one is
_APART = 0x2545F491
# bits of a code, and how many share a scale
_BLOCKWISE = {"int8": (8, 256), "int4": (4, 64)}


def read_moment(state: Mapping[str, Tensor], name: str, shape: Sequence[int], state_dtype: str) -> Tensor:
    """Return float32 of the moment `name`."""
    kept = state[name]
    if state_dtype not in _BLOCKWISE:
        return kept.to(torch.float32, copy=True)
    bits, block = _BLOCKWISE[state_dtype]
    numel = math.prod(shape)
    codes = kept.view(-1) if bits == 8 else reference.unpack(kept, numel)
    # a whole last block, whose scale is its own
    padded = torch.nn.functional.pad(codes, (0, -numel % block)).view(-1, block)
    moment = torch.empty(padded.shape, dtype=torch.float32, device=kept.device)
    reference.dequantize_(moment, padded, state[f"{name}_scale"], **_grid(bits, kept.dtype))
    return moment.view(-1)[:numel].view(tuple(shape))


def write_moment_(state: Mapping[str, Tensor], name: str, moment: Tensor, state_dtype: str, seed: int) -> None:
    """Keep float32 `moment` as the moment `name`."""
    kept = state[name]
    if state_dtype not in _BLOCKWISE:
        kept.copy_(reference.rounded_(moment.clone().view(1, -1), kept.dtype, [seed]).view_as(kept))
        return
    bits, block = _BLOCKWISE[state_dtype]
    numel = moment.numel()
    padded = torch.nn.functional.pad(moment.reshape(-1), (0, -numel % block)).view(-1, block)
    codes = torch.empty(padded.shape, dtype=kept.dtype, device=kept.device)
    dither = None
    if kept.dtype == torch.uint8:
        dither = reference.dither(padded.numel(), [seed], kept.device).view(padded.shape)
    scale = state[f"{name}_scale"]
    reference.quantize_(codes, scale, padded, dither=dither, **_grid(bits, kept.dtype))
    flat = codes.view(-1)[:numel]
    if bits == 8:
        kept.copy_(flat.view_as(kept))
    else:
        reference.pack_(kept, flat)


def stored_adam_directions_(
    grads: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    *,
    state_dtype: str,
    betas: tuple[float, float],
    eps: float,
    steps: Sequence[int],
    seeds: Sequence[int],
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Advance the moments that each state keeps and return scale · m̂ / (√v̂ + ε) of them, as before rounding."""
    found = []
    for grad, state, step, seed in zip(grads, states, steps, seeds, strict=True):
        moments = [read_moment(state, name, grad.shape, state_dtype) for name in ("exp_avg", "exp_avg_sq")]
        direction = reference.adam_direction_(grad.float(), *moments, betas=betas, eps=eps, step=step)
        found.append(direction.mul_(scale).to(dtype))
        write_moment_(state, "exp_avg", moments[0], state_dtype, seed)
        write_moment_(state, "exp_avg_sq", moments[1], state_dtype, seed + _APART)
    return found


def normalized_momenta_(
    grads: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    *,
    state_dtype: str,
    momentum: float,
    nesterov: bool,
    form: Literal["ema", "sum"],
    eps: float,
    seeds: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Advance the momentum that each state keeps; return the updates over their norms, (number of matrices, m, n).

    M ← βM + (1−β)G ("ema") or M ← βM + G ("sum"); the update U is M as it was before rounding, or the same of M once
    more (Nesterov), and what is returned is U / max(‖U‖, eps) in `dtype`.
    """
    weight = 1 - momentum if form == "ema" else 1.0
    updates = []
    for grad, state, seed in zip(grads, states, seeds, strict=True):
        moment = read_moment(state, "momentum_buffer", grad.shape, state_dtype)
        moment = moment.mul_(momentum).add_(grad.float(), alpha=weight)
        ahead = torch.add(momentum * moment, grad.float(), alpha=weight)
        updates.append(ahead if nesterov else moment)
        write_moment_(state, "momentum_buffer", moment, state_dtype, seed)
    return reference_matrix.normalized(torch.stack(updates), eps=eps, dtype=dtype)


def _grid(bits: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return the grid of signed codes, or of unsigned ones."""
    if dtype == torch.int8:
        return {"levels": (1 << bits - 1) - 1, "root": 2}
    return {"levels": (1 << bits) - 1, "root": 4 if bits == 8 else 2}
