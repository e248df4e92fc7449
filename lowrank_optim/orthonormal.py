"""Bases that are stored orthonormal vectors: frozen dataclasses, whose state is handed in."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim._half import multiplies
from lowrank_optim._types import Factored, NewState, Side, State


@dataclass(frozen=True)
class Rotation:
    """From one orthonormal basis to another; what of a moment lies outside the new one is gone.

    A second moment moves with the first (LDAdam, arXiv 2410.16103): v − m² as the variance of uncorrelated
    coordinates, by the squares of the rotation, and m as the mean that it is.
    """

    left: Tensor | None  # (r, r) on the rows of coordinates
    right: Tensor | None  # on their columns

    @property
    def turns(self) -> list[Tensor]:
        """Return the rotations that there are."""
        return [turn for turn in (self.left, self.right) if turn is not None]

    def first(self, moment: Tensor) -> Tensor:
        """Return the moment moved."""
        return _between(self.left, moment, self.right)

    def second(self, moment: Tensor, first: Tensor, unbias: tuple[float, float]) -> Tensor:
        """Return the mean of squares moved."""
        mean = first / unbias[0]
        variance = torch.addcmul(moment / unbias[1], mean, mean, value=-1)
        left, right = (None if turn is None else turn.square() for turn in (self.left, self.right))
        found = _between(left, variance, right).addcmul_(*[self.first(mean)] * 2)
        return found.abs_().mul_(unbias[1])

    def columns(self, numbers: Tensor) -> Tensor:
        """Return the numbers moved."""
        return numbers


def _between(left: Tensor | None, x: Tensor, right: Tensor | None) -> Tensor:
    x = x if left is None else left @ x
    return x if right is None else x @ right


@dataclass(frozen=True)
class Orthonormal:
    """Stored orthonormal vectors: `basis` (m, r) for the left, (r, n) for the right; with both, `basis_right` too."""

    guarded: ClassVar[bool] = True

    rank: int
    side: Side = "right"

    def init(self, shape: tuple[int, int], new: NewState) -> State:
        """Allocate the basis."""
        m, n = shape
        left, right = (m, self.rank), (self.rank, n)
        if self.side == "both":
            return {"basis": new(left), "basis_right": new(right)}
        return {"basis": new(left if self.side == "left" else right)}

    def coords_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return (m, r) or (r, n)."""
        m, n = shape
        return (m if self.side == "right" else self.rank, n if self.side == "left" else self.rank)

    def numel(self, shape: tuple[int, int]) -> int:
        """Return how many numbers are kept."""
        m, n = shape
        return self.rank * {"left": m, "right": n, "both": m + n}[self.side]

    def takes(self, grad: Tensor) -> bool:
        """Return whether products with it are made in its 16 bits."""
        return multiplies(grad)

    def rounded(self, states: list[State], dtype: torch.dtype) -> list[State]:
        """Return the states with the bases in the 16 bits that they are multiplied in, in memory of their own."""
        for name in ("basis", "basis_right") if self.side == "both" else ("basis",):
            made = ops.casts([state[name] for state in states], dtype)
            states = [state | {name: basis} for state, basis in zip(states, made, strict=True)]
        return states

    def project(self, state: State, grad: Tensor) -> Tensor:
        """Return the coordinates."""
        return self.project_all([state], [grad])[0]

    def project_all(self, states: list[State], grads: list[Tensor]) -> list[Tensor]:
        """Return the coordinates of matrices of one shape."""
        if self.side == "right":
            return ops.products(grads, [state["basis"].mT for state in states])
        if self.side == "left":
            return ops.products([state["basis"].mT for state in states], grads)
        # one after the other: what is between the two products is larger than what comes of it
        return [
            ops.product(ops.product(state["basis"].mT, grad), state["basis_right"].mT)
            for state, grad in zip(states, grads, strict=True)
        ]

    def lift(self, state: State, coords: Tensor) -> Factored:
        """Return the factors."""
        if self.side == "right":
            return Factored(coords, state["basis"])
        return Factored(state["basis"], ops.product(coords, state["basis_right"]) if self.side == "both" else coords)

    def follow_(self, state: State, grad: Tensor, moment: Tensor, weights: tuple[float, float], seed: int = 0) -> None:
        """Set the basis from the sum."""
        kept, new = weights
        matrix = grad.to(moment.dtype)
        self.refresh_(state, torch.addmm(matrix, *self.lift(state, moment), beta=new, alpha=kept), seed)

    def refresh_(self, state: State, grad: Tensor, seed: int = 0) -> None:
        """Set the basis again."""
        raise NotImplementedError

    def move(self, old: State, state: State) -> Rotation:
        """Return the way from the one basis to the other."""
        left = right = None
        if self.side != "right":
            left = state["basis"].mT @ old["basis"]
        if self.side != "left":
            name = "basis_right" if self.side == "both" else "basis"
            right = old[name] @ state[name].mT
        return Rotation(left, right)

    def overlap(self, old: State, state: State) -> Tensor:
        """Return the share."""
        shares = [turn.square().sum() / self.rank for turn in self.move(old, state).turns]
        return torch.stack(shares).mean()

    def start_(self, state: State, grad: Tensor, seed: int = 0) -> None:
        """Randomized range finder (Halko et al., arXiv 0909.4061) from a fixed private seed: one product and one QR."""
        left = self.side != "right"
        rows = grad if left else grad.mT
        basis = _range(rows, ops.normal((rows.size(1), self.rank), 0, state["basis"]))
        state["basis"].copy_(basis if left else basis.mT)
        if self.side == "both":
            state["basis_right"].copy_(_range(grad.mT, basis).mT)

    def _iterate_(self, state: State, grad: Tensor) -> None:
        """One block power iteration: an orthonormal basis of G Gᵀ P (left), of Gᵀ G Pᵀ (right), or of each in turn."""
        basis = state["basis"]
        if self.side == "left":
            basis.copy_(_range(grad, ops.unit(ops.product(grad.mT, basis))))
        elif self.side == "right":
            basis.copy_(_range(grad.mT, ops.unit(ops.product(grad, basis.mT))).mT)
        else:
            basis.copy_(_range(grad, state["basis_right"].mT))
            state["basis_right"].copy_(_range(grad.mT, basis).mT)


