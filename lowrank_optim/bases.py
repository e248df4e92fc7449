"""Where a gradient is looked at from: frozen dataclasses, whose state is handed in."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim._types import Basis, Factored, NewState, Side, State
from lowrank_optim.columns import DCT, Identity

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")


def resolve(rank: int | float, proj_type: str, shape: tuple[int, int]) -> tuple[int, Side]:
    """Return the rank as a number and the side as one of three: the only place that decides either.

    Args:
        rank: an int, clamped to min(m, n), or a float in (0, 1] that is a fraction of it.
        proj_type: GaLore's: `std` compresses the short side (right of a square), `reverse_std` the long one,
            `left` and `right` the one they name, `full` both.
        shape: (m, n).
    """
    m, n = shape
    short = min(m, n)
    count = max(1, round(rank * short)) if isinstance(rank, float) else min(rank, short)
    sides: dict[str, Side] = {
        "std": "right" if m >= n else "left",
        "reverse_std": "left" if m >= n else "right",
        "left": "left",
        "right": "right",
        "full": "both",
    }
    return count, sides[proj_type]


def compresses(basis: Basis, shape: tuple[int, int], moments: int = 2) -> bool:
    """Say whether a basis and so many moments of coordinates take fewer numbers than the moments of the matrix."""
    m, n = shape
    return basis.numel(shape) + moments * math.prod(basis.coords_shape(shape)) < moments * m * n


@dataclass(frozen=True)
class _Orthonormal:
    """Stored orthonormal vectors: `basis` (m, r) for the left, (r, n) for the right; with both, `basis_right` too."""

    guarded: ClassVar[bool] = True

    rank: int
    side: Side = "right"

    def init(self, shape: tuple[int, int], new: NewState) -> State:
        m, n = shape
        left, right = (m, self.rank), (self.rank, n)
        if self.side == "both":
            return {"basis": new(left), "basis_right": new(right)}
        return {"basis": new(left if self.side == "left" else right)}

    def coords_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        m, n = shape
        return (m if self.side == "right" else self.rank, n if self.side == "left" else self.rank)

    def numel(self, shape: tuple[int, int]) -> int:
        m, n = shape
        return self.rank * {"left": m, "right": n, "both": m + n}[self.side]

    def project(self, state: State, grad: Tensor) -> Tensor:
        if self.side == "right":
            return grad @ state["basis"].mT
        coords = state["basis"].mT @ grad
        return coords @ state["basis_right"].mT if self.side == "both" else coords

    def lift(self, state: State, coords: Tensor) -> Factored:
        if self.side == "right":
            return Factored(coords, state["basis"])
        return Factored(state["basis"], coords @ state["basis_right"] if self.side == "both" else coords)

    def follow_(
        self, state: State, grad: Tensor, moment: Tensor, weights: tuple[float, float]
    ) -> tuple[Tensor, Tensor]:
        old = {name: value.clone() for name, value in state.items() if name.startswith("basis")}
        kept, new = weights
        self.refresh_(state, torch.addmm(grad, *self.lift(old, moment), beta=new, alpha=kept))
        return self.project(state, grad), self.carry(old, state, moment)

    def refresh_(self, state: State, grad: Tensor) -> None:
        raise NotImplementedError

    def carry(self, old: State, new: State, coords: Tensor) -> Tensor:
        """Return, in the basis `new`, what of the matrix with coordinates `coords` in the basis `old` lies in it."""
        if self.side != "left":
            name = "basis_right" if self.side == "both" else "basis"
            coords = coords @ (old[name] @ new[name].mT)
        return (new["basis"].mT @ old["basis"]) @ coords if self.side != "right" else coords

    def start_(self, state: State, grad: Tensor) -> None:
        """Randomized range finder (Halko et al., arXiv 0909.4061) from a fixed private seed: one product and one QR."""
        source = torch.Generator(grad.device).manual_seed(0)
        left = self.side != "right"
        rows = grad if left else grad.mT
        sketch = torch.randn(rows.size(1), self.rank, generator=source, dtype=grad.dtype, device=grad.device)
        basis = _range(rows, sketch)
        state["basis"].copy_(basis if left else basis.mT)
        if self.side == "both":
            state["basis_right"].copy_(_range(grad.mT, basis).mT)

    def _iterate_(self, state: State, grad: Tensor) -> None:
        """One block power iteration: an orthonormal basis of G Gᵀ P (left), of Gᵀ G Pᵀ (right), or of each in turn."""
        basis = state["basis"]
        if self.side == "left":
            basis.copy_(_range(grad, ops.unit(grad.mT @ basis)))
        elif self.side == "right":
            basis.copy_(_range(grad.mT, ops.unit(grad @ basis.mT)).mT)
        else:
            basis.copy_(_range(grad, state["basis_right"].mT))
            state["basis_right"].copy_(_range(grad.mT, basis).mT)


@dataclass(frozen=True)
class SVD(_Orthonormal):
    """The leading singular vectors of the gradient (GaLore, arXiv 2403.03507).

    `rank` vectors of `side`: r·n or m·r floats of state. A refresh costs O(m n min(m, n)) with a large constant.
    """

    def refresh_(self, state: State, grad: Tensor) -> None:
        """Decompose the gradient; raises `torch.linalg.LinAlgError` when LAPACK does not converge."""
        u, _, vh = torch.linalg.svd(grad, full_matrices=False)
        if self.side == "right":
            state["basis"].copy_(vh[: self.rank])
            return
        state["basis"].copy_(u[:, : self.rank])
        if self.side == "both":
            state["basis_right"].copy_(vh[: self.rank])


@dataclass(frozen=True)
class SubspaceIteration(_Orthonormal):
    """Block power iteration and QR, started from the basis that it replaces.

    Tracks the leading singular subspace for two products and one QR of a thin matrix, O(m n r) a refresh, and moves
    smoothly, which suits moments that are kept as they are. State as `SVD`.
    """

    iterations: int = 1

    def refresh_(self, state: State, grad: Tensor) -> None:
        """Iterate `iterations` times."""
        for _ in range(self.iterations):
            self._iterate_(state, grad)


def _range(matrix: Tensor, vectors: Tensor) -> Tensor:
    return ops.orthonormalize(ops.unit(matrix @ vectors))


_BASES: dict[str, Callable[[int, Side, int], Basis]] = {
    "svd": lambda rank, side, size: SVD(rank, side),
    "subspace": lambda rank, side, size: SubspaceIteration(rank, side),
    "dct": DCT,
    "identity": Identity,
}
NAMES = tuple(_BASES)


def make(name: str, rank: int | float, proj_type: str, shape: tuple[int, int]) -> Basis:
    """Return the basis of this name for an m×n matrix; `rank` and `proj_type` as in `resolve`."""
    count, side = resolve(rank, proj_type, shape)
    return _BASES[name](count, side, shape[1 if side == "right" else 0])
