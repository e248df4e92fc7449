"""Every optimizer of the experiments: its options reach it, others are refused, and a run may start from weights."""

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

import lowrank_optim
from experiments.config import Config, ConfigError, OptimConfig, parse
from experiments.llama import Llama, LlamaConfig
from experiments.optimizer import OPTIMIZERS, SHARED, build_optimizer
from experiments.pretrain import main
from lowrank_optim import state_bytes
from tests import tiny_run

CLASSES = {
    "galore_adamw": "GaLoreAdamW",
    "dct_adamw": "DCTAdamW",
    "apollo_adamw": "APOLLOAdamW",
    "fira_adamw": "FiraAdamW",
    "ldadamw": "LDAdamW",
    "muon": "Muon",
    "lowrank_muon": "LowRankMuon",
    "trion": "Trion",
    "auon": "AuON",
    "steepest_descent": "SteepestDescent",
    "mfac": "MFAC",
    "lowrank_mfac": "MFAC",
}
PROJECTED = ("galore_adamw", "dct_adamw", "apollo_adamw", "fira_adamw", "ldadamw")
# a value of each of their options that is nobody's default
VALUES: dict[str, Any] = {
    "betas": (0.7, 0.8),
    "eps": 1e-5,
    "stagger": False,
    "residual": "fira",
    "residual_scale": 0.5,
    "carry": "reset",
    "adaptive_overlap": 0.4,
    "ranking": "l1",
    "column_ages": True,
    "error_feedback": "int8",
    "scale_type": "tensor",
    "proj_dtype": "float32",
    "published_code": True,
    "rho": 0.5,
    "rank": 4,
    "update_proj_gap": 9,
    "basis": "subspace",
    "scale": 0.5,
    "proj_type": "left",
    "state_dtype": "int4",
}
D, F, LAYERS = 32, 64, 2
MATRIX_ELEMENTS = LAYERS * (4 * D * D + 3 * D * F)


def model() -> Llama:
    return Llama(LlamaConfig(dim=D, layers=LAYERS, heads=2, ffn_dim=F))


def test_the_table_and_the_options_name_each_other() -> None:
    assert set(OPTIMIZERS) == set(get_args(get_type_hints(OptimConfig)["name"])) == {"adamw", *CLASSES}
    taken = {option for known in OPTIMIZERS.values() for option in (*known.arguments, *known.of_matrices)}
    assert {field.name for field in dataclasses.fields(OptimConfig)} == taken | set(SHARED)


@pytest.mark.parametrize("name", CLASSES)
def test_the_table_names_arguments_that_exist(name: str) -> None:
    known = set(inspect.signature(getattr(lowrank_optim, CLASSES[name])).parameters)
    assert set(OPTIMIZERS[name].arguments.values()) <= known
    assert {"rank", "update_proj_gap", "basis", "scale", "proj_type"} & set(OPTIMIZERS[name].of_matrices) <= known


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_takes_a_step_with_its_defaults(name: str) -> None:
    llama = model()
    rank = {"rank": 0.25} if "rank" in OPTIMIZERS[name].of_matrices else {}
    optimizer, groups = build_optimizer(llama, OptimConfig(name=name, lr=1e-2, other_lr=1e-3, **rank))
    before = [p.detach().clone() for p in llama.parameters()]
    x = torch.randint(256, (2, 9))
    llama.loss(x[:, :-1], x[:, 1:]).backward()
    optimizer.step()
    assert all((p != old).any() and p.isfinite().all() for p, old in zip(llama.parameters(), before, strict=True))
    lrs = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert lrs.pop("matrices") == 1e-2
    assert set(lrs.values()) == {1e-3}
    assert groups[0]["name"] == "matrices"