@dataclass(frozen=True)
class SVD(Orthonormal):
    """The leading singular vectors of the gradient (GaLore, arXiv 2403.03507).

    `rank` vectors of `side`: r·n or m·r floats of state. A refresh costs O(m n min(m, n)) with a large constant.
    """

    def refresh_(self, state: State, grad: Tensor, seed: int = 0) -> None:
        """Decompose the gradient; raises `torch.linalg.LinAlgError` when LAPACK does not converge."""
        u, _, vh = torch.linalg.svd(grad.to(state["basis"].dtype), full_matrices=False)
        if self.side == "right":
            state["basis"].copy_(vh[: self.rank])
            return
        state["basis"].copy_(u[:, : self.rank])
        if self.side == "both":
            state["basis_right"].copy_(vh[: self.rank])


@dataclass(frozen=True)
class SubspaceIteration(Orthonormal):
    """Block power iteration and QR, started from the basis that it replaces.

    Tracks the leading singular subspace for two products and one QR of a thin matrix, O(m n r) a refresh, and moves
    smoothly, which suits moments that are kept as they are. State as `SVD`.
    """

    iterations: int = 1
    # start from a decomposition instead of a sketch, as published by LDAdam
    decompose_first: bool = False

    def start_(self, state: State, grad: Tensor, seed: int = 0) -> None:
        """Set the first basis."""
        # something first: the decomposition may fail
        super().start_(state, grad, seed)
        if self.decompose_first:
            SVD(self.rank, self.side).refresh_(state, grad, seed)

    def refresh_(self, state: State, grad: Tensor, seed: int = 0) -> None:
        """Iterate `iterations` times."""
        for _ in range(self.iterations):
            self._iterate_(state, grad)


@dataclass(frozen=True)
class RandomizedSVD(Orthonormal):
    """The leading singular vectors of the gradient, nearly: a decomposition of what a random sketch of it spans.

    Halko et al., arXiv 0909.4061, with `oversample` vectors more than are kept and `iterations` power iterations: one
    product and a thin QR for the sketch and two for each iteration, then an SVD of a thin matrix. State as `SVD`.
    """

    oversample: int = 8
    iterations: int = 1

    def refresh_(self, state: State, grad: Tensor, seed: int = 0) -> None:
        """Sketch and decompose; raises `torch.linalg.LinAlgError` when LAPACK does not converge."""
        rows = grad.mT if self.side == "right" else grad
        # (long or short, r + few): an orthonormal basis of nearly all that matters of the columns of `rows`
        count = min(self.rank + self.oversample, *rows.shape)
        found = _range(rows, ops.normal((rows.size(1), count), seed, state["basis"]))
        for _ in range(self.iterations):
            found = _range(rows, ops.unit(ops.product(rows.mT, found)))
        u, _, vh = torch.linalg.svd(ops.unit(ops.product(found.mT, rows)), full_matrices=False)
        leading = found @ u[:, : self.rank]
        state["basis"].copy_(leading.mT if self.side == "right" else leading)
        if self.side == "both":
            state["basis_right"].copy_(vh[: self.rank])


def _range(matrix: Tensor, vectors: Tensor) -> Tensor:
    return ops.orthonormalize(ops.unit(ops.product(matrix, vectors)))
