"""The convex experiment: its Hessian is autograd's, its floors are exact, its race is fair, a small run is whole."""

import json
import math
from pathlib import Path

import pytest
import torch

from experiments import convex, convex_directions, convex_race
from experiments.convex_problems import Problem, known, least_squares, make, per_sample_gradients, synthetic_logistic
from experiments.convex_report import claim
from lowrank_optim import InverseFisher

PROBLEMS = [make("tiny"), synthetic_logistic(rows=200, size=6)]
IDS = ["least squares", "logistic"]


def point(problem: Problem) -> torch.Tensor:
    return 0.3 * torch.randn(problem.size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)
def test_gradient_and_hessian_are_those_of_autograd(problem: Problem) -> None:
    w = point(problem)
    hessian = torch.autograd.functional.hessian(problem.loss, w)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(problem.hessian(w), hessian, rtol=1e-10, atol=1e-12)
    (gradient,) = torch.autograd.grad(problem.loss(w.requires_grad_()), w)
    w = w.detach()
    torch.testing.assert_close(problem.gradient(w), gradient, rtol=1e-10, atol=1e-12)
    # of all rows it is the mean of those of each
    torch.testing.assert_close(per_sample_gradients(problem, w).mean(0), gradient, rtol=1e-10, atol=1e-12)
    batch = torch.tensor([3, 1, 1])
    torch.testing.assert_close(problem.gradient(w, batch), per_sample_gradients(problem, w)[batch].mean(0))


@pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)
def test_the_optimum_is_one(problem: Problem) -> None:
    found = known(problem)
    assert float(problem.gradient(found.optimum).norm()) < 1e-10
    assert found.suboptimality(problem.start()) == pytest.approx(1)
    w = point(problem)
    share = float(problem.loss(w) - problem.loss(found.optimum)) / found.initial
    assert found.suboptimality(w) == pytest.approx(share)
    # whole Newton steps: one where the loss is a quadratic
    steps = convex_race.newton_steps(found, [1e-6])["1e-06"]
    assert steps is not None
    assert steps == 1 if not problem.logistic else steps < 10


def test_the_design_has_the_eigenvalues_that_were_asked_for() -> None:
    values = torch.linalg.eigvalsh(known(least_squares("x", rows=128, size=8, condition=100)).hessian)
    torch.testing.assert_close(values, torch.logspace(-2, 0, 8, dtype=torch.float64))


def test_seeds_have_their_minibatches() -> None:
    problem = make("tiny")
    first, again, other = (torch.stack(list(problem.batches(seed, 3))) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_loss_is_reached_where_it_is_kept() -> None:
    below = [0.05] * convex_race.HOLD
    assert convex_race.Run([1.0, 0.05, 0.5, *below], 0.0).reached(0.1) == 3
    assert convex_race.Run([1.0, *below[1:]], 0.0).reached(0.1) is None
    assert convex_race.Run([1.0, *below], 0.0).reached(0.01) is None
    run = convex_race.Run([1.0, 0.01, 0.5, *below], 0.0)
    assert run.kept == 0.05
    assert run.reached(run.kept) == 3
    assert convex_race.Run([1.0], 0.0).kept == math.inf


def test_methods_have_equally_many_settings_and_edges_are_seen() -> None:
    found = known(make("tiny"))
    tried = {name: len(method.grid) for name, method in convex_race.methods(found, 100).items()}
    assert tried["M-FAC"] <= tried["SGD"] == tried["AdamW"]
    sgd = convex_race.methods(found, 100)["SGD"]
    # past the edge of stability of heavy ball with the largest momentum
    assert max(setting["lr"] for setting in sgd.grid) > 2 * 1.99 / found.largest
    assert convex_race.at_edge(sgd, sgd.grid[0]) == ["lr", "momentum"]


def test_directions_are_those_of_the_library() -> None:
    problem = make("tiny")
    rows = convex_directions.gradients_at(problem, problem.start(), 24, 0, single=True)
    fisher = InverseFisher(problem.size, num_grads=24, damping=1e-3, dtype=torch.float64)
    for row in rows:
        fisher.push(row)
    x = problem.gradient(problem.start())
    torch.testing.assert_close(convex_directions.inverse_fisher_times(rows, 1e-3, x), fisher.solve(x))
    metric = torch.diag(torch.tensor([4.0, 1.0]))
    assert convex_directions.cosine(torch.tensor([1.0, 1.0]), torch.tensor([1.0, -1.0]), metric) == pytest.approx(0.6)


def test_coordinates_of_full_rank_are_whole_gradients() -> None:
    for row in convex_directions.coordinates(num_grads=4, steps=6):
        if row["rank"] == 1:
            assert row["relative_difference"] < 1e-10
        else:
            assert 0 < row["cosine"] < 0.999


def test_mfac_needs_fewer_steps_than_tuned_sgd() -> None:
    found, level, steps = known(make("tiny")), 0.1, 100
    medians = {}
    for name, method in convex_race.methods(found, steps, small=True).items():
        if name in ("M-FAC", "SGD"):
            tuned = convex_race.tune(found, method, 0, steps, [level])
            report = convex_race.repeat(found, tuned, [1, 2, 3], steps, [level])
            reached = report["levels"][str(level)]["steps"]
            medians[name] = sorted(math.inf if at is None else at for at in reached)[1]
    assert medians["M-FAC"] < 0.8 * medians["SGD"]


def test_a_small_run_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--problems", "tiny", "--steps", "12", "--small", "--seeds", "1", "2", "--results", str(tmp_path)]
    convex.main(argv)
    document = json.loads((tmp_path / "convex.json").read_text())
    problem = document["problems"]["tiny"]
    assert document["command"].startswith("python -m experiments.convex --problems tiny")
    assert list(problem["methods"]) == ["M-FAC", "SGD", "AdamW", "stochastic Newton"]
    for report in problem["methods"].values():
        assert [len(curve) for curve in report["curves"]] == [13, 13]
        assert list(report["levels"]) == [str(level) for level in convex.LEVELS]
    assert (tmp_path / "convex.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "convex.png").stat().st_size > 1000
    assert claim(problem, "0.003")


def test_a_wrong_argument_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        convex.main(["--steps", "0"])
    assert "--steps must be at least 1, got 0" in capsys.readouterr().err
