"""Where state lives when parameters are sharded, and what is refused."""

import sys
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from lowrank_optim._types import NewState, compute_dtype

# a lone vector of this many elements in a projected group is a flattened model, not a bias
_FLATTENED = 1 << 20


def is_sharded(x: Tensor) -> bool:
    """Say whether `x` is a DTensor, without importing that machinery."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def allocator(like: Tensor, owner: str) -> NewState:
    """Return a function that allocates state of `like`: on its device, and sharded as it is.

    Args:
        like: the parameter.
        owner: the optimizer's name, for the message.
    """

    def new(shape: Sequence[int], dtype: torch.dtype | None = None, *, host: bool = False) -> Tensor:
        dtype = dtype or compute_dtype(like)
        if host:
            return torch.zeros(tuple(shape), dtype=dtype, device="cpu")
        if not is_sharded(like):
            return torch.zeros(tuple(shape), dtype=dtype, device=like.device)
        if tuple(shape) == tuple(like.shape):
            return torch.zeros_like(like, dtype=dtype, requires_grad=False)
        refuse_shards(like, owner)

    return new


def refuse_shards(p: Tensor, owner: str) -> NoReturn:
    """Raise: what looks at a sharded matrix as a whole would need communication that is not there."""
    raise RuntimeError(
        f"{owner}: a DTensor parameter of shape {tuple(p.shape)} cannot be projected or orthogonalized: that needs the "
        "whole matrix. Keep it in a group without a rank, or of a role other than 'matrix' (AdamW, which works under "
        "FSDP2), or shard the optimizer with DDP and ZeroRedundancyOptimizer"
    )


def refuse_coded_shards(p: Tensor, owner: str, state_dtype: str) -> NoReturn:
    """Raise: the blocks of a quantized moment do not end where a shard ends."""
    raise RuntimeError(
        f"{owner}: state_dtype={state_dtype!r} cannot be kept for a DTensor parameter of shape {tuple(p.shape)}: codes "
        "and scales would not be sharded as it is. Use state_dtype='float32', or shard the optimizer with DDP and "
        "ZeroRedundancyOptimizer"
    )


def refuse_flattened(p: Tensor, owner: str) -> None:
    """Raise for a parameter that has lost its matrix shape to FSDP1 or DeepSpeed ZeRO."""
    # FSDP1 marks its flat parameter and, with use_orig_params, the views of it; DeepSpeed marks with an id
    fsdp1 = getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False)
    if fsdp1 or type(p).__name__ == "FlatParameter" or hasattr(p, "ds_id"):
        raise RuntimeError(
            f"{owner}: got a flattened parameter ({type(p).__name__}), which has lost its matrix shape. "
            "Use FSDP2 (fully_shard), or DDP with ZeroRedundancyOptimizer, both of which keep whole parameters"
        )


def refuse_flattened_group(params: Sequence[Tensor], owner: str) -> None:
    """Raise for a group that is to hold matrices and holds nothing but one huge vector, as ZeRO-1 and 2 make it."""
    if len(params) == 1 and params[0].dim() == 1 and params[0].numel() >= _FLATTENED:
        raise RuntimeError(
            f"{owner}: a group that is to hold matrices holds one vector of {params[0].numel()} elements, which looks "
            "like a flattened model (DeepSpeed ZeRO, FSDP1): the matrices are gone. Use FSDP2 or "
            "ZeroRedundancyOptimizer, or leave `rank` out of this group and give it a `role` other than 'matrix'"
        )
