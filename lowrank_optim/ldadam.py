"""LDAdam: Adam in a subspace that turns a little at every step, with everything taken along."""

from typing import ClassVar, Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowrank_optim import bases
from lowrank_optim._checks import check_share, require
from lowrank_optim._types import Basis
from lowrank_optim.optimizer import Group
from lowrank_optim.orthonormal import SubspaceIteration
from lowrank_optim.projected import ProjectedAdamW
from lowrank_optim.rules import Projected
from lowrank_optim.schedule import Schedule


class LDAdamW(ProjectedAdamW):
    r"""AdamW in a rank-r basis that one power iteration moves at every step; moments rotate, nothing is dropped.

    For a gradient G (m×n) with m ≥ n (for m < n all is transposed), Q (n×r) and C = Q_{old}ᵀ Q:

    .. math::
        A = G + E, \quad B = ρ \hat M Q_{old}^T + (1-ρ) A, \quad Q = \mathrm{qr}(B^T B Q_{old}), \quad R = A Q, \\
        E ← A - R Q^T + \tfrac{β_1}{1-β_1} (M Q_{old}^T - M C Q^T), \\
        M ← β_1 M C + (1-β_1) R, \quad
        \hat S ← \big| (\hat S - \hat M^2)\, C^2 + (\hat M C)^2 \big|, \quad S ← β_2 S + (1-β_2) R^2, \\
        W ← (1 - ηλ) W - η \frac{\hat M}{\sqrt{\hat S} + ε} Q^T

    with C² elementwise. The first basis are the leading singular vectors of the first gradient. E is a state of its
    own: `p.grad` is not written to, so clipping, accumulation and loss scaling see gradients only.

    Args:
        params: parameters, (name, parameter) pairs, or groups; see `GaLoreAdamW`. The group key `enable_lowrank` of the
            authors' code works: False is AdamW.
        lr: η, a number or a one-element tensor. Default 1e-3 (the authors' code).
        betas: decay of M and S. Default (0.908, 0.99) (the authors' code).
        eps: ε, added after bias correction as in torch.optim.AdamW. Default 1e-8.
        weight_decay: λ, decoupled, in fractions of the weight per unit of lr. Default 0.
        rank: r, an int (clamped to min(m, n)) or a float in (0, 1], a fraction of min(m, n). Fills groups as for
            `GaLoreAdamW`. Default: 16 (the authors' code) for bare parameters and for groups of role "matrix", none in
            other groups.
        rho: ρ, the weight of the mean gradient in what the basis is found from. Default 0.908 (the authors' code).
        error_feedback: keep E, in "float32", "bfloat16", "int8" or "int4"; None drops what the basis does not see.
            Default "float32".
        proj_type: as for `GaLoreAdamW`. Default "std".
        state_dtype: how moments are kept; see `GaLoreAdamW`. Default "float32".
        stochastic_rounding: round low-precision weights stochastically. Default False.
        maximize: ascend instead of descend. Default False.

    What is projected, and how several matrices in one parameter are treated, is as for `GaLoreAdamW`.

    Raises:
        ValueError: for an argument out of its range, or a group key that looks misspelt.
        RuntimeError: as for `GaLoreAdamW`.

    State bytes of an m×n matrix: those of `GaLoreAdamW`, and B(m·n) with error feedback. The authors' code keeps E in
    `p.grad`, whose m·n numbers are then never freed.

    Every step looks at the gradient's norm before it moves a basis, and makes the host wait for it.

    Source: Robert et al., "LDAdam: Adaptive Optimization from Low-Dimensional Gradient Statistics", arXiv 2410.16103.

    Example:
        >>> import torch
        >>> from lowrank_optim import LDAdamW, param_groups
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
        >>> opt = LDAdamW(param_groups(model, rank=8), lr=1e-2)
        >>> model(torch.randn(4, 64)).square().mean().backward()
        >>> opt.step()
    """

    usual_rank: ClassVar[int | float] = 16
    bases: ClassVar[tuple[str, ...]] = ("subspace",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.908, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | float | None = None,
        rho: float = 0.908,
        error_feedback: str | None = "float32",
        proj_type: Literal["std", "reverse_std", "left", "right", "full"] = "std",
        state_dtype: str = "float32",
        stochastic_rounding: bool = False,
        maximize: bool = False,
    ) -> None:
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        where = {"rank": rank, "proj_type": proj_type, "basis": "subspace", "rho": rho}
        when = {"update_proj_gap": 1, "stagger": False}
        kept = {
            "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding,
            "error_feedback": error_feedback,
        }
        super().__init__(params, adam | where | when | kept)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group; see `ProjectedAdamW`."""
        if isinstance(param_group, dict) and "enable_lowrank" in param_group:
            param_group = dict(param_group)
            rank = param_group.get("rank", self.defaults["rank"])
            param_group["rank"] = self.usual_rank if rank is None else rank
            if not param_group.pop("enable_lowrank"):
                param_group["rank"] = None
        super().add_param_group(param_group)

    def _check(self, group: Group, known: Group) -> None:
        super()._check(group, known)
        check_share(group, "rho")
        require(group["update_proj_gap"] == 1, group, "update_proj_gap", "1: a basis moves at every step")

    def _basis(self, group: Group, shape: tuple[int, int], **options: object) -> Basis:
        return SubspaceIteration(*bases.resolve(group["rank"], group["proj_type"], shape), decompose_first=True)

    def _projected(self, group: Group, basis: Basis) -> Projected:
        beta1 = group["betas"][0]
        residual = self._fed_back(group, recovers=beta1 / (1 - beta1))
        return Projected(basis, self._adam(group), residual, Schedule(1), "rotate", group["rho"])
