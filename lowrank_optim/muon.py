"""Muon: momentum, orthogonalized."""

from collections.abc import Sequence

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowrank_optim._checks import check_beta2, check_choice, check_momentum
from lowrank_optim._types import Rule
from lowrank_optim.matrices import JORDAN, MatrixOptimizer, check_spectral
from lowrank_optim.momentum import FORMS, Momentum
from lowrank_optim.optimizer import Group
from lowrank_optim.steering import Steered
from lowrank_optim.storage import storage


class Muon(MatrixOptimizer):
    r"""Muon: the momentum of each matrix with its singular values brought near 1.

    For a matrix W (m×n) with gradient G:

    .. math::
        M ← β M + (1-β) G, \quad U = β M + (1-β) G, \quad O = \mathrm{NS}(U) ≈ (U U^T)^{-1/2} U, \\
        W ← (1 - ηλ) W - η γ O

    where NS is `ns_steps` steps of X ← aX + b(XXᵀ)X + c(XXᵀ)²X from X = U/‖U‖_F, U = M without `nesterov`, and γ a
    factor of the shape (`adjust_lr_fn`). Parameters that are not matrices (`role` of their group) are AdamW.

    The arguments up to `adjust_lr_fn` are those of `torch.optim.Muon`, with its defaults, and do what they do there.

    Args:
        params: parameters, (name, parameter) pairs, or groups. Bare ones are sorted by their dimensions: two or more
            are matrices, the rest AdamW. Better groups, which know embeddings and heads, come from
            `param_groups(model)`. `use_muon` in a group is understood.
        lr: η, a number or a one-element tensor. Default 1e-3 (torch); .02 is usual with "original".
        weight_decay: λ, decoupled, per unit of lr and not multiplied by γ. Default 0.1 (torch).
        momentum: β. Default 0.95.
        nesterov: look one step ahead. Default True.
        ns_coefficients: (a, b, c), a sequence of them, one for each step (the last one repeats), or the name of a table
            ("jordan", "you", "polar_express", ...). Default (3.4445, -4.775, 2.0315) (Jordan).
        eps: U is divided by max(‖U‖_F, eps). Default 1e-7 (torch); 0 keeps tiny gradients at full size.
        ns_steps: Newton–Schulz steps, 1 to 99. Default 5. A named table that is made for another number wants it named;
            other numbers cut a table or repeat its last triple.
        adjust_lr_fn: γ for m×n. None or "original": √max(1, m/n) (Jordan). "match_rms_adamw": 0.2·√max(m, n), for the
            learning rate of AdamW (Moonlight, arXiv 2502.16982). "rms_to_rms": √(m/n), which others call spectral norm
            (Scion, dion). "nuclear": ⟨O, U⟩, near the nuclear norm of U (PolarGrad, arXiv 2505.21799). "none": 1.
        method: "newton_schulz", "gram" (iterates on the small Gram matrix), "eigh" (the exact polar factor) or "auto",
            the cheaper of the first two. Default "auto".
        ns_dtype: of the products: "bfloat16" (torch), "float16" or "float32"; float64 for float64 parameters.
        momentum_form: "ema" as above (torch), or "sum": M ← βM + G, U = G + βM (Moonlight, dion). Default "ema".
        normuon_beta2: if not None, rows of O are divided by the root of their running mean square with this decay, and
            O scaled back to its norm (NorMuon, arXiv 2510.05491; 0.95 there). Default None.
        cautious: decay only where update and weight do not differ in sign; a key that a group of any of the optimizers
            here may have. Default False.
        split: blocks of rows that are matrices of their own, with γ of their shape: a number of equal blocks or the
            rows of each (fused query, key and value; heads). Default None.
        flatten: parameters of more than two dimensions are one matrix, `flatten(1)` (convolutions); False: the leading
            dimensions count matrices (stacked experts). Default True.
        state_dtype: how momentum and AdamW's moments are kept: "float32", "bfloat16", "int8" or "int4".
        stochastic_rounding: round low-precision weights stochastically, so that small updates count. Default False.
        maximize: ascend instead of descend. Default False.
        fallback_lr: learning rate of groups that are not matrices and name none. Default None, that is `lr`.
        fallback_betas: AdamW's, for what is not a matrix. Default (0.9, 0.95) (Jordan).
        fallback_eps: the same. Default 1e-8.

    Raises:
        ValueError: for an argument out of its range, coefficients that turn a singular value negative or let it grow
            without bound, a vector in a group with the role "matrix", or a `split` that does not fit.
        RuntimeError: for complex, flattened (FSDP1, DeepSpeed ZeRO) or DTensor matrices, and sparse gradients.

    State bytes of an m×n matrix: 4·m·n + 4 (half of AdamW's), and 4·m with `normuon_beta2`; 2·m·n + 4 in bfloat16,
    m·n + 4·⌈mn/256⌉ + 4 in int8, ⌈mn/2⌉ + 4·⌈mn/64⌉ + 4 in int4.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.

    Example:
        >>> import torch
        >>> from lowrank_optim import Muon, param_groups
        >>> model = torch.nn.Sequential(torch.nn.Embedding(32, 16), torch.nn.Linear(16, 64), torch.nn.Linear(64, 16))
        >>> opt = Muon(param_groups(model), lr=0.02, fallback_lr=3e-3, state_dtype="int8")
        >>> model(torch.tensor([1, 2])).square().mean().backward()
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
        method: str = "auto",
        ns_dtype: str = "bfloat16",
        momentum_form: str = "ema",
        normuon_beta2: float | None = None,
        cautious: bool = False,
        split: int | Sequence[int] | None = None,
        flatten: bool = True,
        state_dtype: str = "float32",
        stochastic_rounding: bool = False,
        maximize: bool = False,
        fallback_lr: float | Tensor | None = None,
        fallback_betas: tuple[float, float] = (0.9, 0.95),
        fallback_eps: float = 1e-8,
    ) -> None:
        usual = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
        iteration = {"ns_coefficients": ns_coefficients, "eps": eps, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        form = {"method": method, "ns_dtype": ns_dtype, "momentum_form": momentum_form, "normuon_beta2": normuon_beta2}
        shape = {"cautious": cautious, "split": split, "flatten": flatten}
        kept = {"state_dtype": state_dtype, "stochastic_rounding": stochastic_rounding, "maximize": maximize}
        fallback = {"fallback_lr": fallback_lr, "fallback_betas": fallback_betas, "fallback_eps": fallback_eps}
        super().__init__(params, usual | iteration | form | shape | kept | fallback)

    def _check(self, group: Group, known: Group) -> None:
        super()._check(group, known)
        check_momentum(group)
        check_spectral(group)
        check_choice(group, "momentum_form", FORMS)
        check_beta2(group, "normuon_beta2")

    def _matrix_rule(self, group: Group, p: Tensor) -> Rule:
        layout = self._layout(group, p)
        steered = Steered(self._spectral(group, p), layout, group["adjust_lr_fn"] or "original")
        return Momentum(
            storage(group["state_dtype"]),
            steered,
            group["momentum"],
            group["nesterov"],
            group["momentum_form"],
            group["normuon_beta2"],
        )
