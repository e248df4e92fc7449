"""Pruning by the Optimal Brain Surgeon with M-FAC's inverse of the empirical Fisher matrix."""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowrank_optim.fisher import InverseFisher
from lowrank_optim.masks import Masks, check_mask, check_sparsity, require, sparsity_schedule

Pattern = tuple[int, int]
Losses = Callable[[], Iterable[Tensor]]


@torch.no_grad()
def obs_scores(weights: Tensor, fisher: InverseFisher) -> Tensor:
    r"""Return by how much the loss rises for each weight, when it is pruned alone and the others make up for it.

    .. math:: ρ_k = \frac{w_k^2}{2 [F^{-1}]_{kk}}

    is the least of ½δᵀFδ with δₖ = -wₖ. It takes O(d m²). A diagonal below what is lost in its computation, ε/λ with
    the ε of float64, is taken as that, so all scores are finite.

    Args:
        weights: of any shape, as many numbers as `fisher` has parameters, d.
        fisher: holds gradients by the weights.

    Returns:
        Of the shape of `weights`, in float64, on the device of `fisher`.

    Raises:
        ValueError: for another number of weights than d.

    Source: Hassibi, Stork: "Second order derivatives for network pruning: Optimal Brain Surgeon", NeurIPS 1992.

    Example:
        >>> fisher = InverseFisher(2, num_grads=1, damping=0.5, dtype=torch.float64)
        >>> fisher.push(torch.tensor([1.0, 0.0]))
        True
        >>> [round(score, 4) for score in obs_scores(torch.tensor([1.0, 1.0]), fisher).tolist()]
        [0.75, 0.25]
    """
    return _scores(_flat(weights, fisher), _diagonal(fisher)).view(weights.shape)


