"""GaLore: Adam on the coordinates of the gradient in a low-rank basis."""

from typing import Literal, cast

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowrank_optim._checks import check_projection
from lowrank_optim._types import Rule, matrix_shape
from lowrank_optim._warn import warn_once
from lowrank_optim.bases import PROJ_TYPES, SVD, SubspaceIteration, compresses, resolve
from lowrank_optim.optimizer import Group, RuleOptimizer
from lowrank_optim.rules import Adam, Projected
from lowrank_optim.storage import storage

_BASES: dict[str, type[SVD] | type[SubspaceIteration]] = {"svd": SVD, "subspace": SubspaceIteration}

# the smallest of the paper's, where nobody says another
_RANK = 128


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
            from `param_groups(model, rank=...)`; they say their `role`, and "matrix" without a rank takes the default.
        lr: η, a number or a one-element tensor. Default 1e-3 (torch.optim.AdamW); the paper trains at 1e-2.
        betas: decay of M and S. Default (0.9, 0.999).
        eps: ε, added after bias correction as in torch.optim.AdamW. Default 1e-8.
        weight_decay: λ, decoupled, in fractions of the weight per unit of lr; not multiplied by `scale`. Default 0.
        rank: r, an int (clamped to min(m, n)) or a float in (0, 1], a fraction of min(m, n). Fills the groups that
            do not name their own, nor a `role` other than "matrix". Default: 128 for bare parameters and for groups of
            role "matrix", none in other groups.
        update_proj_gap: steps between two refreshes of a basis. Default 200 (the paper).
        scale: α. Default 0.25 (the paper, pre-training).
        proj_type: "std" compresses the short side, "reverse_std" the long one, "left" and "right" the one named,
            "full" both. Default "std".
        basis: "svd", or "subspace": warm-started block power iteration, two thin products and a thin QR in the place
            of a decomposition. Default "svd".
        stagger: give each matrix its own turn within the period, after a cheap first basis for all, so that no step
            stalls. False refreshes all at steps 0, gap, 2·gap, ..., as galore-torch does. Default True.
        state_dtype: how moments are kept: "float32", "bfloat16" (rounded stochastically), "int8" (in blocks of 256) or
            "int4" (in blocks of 64). Default "float32".
        stochastic_rounding: round bfloat16 and float16 weights up or down at random, with their exact value as mean,
            so that updates too small for their precision still count. Default False.
        maximize: ascend instead of descend. Default False.

    Vectors are AdamW, and so is a matrix whose projected state would not be smaller than AdamW's (`rank=1.0` asks for
    the full rotation and gets it). Parameters of more than two dimensions are matrices by `flatten(1)`, as suits
    convolutions; the group keys `split` and `flatten` mean nothing here, so stacked experts (e, m, n) are better left
    in a group without a rank.

    Raises:
        ValueError: for an argument out of its range, or a group key that looks misspelt.
        RuntimeError: for complex or flattened (FSDP1, DeepSpeed ZeRO) parameters, DTensor parameters in a projected
            group, and sparse gradients.

    State bytes of a projected m×n matrix for "std": 2·B(r·max(m, n)) + 4·r·min(m, n) + 4, the last for `step`, where a
    moment of k elements takes B(k) = 4·k in float32, 2·k in bfloat16, k + 4·⌈k/256⌉ in int8 and ⌈k/2⌉ + 4·⌈k/64⌉ in
    int4; the basis stays float32. AdamW keeps 2·B(m·n) + 4. Temporaries of a step: see `RuleOptimizer.chunk_bytes`.

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
        stochastic_rounding: bool = False,
        maximize: bool = False,
    ) -> None:
        if rank is None and params is not None and not isinstance(params, Tensor):
            params = cast("ParamsT", list(params))
            rank = None if any(isinstance(p, dict) for p in params) else _RANK
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        projection = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale, "proj_type": proj_type}
        kept = {"state_dtype": state_dtype, "stochastic_rounding": stochastic_rounding}
        super().__init__(params, {**adam, **projection, "basis": basis, "stagger": stagger, **kept})
        if all(group["rank"] is None for group in self.param_groups):
            warn_once("GaLoreAdamW: no parameter group has a rank, so every parameter is AdamW (said once)")

    def add_param_group(self, param_group: Group) -> None:
        """Add a group; one that says its role has a rank by it, unless it names its own."""
        if isinstance(param_group, dict) and param_group.get("role") is not None:
            rank = self.defaults["rank"] or _RANK if param_group["role"] == "matrix" else None
            param_group = {"rank": rank, **param_group}
        super().add_param_group(param_group)

    def _check(self, group: Group, known: Group) -> None:
        super()._check(group, known)
        check_projection(group, proj_types=PROJ_TYPES, bases=tuple(_BASES))

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
