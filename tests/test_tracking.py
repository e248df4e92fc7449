import importlib.util
import json
import math
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
import wandb
from torch.optim.optimizer import register_optimizer_step_pre_hook

from experiments.config import TrackConfig
from experiments.curves import draw
from experiments.llama import Llama, LlamaConfig
from experiments.pretrain import main
from experiments.tracking import METRICS, Tracker, deterministic, documented, has_login, metric_of, read, wandb_mode
from lowrank_optim import probes
from tests import tiny_run
from tests.wandb_reader import OfflineRun, read_runs, records

HERE = documented("cpu")
FAMILIES = {name for name in HERE if name.endswith("*")}
# a run that somebody watches in wandb: rows are not all alike
OPTIONS = ("--track.wandb=on", "--track.project=tiny", "--track.tags=[first,second]", "--train.log_every=2")


@pytest.fixture(scope="module")
def tracked(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a real offline wandb run inside its directory."""
    run_dir = tmp_path_factory.mktemp("runs") / "tracked"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_API_KEY"):
            patch.delenv(name, raising=False)
        patch.setenv("NETRC", str(run_dir / "none"))
        assert main(tiny_run.arguments(text, run_dir, *OPTIONS)) == 0
    return run_dir


@pytest.fixture
def offline(tracked: Path) -> OfflineRun:
    (run,) = read_runs(tracked)
    return run


def tracker(directory: Path | None, said: list[str], **more: Any) -> Tracker:
    return Tracker(directory, say=said.append, **{"track": TrackConfig(wandb="off"), **more})


def test_every_documented_metric_is_logged_and_no_other(tracked: Path) -> None:
    rows = read(tracked / "metrics.jsonl")
    assert {metric_of(key) for row in rows for key in row} == set(HERE)
    assert all({"step", "tokens"} <= row.keys() for row in rows)
    assert set(METRICS) > set(HERE)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("train/loss", "train/loss"),
        ("layers/update_rms/embed/weight", "layers/update_rms/*"),
        ("layers/update_rms", None),
        ("layers/other/embed/weight", None),
        ("train/losses", None),
    ],
)
def test_a_key_is_documented_by_its_name_or_that_of_its_family(key: str, name: str | None) -> None:
    assert metric_of(key) == name


def test_wandb_has_every_metric_with_its_axis_and_summary(offline: OfflineRun) -> None:
    # a family has a name of another kind, see below
    assert offline.metrics.keys() - {""} == HERE.keys() - FAMILIES
    for name in HERE.keys() - FAMILIES:
        axis, kept = offline.metrics[name]
        assert axis == (HERE[name].axis or "")
        assert kept == ({HERE[name].summary} if HERE[name].axis else set())
        assert any(name in row for row in offline.history)


def test_wandb_has_every_family_with_its_axis(tracked: Path, offline: OfflineRun) -> None:
    (log,) = tracked.glob("wandb/offline-run-*/run-*.wandb")
    defined = [record.metric for record in records(log) if record.WhichOneof("record_type") == "metric"]
    axes = {metric.glob_name: metric.step_metric for metric in defined if metric.glob_name}
    assert axes == {name: HERE[name].axis for name in FAMILIES}
    for name in FAMILIES:
        found = {key for row in offline.history for key in row if metric_of(key) == name}
        assert found
        # that it has a value of its own kind means that wandb has seen to which family it belongs
        assert all(offline.summary[key].keys() == {HERE[name].summary} for key in found)


def test_wandb_has_the_rows_of_the_file(tracked: Path, offline: OfflineRun) -> None:
    rows = [{k: v for k, v in row.items() if not k.startswith("_")} for row in offline.history]
    assert rows == read(tracked / "metrics.jsonl")
    assert rows[-1]["tokens"] == 20 * 4 * 32


def test_wandb_has_the_memory_curves_and_their_peaks(tracked: Path, offline: OfflineRun) -> None:
    summary = json.loads((tracked / "summary.json").read_text())
    state = offline.curve("mem/opt_state_bytes")
    assert state == [(step, summary["opt_state_bytes"]) for step in range(2, 21, 2)]
    for name in (name for name in HERE if name.startswith("mem/")):
        assert offline.summary[name] == {"max": max(value for _, value in offline.curve(name))}
    assert offline.summary["mem/opt_state_bytes"]["max"] < offline.summary["mem/adamw_state_bytes"]["max"]
    assert offline.summary["eval/loss"] == {"min": summary["best_val_loss"]}
    assert offline.summary["final/val_loss"] == summary["val_loss"]


def test_wandb_has_the_configuration(tracked: Path, offline: OfflineRun) -> None:
    assert offline.project == "tiny"
    assert offline.tags == ["first", "second"]
    assert offline.config["optim"]["rank"] == 8
    assert offline.config["environment"]["versions"]["torch"] == torch.__version__
    assert sum(offline.config["parameters"].values()) == json.loads((tracked / "summary.json").read_text())["params"]
    assert offline.config["corpus"]["train_tokens"] > 50_000


def test_a_resumed_run_continues_the_same_curves(text: Path, tracked: Path, tmp_path: Path) -> None:
    options = [*OPTIONS, "--train.steps=300", "--train.eval_every=50"]
    run_dir = tmp_path / "r"
    process = tiny_run.spawn(tiny_run.arguments(text, run_dir, *options))
    while process.poll() is None and not any((run_dir / "checkpoints").glob("step-*.pt")):
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert main(tiny_run.arguments(text, run_dir, *options)) == 0
    first, second = read_runs(run_dir)
    assert first.run_id == second.run_id != read_runs(tracked)[0].run_id
    assert first.metrics == second.metrics
    joined = read(run_dir / "metrics.jsonl")
    for name in ("train/loss", "eval/loss", "mem/opt_state_bytes", "basis/captured_energy", "update/rms"):
        axis = HERE[name].axis
        curve = first.curve(name) + second.curve(name)
        assert curve == [(row[axis], row[name]) for row in joined if name in row]
        assert [x for x, _ in curve] == sorted({x for x, _ in curve})
    # wandb's own counter starts again, which is why it is no axis
    assert second.history[0]["_step"] == 0


def layers(row: dict[str, Any], reading: str) -> dict[str, float]:
    prefix = f"layers/{reading}/"
    return {key.removeprefix(prefix): value for key, value in row.items() if key.startswith(prefix)}


def test_means_are_those_of_the_matrices_and_layers_have_their_names(tracked: Path) -> None:
    rows = [row for row in read(tracked / "metrics.jsonl") if "train/loss" in row]
    named = dict(Llama(LlamaConfig(dim=32, layers=2, heads=2, ffn_dim=64)).named_parameters())
    names = {name.replace(".", "/") for name in named}
    matrices = {name.replace(".", "/") for name, p in named.items() if name.startswith("layers.") and p.dim() == 2}
    assert len(matrices) == 14
    turns = []
    for row in rows:
        assert layers(row, "update_rms").keys() == names
        assert layers(row, "captured_energy").keys() == layers(row, "effective_rank").keys() == matrices
        for reading, (low, high) in {"captured_energy": (0, 1), "effective_rank": (1, 8)}.items():
            values = layers(row, reading)
            assert row[f"basis/{reading}"] == pytest.approx(sum(values.values()) / 14)
            assert all(low <= value <= high + 1e-6 for value in values.values())
        mean = sum(value for name, value in layers(row, "update_rms").items() if name in matrices) / 14
        assert row["update/rms"] == pytest.approx(mean)
        # of those that are refreshed in this step, each in one of seven
        turns.append(overlaps := layers(row, "subspace_overlap"))
        assert ("basis/subspace_overlap" in row) == bool(overlaps)
    assert {name for overlaps in turns for name in overlaps} == matrices
    assert max(map(len, turns)) < 14


def test_the_means_are_drawn(tracked: Path, tmp_path: Path) -> None:
    assert (tracked / "basis.png").read_bytes().startswith(b"\x89PNG")
    rows = (tracked / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(rows[:3]))
    # rows in which none of these numbers was finite leave a gap
    bare = [{k: None if k.startswith("basis/") else v for k, v in json.loads(row).items()} for row in rows[3:]]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in bare)
    assert [path.name for path in draw(tmp_path)] == ["loss.png", "memory.png", "basis.png"]
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "tokens": 4, "train/loss": 3.0}) + "\n")
    assert [path.name for path in draw(tmp_path)] == ["loss.png", "memory.png"]


@pytest.mark.parametrize("log_every", [1, 3])
def test_what_is_listened_to_changes_no_other_number(log_every: int, text: Path, tmp_path: Path) -> None:
    often = f"--train.log_every={log_every}"
    assert main(tiny_run.arguments(text, tmp_path / "on", often)) == 0
    assert main(tiny_run.arguments(text, tmp_path / "off", often, "--track.diagnostics=false")) == 0
    heard, unheard = tiny_run.rows(tmp_path / "on"), tiny_run.rows(tmp_path / "off")
    of_optimizer = ("basis/", "update/", "layers/")
    assert [{k: v for k, v in row.items() if not k.startswith(of_optimizer)} for row in heard] == unheard
    assert sum("update/rms" in row for row in heard) == -(-20 // log_every)
    # and there is nothing to draw
    assert [(tmp_path / name / "basis.png").exists() for name in ("on", "off")] == [True, False]


def test_only_the_steps_with_a_row_are_listened_to(text: Path, tmp_path: Path) -> None:
    heard: list[bool] = []
    hook = register_optimizer_step_pre_hook(lambda *_: heard.append(probes.listening()))
    try:
        assert main(tiny_run.arguments(text, tmp_path / "r", "--train.log_every=6")) == 0
    finally:
        hook.remove()
    assert [step for step, listened in enumerate(heard, 1) if listened] == [6, 12, 18, 20]


@pytest.mark.parametrize(("name", "basis", "update"), [("adamw", False, False), ("muon", False, True)])
def test_an_optimizer_without_bases_says_what_it_can(
    name: str, basis: bool, update: bool, text: Path, tmp_path: Path
) -> None:
    assert main(tiny_run.arguments(text, tmp_path / "r", f"--optim.name={name}", "--train.steps=3")) == 0
    row = read(tmp_path / "r" / "metrics.jsonl")[-1]
    found = [any(key.startswith(part) for key in row) for part in ("basis/", "update/", "layers/")]
    assert found == [basis, update, update]
    assert (tmp_path / "r" / "basis.png").exists() == basis


# attribute of a wandb run -> what the tracker was about to do
WHERE = {"log": "log", "finish": "finish", "summary": "summarize", "define_metric": "start"}


class Raising:
    """A run that breaks where it is told to, in place of wandb's own."""

    def __init__(self, where: str, run: Any) -> None:
        self.where, self.run = where, run

    def __getattr__(self, name: str) -> Any:
        if name == self.where:
            raise RuntimeError(f"no {name}\ntoday")
        return getattr(self.run, name)


@pytest.mark.parametrize(("where", "doing"), [*WHERE.items()])
def test_a_tracker_that_raises_does_not_stop_training(
    where: str,
    doing: str,
    text: Path,
    tracked: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real: Callable[..., Any] = wandb.init
    begun = []

    def breaking(**more: Any) -> Raising:
        begun.append(real(**more))
        return Raising(where, begun[-1])

    monkeypatch.setattr(wandb, "init", breaking)
    assert main(tiny_run.arguments(text, tmp_path / "r", *OPTIONS)) == 0
    said = capsys.readouterr().err
    assert said.count("wandb failed") == 1
    assert f"wandb failed to {doing} (RuntimeError: no {where} today)" in said
    assert tiny_run.rows(tmp_path / "r") == tiny_run.rows(tracked)
    begun[0].finish()


def test_a_place_that_wandb_cannot_write_to_does_not_stop_training(
    text: Path, tracked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # a file where wandb wants a folder: what root may not overcome either
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "wandb").write_text("in the way")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "place"))
    assert main(tiny_run.arguments(text, tmp_path / "r", *OPTIONS)) == 0
    assert capsys.readouterr().err.count("wandb failed to start") == 1
    assert tiny_run.rows(tmp_path / "r") == tiny_run.rows(tracked)