def test_options_reach_the_matrices_and_the_rest() -> None:
    c = OptimConfig(
        name="muon",
        betas=(0.7, 0.8),
        eps=1e-5,
        momentum=0.6,
        adjust_lr_fn="match_rms_adamw",
        ns_steps=3,
        ns_coefficients="polar_express",
        normuon_beta2=0.9,
        state_dtype="int8",
    )
    optimizer, _ = build_optimizer(model(), c)
    by_name = {group["name"]: group for group in optimizer.param_groups}
    matrices = by_name["matrices"]
    assert (matrices["momentum"], matrices["ns_steps"], matrices["normuon_beta2"]) == (0.6, 3, 0.9)
    assert (matrices["adjust_lr_fn"], matrices["ns_coefficients"]) == ("match_rms_adamw", "polar_express")
    assert matrices["state_dtype"] == "int8"
    # what is compared is the matrices' state, so the rest stays as it is
    assert by_name["embeddings"]["state_dtype"] == "float32"
    assert tuple(by_name["embeddings"]["fallback_betas"]) == (0.7, 0.8)
    assert by_name["embeddings"]["fallback_eps"] == 1e-5


def options_of(name: str) -> list[str]:
    return [*OPTIMIZERS[name].arguments, *OPTIMIZERS[name].of_matrices]


@pytest.mark.parametrize(("name", "option"), [(name, option) for name in PROJECTED for option in options_of(name)])
def test_each_option_of_a_projected_optimizer_reaches_it(name: str, option: str) -> None:
    # two bases are all that APOLLO knows
    value = "svd" if (name, option) == ("apollo_adamw", "basis") else VALUES[option]
    usual, _ = build_optimizer(model(), OptimConfig(name=name))
    optimizer, _ = build_optimizer(model(), OptimConfig(**{"name": name, option: value}))
    key = OPTIMIZERS[name].arguments.get(option, option)
    given, default = optimizer.param_groups[0][key], usual.param_groups[0][key]
    assert given == value != default
    # and nothing else has changed, nor anything of the rest that is the matrices' alone
    for ours, theirs in zip(optimizer.param_groups, usual.param_groups, strict=True):
        other = {k for k in ours if k not in ("params", key)}
        assert {k: ours[k] for k in other} == {k: theirs[k] for k in other}
    if option in OPTIMIZERS[name].of_matrices:
        assert all(group[key] != value for group in optimizer.param_groups[1:])


@pytest.mark.parametrize("name", PROJECTED)
def test_a_run_takes_all_that_a_projected_optimizer_has(name: str, text: Path, tmp_path: Path) -> None:
    values = {option: VALUES[option] for option in options_of(name)}
    if name == "galore_adamw":
        # which goes with no residual
        del values["error_feedback"]
    values |= {"basis": "svd"} if name == "apollo_adamw" else {}
    words = [f"--optim.{option}={json.dumps(value).strip(chr(34))}" for option, value in values.items()]
    assert main(tiny_run.arguments(text, tmp_path / "r", "--train.steps=12", f"--optim.name={name}", *words)) == 0
    assert parse(["--config", str(tmp_path / "r" / "config.yaml")]).optim == dataclasses.replace(
        Config().optim, name=name, lr=0.01, **({"rank": 8, "update_proj_gap": 7} | values)
    )
    losses = [row["train/loss"] for row in tiny_run.rows(tmp_path / "r") if "train/loss" in row]
    assert losses[-1] < losses[0]
    whole = tiny_run.rows(tmp_path / "r")
    # what is kept under these options goes on to the bit
    (tmp_path / "r" / "checkpoints" / "step-00000012.pt").unlink()
    assert main(tiny_run.arguments(text, tmp_path / "r", "--train.steps=12", f"--optim.name={name}", *words)) == 0
    assert tiny_run.rows(tmp_path / "r") == whole


