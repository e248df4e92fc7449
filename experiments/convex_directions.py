"""How close M-FAC's direction is to Newton's, and a window of coordinates to a window of whole gradients."""

import copy
import importlib
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from experiments.convex_problems import Known, Problem, default_problems, per_sample_gradients
from lowrank_optim import MFAC

WINDOWS = (8, 32, 128, 512)
SHARES = (1.0, 0.1, 0.01, 0.001)
SEEDS = range(3)


def cosine(x: Tensor, y: Tensor, metric: Tensor | None = None) -> float:
    """Return the cosine between two vectors, in the norm of a metric where one is given."""
    other = y if metric is None else metric @ y
    lengths = (x @ x if metric is None else x @ metric @ x) * (y @ other)
    return float(x @ other / lengths.sqrt())


def inverse_fisher_times(rows: Tensor, damping: float, x: Tensor) -> Tensor:
    """Return (λI + GᵀG/m)⁻¹x as `InverseFisher` does, by the d×d matrix, which is small here."""
    fisher = rows.T @ rows / len(rows) + damping * torch.eye(rows.size(1), dtype=rows.dtype)
    found: Tensor = torch.linalg.solve(fisher, x)
    return found


def gradients_at(problem: Problem, w: Tensor, count: int, seed: int, *, single: bool) -> Tensor:
    """Return gradients of so many minibatches, or of so many rows, all at one point."""
    if single:
        generator = torch.Generator().manual_seed(seed)
        return per_sample_gradients(problem, w)[torch.randint(len(problem.rows), (count,), generator=generator)]
    return torch.stack([problem.gradient(w, batch) for batch in problem.batches(seed, count)])


def directions(found: Known, windows: Sequence[int] = WINDOWS) -> list[dict[str, Any]]:
    """Compare F⁻¹∇f with H⁻¹∇f, for windows of gradients at one point, and F⁻¹g of the newest with H⁻¹g.

    Points: the start, and a tenth of the way from the optimum to it. Damping is a share of the largest eigenvalue of
    G'G/m.
    """
    problem, table = found.problem, []
    for place, share in (("start", 1.0), ("a tenth of the way", 0.1)):
        w = found.optimum + share * (problem.start() - found.optimum)
        hessian, whole = problem.hessian(w), problem.gradient(w)
        newton = torch.linalg.solve(hessian, whole)
        for single in (True, False):
            for count in windows:
                sets = [gradients_at(problem, w, count, seed, single=single) for seed in SEEDS]
                tops = [float(torch.linalg.matrix_norm(rows, 2) ** 2) / count for rows in sets]
                for damping in SHARES:
                    made = [
                        inverse_fisher_times(rows, damping * top, whole) for rows, top in zip(sets, tops, strict=True)
                    ]
                    newest = [
                        cosine(
                            inverse_fisher_times(rows, damping * top, rows[-1]), torch.linalg.solve(hessian, rows[-1])
                        )
                        for rows, top in zip(sets, tops, strict=True)
                    ]
                    table.append(
                        {
                            "point": place,
                            "gradients_of": "one row" if single else "a minibatch",
                            "num_grads": count,
                            "damping_share": damping,
                            "cosine": statistics.fmean(cosine(u, newton) for u in made),
                            "cosine_in_hessian_norm": statistics.fmean(cosine(u, newton, hessian) for u in made),
                            "newest_cosine": statistics.fmean(newest),
                            "gradient_cosine": cosine(whole, newton),
                            "gradient_cosine_in_hessian_norm": cosine(whole, newton, hessian),
                        }
                    )
    return table


def _classification() -> tuple[Tensor, Tensor]:
    if "digits" in default_problems():
        features, labels = importlib.import_module("sklearn.datasets").load_digits(return_X_y=True)
        return torch.from_numpy(features).double() / 16, torch.from_numpy(labels).long()
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1024, 64, dtype=torch.float64, generator=generator)
    return features, (features @ torch.randn(64, 10, dtype=torch.float64, generator=generator)).argmax(1)


def recorded_gradients(steps: int, batch: int = 32) -> tuple[nn.Module, list[list[Tensor]]]:
    """Train a small MLP by SGD and return it as it was at first, with the gradients of each step."""
    features, labels = _classification()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 10)).double()
    first, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    found = []
    for _ in range(steps):
        rows = torch.randint(len(features), (batch,), generator=generator)
        grads = torch.autograd.grad(
            nn.functional.cross_entropy(model(features[rows]), labels[rows]), list(model.parameters())
        )
        found.append(list(grads))
        with torch.no_grad():
            for p, grad in zip(model.parameters(), grads, strict=True):
                p.sub_(grad, alpha=0.1)
    return first, found


def updates(model: nn.Module, grads: list[list[Tensor]], last: int, **options: Any) -> list[Tensor]:
    """Feed gradients to M-FAC and return what it takes from the matrices in each of the last steps, as one vector."""
    params = [p for p in copy.deepcopy(model).parameters() if p.dim() == 2]
    optimizer, made = MFAC(params, lr=1.0, **options), []
    for each in grads:
        before = [p.detach().clone() for p in params]
        for p, grad in zip(params, (g for g in each if g.dim() == 2), strict=True):
            p.grad = grad
        optimizer.step()
        made.append(torch.cat([(b - p.detach()).reshape(-1) for b, p in zip(before, params, strict=True)]))
    return made[-last:]


def coordinates(num_grads: int = 32, steps: int = 80) -> list[dict[str, Any]]:
    """Compare updates of windows of coordinates with those of the whole window, fed with the same gradients.

    Damping is a share of the mean of ‖g‖². The basis is found again every `num_grads` gradients. Means over the last
    half window of steps, at its turn and after it.
    """
    model, grads = recorded_gradients(steps)
    mean = statistics.fmean(sum(float(g.square().sum()) for g in each if g.dim() == 2) for each in grads)
    table = []
    for share in (0.1, 1e-3):
        options: dict[str, Any] = {"num_grads": num_grads, "damping": share * mean}
        whole = updates(model, grads, num_grads // 2, **options)
        for basis in ("dct", "svd", "identity"):
            for rank in (1.0, 0.5, 0.25):
                seen = updates(model, grads, num_grads // 2, rank=rank, basis=basis, **options)
                pairs = list(zip(seen, whole, strict=True))
                table.append(
                    {
                        "num_grads": num_grads,
                        "damping_share": share,
                        "basis": basis,
                        "rank": rank,
                        "cosine": statistics.fmean(cosine(x, y) for x, y in pairs),
                        "norm_ratio": statistics.fmean(float(x.norm() / y.norm()) for x, y in pairs),
                        "relative_difference": statistics.fmean(float((x - y).norm() / y.norm()) for x, y in pairs),
                    }
                )
    return table
