"""The grid search on known loss surfaces, and forked runs of a second."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments import compare, compare_fork
from experiments.compare_fork import Fork, Remembered
from experiments.compare_grid import search
from experiments.compare_plan import Arm, Comparison, load, plan
from experiments.compare_plots import front
from experiments.compare_report import difference, table
from experiments.compare_runs import ROOT, Result, Run
from experiments.data import DataConfig
from tests.test_compare import SMALL, follow, small, valley
from tests.tiny_run import spawn

CONFIGS = ROOT / "experiments" / "configs"


def complete(grid: dict[str, tuple[Any, ...]], loss: Callable[[dict[str, Any]], float], extensions: int = 8) -> Any:
    """Carry out one arm's search on a known loss; returns it and the settings in the order in which they were run."""
    known: dict[str, float] = {}
    run: list[dict[str, Any]] = []

    def look_up(one: dict[str, Any]) -> float | None:
        return known.get(str(one))

    while (found := search(grid, look_up, extensions)).missing:
        known |= {str(one): loss(one) for one in found.missing}
        run += found.missing
    return found, run


@pytest.mark.parametrize("best", [0.03, 1.7, 2.0, 60.0])
def test_every_setting_of_the_grid_is_run_and_the_first_argument_grows_outward(best: float) -> None:
    grid = {"lr": (1.0, 2.0, 4.0, 8.0), "beta": (0.8, 0.9, 0.95)}
    found, run = complete(grid, lambda one: valley(best)(one["lr"]) + (one["beta"] - 0.9) ** 2)
    assert {(one["lr"], one["beta"]) for one in run} >= {(lr, beta) for lr in grid["lr"] for beta in grid["beta"]}
    assert len(run) == len({str(one) for one in run})
    # what lies outside is run with the best of the others only
    assert {one["beta"] for one in run[12:]} <= {0.9}
    assert found.best["beta"] == 0.9
    assert found.slices["lr"].bracketed
    assert abs(math.log2(found.best["lr"] / best)) <= 0.5
    values = found.slices["lr"].candidates
    assert [b / a for a, b in pairwise(values)] == [2.0] * (len(values) - 1)
    assert found.slices["beta"].bracketed


def test_the_best_is_not_where_each_argument_alone_is_best() -> None:
    # a ridge: large lr wants small beta
    grid = {"lr": (1.0, 2.0, 4.0, 8.0), "beta": (0.5, 0.25, 0.125)}
    found, _ = complete(grid, lambda one: valley(1.0)(one["lr"] * one["beta"]) + valley(4.0)(one["lr"]))
    assert found.best == {"lr": 4.0, "beta": 0.25}


def test_an_edge_of_a_given_argument_is_told() -> None:
    found, run = complete({"lr": (1.0, 2.0, 4.0), "beta": (0.8, 0.9)}, lambda one: valley(2.0)(one["lr"]) + one["beta"])
    assert found.slices["lr"].bracketed
    assert not found.slices["beta"].bracketed
    assert found.slices["beta"].candidates == [0.8, 0.9]
    assert len(run) == 6


def test_pairs_have_no_edge() -> None:
    pairs = ([0.9, 0.95], [0.8, 0.95], [0.9, 0.99])
    grid = {"lr": (1.0, 2.0, 4.0), "betas": pairs}
    found, _ = complete(grid, lambda one: valley(2.0)(one["lr"]) + pairs.index(one["betas"]))
    assert found.best == {"lr": 2.0, "betas": [0.9, 0.95]}
    assert found.slices["betas"].candidates == list(pairs)
    assert found.slices["betas"].bracketed


def test_a_lone_value_grows_down_and_then_up() -> None:
    found, run = complete({"lr": (1.0,)}, lambda one: valley(1.4)(one["lr"]))
    assert [one["lr"] for one in run] == [1.0, 0.5, 2.0]
    assert found.best == {"lr": 1.0}
    assert found.slices["lr"].bracketed


