"""GaLore: Adam on the coordinates of the gradient in a low-rank basis."""

from typing import ClassVar, Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowrank_optim import bases
from lowrank_optim._checks import check_adaptive, check_one_side, check_residual
from lowrank_optim._types import Basis, Residual
from lowrank_optim.optimizer import Group
from lowrank_optim.projected import ProjectedAdamW
from lowrank_optim.residuals import GROWTH, Fira, Limiter, SignDescent
from lowrank_optim.rules import Carry, Projected
from lowrank_optim.schedule import Adaptive, Schedule

RESIDUALS = ("fira", "sign")


class GaLoreAdamW(ProjectedAdamW):
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
        basis: "svd"; "rsvd", the same but for a random sketch; "subspace": warm-started block power iteration, two thin
            products and a thin QR in the place of a decomposition; "random" orthonormal; or columns of a fixed basis
            with most energy, of which only indices are kept: "dct", "hadamard" (sides that are powers of two) and
            "identity". Default "svd".
        stagger: give each matrix its own turn within the period, after a cheap first basis for all, so that no step
            stalls. False refreshes all at steps 0, gap, 2·gap, ..., as galore-torch does. Default True.
        carry: what moments do when their basis moves: "keep" (GaLore), "reset" to zero, with their bias correction
            (FRUGAL), or "rotate" with it (LDAdam; columns of a fixed basis are gathered). Default "keep".
        residual: what becomes of the part of a gradient outside its basis: None drops it (GaLore), "fira" scales it as
            Adam scales what is inside, "sign" descends along its signs (FRUGAL). Default None.
        residual_scale: c, the factor on that part in the update. Default None, that is α.
        error_feedback: instead, add that part to the next gradient, and keep it until then in "float32", "bfloat16",
            "int8" or "int4". Default None.
        adaptive_overlap: share of a subspace, in (0, 1], that a refresh must find again to double the matrix's own
            period, up to 16 times `update_proj_gap`; at less, the period is `update_proj_gap` again. Default None: all
            periods are alike.
        state_dtype: how moments are kept: "float32", "bfloat16" (rounded stochastically), "int8" (in blocks of 256) or
            "int4" (in blocks of 64). Default "float32".
        stochastic_rounding: round bfloat16 and float16 weights up or down at random, with their exact value as mean,
            so that updates too small for their precision still count. Default False.
        maximize: ascend instead of descend. Default False.

    Vectors are AdamW, and so is a matrix for which basis and moments would be no fewer numbers than AdamW's moments
    (`rank=1.0` asks for the full rotation and gets it). Parameters of more than two dimensions are matrices by
    `flatten(1)`, as suits convolutions; the group keys `split` (fused query, key and value) and `flatten=False`
    (stacked experts) make them several matrices, each with a basis, moments and a count of steps of its own.

    A zero gradient when a matrix's turn comes leaves its basis for another period. A NaN or Inf then leaves the matrix
    as it is and waits for a better gradient ("svd", "rsvd", "subspace"); bases that ask nothing of a gradient let it
    through, as AdamW does.

    Raises:
        ValueError: for an argument out of its range, or a group key that looks misspelt.
        RuntimeError: for complex or flattened (FSDP1, DeepSpeed ZeRO) parameters, DTensor parameters in a projected
            group, and sparse gradients.

    State bytes of a projected m×n matrix for "std": 2·B(r·max(m, n)) + 4·r·min(m, n) + 4, the last for `step`, where a
    moment of k elements takes B(k) = 4·k in float32, 2·k in bfloat16, k + 4·⌈k/256⌉ in int8 and ⌈k/2⌉ + 4·⌈k/64⌉ in
    int4; the basis stays float32. Columns of a fixed basis are 4·r in its place. Error feedback adds B(m·n), "fira" 4,
    "reset" 4·r, an adaptive period 16. AdamW keeps 2·B(m·n) + 4. Temporaries of a step: see
    `RuleOptimizer.chunk_bytes`.

    Source: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", arXiv 2403.03507.

    Example:
        >>> import torch
        >>> from lowrank_optim import GaLoreAdamW, param_groups
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
        >>> opt = GaLoreAdamW(param_groups(model, rank=8), lr=1e-2)
        >>> model(torch.randn(4, 64)).square().mean().backward()
        >>> opt.step()
    """

    usual_rank: ClassVar[int | float] = 128  # the smallest of the paper's

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
        basis: str = "svd",
        stagger: bool = True,
        carry: Carry = "keep",
        residual: str | None = None,
        residual_scale: float | None = None,
        error_feedback: str | None = None,
        adaptive_overlap: float | None = None,
        state_dtype: str = "float32",
        stochastic_rounding: bool = False,
        maximize: bool = False,
    ) -> None:
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        where = {"rank": rank, "proj_type": proj_type, "basis": basis, "scale": scale}
        when = {"update_proj_gap": update_proj_gap, "stagger": stagger, "adaptive_overlap": adaptive_overlap}
        rest = {
            "carry": carry,
            "residual": residual,
            "residual_scale": residual_scale,
            "error_feedback": error_feedback,
        }
        kept = {"state_dtype": state_dtype, "stochastic_rounding": stochastic_rounding}
        super().__init__(params, adam | where | when | rest | kept)

    def _check(self, group: Group, known: Group) -> None:
        super()._check(group, known)
        check_adaptive(group)
        check_residual(group, RESIDUALS)
        if group["residual"] == "fira":
            check_one_side(group, "Fira scales rows or columns")
        if group["basis"] in bases.COLUMNS:
            check_one_side(group, "the columns of one side are chosen")

    def _projected(self, group: Group, basis: Basis) -> Projected:
        adam = self._carried(group, basis)
        return Projected(basis, adam, self._residual(group), self._schedule(group), group["carry"])

    def _schedule(self, group: Group) -> Schedule:
        fixed = super()._schedule(group)
        overlap = group["adaptive_overlap"]
        return fixed if overlap is None else Adaptive(fixed.gap, fixed.stagger, overlap)

    def _residual(self, group: Group) -> Residual:
        scale, share = group["scale"], group["residual_scale"]
        share = scale if share is None else share
        if group["residual"] == "fira":
            return Fira(Limiter(GROWTH, tuple(group["betas"])), scale, share)
        if group["residual"] == "sign":
            return SignDescent(scale, share)
        return self._fed_back(group, scale)