def test_without_wandb_installed_training_goes_on(
    text: Path, tracked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # what `import` finds for a package that is not there
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(tiny_run.arguments(text, tmp_path / "r", *OPTIONS)) == 0
    assert "wandb failed to start (ModuleNotFoundError" in capsys.readouterr().err
    assert tiny_run.rows(tmp_path / "r") == tiny_run.rows(tracked)


def test_wandb_is_imported_only_when_used() -> None:
    code = "import sys, experiments.pretrain; sys.exit('wandb' in sys.modules or 'matplotlib' in sys.modules)"
    process = tiny_run.spawn([], module=("-c", code))
    process.communicate(timeout=120)
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("choice", "asked", "login", "mode"),
    [
        ("off", "online", True, None),
        ("auto", "", False, "offline"),
        ("auto", "", True, "online"),
        ("auto", "offline", False, "offline"),
        ("auto", "offline", True, "offline"),
        ("auto", "disabled", True, None),
        ("on", "", False, "offline"),
        ("on", "", True, "online"),
        # going online without a key would stop and ask for one
        ("on", "online", False, "offline"),
        ("on", "disabled", True, None),
    ],
)
def test_the_mode_follows_the_login(
    choice: Any, asked: str, login: bool, mode: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_IDENTITY_TOKEN_FILE", raising=False)
    monkeypatch.setenv("WANDB_MODE", asked)
    monkeypatch.setenv("WANDB_BASE_URL", "https://curves.example.org")
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine {'curves' if login else 'other'}.example.org login user password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    assert has_login() == login
    assert wandb_mode(choice) == mode


def test_a_key_in_the_environment_is_a_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert not has_login()
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert has_login()


def test_a_key_for_wandb_s_own_server_is_a_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    for server, login in ((wandb.setup().settings.base_url, True), ("https://other.example.org", False)):
        netrc.write_text(f"machine {urlsplit(server).netloc} login user password secret\n")
        assert has_login() == login


def test_a_folder_named_wandb_is_no_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert importlib.util.find_spec("wandb") is not None
    assert wandb_mode("auto") is None


def test_a_server_that_cannot_be_reached_leaves_the_run_offline(
    text: Path, tracked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real: Callable[..., Any] = wandb.init

    def unreachable(**more: Any) -> Any:
        if more["mode"] == "online":
            raise ConnectionError("no route")
        return real(**more)

    monkeypatch.setattr(wandb, "init", unreachable)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_MODE", "online")
    assert main(tiny_run.arguments(text, tmp_path / "r", *OPTIONS)) == 0
    said = capsys.readouterr().err
    assert "wandb cannot go online (ConnectionError: no route); offline instead" in said
    assert "wandb: offline run" in said
    (run,) = read_runs(tmp_path / "r")
    assert len(run.history) == len(read(tracked / "metrics.jsonl"))


def test_a_process_without_a_directory_writes_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    silent = tracker(None, said, track=TrackConfig(wandb="on"))
    silent.log({"step": 1, "tokens": 2})
    silent.close()
    assert (silent.position, silent.run_id, said) == (0, None, [])


def test_the_file_is_cut_back_to_the_position_and_goes_on(tmp_path: Path) -> None:
    said: list[str] = []
    first = tracker(tmp_path, said)
    first.log({"step": 1, "tokens": 10})
    position = first.position
    first.log({"step": 2, "tokens": 20})
    first.close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        # what a kill leaves of a row
        file.write(b'{"step": 3, "to')
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [1, 2]
    second = tracker(tmp_path, said, position=position)
    second.log({"step": 2, "tokens": 21})
    assert second.position > position
    second.close()
    assert read(tmp_path / "metrics.jsonl") == [{"step": 1, "tokens": 10}, {"step": 2, "tokens": 21}]
    assert said == []


def test_a_file_that_lost_rows_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    tracker(tmp_path, said, position=1000).close()
    assert len(said) == 1
    assert "gap" in said[0]


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    log = tracker(tmp_path, [])
    log.log({"step": 1, "tokens": 1, "train/loss": math.nan, "train/grad_norm": math.inf})
    log.close()
    assert read(tmp_path / "metrics.jsonl")[0] == {"step": 1, "tokens": 1, "train/loss": None, "train/grad_norm": None}


def test_clock_and_machine_are_left_out_of_a_comparison() -> None:
    kept = set(deterministic(dict.fromkeys(METRICS, 0.0)))
    assert kept == {
        *("step", "tokens", "train/loss", "train/lr", "train/skipped", "train/grad_norm"),
        *("eval/loss", "eval/perplexity", "eval/bits_per_byte"),
        *("basis/captured_energy", "basis/effective_rank", "basis/subspace_overlap", "update/rms"),
        *FAMILIES,
        *("mem/params_bytes", "mem/grads_bytes", "mem/opt_state_bytes", "mem/basis_bytes", "mem/adamw_state_bytes"),
    }
