import io
import json
import math
import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from experiments import curves
from experiments.config import parse
from experiments.optimizer import lr_factor
from experiments.pretrain import main
from experiments.tracking import read
from tests import tiny_run

PNG = b"\x89PNG\r\n\x1a\n"


def summary(run_dir: Path) -> dict:
    return json.loads((run_dir / "summary.json").read_text())


def test_the_learning_rate_rises_and_falls() -> None:
    factors = [lr_factor(step, 100, 10, 0.1) for step in range(1, 101)]
    assert factors[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert factors[54] == pytest.approx(0.55)
    assert factors[99] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(factors[9:]))
    assert lr_factor(1, 1, 0, 0.1) == pytest.approx(0.1)


def test_a_run_leaves_everything_a_reader_needs(finished: Path) -> None:
    assert {p.name for p in finished.iterdir()} == {
        *(
            ".lock",
            "config.yaml",
            "environment.json",
            "metrics.jsonl",
            "summary.json",
            "loss.png",
            "memory.png",
            "basis.png",
            "checkpoints",
        ),
    }
    for plot in ("loss.png", "memory.png", "basis.png"):
        content = (finished / plot).read_bytes()
        assert content.startswith(PNG)
        assert len(content) > 5000
    about = json.loads((finished / "environment.json").read_text())
    assert about["environment"]["versions"]["torch"] == torch.__version__
    assert about["corpus"]["train_tokens"] > 50_000
    assert parse(["--config", str(finished / "config.yaml")]).run_dir == str(finished)
    assert len(list((finished / "checkpoints").iterdir())) == 2


def test_the_loss_falls_and_its_other_forms_agree(finished: Path) -> None:
    s, curve = summary(finished), [row for row in read(finished / "metrics.jsonl") if "eval/loss" in row]
    assert [row["step"] for row in curve] == [0, 10, 20]
    assert curve[0]["eval/loss"] == pytest.approx(math.log(256), abs=0.3)
    assert 3 > curve[1]["eval/loss"] > curve[2]["eval/loss"] == s["val_loss"]
    assert s["best_val_loss"] == s["val_loss"]
    assert s["perplexity"] == pytest.approx(math.exp(s["val_loss"]))
    assert s["bits_per_byte"] == pytest.approx(s["val_loss"] / math.log(2))
    assert (s["steps"], s["tokens"]) == (20, 20 * 4 * 32)


def test_the_summary_counts_state_to_the_byte(finished: Path) -> None:
    d, f, r, layers = 32, 64, 8, 2
    # two moments of r·max and a basis of r·min for each matrix, and its step; the rest is AdamW
    matrices = layers * (4 * (2 * r * d + r * d) + 3 * (2 * r * f + r * d))
    others = 2 * (2 * 256 * d + (2 * layers + 1) * d)
    tensors = layers * 9 + 3
    s = summary(finished)
    assert s["opt_state_bytes"] == 4 * (matrices + others + tensors)
    assert s["basis_bytes"] == 4 * layers * 7 * r * d
    assert s["params_bytes"] == 4 * s["params"]
    assert s["adamw_state_bytes"] == 8 * s["params"] + 4 * tensors


def test_the_table_shows_both_memories(text: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tiny_run.rows(finished)
    # a finished run, started again, only says what it found
    assert main(tiny_run.arguments(text, finished)) == 0
    table, s = capsys.readouterr().out, summary(finished)
    for number in (f"{s['opt_state_bytes']:,} bytes", f"{s['adamw_state_bytes']:,} bytes", f"{s['val_loss']:.4f}"):
        assert number in table
    assert tiny_run.rows(finished) == before


def test_its_own_config_gives_the_same_run(finished: Path, tmp_path: Path) -> None:
    assert main([f"--config={finished / 'config.yaml'}", f"--run_dir={tmp_path / 'again'}"]) == 0
    assert tiny_run.rows(tmp_path / "again") == tiny_run.rows(finished)


def test_a_plain_terminal_gets_one_line_a_row(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tiny_run.arguments(text, tmp_path / "r", "--train.log_every=5")) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "tok/s" in line]
    assert [line.split(":")[0] for line in lines] == [f"step {s}/20" for s in (5, 10, 15, 20)]
    assert all("eta" in line for line in lines)


