"""GaLore: Adam on the coordinates of the gradient in a low-rank basis."""

from typing import Literal, cast

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowrank_optim._checks import check_projection, require
from lowrank_optim._types import Rule, matrix_shape
from lowrank_optim._warn import warn_once
from lowrank_optim.bases import PROJ_TYPES, SVD, SubspaceIteration, compresses, resolve
from lowrank_optim.optimizer import Group, RuleOptimizer
from lowrank_optim.rules import Adam, Projected
from lowrank_optim.storage import STATE_DTYPES, storage

_BASES: dict[str, type[SVD] | type[SubspaceIteration]] = {"svd": SVD, "subspace": SubspaceIteration}


class GaLoreAdamW(RuleOptimizer):
    r"""AdamW whose moments are kept in a rank-r basis of each gradient matrix.

    For a gradient G (m×n) with m ≥ n, and V_r (n×r) the leading right singular vectors of an earlier gradient:

    .. math::
        R = G V_r, \quad M = β_1 M + (1-β_1) R, \quad S = β_2 S + (1-β_2) R^2, \\
        W ← (1 - ηλ) W - η α \frac{\hat M}{\sqrt{\hat S} + ε} V_r^T

    and from the left with U_r (m×r) where m < n. Every `update_proj_gap` steps the basis is computed again from the
    gradient at hand; the moments are kept as they are.

    Args:
        params: parameters, (name, parameter) pairs, or groups. In groups, those with a `rank` are projected and
            those without are AdamW, as in galore-torch, whose group keys work unchanged. Groups for a whole model come
            from `param_groups(model, rank=...)`.
        lr: η, a number or a one-element tensor. Default 1e-3 (torch.optim.AdamW); the paper trains at 1e-2.
        betas: decay of M and S. Default (0.9, 0.999).
        eps: ε, added after bias correction as in torch.optim.AdamW. Default 1e-8.
        weight_decay: λ, decoupled, in fractions of the weight per unit of lr; not multiplied by `scale`. Default 0.
        rank: r, an int (clamped to min(m, n)) or a float in (0, 1], a fraction of min(m, n). Fills the groups that
            do not name their own. Default: 128 when `params` are bare parameters, none in groups.
        update_proj_gap: steps between two refreshes of a basis. Default 200 (the paper).
        scale: α. Default 0.25 (the paper, pre-training).
        proj_type: "std" compresses the short side, "reverse_std" the long one, "left" and "right" the one named,
            "full" both. Default "std".
        basis: "svd", or "subspace": warm-started block power iteration, two thin products and a thin QR in the place
            of a decomposition. Default "svd".
        stagger: give each matrix its own turn within the period, after a cheap first basis for all, so that no step
            stalls. False refreshes all at steps 0, gap, 2·gap, ..., as galore-torch does. Default True.
        state_dtype: how moments are kept; "float32". Default "float32".
        maximize: ascend instead of descend. Default False.

    Vectors are AdamW, and so is a matrix whose projected state would not be smaller than AdamW's (`rank=1.0` asks for
    the full rotation and gets it). Parameters of more than two dimensions are matrices by `flatten(1)`, as suits
    convolutions; stacked experts (e, m, n) are better left in a group without a rank.

    Raises:
        ValueError: for an argument out of its range, or a group key that looks misspelt.
        RuntimeError: for complex or flattened (FSDP1, DeepSpeed ZeRO) parameters, DTensor parameters in a projected
            group, and sparse gradients.

    State bytes of a projected m×n matrix: 4·(2·r·max(m, n) + r·min(m, n)) for "std", and 4 for `step`; AdamW keeps
    4·2·m·n + 4. Temporaries of a step: see `chunk_bytes` of `RuleOptimizer`.

    Source: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", arXiv 2403.03507.

    Example:
        >>> import torch
        >>> from lowrank_optim import GaLoreAdamW, param_groups
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
        >>> opt = GaLoreAdamW(param_groups(model, rank=8), lr=1e-2)
        >>> model(torch.randn(4, 64)).square().mean().backward()
        >>> opt.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | float | None = None,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: Literal["std", "reverse_std", "left", "right", "full"] = "std",
        basis: Literal["svd", "subspace"] = "svd",
        stagger: bool = True,
        state_dtype: str = "float32",
        maximize: bool = False,
    ) -> None:
        if rank is None and params is not None and not isinstance(params, Tensor):
            params = cast("ParamsT", list(params))
            rank = None if any(isinstance(p, dict) for p in params) else 128
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        projection = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale, "proj_type": proj_type}
        super().__init__(params, {**adam, **projection, "basis": basis, "stagger": stagger, "state_dtype": state_dtype})
        if all(group["rank"] is None for group in self.param_groups):
            warn_once("GaLoreAdamW: no parameter group has a rank, so every parameter is AdamW (said once)")

    def _check(self, group: Group, known: Group) -> None:
        super()._check(group, known)
        check_projection(group, proj_types=PROJ_TYPES, bases=tuple(_BASES))
        require(group["state_dtype"] in STATE_DTYPES, group, "state_dtype", f"one of {', '.join(STATE_DTYPES)}")

    def _rule(self, group: Group, p: Tensor) -> Rule:
        adam = Adam(storage(group["state_dtype"]), tuple(group["betas"]), group["eps"])
        if group["rank"] is None or p.dim() < 2 or p.numel() == 0:
            return adam
        matrix = matrix_shape(p.shape)
        basis = _BASES[group["basis"]](*resolve(group["rank"], group["proj_type"], matrix))
        full = isinstance(group["rank"], float) and group["rank"] == 1
        if not full and not compresses(basis, matrix):
            return adam
        return Projected(basis, adam, group["update_proj_gap"], group["scale"], group["stagger"])
