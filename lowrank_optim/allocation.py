"""Ranks where they are needed: more vectors for the gradients whose spectra are flat, within one budget."""

import heapq
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lowrank_optim._checks import Role, check_rank, require
from lowrank_optim._types import matrix_shape
from lowrank_optim.bases import resolve
from lowrank_optim.distributed import is_sharded, refuse_shards
from lowrank_optim.roles import HEADS, Placed, Targets, place


class Row(NamedTuple):
    """What one matrix got; `share` is of the energy (the squared Frobenius norm) of its gradient."""

    name: str
    shape: tuple[int, int]
    rank: int
    share: float
    uniform: int  # the rank that it would have if all had the same
    uniform_share: float


class Ranks(dict[str, int]):
    """The rank of each matrix, keyed by a pattern of its module's name, as `param_groups(model, rank=...)` takes it.

    Args:
        modules: the module of each matrix.
        rows: what each matrix got.

    Attributes:
        rows: the same, for programs.
    """

    def __init__(self, modules: Iterable[str], rows: Sequence[Row]) -> None:
        self.rows = tuple(rows)
        # the whole name and nothing else, or `layers.1` would decide for `layers.10` too
        super().__init__((f"^{re.escape(name)}$", row.rank) for name, row in zip(modules, rows, strict=True))

    def describe(self) -> str:
        """Return a table: each matrix with its rank and the share of its gradient's energy that so many vectors hold.

        Beside them stand the uniform rank and its share. Below are the means of the shares, and what they are bought
        with: the numbers in the two moments that `GaLoreAdamW` keeps in coordinates.
        """
        table = [("", "shape", "rank", "energy", "uniform", "energy")]
        for row in self.rows:
            own, same = f"{row.share:.1%}", f"{row.uniform_share:.1%}"
            table.append((row.name, "×".join(map(str, row.shape)), str(row.rank), own, str(row.uniform), same))
        ours = math.fsum(row.share for row in self.rows) / len(self.rows)
        theirs = math.fsum(row.uniform_share for row in self.rows) / len(self.rows)
        table.append(("mean", "", "", f"{ours:.1%}", "", f"{theirs:.1%}"))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = []
        for line in table:
            name, *cells = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            lines.append("  ".join([name.lstrip().ljust(widths[0]), *cells]))
        spent = sum(row.rank * _cost(row.shape) for row in self.rows)
        budget = sum(row.uniform * _cost(row.shape) for row in self.rows)
        return "\n".join([*lines, f"{spent:,} coordinates of {budget:,}"])


def allocate_ranks(
    model: nn.Module,
    rank: int | float,
    *,
    least: int = 1,
    targets: Targets = "all-linear",
    roles: Literal["auto"] | Mapping[str, Role] = "auto",
    heads: str = HEADS,
) -> Ranks:
    r"""Share a budget of ranks out among the matrices of a model, by the spectra of the gradients that it holds now.

    A vector more for an m×n matrix costs max(m, n) numbers in each moment, and gains σₖ²/Σσ², the share of the energy
    of the gradient that the k-th singular vector holds. It is a share because Adam does not see how large a gradient
    is. The best gain for its cost is bought until no vector fits: gains only decrease within a matrix, so nothing
    captures more but for what is left of the budget at the end. Where that makes the uniform rank the better one, it is
    returned, unless it is below `least`.

    Ties go to the matrix that comes first in the model. State is allocated when an optimizer is made, so ranks are
    found before, from `p.grad` after one backward pass or several; gradients are only read.

    Args:
        model: any module whose targets have gradients.
        rank: the uniform rank that would cost as much, an int or a float in (0, 1], a fraction of a matrix's short
            side: the budget is the sum of 2·r·max(m, n). The bases that an optimizer keeps beside are not in it.
        least: no matrix gets fewer, unless its short side is. Default 1.
        targets: as for `param_groups`, which must be given the same. Default "all-linear".
        roles: likewise. Default "auto".
        heads: likewise.

    Returns:
        A mapping for `param_groups(model, rank=...)`; print its `describe()`. A parameter of more than two dimensions
        is one matrix, `flatten(1)`.

    Raises:
        ValueError: when a gradient is missing, zero or not finite, when `least` alone exceeds the budget, when a module
            holds several matrices, which `param_groups` can give one rank only, when there is no matrix, and for
            arguments out of their ranges.
        RuntimeError: for sparse, complex or DTensor gradients.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        >>> model[0].weight.grad = torch.diag(torch.tensor([3.0, 1.0, 0.0, 0.0]))
        >>> model[1].weight.grad = torch.eye(4)
        >>> ranks = allocate_ranks(model, 2)
        >>> print(ranks.describe())
                  shape  rank  energy  uniform  energy
        0.weight    4×4     1   90.0%        2  100.0%
        1.weight    4×4     3   75.0%        2   50.0%
        mean                    82.5%            75.0%
        32 coordinates of 32
        >>> dict(ranks)
        {'^0$': 1, '^1$': 3}
    """
    check_rank({"rank": rank})
    whole = isinstance(least, int) and not isinstance(least, bool)
    require(whole and least >= 1, {"least": least}, "least", "an int >= 1")
    if isinstance(roles, str) and roles != "auto":
        raise ValueError(f"Invalid roles: {roles!r}, must be 'auto' or a mapping from names to roles")
    placed = place(model, targets=targets, heads=heads, roles={} if isinstance(roles, str) else roles, stacked=None)
    matrices = [entry for entry in placed if entry.role == "matrix" and entry.use.p.numel()]
    if not matrices:
        raise ValueError("the model has no matrix to give a rank to: name some with `targets`")
    modules = _modules(matrices)
    shapes = [matrix_shape(entry.use.p.shape) for entry in matrices]
    costs = [_cost(shape) for shape in shapes]
    uniform = [resolve(rank, "std", shape)[0] for shape in shapes]
    floor = [min(least, *shape) for shape in shapes]
    budget, needed = _total(uniform, costs), _total(floor, costs)
    if needed > budget:
        raise ValueError(
            f"Invalid least: {least!r}, whose {needed:,} coordinates must not exceed the {budget:,} of rank={rank!r}"
        )
    # after all that is cheap to refuse
    spectra = [_shares(entry.use.name, entry.use.p) for entry in matrices]
    ranks = _greedy(spectra, costs, floor, budget)
    feasible = all(r >= low for r, low in zip(uniform, floor, strict=True))
    if feasible and math.fsum(_held(spectra, uniform)) > math.fsum(_held(spectra, ranks)):
        ranks = uniform
    names = [entry.use.name for entry in matrices]
    columns = (names, shapes, ranks, _held(spectra, ranks), uniform, _held(spectra, uniform))
    return Ranks(modules, [Row(*values) for values in zip(*columns, strict=True)])


