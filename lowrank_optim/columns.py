"""Bases that are some of the columns of a fixed one: nothing is kept of them but indices."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from lowrank_optim import cosine, ops, passes
from lowrank_optim._half import HALF, multiplies
from lowrank_optim._types import Coefficients, Factored, NewState, Side, State


class Sorted(NamedTuple):
    """Coefficients along all columns of a fixed basis, as a matrix of the shape of the one that they are of."""

    values: Tensor
    side: Side
    ranking: Literal["l2", "l1"]

    def energies(self) -> Tensor:
        """Return the sum of squares or of magnitudes along each column."""
        along = -2 if self.side == "right" else -1
        # vector_norm along the first dimension is ten times slower on a CPU
        return (self.values.square() if self.ranking == "l2" else self.values.abs()).sum(along)

    def take(self, index: Tensor) -> Tensor:
        """Return the coefficients along these columns."""
        return self.values.index_select(-1 if self.side == "right" else -2, index)


class Ranked(NamedTuple):
    """Coefficients in 16 bits, and what there is along each column, which was added up before they were rounded."""

    values: Tensor
    energy: Tensor
    side: Side

    def energies(self) -> Tensor:
        """Return the sum of squares or of magnitudes along each column."""
        return self.energy

    def take(self, index: Tensor) -> Tensor:
        """Return the coefficients along these columns in float32."""
        return self.values.index_select(-1 if self.side == "right" else -2, index).to(torch.float32)


@dataclass(frozen=True)
class Gather:
    """From some columns of a fixed basis to others: what stays keeps its numbers bit for bit, what enters has zeros.

    Bases of such columns differ by a 0/1 matrix, so squares and means of squares move as sums do.
    """

    place: Tensor  # (r,) where among the old columns each new one is, or would be
    stays: Tensor  # (r,) whether it is there
    dim: int

    def first(self, moment: Tensor) -> Tensor:
        """Return the moment moved."""
        return self._gathered(moment, self.dim)

    def second(self, moment: Tensor, first: Tensor, unbias: tuple[float, float]) -> Tensor:
        """Return the mean of squares moved."""
        return self.first(moment)

    def columns(self, numbers: Tensor) -> Tensor:
        """Return the numbers moved."""
        return self._gathered(numbers, -1)

    def _gathered(self, x: Tensor, dim: int) -> Tensor:
        found = x.index_select(dim, self.place)
        # filled: the moments of a gradient of 1e20 are infinite, and infinity times zero is none
        enters = ~self.stays
        if x.device.type == "cpu":
            # where the host need not wait to know which they are, a quarter of the time
            return found.index_fill_(dim, enters.nonzero().squeeze(1), 0)
        return found.masked_fill_(enters if dim == -1 else enters.unsqueeze(-1), 0)


class Still:
    """Nothing moves: the columns are the same."""

    def first(self, moment: Tensor) -> Tensor:
        """Return the moment."""
        return moment

    def second(self, moment: Tensor, first: Tensor, unbias: tuple[float, float]) -> Tensor:
        """Return the mean of squares."""
        return moment

    def columns(self, numbers: Tensor) -> Tensor:
        """Return the numbers."""
        return numbers


@dataclass(frozen=True)
class Selected:
    """`rank` columns of one fixed orthonormal basis of one side, kept as sorted int32 indices and nothing else.

    Columns are ranked by the energy of the matrix along them, by sums of squares ("l2") or of magnitudes ("l1"); equal
    ones by their index. Nothing is asked of the matrix, so a refresh never makes the host wait. By "l2" the columns
    hold at least r/n of any matrix's energy, and more than any others; by "l1" there is no such bound.
    """

    guarded: ClassVar[bool] = False

    rank: int
    side: Side
    size: int  # of the compressed side
    ranking: Literal["l2", "l1"] = "l2"

    def init(self, shape: tuple[int, int], new: NewState) -> State:
        """Allocate the basis."""
        return {"basis_index": new((self.rank,), torch.int32)}

    def coords_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return (m, r) or (r, n)."""
        m, n = shape
        return (m, self.rank) if self.side == "right" else (self.rank, n)

    def numel(self, shape: tuple[int, int]) -> int:
        """Return how many numbers are kept."""
        return self.rank

    def start_(self, state: State, grad: Tensor, seed: int = 0) -> Tensor:
        """Do as `refresh_`."""
        return self.refresh_(state, grad, seed)

    def refresh_(self, state: State, grad: Tensor, seed: int = 0) -> Tensor:
        """Select the columns along which `grad` has most energy; the coordinates come with it."""
        coefficients = self.analyze(grad)
        index = self.select(coefficients.energies())
        state["basis_index"].copy_(index)
        return coefficients.take(index)

    def follow_(
        self, state: State, grad: Tensor, moment: Tensor, weights: tuple[float, float], seed: int = 0
    ) -> Tensor:
        """Set the basis from the sum."""
        coefficients, old = self.analyze(grad), state["basis_index"].clone()
        kept, new = weights
        energies = coefficients.energies().mul_(new ** (2 if self.ranking == "l2" else 1))
        # a moment has coefficients in its own columns only, so there is nothing to lift
        coming = coefficients.take(old).mul_(new).add_(moment, alpha=kept)
        energies[old] = Sorted(coming, self.side, self.ranking).energies()
        index = self.select(energies)
        state["basis_index"].copy_(index)
        return coefficients.take(index)

    def select(self, energies: Tensor) -> Tensor:
        """Return the sorted indices of the columns to keep, from the energies along all of them."""
        # a stable sort breaks ties by index, which topk does not promise
        return torch.sort(energies, descending=True, stable=True).indices[: self.rank].sort().values

    def move(self, old: State, state: State) -> Gather | Still:
        """Return the way from the one basis to the other."""
        before, after = old["basis_index"], state["basis_index"]
        # asked only where that costs no wait
        if before.device.type == "cpu" and torch.equal(before, after):
            return Still()
        # both are sorted, so each new index has one place where it would be among the old
        place = torch.searchsorted(before, after).clamp_(max=self.rank - 1)
        return Gather(place, before[place] == after, self._dim)

    def overlap(self, old: State, state: State) -> Tensor:
        """Return the share."""
        return self.move(old, state).columns(torch.ones_like(state["basis_index"], dtype=torch.float32)).mean()

    def analyze(self, matrix: Tensor) -> Coefficients:
        """Return the coefficients of `matrix` along all columns of the fixed basis."""
        return Sorted(self.transform(matrix), self.side, self.ranking)

    def transform(self, matrix: Tensor) -> Tensor:
        """Return the coefficients as a matrix, sorted."""
        raise NotImplementedError

    @property
    def _dim(self) -> int:
        return -1 if self.side == "right" else -2


