"""Fira: GaLore that keeps the rest of the gradient, scaled as Adam scales what is projected."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowrank_optim._checks import check_one_side, require
from lowrank_optim._types import Basis
from lowrank_optim.optimizer import Group
from lowrank_optim.projected import ProjectedAdamW
from lowrank_optim.residuals import GROWTH, Fira
from lowrank_optim.rules import Carry, Projected


class FiraAdamW(ProjectedAdamW):
    r"""AdamW in a rank-r basis of each gradient matrix, and the rest of the gradient scaled channel by channel.

    For a gradient G (m×n) with m ≥ n, and V_r (n×r) as for `GaLoreAdamW` (from the left where m < n):

    .. math::
        R = G V_r, \quad N = \hat M / (\sqrt{\hat S} + ε) \text{ of } R, \quad φ_i = \|N_i\| / \|R_i\|, \\
        S = \mathrm{diag}(φ)\,(G - R V_r^T), \quad W ← (1 - ηλ) W - η α (N V_r^T + S)

    The norm of S may grow by a factor γ from step to step, measured without bias correction; what is beyond is scaled
    down. So the update has full rank and the state is GaLore's and one number.

    Args:
        params: parameters, (name, parameter) pairs, or groups; see `GaLoreAdamW`. The group keys of fira work: `alpha`
            is `scale`.
        lr: η, a number or a one-element tensor. Default 1e-3 (fira; the paper trains at 1e-2).
        betas: decay of the moments. Default (0.9, 0.999).
        eps: ε, added after bias correction as in torch.optim.AdamW. Default 1e-8.
        weight_decay: λ, decoupled, in fractions of the weight per unit of lr; not multiplied by `scale`. Default 0.
        rank: r, an int (clamped to min(m, n)) or a float in (0, 1], a fraction of min(m, n). Fills groups as for
            `GaLoreAdamW`. Default: 128 for bare parameters and for groups of role "matrix", none in other groups.
        update_proj_gap: steps between two refreshes of a basis. Default 200 (the paper).
        scale: α. Default 0.25 (the paper, up to 350M parameters).
        norm_growth: γ, or None for no limit. Default 1.01 (the paper).
        published_code: compute S from G - α R V_rᵀ and add it without the factor α, as the authors' code does, so that
            the share 1 - α of what is inside is used twice; the published results were probably made so. Default False:
            the paper's formula, as above.
        basis: as for `GaLoreAdamW`. Default "svd".
        carry: as for `GaLoreAdamW`. Default "keep" (the paper).
        proj_type: as for `GaLoreAdamW`, but for "full". Default "std".
        stagger: give each matrix its own turn within the period. Default True.
        state_dtype: how moments are kept; see `GaLoreAdamW`. Default "float32".
        stochastic_rounding: round low-precision weights stochastically. Default False.
        maximize: ascend instead of descend. Default False.

    What is projected, and how several matrices in one parameter are treated, is as for `GaLoreAdamW`.

    Raises:
        ValueError: for an argument out of its range, or a group key that looks misspelt.
        RuntimeError: as for `GaLoreAdamW`.

    State bytes of an m×n matrix: those of `GaLoreAdamW`, and 4 for the norm unless γ is None.

    Source: Chen et al., "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?", arXiv 2410.01623.
    Beside `published_code`, differs from fira in where ε is added and in weight decay (there after the update).

    Example:
        >>> import torch
        >>> from lowrank_optim import FiraAdamW, param_groups
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
        >>> opt = FiraAdamW(param_groups(model, rank=8), lr=1e-2)
        >>> model(torch.randn(4, 64)).square().mean().backward()
        >>> opt.step()
    """

    usual_rank: ClassVar[int | float] = 128
    their_keys: ClassVar[Mapping[str, str]] = {"alpha": "scale"}

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
        norm_growth: float | None = GROWTH,
        published_code: bool = False,
        basis: str = "svd",
        carry: Carry = "keep",
        proj_type: Literal["std", "reverse_std", "left", "right"] = "std",
        stagger: bool = True,
        state_dtype: str = "float32",
        stochastic_rounding: bool = False,
        maximize: bool = False,
    ) -> None:
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        where = {"rank": rank, "proj_type": proj_type, "basis": basis, "scale": scale, "carry": carry}
        when = {"update_proj_gap": update_proj_gap, "stagger": stagger}
        rest = {"norm_growth": norm_growth, "published_code": published_code}
        kept = {"state_dtype": state_dtype, "stochastic_rounding": stochastic_rounding}
        super().__init__(params, adam | where | when | rest | kept)

    def _check(self, group: Group, known: Group) -> None:
        super()._check(group, known)
        check_one_side(group, "rows or columns are scaled")
        require(isinstance(group["published_code"], bool), group, "published_code", "a bool")

    def _projected(self, group: Group, basis: Basis) -> Projected:
        scale = group["scale"]
        share, taken = (1.0, scale) if group["published_code"] else (scale, 1.0)
        residual = Fira(self._limiter(group), scale, share, taken)
        return Projected(basis, self._carried(group, basis), residual, self._schedule(group), group["carry"])
