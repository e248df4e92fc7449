"""Low-rank Muon: momentum kept in r coordinates, orthogonalized there or after being completed to full rank."""

from collections.abc import Sequence

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowrank_optim import bases
from lowrank_optim._checks import check_coordinates, check_momentum, check_uncut
from lowrank_optim._types import Basis, Rule, matrix_shape
from lowrank_optim.matrices import JORDAN, MatrixOptimizer, check_spectral
from lowrank_optim.momentum import Completed, Momentum, Stateless
from lowrank_optim.optimizer import Group
from lowrank_optim.residuals import Drop
from lowrank_optim.rules import Projected
from lowrank_optim.schedule import Schedule
from lowrank_optim.steering import Steered
from lowrank_optim.storage import storage


class LowRankMuon(MatrixOptimizer):
    r"""Muon whose momentum is kept in a rank-r basis of each matrix: r·max(m, n) numbers instead of m·n.

    For a matrix W (m×n), m ≥ n, with gradient G, and Q (n×r) the basis (for m < n all is transposed):

    .. math::
        R = G Q, \quad M ← β M Q_{old}^T Q + (1-β) R, \quad U = β M + (1-β) R, \\
        W ← (1 - ηλ) W - η γ \, \mathrm{NS}(U) Q^T

    NS is Newton–Schulz on m×r. With `residual` = c the update is completed to full rank instead:

    .. math::
        W ← (1 - ηλ) W - η γ \, \mathrm{NS}\big(U Q^T + c\,(G - G Q Q^T)\big)

    and `rank=0` with a residual keeps no momentum at all: NS(G). At full rank this is `Muon`.

    Whenever the basis is found again, it is found from the momentum as it will be with the gradient at hand, and the
    momentum is carried into it. For "dct" that is a choice of r columns and a gather. A column that has gathered
    momentum stays until one outside has more energy in a single gradient, times 1-β: at β = 0.95, few columns change.

    Args:
        params: as for `Muon`.
        lr: η. Default 1e-3 (`torch.optim.Muon`).
        weight_decay: λ, decoupled, per unit of lr. Default 0.1 (torch).
        momentum: β. Default 0.95.
        nesterov: look one step ahead. Default True.
        ns_coefficients: as for `Muon`. Default (3.4445, -4.775, 2.0315).
        eps: as for `Muon`. Default 1e-7.
        ns_steps: as for `Muon`. Default 5.
        adjust_lr_fn: γ, as for `Muon`, of the shape m×n. Default None.
        rank: r, an int (clamped to min(m, n)) or a float in (0, 1], a fraction of min(m, n); 0 only with `residual`.
            Default 0.25.
        basis: "dct" (columns of the DCT-II matrix with most energy), "identity" (columns of the matrix), "svd" or
            "subspace" (warm-started block power iteration). Default "dct".
        update_proj_gap: steps between two refreshes of a basis. Default None: 1 for "dct" and "identity", which are
            compared anew at each step, else 200 (GaLore).
        residual: c, or None. Default None.
        stagger: give each matrix its own turn within the period. Default True.
        method: as for `Muon`. Default "auto".
        ns_dtype: as for `Muon`, "float32", "bfloat16" or "float16". Default None: "float32" in coordinates, where the
            products are small, and "bfloat16" with a residual, as `Muon`.
        state_dtype: "float32", "bfloat16", "int8" or "int4". Default "float32".
        stochastic_rounding: round low-precision weights stochastically. Default False.
        maximize: ascend instead of descend. Default False.
        fallback_lr: learning rate of groups that are not matrices and name none. Default None, that is `lr`.
        fallback_betas: AdamW's, for what is not a matrix. Default (0.9, 0.95).
        fallback_eps: the same. Default 1e-8.

    A matrix for which basis and coordinates would not be smaller than its momentum is Muon, but for `rank=1.0`.

    Raises:
        ValueError: for an argument out of its range, a vector in a group with the role "matrix", or one with `split` or
            `flatten=False`: there is one basis for each parameter.
        RuntimeError: for complex, flattened (FSDP1, DeepSpeed ZeRO) or DTensor matrices, and sparse gradients.

    State bytes of an m×n matrix in float32: 4·r·max(m, n) + 4·r (int32 indices) + 4 for "dct" and "identity",
    4·r·(m + n) + 4 for "svd" and "subspace", 4 for rank 0. The DCT matrices, 4·min(m, n)² bytes for each different
    short side, are shared by all matrices of a process and are not state.

    Source: the composition is this package's; Muon (Jordan et al., 2024), DCT columns (arXiv 2505.17967), moments
    rotated with the basis (LDAdam, arXiv 2410.16103; SUMO, arXiv 2505.24749).

    Example:
        >>> import torch
        >>> from lowrank_optim import LowRankMuon, param_groups
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
        >>> opt = LowRankMuon(param_groups(model), lr=0.02, fallback_lr=3e-3, residual=0.3)
        >>> model(torch.randn(4, 16)).square().mean().backward()
        >>> opt.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: str | Sequence[float] | Sequence[Sequence[float]] = JORDAN,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        rank: int | float = 0.25,
        basis: str = "dct",
        update_proj_gap: int | None = None,
        residual: float | None = None,
        stagger: bool = True,
        method: str = "auto",
        ns_dtype: str | None = None,
        state_dtype: str = "float32",
        stochastic_rounding: bool = False,
        maximize: bool = False,
        fallback_lr: float | Tensor | None = None,
        fallback_betas: tuple[float, float] = (0.9, 0.95),
        fallback_eps: float = 1e-8,
    ) -> None:
        usual = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
        iteration = {"ns_coefficients": ns_coefficients, "eps": eps, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        where = {"rank": rank, "basis": basis, "update_proj_gap": update_proj_gap, "stagger": stagger}
        form = {"residual": residual, "method": method, "ns_dtype": ns_dtype}
        kept = {"state_dtype": state_dtype, "stochastic_rounding": stochastic_rounding, "maximize": maximize}
        fallback = {"fallback_lr": fallback_lr, "fallback_betas": fallback_betas, "fallback_eps": fallback_eps}
        super().__init__(params, usual | iteration | where | form | kept | fallback)

    def _check(self, group: Group, known: Group) -> None:
        super()._check(group, known)
        check_momentum(group)
        check_spectral(group)
        # the other groups of `param_groups` say that they have no rank
        if group["role"] == "matrix":
            check_coordinates(group, bases=bases.NAMES)
            check_uncut(group)

    def _matrix_rule(self, group: Group, p: Tensor) -> Rule:
        shape = matrix_shape(p.shape)
        usual = "float32" if group["residual"] is None else "bfloat16"
        steered = Steered(self._spectral(group, p, usual), adjust=group["adjust_lr_fn"] or "original", shape=shape)
        if group["rank"] == 0:
            return Stateless(steered)
        basis = bases.make(group["basis"], group["rank"], "std", shape)
        # the int 1 is one vector
        full = isinstance(group["rank"], float) and group["rank"] == 1
        if not full and not bases.compresses(basis, shape, moments=1):
            return self._momentum(group, steered)
        if group["residual"] is None:
            return self._projected(group, basis, self._momentum(group, steered))
        share = group["residual"]
        return Completed(self._projected(group, basis, self._momentum(group, None, less=share)), share, steered)

    def _momentum(self, group: Group, steered: Steered | None, less: float = 0.0) -> Momentum:
        return Momentum(storage(group["state_dtype"]), steered, group["momentum"], group["nesterov"], less=less)

    def _projected(self, group: Group, basis: Basis, inner: Momentum) -> Projected:
        gap = group["update_proj_gap"] or (200 if basis.guarded else 1)
        schedule = Schedule(gap, group["stagger"])
        return Projected(basis, inner, Drop(), schedule, carry="rotate", follow=group["momentum"])
