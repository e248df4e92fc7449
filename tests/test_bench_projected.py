"""The benchmark of projected AdamW: formulas by hand, operations as counted, and one small run of the whole."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import bench, bench_costs, bench_measure
from experiments.bench_entries import ENTRIES, FAMILIES
from experiments.bench_flops import count_entry
from experiments.bench_workloads import WORKLOADS, Workload, gradient_sets, least_work, parameters
from lowrank_optim.optimizer import RuleOptimizer

TINY = WORKLOADS["tiny"]
FAMILY = FAMILIES["projected"]
PEERS = ("galore_torch", "fira_peer", "apollo_torch")
OURS = tuple(name for name in FAMILY.names if name not in PEERS)
SHAPE, RANK = (6, 4), 2


def stepped(name: str) -> torch.optim.Optimizer:
    params = parameters(TINY, "cpu")
    optimizer = ENTRIES[name].build(params, TINY.rank, 3)
    for p, g in zip(params, gradient_sets(TINY, "cpu")[0], strict=True):
        p.grad = g.clone()
    optimizer.step()
    return optimizer


def test_the_family_names_ours_the_peers_and_what_ratios_are_to() -> None:
    assert set(FAMILY.names) <= ENTRIES.keys()
    assert len(set(FAMILY.names)) == len(FAMILY.names)
    assert {*PEERS, "adamw_fused", "dct_adamw", "galore_subspace_every_step", "ldadam", "apollo", "fira"} <= {
        *FAMILY.names
    }
    assert (FAMILY.baseline, FAMILY.rounds, FAMILY.flops) == ("galore_torch", 15, False)
    # the one that its state is compared with is there too
    forms = {ENTRIES[name].float32_form for name in FAMILY.names} - {None}
    assert forms <= {*FAMILY.names}
    for family in FAMILIES.values():
        assert family.baseline in family.names


@pytest.mark.parametrize("name", OURS)
def test_state_is_the_formula(name: str) -> None:
    optimizer = stepped(name)
    # what the formulas leave out: the count of steps, a seed, and the norm that a limiter remembers
    small = ("step", "basis_seed", "update_norm")
    left_out = sum(value.nbytes for state in optimizer.state.values() for key, value in state.items() if key in small)
    assert left_out <= 16 * len(TINY.shapes)
    counted, held = bench_measure.state_sizes(optimizer)
    assert counted == least_work(ENTRIES[name], TINY).state_bytes + left_out
    # and nothing keeps a larger tensor alive
    assert held == counted


@pytest.mark.parametrize("name", OURS)
def test_every_operation_is_counted_and_none_is_beneath_the_formula(name: str) -> None:
    for row in count_entry(ENTRIES[name], TINY, "cpu").values():
        assert row["uncounted"] == []
        assert row["counted"] >= row["formula"]
        assert row.get("refresh_counted", 0) >= row.get("refresh_formula", 0)
        if not name.startswith(("dct_adamw", "ldadam")):
            # a small transform is cheapest as a product; LDAdam also moves its moments
            assert row["counted"] == row["formula"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dct_adamw", {"rank": 4, "update_proj_gap": 1, "carry": "rotate", "column_ages": False}),
        ("dct_adamw_ages", {"column_ages": True, "state_dtype": "float32", "error_feedback": None}),
        ("dct_adamw_int8", {"state_dtype": "int8", "error_feedback": None}),
        ("dct_adamw_error_int8", {"state_dtype": "float32", "error_feedback": "int8"}),
        ("galore_subspace_every_step", {"rank": 4, "basis": "subspace", "update_proj_gap": 1}),
        ("identity", {"rank": 4, "basis": "identity", "update_proj_gap": 1, "carry": "rotate", "scale": 1.0}),
        ("ldadam", {"rank": 4, "error_feedback": "float32"}),
        ("apollo", {"rank": 4, "scale_type": "channel", "scale": 1.0}),
        ("apollo_mini", {"rank": 1, "scale_type": "tensor", "scale": 128.0}),
        ("fira", {"rank": 4, "basis": "subspace"}),
    ],
)
def test_entries_are_what_their_names_say(name: str, expected: dict[str, Any]) -> None:
    optimizer = stepped(name)
    assert isinstance(optimizer, RuleOptimizer)
    (group,) = optimizer.param_groups
    assert {key: group[key] for key in expected} == expected
    assert group["lr"] == 1e-3


# 4·6 numbers, 2·6 coordinates: a product of those sizes is 96 operations, a transform of six rows of four 6·20
TRANSFORMS, PRODUCT, MOMENTS = 120, 96, 2 * 4 * 12
QR = 4 * 4 * 4 - 10


@pytest.mark.parametrize(
    ("cost", "flops", "moments", "extra"),
    [
        (bench_costs.dct_adamw(), TRANSFORMS + PRODUCT, MOMENTS + 8, 48),
        (bench_costs.dct_adamw(ages=True), TRANSFORMS + PRODUCT, MOMENTS + 16, 48),
        (bench_costs.dct_adamw(state_dtype="int8"), TRANSFORMS + PRODUCT, 2 * (12 + 4) + 8, 48),
        (bench_costs.dct_adamw(error="int8"), TRANSFORMS + 2 * PRODUCT, MOMENTS + 8 + 24 + 4, 96),
        (bench_costs.dct_adamw(error="float32"), TRANSFORMS + 2 * PRODUCT, MOMENTS + 8 + 96, 96),
        (bench_costs.columns, 0, MOMENTS + 8, 48),
        # down, up, and G (Gᵀ Q)
        (bench_costs.every_step, 4 * PRODUCT + QR, MOMENTS + 32, 32 + 48),
        # the mean gradient, one power iteration of it, down, up, two more lifts for the error, and the error itself
        (bench_costs.ldadam, 8 * PRODUCT + QR, MOMENTS + 32 + 96, 96),
        (bench_costs.apollo, PRODUCT, MOMENTS, 48 + 32),
    ],
    ids=["dct", "ages", "int8", "error int8", "error", "columns", "every step", "ldadam", "apollo"],
)
@pytest.mark.parametrize("shape", [SHAPE, SHAPE[::-1]])
def test_costs_by_hand(
    shape: bench_costs.Shape, cost: bench_costs.CostOf, flops: int, moments: int, extra: int
) -> None:
    found = cost(shape, RANK, torch.float32)
    assert (found.flops, found.bfloat16_flops) == (flops, 0)
    assert (found.moments, found.basis, found.extra) == (moments, 0, extra)
    # no step is another's turn
    assert found.refresh_flops == found.first_flops == 0
    assert found.refresh_extra <= found.extra
    # in bfloat16 the mathematics and the state are float32 all the same
    assert cost(shape, RANK, torch.bfloat16) == found


def test_least_work_by_hand() -> None:
    work = Workload((SHAPE, SHAPE), rank=RANK, dtype=torch.float32)
    dct = least_work(ENTRIES["dct_adamw"], work)
    # weight and state twice, gradient once
    assert dct.step_bytes == 2 * (3 * 24 * 4 + 2 * (MOMENTS + 8))
    assert dct.step_flops == 2 * (TRANSFORMS + PRODUCT)
    assert dct.refresh_flops == ()
    # of one at a time
    assert dct.extra_bytes == 48
    mini = least_work(ENTRIES["apollo_mini"], work)
    # one direction, whatever the rank of the workload
    assert mini.state_bytes == 2 * 8 * 6
    assert mini.step_flops == 2 * 2 * 24


def test_whole_run_of_the_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    argv = ["--family", "projected", "--workload", "tiny", "--gap", "4", "--rounds", "3", "--baseline", "adamw_fused"]
    bench.main([*argv, "--entries", *OURS, "--out", str(out)])
    printed = capsys.readouterr().out
    (report,) = json.loads(out.read_text())["workloads"]
    assert report["baseline"] == "adamw_fused"
    assert list(report["results"]) == list(OURS)
    assert "flops" not in report
    assert not report["gradients_copied"]
    for name, row in report["results"].items():
        assert f"| {name} |" in printed
        assert (len(row["step_ms"]), len(row["first_step_ms"])) == (3, 1)
        assert 0 <= row["state_bytes"] - row["state_floor_bytes"] <= 32
        assert row["extra_ordinary_bytes"] >= row["extra_ordinary_floor_bytes"] * (name != "adamw_fused")
    ratio = report["results"]["dct_adamw_int8"]["median_ms"] / report["results"]["dct_adamw"]["median_ms"]
    assert report["results"]["dct_adamw_int8"]["median_over_float32"] == pytest.approx(ratio)
    assert "median_over_float32" not in report["results"]["dct_adamw"]


def test_without_the_peer_that_ratios_are_to_it_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.import_module

    def missing(name: str) -> Any:
        if name in ("galore_torch", "fira", "apollo_torch"):
            raise ImportError(f"No module named {name!r}")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    argv = ["--family", "projected", "--workload", "tiny", "--gap", "2", "--rounds", "1"]
    with pytest.raises(SystemExit) as left:
        bench.main([*argv, "--entries", "galore_torch", "ldadam"])
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: --baseline galore_torch: not installed: No module named 'galore_torch'\n"
    # the others are only listed
    bench.main([*argv, "--entries", "fira_peer", "apollo_torch", "ldadam", "--baseline", "ldadam"])
    printed = capsys.readouterr().out
    assert "| ldadam |" in printed
    assert "No module named 'fira'" in printed
    assert "No module named 'apollo_torch'" in printed


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_the_whole_family_with_its_peers(tmp_path: Path) -> None:
    for module in ("galore_torch", "fira", "apollo_torch"):
        pytest.importorskip(module)
    out = tmp_path / "bench.json"
    bench.main(["--family", "projected", "--workload", "tiny", "--gap", "2", "--rounds", "2", "--out", str(out)])
    (report,) = json.loads(out.read_text())["workloads"]
    assert report["absent"] == {}
    assert list(report["results"]) == list(FAMILY.names)
    assert report["results"]["galore_torch"]["median_over_baseline"] == 1.0
