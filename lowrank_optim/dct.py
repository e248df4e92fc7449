"""DCT-AdamW: Adam on the coordinates of the gradient along chosen columns of the DCT-II matrix."""

from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowrank_optim._checks import check_choice, check_one_side, require
from lowrank_optim._types import Basis
from lowrank_optim.optimizer import Group
from lowrank_optim.projected import ProjectedAdamW
from lowrank_optim.rules import Carry, Projected

RANKINGS = ("l2", "l1")


class DCTAdamW(ProjectedAdamW):
    r"""AdamW whose moments are kept along the r columns of the DCT-II matrix that hold most of each gradient.

    For a gradient G (m×n) with m ≥ n, D (n×n) the orthonormal DCT-II matrix with cosines as columns, and j the indices
    of the r columns of G D with the largest norms (from the left, Dᵀ G and its rows, where m < n):

    .. math::
        A = G + E, \quad R = (A D)_{:,j}, \quad Q = D_{:,j}, \quad E ← A - R Q^T, \\
        M ← β_1 (M Q_{old}^T Q) + (1-β_1) R, \quad S ← β_2 (S Q_{old}^T Q) + (1-β_2) R^2, \\
        W ← (1 - ηλ) W - η \frac{\hat M}{\sqrt{\hat S} + ε} Q^T

    E only with `error_feedback`. There is no decomposition and no stored basis. Columns are chosen anew at every step,
    and because they come from one fixed matrix, taking the moments along is a gather: a column that stays keeps its
    moments bit for bit, one that enters begins at zero. The coordinates come with the choice, without a product.

    Args:
        params: parameters, (name, parameter) pairs, or groups; see `GaLoreAdamW`.
        lr: η, a number or a one-element tensor. Default 1e-3 (torch.optim.AdamW; the paper's code has none).
        betas: decay of M and S. Default (0.9, 0.999) (the paper's code).
        eps: ε, added after bias correction as in torch.optim.AdamW. Default 1e-8 (the paper's code).
        weight_decay: λ, decoupled, in fractions of the weight per unit of lr. Default 0.
        rank: r, an int (clamped to min(m, n)) or a float in (0, 1], a fraction of min(m, n). Fills groups as for
            `GaLoreAdamW`. Default: 0.25 for bare parameters and for groups of role "matrix", none in other groups.
        update_proj_gap: steps between two choices of columns. Default 1 (the paper).
        ranking: "l2", sums of squares, of which the chosen columns hold at least the share r/n, and the most that r
            columns can; or "l1", sums of magnitudes, as the paper's code has it, without such a bound. Default "l2".
        carry: what moments do when columns change: "rotate" as above, "keep" (they are read as those of the new
            columns), or "reset". Default "rotate" (the paper; off in its code).
        column_ages: correct the bias of each column by the number of steps since it entered, instead of by all steps.
            A new column then begins like an Adam of its own; else its first update is (1-β₁)/√(1-β₂) times as large,
            3.2 with the default betas. With carry "keep" no column enters, and this changes nothing. Default False (the
            paper).
        error_feedback: keep E, in "float32", "bfloat16", "int8" or "int4"; None drops what the columns do not see.
            E is m·n numbers, which is more than all else. Default None.
        proj_type: as for `GaLoreAdamW`, but for "full". Default "std".
        stagger: give each matrix its own turn within the period. Default True.
        state_dtype: how moments are kept; see `GaLoreAdamW`. Default "float32".
        stochastic_rounding: round low-precision weights stochastically. Default False.
        maximize: ascend instead of descend. Default False.

    What is projected, and how several matrices in one parameter are treated, is as for `GaLoreAdamW`. At `rank=1.0`
    this is AdamW on W D, whatever the gap (but for "reset").

    Raises:
        ValueError: for an argument out of its range, or a group key that looks misspelt.
        RuntimeError: as for `GaLoreAdamW`.

    State bytes of an m×n matrix: 2·B(r·max(m, n)) + 4·r (int32 indices) + 4 for `step`, and B(m·n) with error feedback,
    4·r with `column_ages` or "reset". A moment of k elements takes B(k) = 4·k in float32, 2·k in bfloat16,
    k + 4·⌈k/256⌉ in int8 and ⌈k/2⌉ + 4·⌈k/64⌉ in int4. The DCT matrices, 4·min(m, n)² bytes for each different short
    side, are shared by all matrices of a process and are not state.

    Source: "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language Models", arXiv
    2505.17967.

    Example:
        >>> import torch
        >>> from lowrank_optim import DCTAdamW, param_groups
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
        >>> opt = DCTAdamW(param_groups(model, rank=0.25), lr=1e-2)
        >>> model(torch.randn(4, 64)).square().mean().backward()
        >>> opt.step()
    """

    usual_rank: ClassVar[int | float] = 0.25
    bases: ClassVar[tuple[str, ...]] = ("dct",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | float | None = None,
        update_proj_gap: int = 1,
        ranking: Literal["l2", "l1"] = "l2",
        carry: Carry = "rotate",
        column_ages: bool = False,
        error_feedback: str | None = None,
        proj_type: Literal["std", "reverse_std", "left", "right"] = "std",
        stagger: bool = True,
        state_dtype: str = "float32",
        stochastic_rounding: bool = False,
        maximize: bool = False,
    ) -> None:
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        where: dict[str, Any] = {"rank": rank, "proj_type": proj_type, "basis": "dct", "ranking": ranking}
        when = {"update_proj_gap": update_proj_gap, "stagger": stagger, "carry": carry, "column_ages": column_ages}
        kept = {
            "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding,
            "error_feedback": error_feedback,
        }
        super().__init__(params, adam | where | when | kept)

    def _check(self, group: Group, known: Group) -> None:
        super()._check(group, known)
        check_one_side(group, "the columns of one side are chosen")
        check_choice(group, "ranking", RANKINGS)
        require(isinstance(group["column_ages"], bool), group, "column_ages", "a bool")

    def _basis(self, group: Group, shape: tuple[int, int], **options: Any) -> Basis:
        return super()._basis(group, shape, ranking=group["ranking"])

    def _projected(self, group: Group, basis: Basis) -> Projected:
        adam, residual = self._carried(group, basis), self._fed_back(group)
        return Projected(basis, adam, residual, self._schedule(group), group["carry"])
