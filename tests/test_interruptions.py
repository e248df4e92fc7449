import contextlib
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.pretrain import main
from tests import tiny_run


def wait_for(condition: Callable[[], bool], process: multiprocessing.process.BaseProcess) -> None:
    while process.is_alive() and not condition():
        time.sleep(0.0005)


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@pytest.mark.slow
def test_twenty_kills_leave_the_metrics_of_a_run_that_was_never_killed(text: Path, tmp_path: Path) -> None:
    options = ["--train.steps=240", "--train.save_every=5", "--train.eval_every=20"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(tiny_run.arguments(text, whole, *options)) == 0
    argv = [*tiny_run.arguments(text, killed, *options), "--resume=auto"]
    # real processes and a real SIGKILL; the server spares each of them the import of torch
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.pretrain", "torch._dynamo"])
    chance, saved, moments = random.Random(20), killed / "checkpoints", []

    def written(pattern: str) -> set[tuple[str, int]]:
        found = set()
        for path in saved.glob(pattern):
            # a file that is renamed meanwhile is found under its new name
            with contextlib.suppress(FileNotFoundError):
                found.add((path.name, path.stat().st_mtime_ns))
        return found

    for number in range(20):
        rows, whole_files, half_files = size(killed / "metrics.jsonl"), written("step-*.pt"), written(".step-*.tmp")
        process = context.Process(target=main, args=(argv,))
        process.start()
        moment = ("start", "step", "while saving", "after saving")[number % 4]
        if moment == "start":
            # anywhere from the first line of `main` to the first rows
            goal, until = rows + 3000, time.monotonic() + chance.uniform(0.0, 0.2)
            wait_for(
                lambda goal=goal, until=until: time.monotonic() > until or size(killed / "metrics.jsonl") > goal,
                process,
            )
        elif moment == "step":
            # two to fifteen rows further on; a row has some 600 bytes
            goal = rows + 600 * chance.randint(2, 15)
            wait_for(lambda goal=goal: size(killed / "metrics.jsonl") > goal, process)
            time.sleep(chance.uniform(0.0, 0.02))
        elif moment == "while saving":
            wait_for(lambda known=half_files: not written(".step-*.tmp") <= known, process)
        else:
            wait_for(lambda known=whole_files: not written("step-*.pt") <= known, process)
            time.sleep(chance.uniform(0.0, 0.002))
        os.kill(process.pid, signal.SIGKILL)
        process.join(30)
        assert process.exitcode == -signal.SIGKILL, f"the run was over before kill {number} ({moment})"
        moments.append((moment, size(killed / "metrics.jsonl")))
    assert not (killed / "summary.json").exists()
    assert main(argv) == 0
    assert tiny_run.rows(killed) == tiny_run.rows(whole), moments
    assert len(tiny_run.rows(killed)) == 241
    # the kills fell over the whole run, not all before its first checkpoint
    assert len({position for _, position in moments}) > 8


def test_a_kill_of_the_command_itself(text: Path, finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "r"
    process = tiny_run.spawn(tiny_run.arguments(text, run_dir, "--train.eval_batches=2"))
    while process.poll() is None and not any((run_dir / "checkpoints").glob("step-*.pt")):
        time.sleep(0.001)
    process.kill()
    process.communicate(timeout=120)
    assert main(tiny_run.arguments(text, run_dir)) == 0
    assert tiny_run.rows(run_dir) == tiny_run.rows(finished)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_signal_saves_and_exits_with_0(number: signal.Signals, text: Path, tmp_path: Path) -> None:
    options = ["--train.steps=300", "--train.save_every=0", "--train.eval_every=50", "--train.log_every=7"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(tiny_run.arguments(text, whole, *options)) == 0
    process = tiny_run.spawn(tiny_run.arguments(text, stopped, *options))
    while process.poll() is None and size(stopped / "metrics.jsonl") < 2000:
        time.sleep(0.001)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert f"{number.name}: saved after step" in said
    saved = list((stopped / "checkpoints").iterdir())
    assert len(saved) == 1
    # between two rows, where the running mean of the loss is part of the state
    assert not (stopped / "summary.json").exists()
    assert main(tiny_run.arguments(text, stopped, *options)) == 0
    assert tiny_run.rows(stopped) == tiny_run.rows(whole)


@pytest.mark.slow
def test_two_processes_are_one_run_with_twice_the_batch(text: Path, tmp_path: Path) -> None:
    one = ["--train.batch_size=4", "--train.eval_batches=2", "--train.accumulate=2"]
    two = ["--train.batch_size=2", "--train.eval_batches=4", "--train.accumulate=2"]
    assert main(tiny_run.arguments(text, tmp_path / "one", *one)) == 0
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "experiments.pretrain")
    process = tiny_run.spawn(tiny_run.arguments(text, tmp_path / "two", *two), module=launcher)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count("optimizer state") == 1
    for a, b in zip(tiny_run.rows(tmp_path / "one"), tiny_run.rows(tmp_path / "two"), strict=True):
        assert a["tokens"] == b["tokens"]
        # the order of a sum differs, which the norm shows first
        for key, near in (("train/loss", 1e-4), ("train/grad_norm", 5e-3), ("eval/loss", 1e-4)):
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=near), (key, a["step"])
