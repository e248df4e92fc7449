"""Steepest descent under the norm that suits the role of each parameter."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowrank_optim import distributed
from lowrank_optim._checks import check_choice, check_momentum
from lowrank_optim._types import Rule
from lowrank_optim.matrices import MatrixOptimizer, check_spectral
from lowrank_optim.momentum import Momentum
from lowrank_optim.optimizer import Group
from lowrank_optim.steering import Layout, Steered
from lowrank_optim.storage import storage

# the norm of a role: "other" are matrices that were taken out of the targets
NORM_OF_ROLE = {"matrix": "spectral", "embedding": "row", "head": "sign", "other": "rms", "vector": "rms"}
NORMS = ("spectral", "row", "column", "sign", "rms")


class SteepestDescent(MatrixOptimizer):
    r"""Momentum whose step is the steepest descent under a norm chosen by the role of the parameter.

    .. math::
        M ← β M + (1-β) G, \quad U = β M + (1-β) G, \quad W ← (1 - ηλ) W - η \, D(U)

    with D(U), for a matrix of m outputs and n inputs:

    - "spectral": √(m/n) · NS(U), root-mean-square to root-mean-square; for hidden matrices
    - "row": every row to root mean square 1, √n · U_i / ‖U_i‖; for embeddings, whose rows are words
    - "column": every column to root mean square 1, √m · U_j / ‖U_j‖
    - "sign": sign(U) / n; for heads
    - "rms": U over its root mean square; for vectors and for what has no norm of its own

    A row, a column or a tensor of zeros stays as it is. There is no AdamW here: everything keeps one momentum.

    Args:
        params: groups from `param_groups(model)`, which assigns roles; groups without a role, and bare parameters, are
            sorted into matrices and vectors by their dimensions. Groups may say `split` and `flatten` as for `Muon`.
        lr: η. Default 0.01; embeddings and heads usually want another than matrices: `param_groups(other_lr=...)`.
        momentum: β. Default 0.95.
        weight_decay: λ, decoupled, per unit of lr. Default 0.
        nesterov: look one step ahead. Default True.
        norm: one of the five for a group that is to have another than its role's. Default None.
        ns_coefficients: as for `Muon`. Default "you".
        eps: as for `Muon`. Default 0.
        ns_steps: as for `Muon`. Default 5.
        method: as for `Muon`. Default "auto".
        ns_dtype: as for `Muon`. Default "bfloat16".
        state_dtype: "float32", "bfloat16", "int8" or "int4". Default "float32".
        stochastic_rounding: round low-precision weights stochastically. Default False.
        maximize: ascend instead of descend. Default False.
        fallback_lr: learning rate of groups that are not matrices and name none. Default None, that is `lr`.

    Raises:
        ValueError: for an argument out of its range, a vector in a group with the role "matrix", or a `split` that does
            not fit.
        RuntimeError: for complex, flattened (FSDP1, DeepSpeed ZeRO) or DTensor parameters, and sparse gradients.

    State bytes of a parameter of N elements in float32: 4·N + 4, half of AdamW's.

    Source: Bernstein and Newhouse, "Old Optimizer, New Norm: An Anthology", arXiv 2409.20325; the norms of embeddings
    and heads as in Scion, arXiv 2502.07529.

    Example:
        >>> import torch
        >>> from lowrank_optim import SteepestDescent, param_groups
        >>> model = torch.nn.Sequential(torch.nn.Embedding(32, 16), torch.nn.Linear(16, 64), torch.nn.Linear(64, 16))
        >>> opt = SteepestDescent(param_groups(model, roles="auto"), lr=0.01)
        >>> model(torch.tensor([1, 2])).square().mean().backward()
        >>> opt.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        nesterov: bool = True,
        *,
        norm: str | None = None,
        ns_coefficients: str | Sequence[float] | Sequence[Sequence[float]] = "you",
        eps: float = 0.0,
        ns_steps: int = 5,
        method: str = "auto",
        ns_dtype: str = "bfloat16",
        state_dtype: str = "float32",
        stochastic_rounding: bool = False,
        maximize: bool = False,
        fallback_lr: float | Tensor | None = None,
    ) -> None:
        usual = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov, "norm": norm}
        iteration = {"ns_coefficients": ns_coefficients, "eps": eps, "ns_steps": ns_steps, "adjust_lr_fn": None}
        form = {"method": method, "ns_dtype": ns_dtype, "fallback_lr": fallback_lr}
        kept = {"state_dtype": state_dtype, "stochastic_rounding": stochastic_rounding, "maximize": maximize}
        super().__init__(params, usual | iteration | form | kept)

    def _check(self, group: Group, known: Group) -> None:
        super()._check(group, known)
        check_momentum(group)
        check_spectral(group)
        if group["norm"] is not None:
            check_choice(group, "norm", NORMS)

    def _rule(self, group: Group, p: Tensor) -> Rule:
        if distributed.is_sharded(p):
            distributed.refuse_shards(p, type(self).__name__)
        norm = group["norm"] or NORM_OF_ROLE[group["role"]]
        if not p.numel() or (p.dim() < 2 and norm != "sign"):
            norm = "rms"
        layout = self._layout(group, p) if p.dim() > 1 else Layout()
        if norm == "spectral":
            steered = Steered(self._spectral(group, p), layout, "rms_to_rms")
        else:
            steered = Steered(Normalized(norm), layout, "none")
        return Momentum(storage(group["state_dtype"]), steered, group["momentum"], group["nesterov"])


@dataclass(frozen=True)
class Normalized:
    """The steepest descent of each matrix under a norm that needs sums only."""

    norm: str

    def __call__(self, x: Tensor) -> Tensor:
        """Return the direction of each matrix of `x`."""
        if not x.numel():
            return x
        if self.norm == "sign":
            return x.sign() / x.size(-1)
        dims = {"row": (-1,), "column": (-2,), "rms": (-2, -1)}[self.norm]
        # over the largest magnitude first, so that squares of tiny numbers do not vanish
        largest = x.abs().amax(dims, keepdim=True)
        x = x / torch.where(largest > 0, largest, 1.0)
        square = x.square().mean(dims, keepdim=True)
        return x / torch.where(square > 0, square, 1.0).sqrt()
