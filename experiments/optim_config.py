"""The options of the optimizer; `experiments.optimizer` says which of them each one takes."""

from dataclasses import dataclass
from typing import Literal

Name = Literal[
    # in the order of OPTIMIZERS
    "adamw",
    "galore_adamw",
    "dct_adamw",
    "apollo_adamw",
    "fira_adamw",
    "ldadamw",
    "muon",
    "lowrank_muon",
    "trion",
    "auon",
    "steepest_descent",
    "mfac",
    "lowrank_mfac",
]

Basis = Literal["svd", "rsvd", "subspace", "random", "gaussian", "dct", "identity", "hadamard"]


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer; the defaults are tuned for the default run.

    Args:
        name: adamw is torch's, fused; the others are this package's.
        lr: Learning rate of the matrices.
        other_lr: Learning rate of everything else (embedding, head, norms); `lr` if null.
        betas: Decay of the two moments of AdamW and the projected ones, and of AdamW on what others leave to it.
        eps: Added to the root of the second moment of the same.
        weight_decay: Decoupled weight decay of the matrices.
        rank: Rank of the projection, or a fraction of the short side. An optimizer does not use what it does not know
            of these four, and refuses what it does not know below, where null leaves an option to the optimizer.
        scale: Factor on the update of GaLore, Fira and APOLLO.
        proj_type: Which side is projected.
        stagger: Spread the refreshes over the period.
        update_proj_gap: Steps between two refreshes of a basis; null is 50 for GaLore, Fira and APOLLO. Not refused.
        basis: How a basis is found. Not refused.
        state_dtype: How the state of the matrices is kept.
        stochastic_rounding: Round the stored state at random instead of to the nearest.
        momentum: Decay of the momentum, beta.
        nesterov: Look one step ahead.
        momentum_form: ema, or sum for one that is not averaged.
        adjust_lr_fn: How the learning rate depends on a matrix's shape.
        ns_coefficients: Newton-Schulz coefficients: a name, or three numbers.
        ns_steps: Newton-Schulz steps.
        ns_dtype: In which Newton-Schulz is computed.
        method: How a matrix is orthogonalized.
        normuon_beta2: Decay of NorMuon's row averages; null for plain Muon.
        cautious: Decay only where update and weight agree in sign.
        residual: For lowrank_muon the share of the residual gradient in the full matrix that is orthogonalized, null
            to orthogonalize in the basis; for galore_adamw what becomes of it, null to drop it.
        residual_scale: Factor on that part of the update, the projected part's `scale` if null.
        carry: What moments do when their basis moves.
        adaptive_overlap: Share of a subspace that must be found again for its period to double.
        ranking: Sums of squares or of magnitudes choose DCT columns.
        column_ages: Correct the bias of each DCT column by its own age.
        error_feedback: How the error is kept.
        scale_type: APOLLO's factors, of channels or of the tensor.
        proj_dtype: In which APOLLO projects.
        published_code: Fira as its authors' code has it.
        rho: Weight of the mean gradient in LDAdam's basis.
        gamma: AuON's factor inside the cosh.
        normalize: AuON as in the paper; false is its authors' later code.
        num_grads: Gradients in M-FAC's window.
        damping: M-FAC's lambda.
        relative_damping: In units of the mean squared norm of the gradients in the window.
        divisor: What their sum is divided by.
        scope: One window for each group, or each parameter.
        num_grads: Gradients in M-FAC's window.
        damping: M-FAC's lambda.
        relative_damping: In units of the mean squared norm of the gradients in the window.
        divisor: What their sum is divided by.
        scope: One window for each group, or each parameter.
        full_rank: Whole gradients in M-FAC's window, not their coordinates.
    """

    name: Name = "galore_adamw"
    lr: float = 7e-3
    other_lr: float | None = 2e-2
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    rank: int | float = 32
    scale: float = 1.0
    proj_type: Literal["std", "reverse_std", "left", "right", "full"] = "std"
    stagger: bool = True
    update_proj_gap: int | None = None
    basis: Basis | None = None
    state_dtype: Literal["float32", "bfloat16", "int8", "int4"] | None = None
    stochastic_rounding: bool | None = None
    momentum: float | None = None
    nesterov: bool | None = None
    momentum_form: str | None = None
    adjust_lr_fn: str | None = None
    ns_coefficients: str | tuple[float, float, float] | None = None
    ns_steps: int | None = None
    ns_dtype: str | None = None
    method: str | None = None
    normuon_beta2: float | None = None
    cautious: bool | None = None
    residual: float | Literal["fira", "sign"] | None = None
    residual_scale: float | None = None
    carry: Literal["keep", "reset", "rotate"] | None = None
    adaptive_overlap: float | None = None
    ranking: Literal["l2", "l1"] | None = None
    column_ages: bool | None = None
    error_feedback: Literal["float32", "bfloat16", "int8", "int4"] | None = None
    scale_type: Literal["channel", "tensor"] | None = None
    proj_dtype: Literal["float32", "bfloat16"] | None = None
    published_code: bool | None = None
    rho: float | None = None
    gamma: float | None = None
    normalize: bool | None = None
    num_grads: int | None = None
    damping: float | None = None
    relative_damping: bool | None = None
    divisor: Literal["window", "count"] | None = None
    scope: Literal["group", "parameter"] | None = None
