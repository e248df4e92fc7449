"""Who reaches a loss in how few steps: methods, their grids, one run, and tuning."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from experiments.convex_problems import Known, Problem
from lowrank_optim import MFAC

Setting = dict[str, Any]
# a loss is reached where it is kept for so many steps: minibatches throw weights across a level and back
HOLD = 10
DIVERGED = 1e2


@dataclass(frozen=True)
class Method:
    """An optimizer and the settings that are tried; `build` is given what a setting says but the schedule."""

    build: Callable[[Problem, list[nn.Parameter], Setting], torch.optim.Optimizer]
    grid: list[Setting]


@dataclass(frozen=True)
class Run:
    """Suboptimality before each step and after the last one, as shares of the start's, and seconds of the steps."""

    curve: list[float]
    seconds: float

    @property
    def kept(self) -> float:
        """Return the lowest level that is reached."""
        starts = range(max(0, len(self.curve) - HOLD + 1))
        return min((max(self.curve[i : i + HOLD]) for i in starts), default=math.inf)

    def reached(self, level: float) -> int | None:
        """Return after how many steps the loss is below a level and stays there for `HOLD` evaluations."""
        below = 0
        for step, share in enumerate(self.curve):
            below = below + 1 if share <= level else 0
            if below == HOLD:
                return step - HOLD + 1
        return None