@dataclass(frozen=True)
class _OfMatrix(Selected):
    """Columns of a matrix that is shared by all of a process and made once."""

    def project(self, state: State, grad: Tensor) -> Tensor:
        """Return G Q (right) or Qᵀ G (left), Q being the selected columns."""
        return self.project_all([state], [grad])[0]

    def project_all(self, states: list[State], grads: list[Tensor]) -> list[Tensor]:
        """Return the coordinates of matrices of one shape."""
        rows = self._selected(states, grads[0])
        if self.side == "right":
            return [ops.product(grad, columns.mT) for grad, columns in zip(grads, rows, strict=True)]
        return [ops.product(columns, grad) for grad, columns in zip(grads, rows, strict=True)]

    def lift(self, state: State, coords: Tensor) -> Factored:
        """Return the factors of R Qᵀ (right) or Q R (left)."""
        return self.lift_all([state], [coords])[0]

    def lift_all(self, states: list[State], coords: list[Tensor]) -> list[Factored]:
        """Return the factors of each, of one shape."""
        rows = self._selected(states, coords[0])
        if self.side == "right":
            return [Factored(each, columns) for each, columns in zip(coords, rows, strict=True)]
        return [Factored(columns.mT, each) for each, columns in zip(coords, rows, strict=True)]

    def _selected(self, states: list[State], like: Tensor) -> Iterator[Tensor]:
        """Yield the selected columns of each as rows; a device gathers all at once, a CPU as they are asked for."""
        every, indices = self._matrix(like).mT, [state["basis_index"] for state in states]
        if multiplies(like) and len(indices) > 1:
            yield from every.index_select(0, torch.cat(indices)).view(len(indices), self.rank, -1).unbind()
            return
        for index in indices:
            yield every.index_select(0, index)

    def _matrix(self, like: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class DCT(_OfMatrix):
    """Columns of the orthonormal DCT-II matrix of the compressed side (arXiv 2505.17967). State: `rank` int32.

    The DCT matrix itself, that side squared, is shared by all matrices of a process and is not state: see
    `cosine.dct_matrix`.
    """

    def takes(self, grad: Tensor) -> bool:
        """Return whether products with it are made in its 16 bits."""
        return multiplies(grad)

    def rounded(self, states: list[State], dtype: torch.dtype) -> list[State]:
        """Return the states: columns are made in the dtype of what they are multiplied with."""
        return states

    def adam_directions_(self, states: list[State], grads: list[Tensor], **numbers: Any) -> list[Tensor] | None:
        """Refresh, take the moments along and return what Adam makes of the coordinates; None where no kernels do."""
        return passes.dct_adam_directions_(grads, states, dim=self._dim, ranking=self.ranking, **numbers)

    def transform(self, matrix: Tensor) -> Tensor:
        """Return G D (right) or Dᵀ G (left): 2 m n min(m, n) operations as a product, m n log min(m, n) by FFT."""
        if matrix.dtype in HALF:
            columns = self._matrix(matrix)
            return ops.product(matrix, columns) if self.side == "right" else ops.product(columns.mT, matrix)
        return cosine.dct(matrix, self._dim)

    def analyze(self, matrix: Tensor) -> Coefficients:
        """Return the coefficients; as an FFT leaves them, where it is one that finds them, or as a kernel does."""
        if (found := passes.dct_energies(matrix, self._dim, self.ranking)) is not None:
            return Ranked(*found, self.side)
        return cosine.spectrum(matrix, self._dim, squares=self.ranking == "l2") or super().analyze(matrix)

    def _matrix(self, like: Tensor) -> Tensor:
        return cosine.dct_matrix(self.size, like.dtype, like.device)


@dataclass(frozen=True)
class Hadamard(_OfMatrix):
    """Columns of the Walsh–Hadamard matrix, in its natural order, of a side that is a power of two."""

    def transform(self, matrix: Tensor) -> Tensor:
        """Return G H (right) or Hᵀ G (left), by two products with matrices of √n."""
        return cosine.hadamard(matrix, self._dim)

    def _matrix(self, like: Tensor) -> Tensor:
        return cosine.hadamard_matrix(self.size, like.dtype, like.device)


@dataclass(frozen=True)
class Identity(Selected):
    """The columns or rows of the matrix itself that have most energy. State: `rank` int32."""

    def transform(self, matrix: Tensor) -> Tensor:
        """Return the matrix: its entries are its coefficients."""
        return matrix

    def project(self, state: State, grad: Tensor) -> Tensor:
        """Return the selected columns (right) or rows (left)."""
        return grad.index_select(self._dim, state["basis_index"])

    def lift(self, state: State, coords: Tensor) -> Tensor:
        """Return the matrix that holds `coords` in the selected columns or rows, and zeros."""
        m, n = coords.shape
        whole = coords.new_zeros((m, self.size) if self.side == "right" else (self.size, n))
        return whole.index_copy_(self._dim, state["basis_index"].long(), coords)
