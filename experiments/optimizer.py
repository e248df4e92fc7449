"""The optimizer of a run and its learning rate."""

import math
from typing import Any

import torch
from torch import nn

from experiments.config import ConfigError, OptimConfig
from lowrank_optim import GaLoreAdamW, ParamGroups, param_groups


def build_optimizer(model: nn.Module, c: OptimConfig) -> tuple[torch.optim.Optimizer, ParamGroups]:
    """The optimizer and the groups it was given; `lr` goes to the matrices, `other_lr` to everything else."""
    projection: dict[str, Any] = {key: getattr(c, key) for key in ("update_proj_gap", "scale", "proj_type", "basis")}
    try:
        groups = param_groups(model, rank=c.rank, weight_decay=c.weight_decay, other_lr=c.other_lr, **projection)
        shared: dict[str, Any] = {"lr": c.lr, "betas": c.betas, "eps": c.eps}
        if c.name == "adamw":
            for group in groups:
                for key in ("rank", *projection):
                    group.pop(key, None)
            fused = not next(model.parameters()).is_meta
            # copies, because torch takes the names out of the groups it is given
            return torch.optim.AdamW([dict(group) for group in groups], **shared, fused=fused), groups
        return GaLoreAdamW(groups, **shared, stagger=c.stagger), groups
    except ValueError as error:
        raise ConfigError(f"optim: {error}") from error


def lr_factor(step: int, steps: int, warmup: int, floor: float) -> float:
    """Factor on every learning rate at `step` (from 1): linear warm-up, then a cosine down to `floor`."""
    if step < warmup:
        return step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