@torch.no_grad()
def obs_prune(
    weights: Tensor,
    fisher: InverseFisher,
    sparsity: float | None = None,
    *,
    mask: Tensor | None = None,
    pattern: Pattern | None = None,
    joint: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""Set the weights with the lowest scores to zero, and change the others so that the loss rises least.

    With P the weights that are pruned and Q those that are kept, the change δ is one of

    .. math::
        δ = \arg\min_{δ_P = -w_P} \tfrac12 δ^T F δ: \quad δ_Q = G_Q^T (cλ I + G_Q G_Q^T)^{-1} G_P w_P; \qquad
        δ = -\sum_{k ∈ P} \frac{w_k}{[F^{-1}]_{kk}} F^{-1} e_k

    The first is `joint`, the exact minimum for all of P: a ridge regression in the space of the gradients, without any
    |P|×|P| matrix. The second, published, sums what is best for each weight if it were the only one. Either takes
    O(d m²). For the scores see `obs_scores`; of equal ones the first goes.

    Args:
        weights: of any shape, as many numbers as `fisher` has parameters, d. They are only read.
        fisher: holds gradients by the weights, zero where `mask` is False.
        sparsity: share of zeros afterwards, in [0, 1): round(sparsity·d), those that are masked among them. Default
            None, the pattern's own, 1 - n/m.
        mask: of the shape of `weights`, bool, False where a weight has been pruned before, and stays so. Default None,
            nowhere.
        pattern: (n, m): at most n of m consecutive weights along the input dimension (the second, or the only one) are
            kept; with less sparsity than 1 - n/m, the lowest of those that it prunes. Default None.
        joint: which δ. Default True; False is published.

    Returns:
        The new weights, of the dtype and on the device of the old ones, zero where they are pruned, and the new mask,
        bool; both of the shape of `weights`.

    Raises:
        ValueError: for an argument out of its range or of another shape.

    Sources: Hassibi, Stork: "Second order derivatives for network pruning: Optimal Brain Surgeon", NeurIPS 1992;
    Frantar, Kurtic, Alistarh: "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information", arXiv
    2107.03356. The joint update is ours.

    Example:
        >>> fisher = InverseFisher(3, num_grads=1, damping=0.5)
        >>> fisher.push(torch.tensor([1.0, 1.0, 0.0]))
        True
        >>> weights, mask = obs_prune(torch.tensor([1.5, 3.0, 4.0]), fisher, 1 / 3)
        >>> weights.tolist(), mask.tolist()
        ([0.0, 4.0, 4.0], [False, True, True])
    """
    share = _check_share(sparsity, pattern)
    flat = _flat(weights, fisher)
    alive = torch.ones_like(weights, dtype=torch.bool) if mask is None else mask
    check_mask("mask", alive, weights.shape)
    alive = alive.reshape(-1).to(flat.device)
    flat = flat.masked_fill(~alive, 0)
    diagonal = _diagonal(fisher)
    scores = _scores(flat, diagonal).masked_fill_(~alive, -torch.inf)
    keep = alive & _chosen([scores.view(weights.shape)], share, pattern)
    updated = _updated(flat, keep, fisher, diagonal, joint)
    return updated.view(weights.shape).to(weights), keep.view(weights.shape).to(weights.device)


class OBSPruner:
    r"""Prunes a model by OBS, all matrices together, in rounds: gradients, scores, masks and the update of the rest.

    A round takes F = λI + (1/c) Σ g gᵀ over gradients of small batches at the present weights, those that are left
    only, and is `obs_prune` on all of them. Rounds after the first see how the loss has changed; each prunes the same
    share of what is left.

    Costs of a round with d weights left: m backward passes and O(d m²); the bytes of `InverseFisher` for d weights, and
    some 80 for each weight. To save a pruner, save its `masks`.

    Args:
        named_params: pairs of name and parameter of those that are to be pruned: weights of layers, hardly biases.
        num_grads: m, the most gradients of a round. Default 256 (the authors' code: 64).
        damping: λ. It is to ‖g‖² what a unit is. Default 1e-5 (the authors' code).
        pattern: as for `obs_prune`; its m must divide the input dimensions of all parameters. Default None.
        joint: likewise. Default True; False is published.
        block_size: as for `InverseFisher`, of the weights that are left. Default None, one block (the authors' code:
            128).
        divisor: likewise; "count" where a round yields fewer losses than `num_grads`. Default "window", published.
        dtype: likewise; on a CPU torch.float64 is faster, and twice as large. Default torch.float32.
        offload: likewise. Default False.

    Attributes:
        masks: its `Masks`: which weights are left, to hold while training and to save.

    Raises:
        ValueError: for an argument out of its range.

    Sources: Frantar, Kurtic, Alistarh: "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information", arXiv
    2107.03356; Hassibi, Stork: "Second order derivatives for network pruning: Optimal Brain Surgeon", NeurIPS 1992.

    Example:
        >>> model, x, y = nn.Linear(8, 4), torch.randn(64, 8), torch.randn(64, 4)
        >>> pruner = OBSPruner([("weight", model.weight)], num_grads=16)
        >>> losses = lambda: (nn.functional.mse_loss(model(a), b) for a, b in zip(x.split(4), y.split(4)))
        >>> pruner.prune(losses, 0.75, recomputations=4)
        >>> int((model.weight == 0).sum())
        24
    """

    def __init__(
        self,
        named_params: Iterable[tuple[str, nn.Parameter]],
        num_grads: int = 256,
        damping: float = 1e-5,
        *,
        pattern: Pattern | None = None,
        joint: bool = True,
        block_size: int | None = None,
        divisor: Literal["window", "count"] = "window",
        dtype: torch.dtype = torch.float32,
        offload: bool = False,
    ) -> None:
        self.masks = Masks(named_params)
        self._num_grads, self._pattern, self._joint = num_grads, pattern, joint
        self._options: dict[str, Any] = {
            **{"num_grads": num_grads, "damping": damping, "block_size": block_size},
            **{"divisor": divisor, "dtype": dtype, "offload": offload},
        }
        # refuses what is out of its range now, and not in the first round
        InverseFisher(1, **self._options)
        if pattern is not None:
            _check_share(None, pattern)
            _chosen([torch.empty_like(p) for p in self.masks.params.values()], 0.0, pattern)

    def prune(self, losses: Losses, sparsity: float | None = None, *, recomputations: int = 16) -> None:
        """Prune to a sparsity, in rounds from the present one on; where it has been reached, do nothing.

        Args:
            losses: called for each round; yields losses of small batches, one for each gradient, of the model in
                evaluation mode. Those past `num_grads` are not asked for. `p.grad` is not touched.
            sparsity: as for `obs_prune`.
            recomputations: rounds. Default 16 (the authors' code); 1 may do where there is training in between.

        Raises:
            ValueError: for an argument out of its range, or where no loss has a finite gradient.
        """
        share, now = _check_share(sparsity, self._pattern), self.masks.sparsity
        # one weight is always left
        share = min(share, 1 - 1 / sum(p.numel() for p in self.masks.params.values()))
        require(type(recomputations) is int and recomputations >= 1, "recomputations", recomputations, "an int >= 1")
        stages = sparsity_schedule(share, recomputations, "geometric", initial=now) if share > now else [share]
        for stage in stages:
            if self._prunable(stage):
                self._prune(losses, stage)

    def _prunable(self, share: float) -> bool:
        """Say whether masks are to change for this sparsity: as a number of weights, or because of a pattern."""
        masks = list(self.masks.state_dict().values())
        scores = [torch.zeros_like(mask, dtype=torch.float64).masked_fill_(~mask, -torch.inf) for mask in masks]
        return bool((_joined(masks) & ~_chosen(scores, share, self._pattern)).any())

    @torch.no_grad()
    def _prune(self, losses: Losses, share: float) -> None:
        # gradients are by the weights that are left
        self.masks.apply_()
        names, params = zip(*self.masks.params.items(), strict=True)
        flat = _joined(params)
        alive = _joined(list(self.masks.state_dict().values())).to(flat.device)
        fisher = self._fisher(losses, params, alive)
        left, diagonal = _flat(flat[alive], fisher), _diagonal(fisher)
        scores = torch.full_like(flat, -torch.inf, dtype=torch.float64)
        scores.masked_scatter_(alive, _scores(left, diagonal))
        keep = alive & _chosen(_parted(scores, params), share, self._pattern)
        flat[alive] = _updated(left, keep[alive], fisher, diagonal, self._joint).to(flat.dtype)
        for p, new in zip(params, _parted(flat, params), strict=True):
            p.copy_(new)
        self.masks.narrow_(dict(zip(names, _parted(keep, params), strict=True)))

    def _fisher(self, losses: Losses, params: Sequence[Tensor], alive: Tensor) -> InverseFisher:
        fisher = InverseFisher(int(alive.sum()), device=alive.device, **self._options)
        with torch.enable_grad():
            for loss in islice(losses(), self._num_grads):
                grads = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
                fisher.push(_joined(grads)[alive])
        require(fisher.num_pushed > 0, "losses", losses, "at least one loss with a finite gradient")
        return fisher


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1).to(tensors[0].device) for x in tensors])


def _parted(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    return [part.view(p.shape) for part, p in zip(torch.split(flat, [p.numel() for p in like]), like, strict=True)]


def _flat(weights: Tensor, fisher: InverseFisher) -> Tensor:
    size = fisher.num_params
    require(weights.numel() == size, "weights", tuple(weights.shape), f"{size} numbers, as fisher has parameters")
    return weights.reshape(-1).double().to(fisher.device)


def _diagonal(fisher: InverseFisher) -> Tensor:
    """Return the diagonal of F⁻¹, above what is lost in its computation, so that it can be divided by."""
    return fisher.diagonal().double().clamp_(min=torch.finfo(torch.float64).eps / fisher.damping)


def _scores(flat: Tensor, diagonal: Tensor) -> Tensor:
    return flat.square() / (2 * diagonal)


def _chosen(scores: Sequence[Tensor], share: float, pattern: Pattern | None) -> Tensor:
    """Return what is kept, flat, where a share of all that has the lowest scores goes; of equal ones the first.

    Scores of -inf are of what has gone. With a pattern only what it prunes goes, and all of that at its own sparsity.
    """
    flat = _joined(scores)
    free = torch.arange(len(flat), device=flat.device)
    count = round(share * len(flat))
    if pattern is not None:
        outside = _joined([_outside(part, pattern) for part in scores])
        free = outside.nonzero().squeeze(1)
        count -= int((flat.isneginf() & ~outside).sum())
        count = len(free) if share >= 1 - pattern[0] / pattern[1] else max(0, count)
    gone = free[flat[free].argsort(stable=True)[:count]]
    return torch.ones_like(flat, dtype=torch.bool).index_fill_(0, gone, False)


def _outside(scores: Tensor, pattern: Pattern) -> Tensor:
    """Return what an n:m pattern prunes: all but the n best of each m along the input dimension."""
    (n, m), at = pattern, max(0, min(1, scores.dim() - 1))
    fits = scores.dim() > 0 and scores.size(at) % m == 0
    require(fits, "pattern", pattern, f"one whose {m} divides the input dimension of {tuple(scores.shape)}")
    last = scores.movedim(at, -1)
    worst = last.reshape(-1, m).argsort(dim=1, stable=True)[:, : m - n]
    found = torch.zeros(last.numel() // m, m, dtype=torch.bool, device=scores.device).scatter_(1, worst, True)
    return found.view(last.shape).movedim(-1, at)


def _updated(flat: Tensor, keep: Tensor, fisher: InverseFisher, diagonal: Tensor, joint: bool) -> Tensor:
    gone = flat.masked_fill(keep, 0).neg_()
    change = fisher.compensate(gone, keep) if joint else fisher.solve(gone / diagonal)
    return (flat + change).masked_fill_(~keep, 0)


def _check_share(sparsity: float | None, pattern: Pattern | None) -> float:
    """Return the sparsity that is meant, where all is in its range."""
    if pattern is None:
        return check_sparsity("sparsity", sparsity)
    whole = isinstance(pattern, tuple) and len(pattern) == 2 and all(type(k) is int for k in pattern)
    require(whole and 1 <= pattern[0] < pattern[1], "pattern", pattern, "(n, m), ints with 1 <= n < m")
    own = 1 - pattern[0] / pattern[1]
    share = own if sparsity is None else check_sparsity("sparsity", sparsity)
    require(share <= own, "sparsity", sparsity, f"at most the {own} of pattern={pattern}")
    return share