def _greedy(spectra: list[list[float]], costs: list[int], floor: list[int], budget: int) -> list[int]:
    """Return ranks from `floor` on, the next vector always being the one with the best gain for its cost."""
    ranks = list(floor)
    left = budget - _total(ranks, costs)

    def offer(i: int) -> tuple[float, int]:
        # the index breaks ties
        return -spectra[i][ranks[i]] / costs[i], i

    offers = [offer(i) for i in range(len(ranks)) if ranks[i] < len(spectra[i])]
    heapq.heapify(offers)
    while offers:
        _, i = heapq.heappop(offers)
        # one that does not fit now never will, and a cheaper one may
        if costs[i] <= left:
            left -= costs[i]
            ranks[i] += 1
            if ranks[i] < len(spectra[i]):
                heapq.heappush(offers, offer(i))
    return ranks


@torch.no_grad()
def _shares(name: str, p: Tensor) -> list[float]:
    """Return what each singular vector of the gradient holds of its energy, decreasing, with sum 1."""
    grad = p.grad
    if grad is None:
        raise ValueError(f"{name} has no gradient: run a backward pass first, or leave it out of `targets`")
    if is_sharded(grad):
        refuse_shards(grad, "allocate_ranks")
    if grad.layout != torch.strided or grad.is_complex():
        raise RuntimeError(f"{name}: allocate_ranks does not support sparse or complex gradients")
    # where there is no float64, and hardly an eigensolver either
    matrix = (grad.cpu() if grad.device.type == "mps" else grad).flatten(1)
    peak = matrix.abs().amax().double()
    if not torch.isfinite(peak):
        raise ValueError(f"the gradient of {name} is not finite: run a backward pass that is")
    if peak == 0:
        raise ValueError(
            f"the gradient of {name} is zero: run a backward pass that reaches it first (several, on more data, where "
            "a layer starts at zero), or leave it out of `targets`"
        )
    # squares halve the digits, so in float64, which neither autocast nor TF32 touches; scaled, so that none overflows
    matrix = matrix.double() / peak
    gram = matrix @ matrix.mT if matrix.shape[0] < matrix.shape[1] else matrix.mT @ matrix
    energy = torch.linalg.eigvalsh(gram).clamp_(min=0).flip(0)
    shares: list[float] = (energy / energy.sum()).tolist()
    return shares


def _modules(matrices: list[Placed]) -> list[str]:
    """Return the names of the modules, each of which must hold one matrix."""
    found: dict[str, str] = {}
    for entry in matrices:
        use = entry.use
        other = found.setdefault(use.module_name, use.name)
        if other != use.name:
            raise ValueError(
                f"{other} and {use.name} are in one module, which can have one rank only: leave it out of `targets` "
                "and `roles` here, and add its rank to what is returned"
            )
    return list(found)


def _held(spectra: list[list[float]], ranks: Iterable[int]) -> list[float]:
    # rounding may carry a sum past 1
    return [min(1.0, math.fsum(spectrum[:r])) for spectrum, r in zip(spectra, ranks, strict=True)]


def _total(ranks: Iterable[int], costs: Iterable[int]) -> int:
    return sum(r * cost for r, cost in zip(ranks, costs, strict=True))


def _cost(shape: tuple[int, int]) -> int:
    """Return how many coordinates a vector more has, in the two moments of Adam."""
    return 2 * max(shape)
