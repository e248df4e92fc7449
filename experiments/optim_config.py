"""The options of the optimizer; `experiments.optimizer` says which of them each one takes."""

from dataclasses import dataclass
from typing import Literal

Name = Literal[
    "adamw", "galore_adamw", "muon", "lowrank_muon", "trion", "auon", "steepest_descent"  # in the order of OPTIMIZERS
]


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer; the defaults are tuned for the default run.

    Args:
        name: adamw is torch's, fused; the others are this package's.
        lr: Learning rate of the matrices.
        other_lr: Learning rate of everything else (embedding, head, norms); `lr` if null.
        betas: Decay of the two moments of AdamW and GaLore, and of AdamW on what others leave to it.
        eps: Added to the root of the second moment of the same.
        weight_decay: Decoupled weight decay of the matrices.
        rank: Rank of the projection, or a fraction of the short side. An optimizer does not use what it does not know
            of these four, and refuses what it does not know below, where null leaves an option to the optimizer.
        scale: Factor on GaLore's projected update.
        proj_type: Which side GaLore projects.
        stagger: Spread GaLore's refreshes over the period.
        update_proj_gap: Steps between two refreshes of a basis; null is 50 for GaLore. Not refused.
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
        residual: Share of the residual gradient in the full matrix that is orthogonalized; null orthogonalizes in the
            basis.
        gamma: AuON's factor inside the cosh.
        normalize: AuON as in the paper; false is its authors' later code.
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
    basis: Literal["svd", "subspace", "dct", "identity"] | None = None
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
    residual: float | None = None
    gamma: float | None = None
    normalize: bool | None = None
