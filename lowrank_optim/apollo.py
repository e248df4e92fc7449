"""APOLLO: the gradient itself, scaled as Adam would scale a random projection of it."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowrank_optim._checks import check_choice, check_one_side, check_seed, require
from lowrank_optim._types import Basis
from lowrank_optim.optimizer import Group
from lowrank_optim.projected import ProjectedAdamW
from lowrank_optim.residuals import GROWTH, SCALE_TYPES, GradientScaling, ScaleType
from lowrank_optim.rules import Projected

_PROJ_DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


class APOLLOAdamW(ProjectedAdamW):
    r"""The gradient, each channel scaled as Adam scales its projection; APOLLO-Mini with `rank=1`, "tensor", 128.

    For a gradient G (m×n) with m ≥ n, and P (r×n) random with entries N(0, 1/r) (from the left, m×r, where m < n):

    .. math::
        R = G P^T, \quad N = \hat M / (\sqrt{\hat S} + ε) \text{ of } R, \quad s_i = \|N_i\| / \|R_i\|, \\
        U = \sqrt{α}\, \mathrm{diag}(s)\, G, \quad W ← (1 - ηλ) W - η U

    M and S being Adam's moments of R. With `scale_type="tensor"` s is one number, ‖N‖ / ‖R‖. The norm of U may grow by
    a factor γ from step to step, measured without bias correction; what is beyond is scaled down. Nothing is lifted, so
    P need not be orthonormal; it is made from a seed at each use and not kept. Every `update_proj_gap` steps each
    matrix takes another seed, its own; the moments are kept as they are.

    Args:
        params: parameters, (name, parameter) pairs, or groups; see `GaLoreAdamW`. The group keys of apollo-torch work:
            `proj` "random" and "svd" are `basis` "gaussian" and "svd".
        lr: η, a number or a one-element tensor. Default 1e-3 (apollo-torch; the paper trains at 1e-2).
        betas: decay of the moments. Default (0.9, 0.999).
        eps: ε, added after bias correction as in torch.optim.AdamW. Default 1e-8.
        weight_decay: λ, decoupled, in fractions of the weight per unit of lr. Default 0.
        rank: r, an int (clamped to min(m, n)) or a float in (0, 1], a fraction of min(m, n). Fills groups as for
            `GaLoreAdamW`. Default: 0.25 (the paper) for bare parameters and for groups of role "matrix", none in other
            groups.
        update_proj_gap: steps between two projections. Default 200 (the paper).
        scale: α, of which the root counts. Default 1.0 (the paper; 128 for Mini).
        scale_type: "channel", a factor for each row (m ≥ n) or column, or "tensor", one for the matrix.
            Default "channel".
        norm_growth: γ, or None for no limit. Default 1.01 (the paper).
        basis: "gaussian", or "svd" (APOLLO-SVD: the leading singular vectors, which are kept). Default "gaussian" (the
            paper).
        proj_type: as for `GaLoreAdamW`, but for "full". Default "std".
        proj_dtype: in which a "gaussian" projection is made, "float32" or "bfloat16", which rounds R to three digits.
            Only norms of R are used, which r random directions tell to 1/√(2r) of themselves anyway, and half of a step
            is this product. Where the hardware has no bfloat16 products, "float32" is faster. float64 parameters keep
            float64. Default "bfloat16" (measured: losses of the two differ by 0.006 ± 0.013 over five seeds).
        stagger: give each matrix its own turn within the period. Default True.
        seed: an int from 0 to 2³⁰. Within an optimizer every matrix and refresh has a seed of its own; optimizers of as
            many matrices, as one for each layer, have the same ones, unless this sets them apart. Default 0.
        state_dtype: how moments are kept; see `GaLoreAdamW`. Default "float32".
        stochastic_rounding: round low-precision weights stochastically. Default False.
        maximize: ascend instead of descend. Default False.

    What is projected, and how several matrices in one parameter are treated, is as for `GaLoreAdamW`.

    Raises:
        ValueError: for an argument out of its range, or a group key that looks misspelt.
        RuntimeError: as for `GaLoreAdamW`.

    State bytes of an m×n matrix: 2·B(r·max(m, n)) + 8 (the seed) + 4 (a norm, unless γ is None) + 4 for `step`, with B
    as for `GaLoreAdamW`; for "svd" 4·r·min(m, n) in the place of the seed's 8. What every P is made of is shared by
    all matrices of a size in a process and is not state: a normal matrix, 8·r·min(m, n) bytes or 2¹⁴ and half of that,
    and signs, 4·min(m, n) + 2¹⁴.

    Source: Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance", arXiv 2412.05270. Differs from apollo-torch
    in where ε is added, in weight decay (there after the update), and in seeds (there 1, 2, 3, ... in each optimizer).

    Example:
        >>> import torch
        >>> from lowrank_optim import APOLLOAdamW, param_groups
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
        >>> mini = APOLLOAdamW(param_groups(model, rank=1, scale=128.0, scale_type="tensor"), lr=1e-2)
        >>> model(torch.randn(4, 64)).square().mean().backward()
        >>> mini.step()
    """

    usual_rank: ClassVar[int | float] = 0.25
    bases: ClassVar[tuple[str, ...]] = ("gaussian", "svd")
    their_keys: ClassVar[Mapping[str, str]] = {"proj": "basis"}

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
        scale: float = 1.0,
        scale_type: ScaleType = "channel",
        norm_growth: float | None = GROWTH,
        basis: Literal["gaussian", "svd"] = "gaussian",
        proj_type: Literal["std", "reverse_std", "left", "right"] = "std",
        proj_dtype: Literal["float32", "bfloat16"] = "bfloat16",
        stagger: bool = True,
        seed: int = 0,
        state_dtype: str = "float32",
        stochastic_rounding: bool = False,
        maximize: bool = False,
    ) -> None:
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        where = {"rank": rank, "proj_type": proj_type, "basis": basis, "seed": seed, "proj_dtype": proj_dtype}
        how = {"scale": scale, "scale_type": scale_type, "norm_growth": norm_growth}
        when = {"update_proj_gap": update_proj_gap, "stagger": stagger}
        kept = {"state_dtype": state_dtype, "stochastic_rounding": stochastic_rounding}
        super().__init__(params, adam | where | how | when | kept)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group; see `ProjectedAdamW`."""
        if isinstance(param_group, dict) and param_group.get("proj") == "random":
            param_group = {**param_group, "proj": "gaussian"}
        super().add_param_group(param_group)

    def _check(self, group: Group, known: Group) -> None:
        super()._check(group, known)
        check_one_side(group, "rows or columns are scaled")
        check_choice(group, "scale_type", SCALE_TYPES)
        check_seed(group)
        check_choice(group, "proj_dtype", tuple(_PROJ_DTYPES))
        require(group["scale"] >= 0, group, "scale", "a number >= 0")

    def _basis(self, group: Group, shape: tuple[int, int], **options: Any) -> Basis:
        if group["basis"] == "gaussian":
            options = {"seed": group["seed"], "dtype": _PROJ_DTYPES[group["proj_dtype"]]}
        return super()._basis(group, shape, **options)

    def _projected(self, group: Group, basis: Basis) -> Projected:
        residual = GradientScaling(self._limiter(group), group["scale"], group["scale_type"])
        return Projected(basis, self._adam(group), residual, self._schedule(group))
