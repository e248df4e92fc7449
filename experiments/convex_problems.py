"""Convex problems with a known Hessian: least squares and logistic regression, seen through minibatch gradients."""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from experiments.machine import versions


@dataclass(frozen=True)
class Problem:
    """A generalized linear model: mean of c(x·w) - y x·w over n rows, plus decay/2 ‖w‖².

    With c(z) = z²/2 it is least squares (up to a constant), with c(z) = log(1 + exp z) logistic regression. The start
    is zero. All numbers are float64.
    """

    name: str
    rows: Tensor
    targets: Tensor
    logistic: bool
    decay: float
    batch: int

    @property
    def size(self) -> int:
        """Return the number of parameters."""
        return self.rows.size(1)

    def loss(self, w: Tensor) -> Tensor:
        """Return the objective."""
        z = self.rows @ w
        cumulant = torch.nn.functional.softplus(z) if self.logistic else z.square() / 2
        return (cumulant - self.targets * z).mean() + self.decay / 2 * w.square().sum()

    def gradient(self, w: Tensor, batch: Tensor | None = None) -> Tensor:
        """Return the gradient of the rows of a batch, or of all."""
        rows, targets = (self.rows, self.targets) if batch is None else (self.rows[batch], self.targets[batch])
        z = rows @ w
        mean = z.sigmoid() if self.logistic else z
        return rows.T @ (mean - targets) / len(rows) + self.decay * w

    def hessian(self, w: Tensor) -> Tensor:
        """Return XᵀDX/n + decay·I."""
        p = (self.rows @ w).sigmoid()
        weighted = self.rows * (p * (1 - p)).unsqueeze(1) if self.logistic else self.rows
        eye = torch.eye(self.size, dtype=w.dtype)
        return self.rows.T @ weighted / len(self.rows) + self.decay * eye

    def batches(self, seed: int, count: int) -> Iterator[Tensor]:
        """Yield the rows of each step, drawn with replacement; a seed has the same for every method."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            yield torch.randint(len(self.rows), (self.batch,), generator=generator)

    def start(self) -> Tensor:
        """Return where every run begins."""
        return torch.zeros(self.size, dtype=self.rows.dtype)

    def optimum(self) -> Tensor:
        """Return the one minimum, by Newton steps that are halved until they descend."""
        w = self.start()
        for _ in range(100):
            step = torch.linalg.solve(self.hessian(w), self.gradient(w))
            rate = 1.0
            while rate > 1e-9 and self.loss(w - rate * step) > self.loss(w):
                rate /= 2
            w = w - rate * step
            if float(step.norm()) <= 1e-12 * float(w.norm()):
                break
        return w


@dataclass(frozen=True)
class Known:
    """What the race knows of a problem and its optimizers do not: the optimum, and the sizes that grids are made of.

    Attributes:
        optimum: the minimum.
        initial: suboptimality of the start.
        largest, smallest: eigenvalues of the Hessian at the optimum.
        fisher_over_hessian: mean of ‖g‖² of a row at the start, over the batch and the trace of the Hessian there: the
            factor between minibatch Fisher matrix and Hessian where a model is right and noise is all there is.
    """

    problem: Problem
    optimum: Tensor
    hessian: Tensor
    initial: float
    largest: float
    smallest: float
    fisher_over_hessian: float

    def suboptimality(self, w: Tensor) -> float:
        """Return loss above the minimum, as a share of the start's."""
        return self.above(w) / self.initial

    def above(self, w: Tensor) -> float:
        """Return loss above the minimum; of a quadratic without cancellation, and whatever the number of rows."""
        if self.problem.logistic:
            return float(self.problem.loss(w) - self.problem.loss(self.optimum))
        error = w - self.optimum
        return float(error @ self.hessian @ error) / 2


def known(problem: Problem) -> Known:
    """Find out."""
    optimum, start = problem.optimum(), problem.start()
    hessian = problem.hessian(optimum)
    values = torch.linalg.eigvalsh(hessian)
    size = float(per_sample_gradients(problem, start).square().sum(1).mean()) / problem.batch
    ratio = size / float(problem.hessian(start).trace())
    found = Known(problem, optimum, hessian, 1.0, float(values[-1]), float(values[0]), ratio)
    return replace(found, initial=found.above(start))


