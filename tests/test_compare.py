"""The search on known loss curves, then a real grid of very short runs, stopped, resumed and reported."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from experiments import compare, compare_runs
from experiments.compare_plan import Arm, Comparison, Plan, load, plan, tune
from experiments.compare_runs import ROOT, Result, Run, collect, read_result

Loss = Callable[[Run], float]


def valley(best: float) -> Callable[[float], float]:
    return lambda value: math.log(value / best) ** 2


def follow(comparison: Comparison, loss: Loss, status: str = "done") -> tuple[Plan, dict[str, Result]]:
    """Carry out a plan on a known loss, as `main` does with processes."""
    results: dict[str, Result] = {}
    for _ in range(100):
        now = plan(comparison, results)
        if not now.wanted:
            return now, results
        assert len({run.key for run in now.wanted}) == len(now.wanted)
        assert not results.keys() & {run.key for run in now.wanted}
        for run in now.wanted:
            value = loss(run)
            results[run.key] = Result(run, status if math.isfinite(value) else "diverged", value)
    raise AssertionError("the plan never ends")


def two_arms(first: tuple[float, ...], second: tuple[float, ...]) -> Comparison:
    return Comparison({"a": Arm({}, {"lr": first}), "b": Arm({}, {"lr": second})})


@pytest.mark.parametrize("best", [1e-4, 2e-3, 1e-2, 0.3])
@pytest.mark.parametrize("grid", [(1e-3, 2e-3, 4e-3), (1e-2,)])
def test_the_grid_grows_until_the_best_lies_inside(grid: tuple[float, ...], best: float) -> None:
    losses: dict[float, float] = {}
    loss = valley(best)
    while (found := tune(grid, losses)).missing:
        losses |= {value: loss(value) for value in found.missing}
    assert found.bracketed
    i = found.best
    assert found.losses[i - 1] >= found.losses[i] <= found.losses[i + 1]
    ratios = [b / a for a, b in zip(found.candidates, found.candidates[1:], strict=False)]
    assert ratios == pytest.approx([2.0] * len(ratios))
    # nothing is run that the bracket does not need
    assert len(found.candidates) <= len(grid) + 8


def test_the_search_gives_up_where_the_loss_falls_for_ever() -> None:
    losses: dict[float, float] = {}
    while (found := tune((1.0, 2.0), losses)).missing:
        losses |= {value: -value for value in found.missing}
    assert not found.bracketed
    assert max(found.candidates) == 2.0 * 2**8


def test_divergence_is_infinitely_bad_and_sends_the_search_down() -> None:
    losses: dict[float, float] = {}
    while (found := tune((4.0, 8.0, 16.0), losses)).missing:
        losses |= {value: math.inf if value > 2 else valley(1.0)(value) for value in found.missing}
    assert found.bracketed
    assert found.candidates[found.best] == 1.0


def test_every_arm_gets_as_many_candidates_as_the_one_that_needed_most() -> None:
    comparison = two_arms((1e-3, 2e-3, 4e-3), (1e-3, 2e-3, 4e-3))
    peaks = {"a": 2.5e-3, "b": 3e-2}
    now, results = follow(comparison, lambda run: valley(peaks[run.arm])(run.settings["lr"]) + run.seed)
    a, b = (now.tunings[name]["lr"] for name in "ab")
    assert len(a.candidates) == len(b.candidates) == 3 + 4
    assert a.bracketed
    assert b.bracketed
    # the arm that was bracketed at once spends the rest around its best
    assert sum(1e-3 < value < 4e-3 for value in a.candidates) == 5
    assert now.best["a"]["lr"] == pytest.approx(2.5e-3, rel=0.2)
    assert now.best["b"]["lr"] == pytest.approx(3.2e-2)
    # tuning on one seed, the best again on fresh ones
    for name in "ab":
        settings = [(run.settings["lr"], run.seed) for result in results.values() if (run := result.run).arm == name]
        assert sorted(seed for lr, seed in settings if lr == now.best[name]["lr"]) == [0, 1, 2, 3]
        assert len(settings) == 7 + 3
    assert now.done


def test_arguments_are_tuned_in_order_each_at_the_best_of_those_before() -> None:
    grid = {"lr": (1.0, 2.0, 4.0), "other_lr": (1.0, 2.0, 4.0)}
    comparison = Comparison({"a": Arm({}, grid), "b": Arm({}, grid)}, seeds=(5,))
    now, results = follow(
        comparison, lambda run: valley(8.0)(run.settings["lr"]) + valley(0.5)(run.settings["other_lr"])
    )
    assert now.best == {"a": {"lr": 8.0, "other_lr": 0.5}, "b": {"lr": 8.0, "other_lr": 0.5}}
    tuned = [result.run.settings for result in results.values() if result.run.seed == 0 and result.run.arm == "a"]
    assert all(settings["other_lr"] == 2.0 or settings["lr"] == 8.0 for settings in tuned)
    # 1..16 and .25..4, one setting in common
    assert len(tuned) == 5 + 5 - 1


def test_an_arm_that_cannot_run_is_not_searched_further() -> None:
    comparison = two_arms((1.0, 2.0, 4.0), (1.0, 2.0, 4.0))
    results: dict[str, Result] = {}
    while (now := plan(comparison, results)).wanted:
        for run in now.wanted:
            good = run.arm == "a"
            loss = valley(16.0)(run.settings["lr"]) if good else math.inf
            results[run.key] = Result(run, "done" if good else "failed", loss)
    assert now.tunings["b"]["lr"].candidates == [1.0, 2.0, 4.0]
    assert not now.tunings["b"]["lr"].bracketed
    assert now.best["a"]["lr"] == 16.0


def test_a_run_with_any_other_argument_is_another_run() -> None:
    one, two = (
        Comparison({"a": Arm({"x": x}, {"optim.lr": (1.0, 2.0)})}).run("a", {"optim.lr": 1.0}, 0) for x in (1, 2)
    )
    assert one.key != two.key
    assert one.key.startswith("a/lr=1,seed=0-")
    assert one.arguments(Path("d"))[:2] == ["-m", "experiments.pretrain"]
    assert {"--x=1", "--optim.lr=1.0", "--train.seed=0", "--run_dir=d"} <= set(one.arguments(Path("d")))


@pytest.mark.parametrize("text", ["NaN", "null", "Infinity"])
def test_a_loss_that_is_no_number_is_a_diverged_run(tmp_path: Path, text: str) -> None:
    run = two_arms((1.0,), (1.0,)).run("a", {"lr": 1.0}, 0)
    assert read_result(run, tmp_path) is None
    assert collect([run], tmp_path) == {}
    (tmp_path / run.key).mkdir(parents=True)
    (tmp_path / run.key / "summary.json").write_text(f'{{"val_loss": {text}}}')
    result = collect([run], tmp_path)[run.key]
    assert (result.status, result.loss) == ("diverged", math.inf)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": {}}, "at least one arm"),
        ({"armz": {}}, "unknown keys ['armz']"),
        ({"arms": {"a": {"args": {}, "grid": {"lr": [1]}, "x": 1}}}, "must have the keys args and grid"),
        ({"arms": {"a": {"args": {}, "grid": {"lr": [1]}}, "b": {"args": {}, "grid": {"lr": [1, 2]}}}}, "same length"),
        ({"arms": {"a": {"args": {}, "grid": {"lr": [0.0]}}}}, "positive values"),
        ({"arms": [1]}, "arms must be a mapping"),
        ({"arms": {"a": 3}}, "arm 'a' must be a mapping"),
        ({"arms": {"a": {"args": [1], "grid": {"lr": [1]}}}}, "args of 'a' must be a mapping"),
        ({"arms": {"a": {"args": {}, "grid": 3}}}, "grid of 'a' must be a mapping"),
        ({"arms": {"a": {"args": {}, "grid": {"lr": 3}}}}, "lr of 'a' must be a list of numbers"),
        ({"arms": {"a": {"args": {}, "grid": {"lr": ["x"]}}}}, "lr of 'a' must be a list of numbers"),
        ({"common": 3}, "common must be a mapping"),
        ({"seeds": 3}, "seeds must be a list of whole numbers"),
        ({"seeds": ["x"]}, "seeds must be a list of whole numbers"),
        ({"baseline": [1]}, "baseline must be a word"),
        ({"baseline": "nobody"}, "baseline 'nobody' is not an arm"),
    ],
)
def test_what_is_wrong_with_a_comparison_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, object], message: str
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"arms": {"a": {"args": {}, "grid": {"lr": [1]}}}} | change))
    assert compare.main(["--config", str(path)]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_a_comparison_file_that_is_no_mapping_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("- 1")
    assert compare.main(["--config", str(path)]) == 2
    assert "must be a mapping" in capsys.readouterr().err


def test_a_run_whose_last_steps_were_skipped_has_diverged(tmp_path: Path) -> None:
    run = two_arms((1.0,), (1.0,)).run("a", {"lr": 1.0}, 0)
    (tmp_path / run.key).mkdir(parents=True)
    (tmp_path / run.key / "summary.json").write_text('{"val_loss": 5.5, "train_loss": null}')
    result = collect([run], tmp_path)[run.key]
    assert (result.status, result.loss, result.message) == ("diverged", math.inf, "its last steps were skipped")


def test_a_changed_default_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def keys() -> list[str]:
        return [Run("a", {}, 0, args).key for args in ({}, {"train.steps": 700}, {"config": str(file)})]

    file = tmp_path / "c.yaml"
    file.write_text("train: {warmup: 7}")
    default, named, from_file = keys()
    # what is resolved counts, not where it comes from
    assert default == named != from_file
    assert Run("a", {}, 0, {"track.wandb": "off"}).key == default
    changed = {**compare_runs.resolved_defaults(), "train.steps": 701}
    monkeypatch.setattr(compare_runs, "resolved_defaults", lambda: changed)
    assert keys()[0] != default
    assert keys()[1] == named
    file.write_text("train: {warmup: 8}")
    assert keys()[2] != from_file


def test_the_committed_comparison_is_fair() -> None:
    comparison = load(ROOT / "experiments" / "configs" / "compare_tiny.yaml")
    assert list(comparison.arms) == ["adamw", "galore_svd", "galore_subspace"]
    assert comparison.knobs == ["optim.lr", "optim.other_lr"]
    assert comparison.tune_seed not in comparison.seeds
    assert len(comparison.seeds) == 3


WORDS = "the quick brown fox jumps over the lazy dog and finds that a low rank is enough for a short text. "
SMALL: dict[str, object] = {
    "model.dim": 16,
    "model.layers": 1,
    "model.heads": 2,
    "model.ffn_dim": 24,
    "train.steps": 8,
    "train.batch_size": 2,
    "train.seq_len": 16,
    "train.warmup": 2,
    "train.eval_every": 4,
    "train.eval_batches": 2,
    "train.save_every": 4,
    "train.threads": 1,
    "track.wandb": "off",
}


def small(folder: Path, arms: dict[str, dict[str, object]], **more: object) -> Path:
    text = folder / "text.txt"
    text.write_text("\n\n".join(WORDS * 4 + str(i) for i in range(20)))
    tree = {"common": SMALL | {"data.path": str(text), "data.val_fraction": 0.2}, "arms": arms, "seeds": [1], **more}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def test_a_real_grid_runs_resumes_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small(
        tmp_path,
        {
            # far too low to too high, so that one value lies inside
            "adamw": {"args": {"optim.name": "adamw"}, "grid": {"optim.lr": [1e-6, 1e-2, 30.0]}},
            "wrong": {"args": {"optim.nmae": "adamw"}, "grid": {"optim.lr": [1e-6, 1e-2, 30.0]}},
        },
    )
    argv = ["--config", str(config), "--out", str(tmp_path / "runs"), "--jobs", "2"]
    # a failed run is told and makes the command fail
    assert compare.main([*argv]) == 1
    told = capsys.readouterr()
    assert "| wrong |" in told.out
    assert "no finished run" in told.out
    assert "optim.nmae" in told.out
    document = json.loads((tmp_path / "runs" / "small.json").read_text())
    adamw = document["arms"]["adamw"]
    assert document["complete"]
    assert document["threads_of_runs"] == [1]
    assert adamw["best"] == {"optim.lr": 1e-2}
    assert adamw["seeds_done"] == [1]
    assert adamw["tuning"]["optim.lr"]["bracketed"]
    assert adamw["opt_state_bytes"] == pytest.approx(adamw["adamw_state_bytes"], rel=0.01)
    tokens, seconds, loss = adamw["curves"]["1"][-1]
    assert tokens == 8 * 2 * 16
    assert seconds > 0
    assert loss == adamw["val_loss"]["mean"]
    assert {run["status"] for run in document["runs"] if run["arm"] == "wrong"} == {"failed"}
    for what in ("tokens", "seconds", "state", "tuning"):
        assert (tmp_path / "runs" / f"small_{what}.png").read_bytes().startswith(b"\x89PNG")

    # again, without the broken arm: nothing is left to do, and every run keeps its files
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("summary.json")}
    assert compare.main([*argv, "--arms", "adamw"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("summary.json")} == before
    assert len(before) == 4


def test_a_terminated_comparison_stops_its_runs_and_goes_on_later(tmp_path: Path) -> None:
    arms: dict[str, dict[str, object]] = {"galore": {"args": {"optim.rank": 4}, "grid": {"optim.lr": [1e-6]}}}
    config = small(tmp_path, arms)
    out = tmp_path / "runs"
    words = [sys.executable, "-m", "experiments.compare", "--config", str(config), "--out", str(out)]
    # so many steps that the run cannot end by itself
    long = [*words, "--set", "train.steps=100000000", "train.save_every=0"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(long, cwd=ROOT, env=env, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (metrics := list(out.rglob("metrics.jsonl"))) or metrics[0].stat().st_size < 100:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143
    # the run was asked to stop, saved, and is gone
    size = metrics[0].stat().st_size
    assert list((metrics[0].parent / "checkpoints").iterdir())
    time.sleep(0.3)
    assert metrics[0].stat().st_size == size
    assert not list(out.rglob("summary.json"))