class StochasticNewton(torch.optim.Optimizer):
    """The minibatch gradient times the inverse of the true Hessian: what M-FAC would do if it knew everything."""

    def __init__(self, params: list[nn.Parameter], problem: Problem, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self._problem = problem
        self._inverse: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make a step."""
        (group,) = self.param_groups
        (w,) = group["params"]
        if self._problem.logistic or self._inverse is None:
            self._inverse = torch.linalg.inv(self._problem.hessian(w.detach()))
        w.sub_(self._inverse @ w.grad, alpha=group["lr"])


def _grid(**axes: Sequence[Any]) -> list[Setting]:
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def _powers(top: float, count: int, ratio: float = 0.5) -> list[float]:
    return [top * ratio**k for k in range(count)]


def methods(found: Known, steps: int, *, small: bool = False) -> dict[str, Method]:
    """Return the methods with their grids, in the units of the problem; those of the first three are equally many.

    The learning rate is constant or falls as 1/(1 + t/after). SGD's goes downwards from the edge of stability of heavy
    ball, 2(1+β)/L with β near 1. M-FAC's are around what makes its update a Newton step where the minibatch Fisher
    matrix is the Hessian times a number, and its dampings are shares of that matrix's largest eigenvalue then. `small`
    is for tests.
    """
    curvature, ratio = found.largest, found.fisher_over_hessian
    after = [None] if small else [None, steps / 16]
    rates = 8 if small else 16
    return {
        "M-FAC": Method(
            lambda problem, params, setting: MFAC(params, **setting),
            _grid(
                lr=_powers(4 * ratio if small else 16 * ratio, 3 if small else 4, 1 / 4),
                num_grads=[2 * found.problem.size] if small else [32, 128],
                damping=[ratio * curvature * share for share in ((0.1, 0.01) if small else (1.0, 0.1, 0.01))],
                momentum=[0.0, 0.9],
                after=after,
            ),
        ),
        "SGD": Method(
            lambda problem, params, setting: torch.optim.SGD(params, **setting),
            _grid(lr=_powers(4 / curvature, rates), momentum=[0.0, 0.9, 0.99], after=after),
        ),
        "AdamW": Method(
            lambda problem, params, setting: torch.optim.AdamW(params, weight_decay=0.0, **setting),
            _grid(lr=_powers(2.0, rates), betas=[(0.9, 0.999), (0.9, 0.95), (0.98, 0.999)], after=after),
        ),
        "stochastic Newton": Method(
            lambda problem, params, setting: StochasticNewton(params, problem, **setting),
            _grid(lr=_powers(1.0, rates // 2), after=after),
        ),
    }


def run(found: Known, method: Method, setting: Setting, seed: int, steps: int, level: float) -> Run:
    """Make steps until the loss is below `level`, or has left all bounds, or for `steps`."""
    problem = found.problem
    w = nn.Parameter(problem.start())
    arguments = {key: value for key, value in setting.items() if key != "after"}
    optimizer = method.build(problem, [w], arguments)
    seconds, below, curve = 0.0, 0, [1.0]
    for step, batch in enumerate(problem.batches(seed, steps)):
        begin = time.perf_counter()
        w.grad = problem.gradient(w.detach(), batch)
        if setting["after"]:
            optimizer.param_groups[0]["lr"] = setting["lr"] / (1 + step / setting["after"])
        optimizer.step()
        seconds += time.perf_counter() - begin
        share = found.suboptimality(w.detach())
        curve.append(share)
        below = below + 1 if share <= level else 0
        if not math.isfinite(share) or share > DIVERGED or below == HOLD:
            break
    return Run(curve, seconds)


def newton_steps(found: Known, levels: Sequence[float]) -> dict[str, int | None]:
    """Return how many damped Newton steps with whole gradients reach each level: the floor."""
    problem, w, curve = found.problem, found.problem.start(), [1.0]
    for _ in range(30):
        step = torch.linalg.solve(problem.hessian(w), problem.gradient(w))
        rate = 1.0
        while rate > 1e-6 and problem.loss(w - rate * step) > problem.loss(w):
            rate /= 2
        w = w - rate * step
        curve.append(found.suboptimality(w))
    done = Run(curve, 0.0)
    return {str(level): done.reached(level) for level in levels}


@dataclass(frozen=True)
class Tuned:
    """What tuning found for one method: for each level the setting that reaches it first, and at which step."""

    method: Method
    best: dict[float, Setting]
    steps: dict[float, int | None]


def tune(found: Known, method: Method, seed: int, steps: int, levels: Sequence[float]) -> Tuned:
    """Try the whole grid on one seed; where nothing reaches a level, the setting that comes nearest stands for it."""
    runs = [run(found, method, setting, seed, steps, min(levels)) for setting in method.grid]
    best: dict[float, Setting] = {}
    reached: dict[float, int | None] = {}
    for level in levels:

        def rank(i: int, level: float = level) -> tuple[float, float]:
            at = runs[i].reached(level)
            return (math.inf if at is None else at, runs[i].kept)

        first = min(range(len(runs)), key=rank)
        best[level], reached[level] = method.grid[first], runs[first].reached(level)
    return Tuned(method, best, reached)


def at_edge(method: Method, setting: Setting) -> list[str]:
    """Return the names of the numbers of a setting that are the first or the last of three or more that were tried."""
    names = []
    for name, value in setting.items():
        tried = sorted({other[name] for other in method.grid if isinstance(other[name], int | float)})
        if len(tried) > 2 and value in (tried[0], tried[-1]):
            names.append(name)
    return names


def repeat(found: Known, tuned: Tuned, seeds: Sequence[int], steps: int, levels: Sequence[float]) -> dict[str, Any]:
    """Run the best settings on other seeds, to the end; curves are those of the setting for the lowest level."""
    runs: list[tuple[Setting, list[Run]]] = []
    report: dict[str, Any] = {"settings_tried": len(tuned.method.grid), "levels": {}}
    for level in levels:
        setting = tuned.best[level]
        known_runs = next((done for other, done in runs if other == setting), None)
        if known_runs is None:
            known_runs = [run(found, tuned.method, setting, seed, steps, -math.inf) for seed in seeds]
            runs.append((setting, known_runs))
        reached = [done.reached(level) for done in known_runs]
        report["levels"][str(level)] = {
            "setting": setting,
            "at_edge": at_edge(tuned.method, setting),
            "tuning_steps": tuned.steps[level],
            "steps": reached,
            "seconds": [
                None if at is None else done.seconds * at / (len(done.curve) - 1)
                for at, done in zip(reached, known_runs, strict=True)
            ],
            "kept": [done.kept for done in known_runs],
        }
        report["curves"] = [[float(f"{x:.4g}") for x in done.curve] for done in known_runs]
    every = [done.seconds / (len(done.curve) - 1) for _, done_runs in runs for done in done_runs]
    report["microseconds_per_step"] = 1e6 * statistics.median(every)
    return report