def test_null_leaves_an_option_to_the_optimizer() -> None:
    optimizer, _ = build_optimizer(model(), OptimConfig(name="galore_adamw", rank=8))
    matrices = optimizer.param_groups[0]
    # tuned for the default run; the class's own is 200
    assert matrices["update_proj_gap"] == 50
    assert (matrices["basis"], matrices["scale"], matrices["stagger"]) == ("svd", 1.0, True)
    optimizer, _ = build_optimizer(model(), OptimConfig(name="muon"))
    assert optimizer.param_groups[0]["momentum"] == 0.95
    gaps = {"dct_adamw": 1, "apollo_adamw": 50, "fira_adamw": 50, "ldadamw": 1}
    for name, gap in gaps.items():
        optimizer, _ = build_optimizer(model(), OptimConfig(name=name, rank=8))
        assert optimizer.param_groups[0].get("update_proj_gap") == gap
        # not refused, and LDAdam's cannot be another
        optimizer, _ = build_optimizer(model(), OptimConfig(name=name, rank=8, update_proj_gap=9))
        assert optimizer.param_groups[0]["update_proj_gap"] == (1 if name == "ldadamw" else 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adamw", "momentum": 0.9}, "optim.momentum=0.9 means nothing to optim.name=adamw"),
        ({"name": "adamw", "state_dtype": "int8"}, "optim.state_dtype=int8 means nothing to optim.name=adamw"),
        ({"name": "galore_adamw", "residual": 0.3}, "residual"),
        ({"name": "galore_adamw", "adaptive_overlap": 1.5}, "adaptive_overlap"),
        ({"name": "galore_adamw", "carry": "drop"}, "carry"),
        ({"name": "galore_adamw", "ranking": "l1"}, "optim.ranking=l1 means nothing to optim.name=galore_adamw"),
        ({"name": "galore_adamw", "rho": 0.5}, "optim.rho=0.5 means nothing to optim.name=galore_adamw"),
        ({"name": "dct_adamw", "residual": "fira"}, "optim.residual=fira means nothing to optim.name=dct_adamw"),
        ({"name": "dct_adamw", "error_feedback": "int2"}, "error_feedback"),
        ({"name": "dct_adamw", "ranking": "l3"}, "ranking"),
        ({"name": "dct_adamw", "proj_type": "full"}, "proj_type"),
        ({"name": "apollo_adamw", "carry": "keep"}, "optim.carry=keep means nothing to optim.name=apollo_adamw"),
        ({"name": "apollo_adamw", "scale_type": "row"}, "scale_type"),
        ({"name": "apollo_adamw", "basis": "dct"}, "basis"),
        ({"name": "apollo_adamw", "scale": -1.0}, "scale"),
        ({"name": "fira_adamw", "scale_type": "tensor"}, "optim.scale_type=tensor means nothing to optim.name=fira"),
        ({"name": "fira_adamw", "proj_type": "full"}, "proj_type"),
        ({"name": "fira_adamw", "carry": "lose"}, "carry"),
        ({"name": "ldadamw", "carry": "rotate"}, "optim.carry=rotate means nothing to optim.name=ldadamw"),
        ({"name": "ldadamw", "rho": 1.5}, "rho"),
        ({"name": "ldadamw", "rank": 0}, "rank"),
        ({"name": "muon", "published_code": True}, "optim.published_code=True means nothing to optim.name=muon"),
        ({"name": "lowrank_muon", "residual": "fira"}, "residual"),
        ({"name": "muon", "momentum": 1.5}, "momentum"),
        ({"name": "muon", "adjust_lr_fn": "best"}, "adjust_lr_fn"),
    ],
)
def test_an_option_that_means_nothing_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        build_optimizer(model(), OptimConfig(**options))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "word", ["--optim.carry=lose", "--optim.rankings=l1", "--optim.residual=drop", "--optim.rho=much"]
)
def test_the_command_line_refuses_others_in_one_line(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse([word])
    assert left.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert word.partition("=")[0].removeprefix("--") in told


def test_the_command_line_takes_them() -> None:
    words = ["--optim.name=muon", "--optim.momentum=0.8", "--optim.ns_coefficients=[2,-1.5,0.5]", "--optim.ns_steps=3"]
    c = parse(words).optim
    assert (c.name, c.momentum, c.ns_coefficients, c.ns_steps) == ("muon", 0.8, (2.0, -1.5, 0.5), 3)
    words = ["--optim.name=dct_adamw", "--optim.column_ages=true", "--optim.error_feedback=int8", "--optim.rank=0.25"]
    c = parse(words).optim
    assert (c.name, c.column_ages, c.error_feedback, c.rank) == ("dct_adamw", True, "int8", 0.25)
    assert parse(["--optim.residual=0.5"]).optim.residual == 0.5
    assert parse(["--optim.residual=fira"]).optim.residual == "fira"
    assert parse(["--optim.ns_coefficients=you"]).optim.ns_coefficients == "you"
    assert parse([]).optim == Config().optim


def summary(run_dir: Path) -> dict[str, object]:
    return json.loads((run_dir / "summary.json").read_text())


def test_the_state_of_the_matrices_is_counted_apart(text: Path, finished: Path, tmp_path: Path) -> None:
    r = 8
    galore = LAYERS * (4 * (2 * r * D + r * D) + 3 * (2 * r * F + r * D))
    assert summary(finished)["matrix_state_bytes"] == 4 * galore
    words = ["--train.steps=2", "--optim.name=muon", "--optim.lr=0.01", "--optim.state_dtype=bfloat16"]
    assert main(tiny_run.arguments(text, tmp_path / "muon", *words)) == 0
    assert summary(tmp_path / "muon")["matrix_state_bytes"] == 2 * MATRIX_ELEMENTS
    assert main(tiny_run.arguments(text, tmp_path / "adamw", "--train.steps=2", "--optim.name=adamw")) == 0
    assert summary(tmp_path / "adamw")["matrix_state_bytes"] == 8 * MATRIX_ELEMENTS


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(max((run_dir / "checkpoints").glob("*.pt")), weights_only=True)["model"]


@pytest.mark.parametrize("place", ["directory", "file"])
def test_a_run_starts_from_the_weights_of_another(place: str, text: Path, finished: Path, tmp_path: Path) -> None:
    file = finished / "checkpoints" / "step-00000020.pt"
    source = finished if place == "directory" else file
    words = ["--optim.name=adamw", f"--train.init_from={source}", "--train.batch_size=2", "--train.seed=9"]
    assert main(tiny_run.arguments(text, tmp_path / "r", *words, "--optim.lr=0", "--optim.other_lr=0")) == 0
    for name, value in weights(finished).items():
        assert torch.equal(value, weights(tmp_path / "r")[name])
    first = tiny_run.rows(tmp_path / "r")[0]
    assert first["step"] == first["tokens"] == 0
    # the state is fresh: the last save of a run of no learning holds its own 20 steps
    kept = torch.load(tmp_path / "r" / "checkpoints" / "step-00000020.pt", weights_only=True)
    assert {float(state["step"]) for state in kept["optimizer"]["state"].values()} == {20.0}


def test_a_run_from_weights_resumes_from_its_own(text: Path, finished: Path, tmp_path: Path) -> None:
    words = [f"--train.init_from={finished}", "--train.seed=9"]
    assert main(tiny_run.arguments(text, tmp_path / "r", *words)) == 0
    whole = tiny_run.rows(tmp_path / "r")
    (tmp_path / "r" / "checkpoints" / "step-00000020.pt").unlink()
    assert main(tiny_run.arguments(text, tmp_path / "r", *words)) == 0
    assert tiny_run.rows(tmp_path / "r") == whole


def test_weights_that_are_not_there_or_do_not_fit_are_one_line(
    text: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, named in (
        ([f"--train.init_from={tmp_path / 'nowhere.pt'}"], "nowhere.pt"),
        ([f"--train.init_from={tmp_path}"], "no checkpoint in"),
        ([f"--train.init_from={finished}", "--model.ffn_dim=48"], "do not fit this model"),
    ):
        assert main(tiny_run.arguments(text, tmp_path / "r", *words)) == 2
        told = capsys.readouterr().err
        assert named in told
        assert told.count("\n") == 1
        assert not (tmp_path / "r").exists()


def test_a_slim_run_leaves_its_numbers_only(
    text: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slim = ["--train.eval_first=false", "--train.save_every=0", "--train.save_last=false", "--train.plots=false"]
    assert main(tiny_run.arguments(text, tmp_path / "r", *slim)) == 0
    assert "plots" not in capsys.readouterr().out
    left = {path.name for path in (tmp_path / "r").iterdir()}
    assert left == {".lock", "config.yaml", "environment.json", "metrics.jsonl", "summary.json", "checkpoints"}
    assert not list((tmp_path / "r" / "checkpoints").iterdir())
    # what is left out changes no number
    rows, full = tiny_run.rows(tmp_path / "r"), tiny_run.rows(finished)
    assert rows == full[1:]
    s = summary(tmp_path / "r")
    assert s["val_loss"] == summary(finished)["val_loss"]
    assert 0 < s["seconds"] < 60


def test_muon_keeps_half_of_adamw_for_the_matrices() -> None:
    llama = model()
    optimizer, _ = build_optimizer(llama, OptimConfig(name="muon"))
    kept = state_bytes(optimizer).by_name
    assert kept["momentum_buffer"] == 4 * MATRIX_ELEMENTS