def test_a_loss_that_falls_for_ever_ends_and_divergence_goes_down() -> None:
    found, run = complete({"lr": (1.0, 2.0)}, lambda one: -one["lr"])
    assert len(run) == 2 + 8
    assert not found.slices["lr"].bracketed
    found, _ = complete(
        {"lr": (4.0, 8.0, 16.0), "beta": (0.8, 0.9)},
        lambda one: math.inf if one["lr"] > 2 else valley(1.0)(one["lr"]),
    )
    assert found.best["lr"] == 1.0
    assert found.slices["lr"].bracketed


def two(first: dict[str, tuple[Any, ...]], second: dict[str, tuple[Any, ...]], **more: Any) -> Comparison:
    return Comparison({"a": Arm({}, first), "b": Arm({}, second)}, search="grid", **more)


def test_arms_with_other_arguments_are_planned_side_by_side() -> None:
    lrs = (1.0, 2.0, 4.0)
    comparison = two({"lr": lrs, "beta": (0.8, 0.9)}, {"lr": lrs, "betas": ([0.9, 0.95], [0.9, 0.99])}, seeds=(5, 6))
    first = plan(comparison, {}).wanted
    # arms take turns
    assert [run.arm for run in first] == ["a", "b"] * 6

    def loss(run: Run) -> float:
        return valley(2.0 if run.arm == "a" else 8.0)(run.settings["lr"]) + run.settings.get("beta", 0.0)

    now, results = follow(comparison, loss)
    assert now.done
    assert now.best == {"a": {"lr": 2.0, "beta": 0.8}, "b": {"lr": 8.0, "betas": [0.9, 0.95]}}
    by_arm = {name: [result.run for result in results.values() if result.run.arm == name] for name in "ab"}
    assert len(by_arm["a"]) == 6 + 2
    assert len(by_arm["b"]) == 6 + 2 + 2
    for name in "ab":
        repeated = [run for run in by_arm[name] if run.seed in (5, 6)]
        assert [run.settings for run in repeated] == [now.best[name]] * 2
    assert comparison.knobs == ["lr", "beta", "betas"]
    assert any("betas=0.9_0.95,seed=5-" in run.key for run in by_arm["b"])


def test_an_arm_repeats_while_another_still_searches() -> None:
    comparison = two({"lr": (1.0, 2.0, 4.0)}, {"lr": (1.0, 2.0, 4.0)}, seeds=(1,))
    results: dict[str, Result] = {}
    for run in plan(comparison, results).wanted:
        results[run.key] = Result(run, "done", valley(2.0 if run.arm == "a" else 16.0)(run.settings["lr"]))
    wanted = plan(comparison, results).wanted
    assert [(run.arm, run.seed, run.settings["lr"]) for run in wanted] == [("a", 1, 2.0), ("b", 0, 8.0)]


def test_an_arm_that_cannot_run_is_not_searched_further() -> None:
    comparison = two({"lr": (1.0, 2.0)}, {"lr": (1.0, 2.0)}, seeds=(1,))
    results: dict[str, Result] = {}
    while (now := plan(comparison, results)).wanted:
        for run in now.wanted:
            loss = valley(2.0)(run.settings["lr"]) if run.arm == "a" else math.inf
            results[run.key] = Result(run, "done" if run.arm == "a" else "failed", loss)
    assert now.tunings["b"]["lr"].candidates == [1.0, 2.0]
    assert not now.tunings["b"]["lr"].bracketed


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        (({"lr": [1.0, 2.0], "beta": [0.9]}, {"lr": [1.0], "beta": [0.9]}), "same length"),
        (({"lr": [1.0]}, {"rl": [1.0]}), "same arguments"),
        (({"lr": [[0.9, 0.95]]}, {"lr": [[0.9, 0.95]]}), "positive values"),
        (({"lr": [-1.0]}, {"lr": [1.0]}), "positive values"),
        (({}, {}), "positive values"),
    ],
)
def test_what_is_no_fair_grid_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], grids: tuple[Any, Any], message: str
) -> None:
    path = tmp_path / "c.yaml"
    arms = {name: {"args": {}, "grid": grid} for name, grid in zip("ab", grids, strict=True)}
    path.write_text(yaml.safe_dump({"arms": arms, "search": "grid"}, sort_keys=False))
    assert compare.main(["--config", str(path)]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_an_unknown_search_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"arms": {"a": {"args": {}, "grid": {"lr": [1.0]}}}, "search": "random"}))
    assert compare.main(["--config", str(path)]) == 2
    assert "search must be 'coordinate' or 'grid', got 'random'" in capsys.readouterr().err