def per_sample_gradients(problem: Problem, w: Tensor) -> Tensor:
    """Return the gradient of each row alone, (n, d)."""
    z = problem.rows @ w
    mean = z.sigmoid() if problem.logistic else z
    return problem.rows * (mean - problem.targets).unsqueeze(1) + problem.decay * w


def least_squares(
    name: str, *, rows: int = 4096, size: int = 50, condition: float = 1e4, even: bool = True, batch: int = 128
) -> Problem:
    """Return a quadratic whose Hessian has exactly the eigenvalues 1 to 1/condition, evenly in their logarithm.

    `even`: each eigenvector has the same share of the initial loss, so that the flat ones matter as much as the steep;
    otherwise the optimum is a draw of N(0, I), and they matter less the flatter they are. The initial loss above the
    minimum is about 1, the noise of the targets has a standard deviation of .5.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), size, dtype=torch.float64)
    # rotated: a basis of its own would be a gift to methods that scale each coordinate
    turn = torch.linalg.qr(normal(size, size)).Q
    design = torch.linalg.qr(normal(rows, size)).Q * rows**0.5 * values.sqrt() @ turn.T
    signs = normal(size)
    truth = signs.sign() * (2 / (size * values)).sqrt() if even else signs * (2 / values.sum()).sqrt()
    return Problem(name, design, design @ (turn @ truth) + 0.5 * normal(rows), False, 0.0, batch)


def logistic(name: str, features: Tensor, labels: Tensor, *, decay: float, batch: int) -> Problem:
    """Return logistic regression on standardized features and a constant one."""
    features = features.double()
    spread = features.std(0, correction=0)
    # pixels that are never set say nothing
    features = (features - features.mean(0))[:, spread > 0] / spread[spread > 0]
    rows = torch.cat([features, torch.ones(len(features), 1, dtype=torch.float64)], 1)
    return Problem(name, rows, labels.double(), True, decay, batch)


def synthetic_logistic(name: str = "synthetic", *, rows: int = 1000, size: int = 30, batch: int = 128) -> Problem:
    """Return logistic regression on correlated Gaussian features, whose labels a linear model draws."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(size, size, dtype=torch.float64, generator=generator) * torch.logspace(0, -2, size).double()
    features = torch.randn(rows, size, dtype=torch.float64, generator=generator) @ mix.T
    truth = torch.randn(size, dtype=torch.float64, generator=generator) / size**0.5
    drawn = torch.rand(rows, dtype=torch.float64, generator=generator)
    return logistic(name, features, drawn < (features @ truth).sigmoid(), decay=1e-4, batch=batch)


def _of_scikit_learn(name: str) -> Problem:
    data = importlib.import_module("sklearn.datasets")
    features, labels = getattr(data, f"load_{name}")(return_X_y=True)
    features, labels = torch.from_numpy(features), torch.from_numpy(labels)
    # ten digits as two classes that no single stroke tells apart
    labels = labels % 2 if name == "digits" else labels
    return logistic(name, features, labels, decay=1e-4, batch=128)


REAL = ("breast_cancer", "digits")
MADE = ("least_squares", "least_squares_smooth", "synthetic", "tiny")


def make(name: str) -> Problem:
    """Return the problem of this name."""
    if name in REAL:
        return _of_scikit_learn(name)
    if name == "synthetic":
        return synthetic_logistic()
    if name == "tiny":
        return least_squares(name, rows=256, size=16, condition=1e3, batch=64)
    return least_squares(name, even=name == "least_squares")


def default_problems() -> list[str]:
    """Return the names of what is run: real data where scikit-learn is installed."""
    there = versions(["scikit-learn"])["scikit-learn"] != "not installed"
    return ["least_squares", "least_squares_smooth", *(REAL if there else ("synthetic",))]
