"""Trion: momentum with error feedback, orthogonalized along the DCT columns that hold most of it."""

from collections.abc import Sequence

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowrank_optim import bases
from lowrank_optim._checks import check_choice, check_momentum, check_rank, check_uncut
from lowrank_optim._types import Rule, matrix_shape
from lowrank_optim.columns import DCT, Identity
from lowrank_optim.matrices import JORDAN, MatrixOptimizer, check_spectral
from lowrank_optim.momentum import Trimmed
from lowrank_optim.optimizer import Group
from lowrank_optim.steering import Steered
from lowrank_optim.storage import storage

# bases that need no state
_BASES: dict[str, type[DCT] | type[Identity]] = {"dct": DCT, "identity": Identity}


class Trion(MatrixOptimizer):
    r"""Muon that orthogonalizes, at each step, only the r columns of a fixed basis that hold most of the momentum.

    For a matrix W (m×n), m ≥ n, with gradient G (for m < n all is transposed), D the DCT-II matrix of size n:

    .. math::
        M ← M + G, \quad Q = \text{the } r \text{ columns } d \text{ of } D \text{ with the largest } ‖M d‖_1, \\
        P = M Q, \quad M ← M - (1-μ) P Q^T, \quad W ← (1 - ηλ) W - η γ \, \mathrm{NS}(P) Q^T

    What was not selected stays in the momentum and waits. With `basis="identity"` the columns are those of the matrix
    itself, which is Dion2. **The state is a full momentum**: this saves arithmetic (and communication, where a
    momentum is sharded), not memory; `LowRankMuon` saves memory.

    Args:
        params: as for `Muon`.
        lr: η. Default 0.02 (the authors' code).
        weight_decay: λ, decoupled, per unit of lr. Default 0.
        momentum: μ. Default 0.95.
        rank: r, an int (clamped to min(m, n)) or a float in (0, 1], a fraction of min(m, n). Default 0.25 (Dion2).
        basis: "dct" or "identity". Default "dct".
        ns_coefficients: as for `Muon`. Default (3.4445, -4.775, 2.0315) (the authors' code).
        eps: as for `Muon`. Default 1e-7.
        ns_steps: as for `Muon`. Default 5.
        adjust_lr_fn: γ, as for `Muon`. Default "rms_to_rms", √(m/n), as for Dion, which Trion follows; the
            authors' code has no default.
        method: as for `Muon`. Default "auto".
        ns_dtype: as for `Muon`, "bfloat16", "float16" or "float32". Default "bfloat16".
        state_dtype: "float32", "bfloat16", "int8" or "int4". Default "float32".
        stochastic_rounding: round low-precision weights stochastically. Default False.
        maximize: ascend instead of descend. Default False.
        fallback_lr: learning rate of groups that are not matrices and name none. Default None, that is `lr`.
        fallback_betas: AdamW's, for what is not a matrix. Default (0.9, 0.95).
        fallback_eps: the same. Default 1e-8.

    Raises:
        ValueError: for an argument out of its range, a vector in a group with the role "matrix", or one with `split` or
            `flatten=False`: there is one basis for each parameter.
        RuntimeError: for complex, flattened (FSDP1, DeepSpeed ZeRO) or DTensor matrices, and sparse gradients.

    State bytes of an m×n matrix in float32: 4·m·n + 4, as for Muon.

    Source: Modoranu et al., arXiv 2505.17967; with "identity", Dion2 of Microsoft's dion.

    Example:
        >>> import torch
        >>> from lowrank_optim import Trion, param_groups
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
        >>> opt = Trion(param_groups(model), lr=0.02, fallback_lr=3e-3)
        >>> model(torch.randn(4, 16)).square().mean().backward()
        >>> opt.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        *,
        rank: int | float = 0.25,
        basis: str = "dct",
        ns_coefficients: str | Sequence[float] | Sequence[Sequence[float]] = JORDAN,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = "rms_to_rms",
        method: str = "auto",
        ns_dtype: str = "bfloat16",
        state_dtype: str = "float32",
        stochastic_rounding: bool = False,
        maximize: bool = False,
        fallback_lr: float | Tensor | None = None,
        fallback_betas: tuple[float, float] = (0.9, 0.95),
        fallback_eps: float = 1e-8,
    ) -> None:
        usual = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "rank": rank, "basis": basis}
        iteration = {"ns_coefficients": ns_coefficients, "eps": eps, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        form = {"method": method, "ns_dtype": ns_dtype}
        kept = {"state_dtype": state_dtype, "stochastic_rounding": stochastic_rounding, "maximize": maximize}
        fallback = {"fallback_lr": fallback_lr, "fallback_betas": fallback_betas, "fallback_eps": fallback_eps}
        super().__init__(params, usual | iteration | form | kept | fallback)

    def _check(self, group: Group, known: Group) -> None:
        super()._check(group, known)
        check_momentum(group)
        check_spectral(group)
        # the other groups of `param_groups` say that they have no rank
        if group["role"] == "matrix":
            check_rank(group)
            check_uncut(group)
        check_choice(group, "basis", tuple(_BASES))

    def _matrix_rule(self, group: Group, p: Tensor) -> Rule:
        m, n = shape = matrix_shape(p.shape)
        rank, side = bases.resolve(group["rank"], "std", shape)
        basis = _BASES[group["basis"]](rank, side, n if side == "right" else m, ranking="l1")
        steered = Steered(self._spectral(group, p), adjust=group["adjust_lr_fn"] or "original", shape=shape)
        return Trimmed(storage(group["state_dtype"]), basis, steered, group["momentum"])