def test_seeds_are_compared_one_by_one() -> None:
    base = {"losses": {"1": 2.0, "2": 3.0, "3": 4.0}}
    assert difference({"losses": {"1": 1.9, "2": 2.9, "3": 3.9}}, base) == "-0.1000 ± 0.0000"
    assert difference({"losses": {"2": 3.5}}, base) == "+0.5000"
    assert difference({"losses": {"4": 3.5}}, base) == ""


def test_the_front_is_who_nobody_beats() -> None:
    points = {"none": (0.0, 3.0), "small": (1.0, 2.0), "bad": (2.0, 2.5), "large": (8.0, 1.0), "same": (8.0, 1.1)}
    assert front(points) == ["none", "small", "large"]


def test_a_fork_ends_with_what_its_function_returns(tmp_path: Path) -> None:
    def speak() -> int:
        print("to stdout", flush=True)
        os.write(2, b"to stderr\n")
        return 3

    def fail() -> int:
        raise KeyError("lost")

    assert Fork(speak, tmp_path / "a.log").wait() == 3
    assert (tmp_path / "a.log").read_text() == "to stdout\nto stderr\n"
    assert Fork(fail, tmp_path / "b.log").wait() == 1
    assert "KeyError: 'lost'" in (tmp_path / "b.log").read_text()
    assert Fork(lambda: sys.exit(2), tmp_path / "c.log").wait() == 2
    sleeping = Fork(lambda: time.sleep(60) or 0, tmp_path / "d.log")
    assert sleeping.poll() is None
    sleeping.terminate()
    assert sleeping.wait() == sleeping.poll() == -signal.SIGTERM


def test_the_text_is_read_once_for_all_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "a.txt"
    text.write_text("\n".join(f"line {i} of a text" for i in range(900)))
    counted = []
    original = compare_fork.load_corpus
    monkeypatch.setattr(compare_fork, "load_corpus", lambda *a, **k: counted.append(1) or original(*a, **k))
    load_text = Remembered()
    corpora = [load_text(DataConfig(path=str(text), seed=seed), seq_len=8, vocab_size=256) for seed in (0, 1)]
    for seed, corpus in enumerate(corpora):
        direct = original(DataConfig(path=str(text), seed=seed), seq_len=8, vocab_size=256)
        for (x, y), (xx, yy) in zip((corpus.batches(4).batch(3),), (direct.batches(4).batch(3),), strict=True):
            assert (x == xx).all()
            assert (y == yy).all()
    assert not (corpora[0].batches(4).batch(3)[0] == corpora[1].batches(4).batch(3)[0]).all()
    assert len(counted) == 1
    load_text(DataConfig(path=str(text)), seq_len=16, vocab_size=256)
    assert len(counted) == 2


