import json
import time
import weakref
from pathlib import Path
from typing import Any

import pytest

from experiments import checkpoint, pretrain, run_dir
from experiments.checkpoint import CheckpointError
from experiments.pretrain import main
from experiments.run_dir import Start, open_directory
from tests import tiny_run


def test_one_process_at_a_time(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "r"
    argv = tiny_run.arguments(text, directory, "--train.steps=100000000", "--train.save_every=0")
    first = tiny_run.spawn(argv)
    while first.poll() is None and not ((directory / "metrics.jsonl").exists() and tiny_run.rows(directory)):
        time.sleep(0.01)
    assert main(tiny_run.arguments(text, directory)) == 2
    assert capsys.readouterr().err == f"error: {directory} is in use by a run that has not ended\n"
    # the lock goes with the process, however it ends
    first.kill()
    first.communicate(timeout=120)
    assert main(tiny_run.arguments(text, directory, "--train.steps=2")) == 0


def test_two_runs_of_one_second_have_two_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with open_directory(Start(), "a") as one, open_directory(Start(), "a") as two:
        assert one != two
        assert one.is_dir()
        assert two.is_dir()


@pytest.mark.parametrize(("name", "end"), [("a/../b c", "a-..-b-c"), ("..", "run"), ("käse", "käse")])
def test_a_name_is_one_component(name: str, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with open_directory(Start(), name) as directory:
        assert directory.parent == Path("runs")
        assert directory.name.endswith(f"-{end}")


@pytest.mark.parametrize("name", ["config.yaml", "summary.json", "environment.json"])
def test_a_folder_of_something_else_is_left_alone(
    name: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("theirs")
    before = tiny_run.files(tmp_path)
    assert main(tiny_run.arguments(text, tmp_path)) == 2
    assert f"is no run but has a {name}" in capsys.readouterr().err
    assert tiny_run.files(tmp_path) == before


def test_a_killed_run_without_rows_is_a_run(text: Path, tmp_path: Path) -> None:
    # what a kill leaves between the first two files
    with open_directory(Start(tmp_path), "a"):
        (tmp_path / "config.yaml").write_text("ours")
    assert main(tiny_run.arguments(text, tmp_path, "--train.steps=1")) == 0


@pytest.mark.parametrize("broken", ["r", "r/checkpoints"])
def test_a_place_that_cannot_be_written_to_is_one_line(
    broken: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # a file where a folder is wanted: what root may not overcome either
    (tmp_path / broken).parent.mkdir(exist_ok=True)
    (tmp_path / broken).write_text("in the way")
    assert main(tiny_run.arguments(text, tmp_path / "r" if "/" in broken else tmp_path / "r" / "x")) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("error: ")
    assert str(tmp_path / broken) in said[0]


def test_each_session_keeps_its_environment(text: Path, tmp_path: Path) -> None:
    for steps in (2, 4, 6):
        assert main(tiny_run.arguments(text, tmp_path / "r", f"--train.steps={steps}")) == 0
    for name, steps in {"environment": 2, "environment-2": 4, "environment-3": 6}.items():
        about = json.loads((tmp_path / "r" / f"{name}.json").read_text())
        assert f"--train.steps={steps}" in about["environment"]["command"]


def test_a_resumed_run_lets_the_checkpoint_go(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(tiny_run.arguments(text, tmp_path / "r", "--train.steps=5")) == 0
    kept: list[weakref.ref[Any]] = []
    alive: list[bool] = []

    def restore(state: dict[str, Any], *more: Any) -> None:
        kept.extend(weakref.ref(tensor) for tensor in state["model"].values())
        assert {tensor.device.type for tensor in state["model"].values()} == {"cpu"}
        real(state, *more)

    def evaluate(*more: Any) -> dict[str, float]:
        alive.extend(ref() is not None for ref in kept)
        return measured(*more)

    real, measured = checkpoint.restore, pretrain.evaluate
    monkeypatch.setattr(checkpoint, "restore", restore)
    monkeypatch.setattr(pretrain, "evaluate", evaluate)
    assert main(tiny_run.arguments(text, tmp_path / "r", "--train.steps=10")) == 0
    assert len(alive) > 10
    assert not any(alive)


def test_a_file_is_no_run_directory(tmp_path: Path) -> None:
    (tmp_path / "r").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        run_dir.find_start(str(tmp_path / "r"), "auto")
