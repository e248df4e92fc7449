"""AuON: momentum divided by its norm, with a factor that its authors take from hyperbolic cosines."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowrank_optim._checks import check_cosh, check_momentum
from lowrank_optim._types import Direction, Rule
from lowrank_optim.matrices import JORDAN, MatrixOptimizer, check_spectral
from lowrank_optim.momentum import Momentum
from lowrank_optim.optimizer import Group
from lowrank_optim.steering import Steered
from lowrank_optim.storage import storage


class AuON(MatrixOptimizer):
    r"""AuON, a normalized momentum: linear in the size of a matrix, with a bound on its spectral norm.

    For a matrix W (m×n) with gradient G and N = m·n:

    .. math::
        M ← β M + (1-β) G, \quad U = β M + (1-β) G, \quad X = U / (‖U‖_F + 10^{-7}), \\
        ρ = \sqrt{\tfrac1N \sum_{ij} \cosh(γ X_{ij})^2}, \\
        W ← (1 - ηλ) W - η \sqrt{\max(1, m/n)} \; X / (ρ + 10^{-8})

    With `ns_steps` = k > 0 this is Hybrid-AuON: X is k Newton–Schulz steps of U.

    **What this is.** ρ lies between 1 and √(1 + sinh(γ)²/N), whatever the gradient: at most 1.00017 for 4,096 elements
    and 1.00001 for 65,536. So for matrices of practical size AuON is momentum divided by its Frobenius norm, and the
    cosh factor changes nothing that five digits show. Its step has Frobenius norm 1 where Muon's has √min(m, n). The
    published claim that it is comparable to Muon is not supported by the paper's own table, in which it ends above
    AdamW; `experiments/results/` has what we measured.

    Args:
        params: as for `Muon`; groups may say `split` and `flatten` as there.
        lr: η. Default 0.24 (the authors' code).
        momentum: β. Default 0.95.
        weight_decay: λ, decoupled, per unit of lr. Default 0.
        nesterov: look one step ahead. Default True.
        gamma: γ, 0 to 32. Default 1 (the paper).
        ns_steps: Newton–Schulz steps first; 1 is Hybrid-AuON. Default 0.
        normalize: False is the authors' present code, which divides U itself by ρ (with γ = 1.5, no factor for the
            shape): gradient descent with momentum, to five digits. Default True.
        ns_coefficients: as for `Muon`. Default (3.4445, -4.775, 2.0315).
        method: as for `Muon`. Default "auto".
        ns_dtype: as for `Muon`. Default "bfloat16".
        adjust_lr_fn: the factor of the shape, as for `Muon`. Default None, √max(1, m/n).
        state_dtype: "float32", "bfloat16", "int8" or "int4". Default "float32".
        stochastic_rounding: round low-precision weights stochastically. Default False.
        maximize: ascend instead of descend. Default False.
        fallback_lr: learning rate of groups that are not matrices and name none. Default 1e-3 (AdamW's: η is not one).
        fallback_betas: AdamW's, for what is not a matrix. Default (0.9, 0.95).
        fallback_eps: the same. Default 1e-8.

    Raises:
        ValueError: for an argument out of its range, a vector in a group with the role "matrix", or a `split` that does
            not fit.
        RuntimeError: for complex, flattened (FSDP1, DeepSpeed ZeRO) or DTensor matrices, and sparse gradients.

    State bytes of an m×n matrix in float32: 4·m·n + 4.

    Source: "AuON: A Linear-time Alternative to Orthogonal Momentum Updates", arXiv 2509.24320.

    Example:
        >>> import torch
        >>> from lowrank_optim import AuON, param_groups
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
        >>> opt = AuON(param_groups(model), ns_steps=1)
        >>> model(torch.randn(4, 16)).square().mean().backward()
        >>> opt.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.24,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        nesterov: bool = True,
        *,
        gamma: float = 1.0,
        ns_steps: int = 0,
        normalize: bool = True,
        ns_coefficients: str | Sequence[float] | Sequence[Sequence[float]] = JORDAN,
        method: str = "auto",
        ns_dtype: str = "bfloat16",
        adjust_lr_fn: str | None = None,
        state_dtype: str = "float32",
        stochastic_rounding: bool = False,
        maximize: bool = False,
        fallback_lr: float | Tensor | None = 1e-3,
        fallback_betas: tuple[float, float] = (0.9, 0.95),
        fallback_eps: float = 1e-8,
    ) -> None:
        usual = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        factor = {"gamma": gamma, "normalize": normalize, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        iteration = {"ns_coefficients": ns_coefficients, "method": method, "ns_dtype": ns_dtype, "eps": _EPS}
        kept = {"state_dtype": state_dtype, "stochastic_rounding": stochastic_rounding, "maximize": maximize}
        fallback = {"fallback_lr": fallback_lr, "fallback_betas": fallback_betas, "fallback_eps": fallback_eps}
        super().__init__(params, usual | factor | iteration | kept | fallback)

    def _check(self, group: Group, known: Group) -> None:
        super()._check(group, known)
        check_momentum(group)
        check_spectral(group, least_steps=0)
        check_cosh(group)

    def _matrix_rule(self, group: Group, p: Tensor) -> Rule:
        first = self._spectral(group, p) if group["ns_steps"] else None
        direction = Hyperbolic(group["gamma"], first, group["normalize"])
        adjust = (group["adjust_lr_fn"] or "original") if group["normalize"] else "none"
        return Momentum(
            storage(group["state_dtype"]),
            Steered(direction, self._layout(group, p), adjust),
            group["momentum"],
            group["nesterov"],
        )


# added to the norm, as the paper has it
_EPS = 1e-7


@dataclass(frozen=True)
class Hyperbolic:
    """X / ρ, where X is the matrix over its norm, or its first Newton–Schulz steps."""

    gamma: float
    first: Direction | None
    normalize: bool

    def __call__(self, x: Tensor) -> Tensor:
        """Return the direction of each matrix of `x`."""
        unit = x / (torch.linalg.matrix_norm(x, keepdim=True) + _EPS)
        if self.first is not None:
            unit = self.first(x).to(x.dtype)
        mean = unit.mul(self.gamma).cosh_().square_().mean((-2, -1), keepdim=True)
        return torch.div(unit if self.normalize or self.first is not None else x, mean.sqrt_() + 1e-8)