def test_a_person_gets_a_bar_with_speed_and_time_left(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    assert main(tiny_run.arguments(text, tmp_path / "r", "--train.steps=40")) == 0
    shown = terminal.getvalue()
    assert re.search(r"\| \d+/40 \[\d\d:\d\d<\d\d:\d\d, .*step/s, loss \d\.\d{3}, [\d.]+k tok/s\]", shown), shown
    assert "eta" not in shown


def test_the_default_directory_is_named_after_time_and_run(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = [a for a in tiny_run.arguments(text, tmp_path, "--train.steps=1") if not a.startswith("--run_dir")]
    assert main([*argv, "--track.name=first"]) == 0
    assert main([*argv, "--track.name=first"]) == 0
    names = sorted(p.name for p in (tmp_path / "runs").iterdir())
    assert len(names) == 2
    assert all("-first" in name for name in names)


def test_a_dry_run_predicts_the_run(text: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tiny_run.files(finished)
    assert main(tiny_run.arguments(text, finished, "--dry_run")) == 0
    out, s = capsys.readouterr().out, summary(finished)
    for group in ("matrices", "embeddings", "heads", "vectors"):
        assert group in out
    assert f"{s['opt_state_bytes']:,} bytes" in out
    assert f"{s['adamw_state_bytes']:,} bytes" in out
    assert tiny_run.files(finished) == before


def test_a_dry_run_of_seven_billion_parameters_allocates_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_run.ROOT / "experiments" / "configs" / "7b.yaml"
    assert main([f"--config={config}", "--optim.rank=1024", "--train.dtype=bf16", "--dry_run"]) == 0
    assert "50.21 GiB" in capsys.readouterr().out


def test_adamw_is_torch_s(text: Path, tmp_path: Path) -> None:
    assert main(tiny_run.arguments(text, tmp_path / "r", "--optim.name=adamw", "--optim.lr=0.003")) == 0
    s = summary(tmp_path / "r")
    assert s["opt_state_bytes"] == s["adamw_state_bytes"]
    assert s["basis_bytes"] == 0
    assert s["val_loss"] < 5


def test_other_lr_goes_to_what_is_not_projected(text: Path, tmp_path: Path) -> None:
    assert main(tiny_run.arguments(text, tmp_path / "r", "--optim.other_lr=0", "--train.steps=3")) == 0
    kept = torch.load(tmp_path / "r" / "checkpoints" / "step-00000003.pt", weights_only=True)
    assert torch.equal(kept["model"]["norm.weight"], torch.ones(32))
    assert not torch.equal(kept["model"]["layers.0.attn.q_proj.weight"], torch.zeros(32, 32))
    assert sorted({group["lr"] for group in kept["optimizer"]["param_groups"]})[0] == 0


def test_accumulation_is_a_larger_batch(text: Path, tmp_path: Path) -> None:
    large = ["--train.batch_size=8", "--train.steps=3", "--train.eval_batches=2"]
    small = ["--train.batch_size=4", "--train.steps=3", "--train.accumulate=2", "--train.eval_batches=4"]
    assert main(tiny_run.arguments(text, tmp_path / "large", *large)) == 0
    assert main(tiny_run.arguments(text, tmp_path / "small", *small)) == 0
    for a, b in zip(tiny_run.rows(tmp_path / "large"), tiny_run.rows(tmp_path / "small"), strict=True):
        assert a["tokens"] == b["tokens"]
        for key in ("train/loss", "train/grad_norm", "eval/loss"):
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=1e-4)


def test_the_seed_moves_weights_and_data(text: Path, finished: Path, tmp_path: Path) -> None:
    assert main(tiny_run.arguments(text, tmp_path / "r", "--train.seed=1", "--train.steps=1")) == 0
    assert tiny_run.rows(tmp_path / "r")[0]["eval/loss"] != tiny_run.rows(finished)[0]["eval/loss"]


def test_bf16_keeps_half_the_weights_and_resumes_to_the_bit(text: Path, finished: Path, tmp_path: Path) -> None:
    assert main(tiny_run.arguments(text, tmp_path / "r", "--train.dtype=bf16")) == 0
    s, whole = summary(tmp_path / "r"), tiny_run.rows(tmp_path / "r")
    assert s["params_bytes"] == 2 * s["params"]
    # moments and bases stay in float32
    assert s["opt_state_bytes"] == summary(finished)["opt_state_bytes"]
    (tmp_path / "r" / "checkpoints" / "step-00000020.pt").unlink()
    assert main(tiny_run.arguments(text, tmp_path / "r", "--train.dtype=bf16")) == 0
    assert tiny_run.rows(tmp_path / "r") == whole


@pytest.mark.slow
def test_a_compiled_model_learns_the_same(text: Path, tmp_path: Path) -> None:
    options = ["--model.layers=1", "--train.steps=4"]
    assert main(tiny_run.arguments(text, tmp_path / "plain", *options)) == 0
    assert main(tiny_run.arguments(text, tmp_path / "compiled", *options, "--train.compile=true")) == 0
    for name in ("val_loss", "opt_state_bytes"):
        assert summary(tmp_path / "compiled")[name] == pytest.approx(summary(tmp_path / "plain")[name], rel=1e-3)


def test_a_loss_that_is_not_a_number_is_said_once(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tiny_run.arguments(text, tmp_path / "r", "--optim.lr=1e38", "--train.warmup=0")) == 0
    captured, rows = capsys.readouterr(), tiny_run.rows(tmp_path / "r")
    said, skipped = captured.err, summary(tmp_path / "r")["skipped_steps"]
    assert re.search(rf"steps skipped, no number +{skipped} of 20\n", captured.out)
    assert summary(tmp_path / "r")["train_loss"] is None
    assert said.count("are skipped (said once)") == 1
    assert rows[-1]["train/skipped"] == skipped > 10
    # JSON has no NaN: a reader in another language can parse the file
    assert rows[-1]["train/loss"] is None
    assert "NaN" not in (tmp_path / "r" / "metrics.jsonl").read_text()


def test_without_matplotlib_a_run_ends_well_and_says_how_to_draw(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "r"
    with monkeypatch.context() as patch:
        # what `import` finds for a package that is not there
        patch.setitem(sys.modules, "matplotlib", None)
        assert main(tiny_run.arguments(text, run_dir, "--train.steps=2")) == 0
        assert f"python -m experiments.curves {run_dir}" in capsys.readouterr().err
        assert curves.main([str(run_dir)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (run_dir / "loss.png").exists()
    assert (run_dir / "summary.json").exists()
    assert curves.main([str(run_dir)]) == 0
    assert (run_dir / "loss.png").read_bytes().startswith(PNG)


def test_curves_of_no_run_are_one_line(tmp_path: Path) -> None:
    process = tiny_run.spawn([str(tmp_path / "nowhere")], module=("-m", "experiments.curves"))
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "nowhere" in err
