"""The search "grid": every setting of a full grid, then outward along its first argument; pure, like `compare_plan`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import inf, isfinite
from typing import Any

Settings = dict[str, Any]


@dataclass
class Slice:
    """One tuned argument of one arm, all others at their best."""

    candidates: list[Any]
    losses: list[float]
    bracketed: bool = False

    @property
    def best(self) -> int:
        """Index of the candidate with the lowest loss; the first where several are equal."""
        return self.losses.index(min(self.losses))


@dataclass
class Search:
    """Where the search of one arm stands."""

    best: Settings
    slices: dict[str, Slice]
    missing: list[Settings]


def settings(grid: Mapping[str, Sequence[Any]]) -> list[Settings]:
    """Every setting of the grid, the first argument rising slowest."""
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def search(grid: Mapping[str, Sequence[Any]], loss: Callable[[Settings], float | None], extensions: int) -> Search:
    """Follow the search through the losses known so far, up to the first settings that are missing.

    The first argument is a number and grows outward by factors of 2 while the best lies at an edge of what was tried of
    it, at the best values of the others. The others keep the values that they were given.

    Args:
        grid: Values of each argument.
        loss: Loss of a setting; infinite for one that diverged or failed, None for one that was not run.
        extensions: How often the first argument may grow outward.
    """
    first = next(iter(grid))
    all_settings = settings(grid)
    while True:
        missing = [one for one in all_settings if loss(one) is None]
        known = [one for one in all_settings if loss(one) is not None]
        best = min(known or all_settings, key=lambda one: (_number(loss(one)), one[first]))
        slices = {name: _slice(name, best, known, loss) for name in grid}
        tried = slices[first].candidates
        inside = tried and best[first] not in (tried[0], tried[-1])
        if missing or inside or not extensions:
            return Search(best, slices, missing)
        value = tried[0] / 2 if best[first] == tried[0] else tried[-1] * 2
        all_settings.append({**best, first: value})
        extensions -= 1


def _number(loss: float | None) -> float:
    return inf if loss is None else loss


def _slice(name: str, best: Settings, known: list[Settings], loss: Callable[[Settings], float | None]) -> Slice:
    alike = [one for one in known if {**one, name: best[name]} == best]
    # pairs of numbers have no order and so no edge
    ordered = all(isinstance(one[name], int | float) for one in alike)
    alike = sorted(alike, key=lambda one: float(one[name])) if ordered else alike
    found = Slice([one[name] for one in alike], [_number(loss(one)) for one in alike])
    if alike:
        at_edge = ordered and len(alike) > 1 and found.best in (0, len(alike) - 1)
        found.bracketed = not at_edge and isfinite(found.losses[found.best])
    return found
