import dataclasses
import re
from pathlib import Path

import pytest
import torch
import yaml

from experiments.config import Config, as_dict, parse
from experiments.pretrain import main
from tests import tiny_run


def test_the_default_run_is_ours_on_offline_text() -> None:
    c = parse([])
    assert (c.optim.name, c.data.path, c.data.tokenizer) == ("galore_adamw", "offline", "bytes")
    assert (c.model.dim, c.model.layers, c.model.vocab_size) == (128, 4, 256)
    assert (c.train.batch_size, c.train.seq_len) == (16, 128)


def test_a_file_and_later_options(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("optim: {lr: 2e-3, rank: 0.25}\ntrain: {steps: 7}\n")
    c = parse(["--config", str(file), "--optim.lr", "1e-2", "--data", "x.txt", "--dry_run"])
    assert (c.optim.lr, c.optim.rank, c.train.steps, c.data.path, c.dry_run) == (1e-2, 0.25, 7, "x.txt", True)


def test_print_config_is_a_file_that_gives_the_same_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--optim.betas=[0.8,0.9]", "--optim.rank=0.5", "--track.tags=[a,b]", "--train.clip=0"]
    with pytest.raises(SystemExit) as left:
        main([*options, "--print_config"])
    assert left.value.code == 0
    file = tmp_path / "c.yaml"
    file.write_text(capsys.readouterr().out)
    assert parse(["--config", str(file)]) == parse(options) != Config()


@pytest.mark.parametrize("name", ["tiny", "60m", "7b"])
def test_the_models_of_the_paper_are_configurations(name: str) -> None:
    file = tiny_run.ROOT / "experiments" / "configs" / f"{name}.yaml"
    model = yaml.safe_load(file.read_text())["model"]
    assert dataclasses.asdict(parse([f"--config={file}"]).model).items() >= model.items()


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("Rank of the projection", "auto continues the newest good checkpoint", "Width of the residual stream"):
        assert text in shown
    for section in ("optim", "train"):
        assert all(f"--{section}.{key} " in shown for key in as_dict(getattr(Config(), section)))


MISTAKES = {
    "unknown section": (["--optm.lr=3"], "optm.lr"),
    "unknown key": (["--optim.rnk=3"], "optim.rank"),
    "shortened key": (["--train.step=10"], "unknown key train.step, did you mean train.steps?"),
    "shortened key before its value": (["--train.batch", "3"], "train.batch_size"),
    "unknown section in a file": (["--config={odd}/section.yaml"], "unknown key trian, did you mean train?"),
    "empty file": (["--config={odd}/empty.yaml"], "empty.yaml is empty"),
    "list in a file": (["--config={odd}/list.yaml"], "list.yaml must hold sections"),
    "null in a file": (["--config={odd}/null.yaml"], "train.steps must not be null"),
    "null for a pair in a file": (["--config={odd}/pair.yaml"], "optim.betas must not be null"),
    "null section in a file": (["--config={odd}/nothing.yaml"], "train must be a section"),
    "number for a section in a file": (["--config={odd}/number.yaml"], "optim must be a section"),
    "no data": (["--data="], "data.path is empty"),
    "device without numbers": (["--train.device=meta"], "train.device=meta"),
    "unknown key in a file": (["--config={file}"], "optim.rnk"),
    "missing config": (["--config=nowhere.yaml"], "nowhere.yaml"),
    "wrong type": (["--train.steps=many"], "train.steps"),
    "unknown choice": (["--optim.proj_type=middle"], "optim.proj_type"),
    "missing data": (["--data.path=nowhere.txt"], "nowhere.txt"),
    "empty data": (["--data.path={empty}"], "empty.txt"),
    "vocabulary": (["--model.vocab_size=100"], "100"),
    "negative lr": (["--optim.lr=-0.1"], "-0.1"),
    "negative lr of torch's AdamW": (["--optim.lr=-0.1", "--optim.name=adamw"], "-0.1"),
    "rank 0": (["--optim.rank=0"], "rank"),
    "rank above 1 as a fraction": (["--optim.rank=1.5"], "rank"),
    "no steps": (["--train.steps=0"], "train.steps"),
    "heads": (["--model.heads=5"], "model.heads"),
    "too long": (["--train.seq_len=4096", "--model.max_len=1024"], "model.max_len"),
    "device": (["--train.device=toaster"], "toaster"),
    "diagnostics": (["--track.diagnostics=some"], "track.diagnostics"),
    "resume from nowhere": (["--resume=nowhere.pt"], "nowhere.pt"),
    "never over a run": (["--resume=never"], "holds a run"),
    "another optimizer": (["--optim.lr=0.02"], "optim.lr 0.01 -> 0.02"),
    "another text": (["--data.path={other}"], "data.fingerprint"),
    "fewer steps than done": (["--train.steps=10"], "step 20"),
}


ODD = {
    "section": "trian: {steps: 3}",
    "empty": "",
    "list": "- 1",
    "null": "train: {steps: null}",
    "pair": "optim: {betas: null}",
    "nothing": "train: null",
    "number": "optim: 3",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_touches_nothing(
    mistake: str, text: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.yaml").write_text("optim: {rnk: 3}\n")
    tiny_run.write_text(tmp_path / "other.txt", 50_000)
    for name, content in ODD.items():
        (tmp_path / f"{name}.yaml").write_text(content)
    places = {
        "odd": tmp_path,
        "file": tmp_path / "bad.yaml",
        "empty": tmp_path / "empty.txt",
        "other": tmp_path / "other.txt",
    }
    options, named = MISTAKES[mistake]
    before = tiny_run.files(finished)
    try:
        code = main(tiny_run.arguments(text, finished, *(option.format(**places) for option in options)))
    except SystemExit as left:
        code = left.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1, captured.err
    assert captured.err.startswith("error: ")
    assert named in captured.err
    assert tiny_run.files(finished) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_one_line(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("cuda", "cuda:1"):
        assert main(tiny_run.arguments(text, tmp_path / "r", f"--train.device={device}")) == 2
        assert capsys.readouterr().err == f"error: train.device={device}: torch finds no CUDA device\n"


def test_another_text_is_told_by_its_checksum(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "a.txt"
    copy.write_bytes(text.read_bytes())
    assert main(tiny_run.arguments(text, tmp_path / "r", "--train.steps=1", f"--data.path={copy}")) == 0
    tiny_run.write_text(copy, 50_000)
    assert main(tiny_run.arguments(text, tmp_path / "r", "--train.steps=1", f"--data.path={copy}")) == 2
    assert re.search(r"cannot go on with data\.fingerprint \w{16} -> \w{16}: name", capsys.readouterr().err)


def test_a_mistake_makes_no_directory_and_no_traceback(tmp_path: Path) -> None:
    process = tiny_run.spawn(tiny_run.arguments(tmp_path / "nowhere.txt", tmp_path / "r"))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "r").exists()


def test_more_steps_may_be_asked_for_and_are_said(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tiny_run.arguments(text, tmp_path / "r", "--train.steps=10")) == 0
    assert main(tiny_run.arguments(text, tmp_path / "r", "--train.steps=15")) == 0
    assert "train.steps 10 -> 15" in capsys.readouterr().err
    assert [row["step"] for row in tiny_run.rows(tmp_path / "r")] == list(range(16))
