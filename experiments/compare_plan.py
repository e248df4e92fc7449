"""What a comparison must run: fair tuning as a pure function of the results so far."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from math import inf, isfinite, sqrt
from pathlib import Path
from typing import Any

import yaml

from experiments import compare_grid
from experiments.compare_grid import Settings, Slice
from experiments.compare_runs import Result, Run

# outward steps per tuned argument: a factor of 256 beyond the starting grid is a broken arm, not a bad guess
MAX_EXTENSIONS = 8
Results = Mapping[str, Result]


@dataclass(frozen=True)
class Arm:
    """One optimizer: the arguments that make it, and starting values of the arguments that are tuned, in order."""

    args: dict[str, Any]
    grid: dict[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Comparison:
    """What a comparison file holds.

    Args:
        arms: Optimizers by name; in a coordinate search all tune the same arguments from grids of the same length.
        common: Arguments of every run.
        search: coordinate tunes one argument after the other, each from its grid outward until the best is bracketed;
            grid runs every setting of the grid, and then only the first argument grows outward.
        tune_seed: Seed of the tuning runs.
        seeds: Seeds of the repeated runs; fresh ones, because the best of many runs is lucky on its own seed.
        seed_key: Argument that takes the seed.
        baseline: Arm that ratios are to; the first one if empty.
    """

    arms: dict[str, Arm]
    common: dict[str, Any] = field(default_factory=dict)
    tune_seed: int = 0
    seeds: tuple[int, ...] = (1, 2, 3)
    seed_key: str = "train.seed"
    baseline: str = ""
    search: str = "coordinate"

    def __post_init__(self) -> None:
        """Refuses what would not be a fair comparison."""
        if not self.arms or not self.seeds:
            raise ValueError("a comparison needs at least one arm and one seed")
        if self.search not in ("coordinate", "grid"):
            raise ValueError(f"search must be 'coordinate' or 'grid', got {self.search!r}")
        shapes = {name: {key: len(values) for key, values in arm.grid.items()} for name, arm in self.arms.items()}
        first = next(iter(shapes.values()))
        alike = [list(shape.items()) == list(first.items()) for shape in shapes.values()]
        if self.search == "grid":
            # momentum here and a pair of betas there are as many choices, under other names
            alike = [next(iter(shape.items()), ()) == next(iter(first.items()), ()) for shape in shapes.values()]
        if not all(alike):
            raise ValueError(f"arms must tune the same arguments from grids of the same length, got {shapes}")
        numbers = [value for arm in self.arms.values() for value in next(iter(arm.grid.values()), (0,))]
        if self.search == "coordinate":
            numbers += [value for arm in self.arms.values() for grid in arm.grid.values() for value in grid]
        if not first or any(not isinstance(value, float) or value <= 0 for value in numbers):
            raise ValueError("every arm needs a grid of positive values for at least one argument")
        if self.baseline and self.baseline not in self.arms:
            raise ValueError(f"baseline {self.baseline!r} is not an arm; arms: {', '.join(self.arms)}")

    @property
    def knobs(self) -> list[str]:
        """The tuned arguments of all arms, in the order in which they are tuned."""
        return list(dict.fromkeys(knob for arm in self.arms.values() for knob in arm.grid))

    def run(self, arm: str, settings: Settings, seed: int) -> Run:
        """The run of one arm at one setting."""
        args = {**self.common, **self.arms[arm].args, **settings, self.seed_key: seed}
        return Run(arm, dict(settings), seed, args)


def load(path: Path) -> Comparison:
    """Read a comparison file; a key that means nothing is an error."""
    tree = _mapping(yaml.safe_load(path.read_text()) or {}, str(path))
    if unknown := set(tree) - set(Comparison.__dataclass_fields__):
        raise ValueError(f"{path}: unknown keys {sorted(unknown)}; known: {sorted(Comparison.__dataclass_fields__)}")
    arms = {}
    for name, arm in _mapping(tree.pop("arms", None) or {}, f"{path}: arms").items():
        if set(_mapping(arm, f"{path}: arm {name!r}")) != {"args", "grid"}:
            raise ValueError(f"{path}: arm {name!r} must have the keys args and grid, got {sorted(arm)}")
        args = _mapping(arm["args"] or {}, f"{path}: args of {name!r}")
        grid = _mapping(arm["grid"], f"{path}: grid of {name!r}")
        pairs = tree.get("search") == "grid"
        values = {key: _values(values, f"{path}: {key} of {name!r}", pairs) for key, values in grid.items()}
        arms[name] = Arm(args, values)
    if "common" in tree:
        tree["common"] = _mapping(tree["common"] or {}, f"{path}: common")
    seeds = tree["seeds"] = tree.get("seeds", list(Comparison.seeds))
    if not isinstance(seeds, list) or not all(type(seed) is int for seed in [*seeds, tree.get("tune_seed", 0)]):
        raise ValueError(f"{path}: seeds must be a list of whole numbers, and tune_seed one")
    tree["seeds"] = tuple(seeds)
    for key in ("baseline", "seed_key", "search"):
        if not isinstance(tree.get(key, ""), str):
            raise ValueError(f"{path}: {key} must be a word, got {tree[key]!r}")
    return Comparison(arms, **tree)


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{what} must be a mapping with words as keys, got {value!r}")
    return value


def _values(values: Any, what: str, pairs: bool = False) -> tuple[Any, ...]:
    try:
        if pairs and isinstance(values, list) and values and all(isinstance(value, list) for value in values):
            return tuple([float(number) for number in value] for value in values)
        if isinstance(values, list) and values:
            # float(): YAML reads 1e-3 as a word
            return tuple(sorted(float(value) for value in values))
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{what} must be a list of numbers, got {values!r}")


@dataclass
class Tuning:
    """Where the tuning of one argument of one arm stands."""

    candidates: list[float]
    losses: list[float]
    missing: list[float]
    bracketed: bool = False

    @property
    def best(self) -> int:
        """Index of the candidate with the lowest loss; the lowest value where several are equal."""
        return self.losses.index(min(self.losses))


def between(tuning: Tuning) -> float:
    """A new candidate on the wider side of the best one, or on the better side where both are as wide."""
    values, best = tuning.candidates, tuning.best
    sides = [i for i in (best - 1, best + 1) if 0 <= i < len(values)]

    def worth(side: int) -> tuple[float, float]:
        ratio = max(values[side], values[best]) / min(values[side], values[best])
        return round(ratio, 2), -tuning.losses[side]

    return float(f"{sqrt(values[max(sides, key=worth)] * values[best]):.3g}")


def tune(
    grid: Sequence[float], losses: Mapping[float, float], count: int = 0, extensions: int = MAX_EXTENSIONS
) -> Tuning:
    """Follow the search through the losses known so far, up to the first that is missing.

    Args:
        grid: Starting values.
        losses: Loss of every value that has been run; infinite for one that diverged or failed.
        count: Number of candidates to reach once the best is bracketed.
        extensions: How often the grid may grow outward.
    """
    state = Tuning(sorted(grid), [], [])
    while True:
        state.candidates.sort()
        state.missing = [value for value in state.candidates if value not in losses]
        state.losses = [losses.get(value, inf) for value in state.candidates]
        if state.missing:
            return state
        at_edge = state.best in (0, len(state.candidates) - 1)
        if at_edge and extensions > 0:
            low = state.candidates[0] / 2
            # a lone value has two edges: down first, then up
            state.candidates.append(low if state.best == 0 else state.candidates[-1] * 2)
            extensions -= 1
        elif len(state.candidates) < count and len(state.candidates) > 1:
            state.candidates.append(between(state))
        else:
            state.bracketed = not at_edge and isfinite(state.losses[state.best])
            return state


@dataclass
class Plan:
    """What to run next, and what is known of every arm."""

    wanted: list[Run]
    best: dict[str, Settings]
    tunings: dict[str, dict[str, Tuning | Slice]]
    done: bool = False


def plan(comparison: Comparison, results: Results) -> Plan:
    """The runs that the results so far call for; a pure function, so a stopped comparison simply goes on."""
    return _plan_grid(comparison, results) if comparison.search == "grid" else _plan_coordinate(comparison, results)


def _plan_grid(comparison: Comparison, results: Results) -> Plan:
    now = Plan([], {}, {})
    wanted = []
    for name, arm in comparison.arms.items():

        def result(settings: Settings, name: str = name) -> Result | None:
            return results.get(comparison.run(name, settings, comparison.tune_seed).key)

        def loss(settings: Settings) -> float | None:
            ended = result(settings)
            return None if ended is None else ended.loss

        # an arm that cannot run at all is not helped by other values
        broken = all((ended := result(one)) and ended.status == "failed" for one in compare_grid.settings(arm.grid))
        found = compare_grid.search(arm.grid, loss, 0 if broken else MAX_EXTENSIONS)
        now.best[name], now.tunings[name] = found.best, dict(found.slices)
        seeds = () if found.missing else comparison.seeds
        runs = [comparison.run(name, one, comparison.tune_seed) for one in found.missing]
        runs += [comparison.run(name, found.best, seed) for seed in seeds]
        wanted.append([run for run in runs if run.key not in results])
    # arms do not wait for each other
    now.wanted, now.done = _interleave(wanted), not any(wanted)
    return now


def _plan_coordinate(comparison: Comparison, results: Results) -> Plan:
    # arguments not tuned yet stand at the middle of their grid
    best = {
        name: {key: values[(len(values) - 1) // 2] for key, values in arm.grid.items()}
        for name, arm in comparison.arms.items()
    }
    tunings: dict[str, dict[str, Tuning | Slice]] = {name: {} for name in comparison.arms}

    def search(name: str, knob: str, count: int) -> list[Run]:
        def run(value: float) -> Run:
            return comparison.run(name, best[name] | {knob: value}, comparison.tune_seed)

        grid = comparison.arms[name].grid[knob]
        losses: dict[float, float] = {}
        statuses: dict[float, str] = {}
        while True:
            # an arm that cannot run at all is not helped by other values
            broken = all(statuses.get(value) == "failed" for value in grid)
            found = tune(grid, losses, *((0, 0) if broken else (count,)))
            known = {value: results[run(value).key] for value in found.missing if run(value).key in results}
            if not known:
                tunings[name][knob] = found
                return [run(value) for value in found.missing]
            losses |= {value: result.loss for value, result in known.items()}
            statuses |= {value: result.status for value, result in known.items()}

    for knob in comparison.knobs:
        for count_known in (False, True):
            # every arm gets as many candidates as the one that needed most
            count = max(len(t[knob].candidates) for t in tunings.values()) if count_known else 0
            wanted = [search(name, knob, count) for name in comparison.arms]
            if any(wanted):
                return Plan(_interleave(wanted), best, tunings)
        for name, found in tunings.items():
            best[name][knob] = found[knob].candidates[found[knob].best]
    repeats = [[comparison.run(name, best[name], seed) for seed in comparison.seeds] for name in comparison.arms]
    open_runs = [[run for run in runs if run.key not in results] for runs in repeats]
    return Plan(_interleave(open_runs), best, tunings, done=not any(open_runs))


def _interleave(lists: Sequence[Sequence[Run]]) -> list[Run]:
    # arms take turns, so that the load of the machine hits their times alike
    return [run for row in zip_longest(*lists) for run in row if run is not None]