def test_forked_runs_are_the_same_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slim = {
        "train.eval_first": False,
        "train.eval_every": 100,
        "train.save_last": False,
        "train.plots": False,
        "train.save_every": 0,
    }
    arms: dict[str, dict[str, object]] = {
        # far too low to too high, so that one value lies inside
        "adamw": {
            "args": {"optim.name": "adamw"},
            "grid": {"optim.lr": [1e-6, 1e-2, 30.0], "optim.betas": [[0.9, 0.95], [0.8, 0.9]]},
        },
        "wrong": {"args": {"optim.name": "adamw", "optim.momentum": 0.9}, "grid": {"optim.lr": [1e-6, 1e-2, 30.0]}},
    }
    config = small(tmp_path, arms, search="grid")
    words = ["--config", str(config), "--jobs", "2", "--set", *(f"{k}={json.dumps(v)}" for k, v in slim.items())]
    assert compare.main([*words, "--out", str(tmp_path / "forked"), "--fork"]) == 1
    told = capsys.readouterr()
    assert "optim.momentum=0.9 means nothing to optim.name=adamw" in told.out
    document = json.loads((tmp_path / "forked" / "small.json").read_text())
    adamw = document["arms"]["adamw"]
    assert document["complete"]
    assert document["threads_of_runs"] == [1]
    assert document["knobs"] == ["optim.lr", "optim.betas"]
    assert adamw["best"]["optim.lr"] == 1e-2
    assert adamw["tuning_runs"] == 6
    assert adamw["seeds_done"] == [1]
    # 7 matrices of the one layer, two moments in float32
    assert adamw["matrix_state_bytes"] == 8 * (4 * 16 * 16 + 3 * 16 * 24)
    assert (tmp_path / "forked" / "small_pareto.png").read_bytes().startswith(b"\x89PNG")
    assert table(document) in (tmp_path / "forked" / "small.md").read_text()
    kept = {path.name for path in next((tmp_path / "forked").rglob("summary.json")).parent.iterdir()}
    assert kept == {".lock", "config.yaml", "environment.json", "metrics.jsonl", "summary.json", "checkpoints"}
    assert not list((tmp_path / "forked").rglob("*.pt"))
    # a new interpreter gives the same numbers, to the bit
    assert len(list((tmp_path / "forked").rglob("summary.json"))) == 7
    path = next(p for p in (tmp_path / "forked").glob("adamw/lr=0.01,betas=0.9_0.95,seed=0-*") if p.is_dir())
    forked = json.loads((path / "summary.json").read_text())
    process = spawn([f"--config={path / 'config.yaml'}", f"--run_dir={tmp_path / 'alone'}"])
    process.communicate(timeout=120)
    assert process.returncode == 0
    alone = json.loads((tmp_path / "alone" / "summary.json").read_text())
    assert alone["val_loss"] == forked["val_loss"]


def test_a_report_counts_what_has_ended_of_an_unfinished_grid(tmp_path: Path) -> None:
    arms: dict[str, dict[str, object]] = {
        "adamw": {"args": {"optim.name": "adamw"}, "grid": {"optim.lr": [1e-3, 1e-2]}}
    }
    config = small(tmp_path, arms, search="grid")
    comparison = load(config)
    run = plan(comparison, {}).wanted[1]
    folder = tmp_path / "runs" / run.key
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text('{"val_loss": 2.5, "train_loss": 2.5}')
    assert compare.main(["--config", str(config), "--out", str(tmp_path / "runs"), "--report_only"]) == 0
    document = json.loads((tmp_path / "runs" / "small.json").read_text())
    assert [run["loss"] for run in document["runs"]] == [2.5]
    assert document["arms"]["adamw"]["best"] == {"optim.lr": 1e-2}
    assert not document["complete"]


def test_a_terminated_comparison_stops_its_forks(tmp_path: Path) -> None:
    arms: dict[str, dict[str, object]] = {"galore": {"args": {"optim.rank": 4}, "grid": {"optim.lr": [1e-6]}}}
    config = small(tmp_path, arms, search="grid")
    out = tmp_path / "runs"
    words = [sys.executable, "-m", "experiments.compare", "--config", str(config), "--out", str(out), "--fork"]
    long = [*words, "--set", "train.steps=100000000", "train.save_every=0"]
    process = subprocess.Popen(long, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (metrics := list(out.rglob("metrics.jsonl"))) or metrics[0].stat().st_size < 100:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143
    assert list((metrics[0].parent / "checkpoints").iterdir())
    assert not list(out.rglob("summary.json"))


@pytest.mark.parametrize("name", ["early", "late"])
def test_the_committed_comparisons_are_fair(name: str) -> None:
    comparison = load(CONFIGS / f"compare_orthogonal_{name}.yaml")
    assert comparison.search == "grid"
    assert comparison.tune_seed not in comparison.seeds
    assert len(comparison.seeds) == 3
    assert comparison.baseline == "adamw"
    sizes = {arm: math.prod(map(len, found.grid.values())) for arm, found in comparison.arms.items()}
    # nobody is searched harder than the baseline
    assert max(sizes.values()) == sizes["adamw"] >= 4 * 3
    for arm, found in comparison.arms.items():
        # one value for all, but for the baseline, and for steepest descent, which has no AdamW
        assert "optim.other_lr" not in found.args
        assert "optim.other_lr" not in found.grid or arm in ("adamw", "steepest")
        assert len(found.grid["optim.lr"]) >= 4, arm
    assert SMALL.keys() - {"model.dim"} >= {"track.wandb"} <= comparison.common.keys()
