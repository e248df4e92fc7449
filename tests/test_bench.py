"""The benchmark's instruments against known cases, and one small run of the whole."""

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from experiments import bench, bench_costs, bench_measure
from experiments.bench_entries import ENTRIES
from experiments.bench_workloads import (
    WORKLOADS,
    Entry,
    Workload,
    gradient_sets,
    least_work,
    llama_shapes,
    parameters,
    state_sizes,
)

TINY = WORKLOADS["tiny"]
MEGA = 2**20


def test_peak_extra_of_known_temporaries() -> None:
    x = torch.randn(MEGA)

    def action() -> None:
        y = x * 2
        z = y + 1
        del y
        z.add_(1)

    # y and z live together; scalars wrapped for the two operations are a few bytes
    assert 0 <= bench_measure.peak_extra_bytes(action) - 2 * x.nbytes <= 64


def test_peak_extra_sees_what_an_operation_allocates_inside() -> None:
    params = [nn.Parameter(torch.randn(MEGA)), nn.Parameter(torch.randn(MEGA // 2))]
    for p in params:
        p.grad = torch.randn_like(p)
    peaks = {}
    for kind in ("foreach", "fused"):
        optimizer = torch.optim.AdamW(params, lr=1e-3, **{kind: True})
        optimizer.step()
        peaks[kind] = bench_measure.peak_extra_bytes(optimizer.step)
    # foreach keeps one denominator per parameter, fused keeps nothing
    numel = sum(p.numel() for p in params)
    assert 0 <= peaks["foreach"] - 4 * numel < 4096
    assert peaks["fused"] < 4096


def test_peak_extra_counts_a_replaced_tensor_once() -> None:
    held: list[torch.Tensor] = []
    with bench_measure._profiled():
        held.extend(torch.zeros(MEGA) for _ in range(4))

    def replace_all() -> None:
        for i in range(len(held)):
            held[i] = torch.zeros(MEGA)

    assert 0 <= bench_measure.peak_extra_bytes(replace_all) - 4 * MEGA <= 64


def test_whole_run_on_two_small_matrices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "bench.json"
    names = ["adamw_foreach", "adamw_fused", "galore_svd", "galore_svd_unstaggered", "galore_subspace"]
    bench.main(["--workload", "tiny", "--gap", "4", "--periods", "3", "--entries", *names, "--out", str(out)])
    printed = capsys.readouterr().out
    document = json.loads(out.read_text())
    assert document["command"].startswith("python -m experiments.bench --workload tiny")
    assert document["machine"]["threads"] == torch.get_num_threads()
    assert document["machine"]["versions"]["torch"] == torch.__version__
    (report,) = document["workloads"]
    assert list(report["results"]) == names
    for name, row in report["results"].items():
        assert f"| {name} |" in printed
        # three whole periods, and as many first steps
        assert len(row["step_ms"]) == 3 * 4
        assert len(row["first_step_ms"]) == 3
        assert row["first_ms"] == pytest.approx(min(row["first_step_ms"]), abs=1e-3)
        assert 0 < row["median_floor_ms"] <= row["median_ms"] <= row["worst_ms"] <= row["raw_worst_ms"]
        assert row["min_ms"] <= row["amortized_ms"] <= row["worst_ms"]
        assert 1 <= row["worst_over_median"] <= row["worst_over_median_with_first"]
        # the formula, and a few bytes for step counters
        assert 0 <= row["state_bytes"] - row["state_floor_bytes"] <= 64
        assert row["state_held_bytes"] >= row["state_bytes"]
        assert row["extra_worst_bytes"] >= row["extra_ordinary_bytes"] >= 0
    assert report["results"]["adamw_fused"]["median_over_baseline"] == 1.0


def test_phases_keep_their_place_in_the_period() -> None:
    racer = bench_measure.Racer(ENTRIES["adamw_loop"], [], torch.optim.SGD([torch.zeros(1, requires_grad=True)]))
    # two periods of three steps; noise hit a different step in each
    racer.times = [0.001, 0.5, 0.003, 0.7, 0.002, 0.004]
    assert racer.best_period(3).tolist() == pytest.approx([1.0, 2.0, 3.0])


def test_a_missing_peer_is_listed_with_its_reason() -> None:
    def build(params: list[nn.Parameter], rank: int, gap: int) -> torch.optim.Optimizer:
        importlib.import_module("a_peer_that_nobody_has")
        raise AssertionError("unreachable")

    entries = {"adamw_fused": ENTRIES["adamw_fused"], "peer": Entry(build, bench_costs.adamw)}
    gradients = bench_measure.Gradients(gradient_sets(TINY, "cpu"))
    racers, absent = bench_measure.line_up(entries, TINY, 4, "cpu", gradients)
    assert list(racers) == ["adamw_fused"]
    assert "a_peer_that_nobody_has" in absent["peer"]


class _Projector:
    """State as a peer keeps it: an object that holds a view of a larger matrix."""

    def __init__(self) -> None:
        self.basis = torch.zeros(10, 10)[:, :2]


def test_state_inside_objects_is_counted_and_views_tell_what_they_hold() -> None:
    p = nn.Parameter(torch.zeros(10, 3))
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state[p]["projector"] = _Projector()
    # a container is seen once
    optimizer.state[p]["nested"] = {"scale": torch.zeros(5)}
    assert state_sizes(optimizer) == (4 * (30 + 20 + 5), 4 * (30 + 100 + 5))


@pytest.mark.peers
@pytest.mark.skipif(importlib.util.find_spec("galore_torch") is None, reason="galore-torch is not installed")
def test_the_peer_runs_and_keeps_its_whole_svd_factor() -> None:
    report = bench.bench(
        "tiny", ["adamw_fused", "galore_torch"], gap=3, periods=1, baseline="adamw_fused", device="cpu"
    )
    row = report["results"]["galore_torch"]
    assert row["state_bytes"] == row["state_floor_bytes"]
    # V of 24 x 16 and U of 16 x 40 in full instead of their four columns
    assert row["state_held_bytes"] - row["state_bytes"] == 4 * 2 * (16 * 16 - 16 * 4)
    assert not report["absent"]


def test_gradients_decay_and_turn() -> None:
    work = Workload(((48, 64),), rank=8, dtype=torch.float32)
    first, second, *_ = (grads[0] for grads in gradient_sets(work, "cpu"))
    assert not torch.equal(first, second)
    sigma = torch.linalg.svdvals(first)
    assert sigma[0] > 10 * sigma[-1] > 0
    bases = [torch.linalg.svd(g).U[:, :8] for g in (first, second)]
    overlap = float((bases[0].T @ bases[1]).square().sum() / 8)
    assert 0.3 < overlap < 0.99


def test_every_optimizer_starts_from_the_same_weights() -> None:
    one, two = parameters(TINY, "cpu"), parameters(TINY, "cpu")
    assert all(torch.equal(a, b) and a is not b for a, b in zip(one, two, strict=True))


def test_default_workload_is_the_25m_llama() -> None:
    work = WORKLOADS["25m"]
    assert len(work.shapes) == 56
    assert work.numel == 8 * (4 * 512 * 512 + 3 * 512 * 1376)
    assert llama_shapes(1, 512, 1376)[-3:] == ((1376, 512), (1376, 512), (512, 1376))


def test_least_work_by_hand() -> None:
    work = Workload(((6, 4),), rank=2, dtype=torch.bfloat16)
    adamw = least_work(ENTRIES["adamw_fused"], work)
    assert (adamw.step_bytes, adamw.state_bytes, adamw.refresh_flops) == (7 * 24 * 2, 2 * 24 * 2, ())
    ours = least_work(ENTRIES["galore_svd"], work)
    # weight twice and gradient once in bfloat16; basis once and two moments twice in float32
    assert ours.step_bytes == 3 * 24 * 2 + (4 * 2 + 4 * 6 * 2) * 4
    assert ours.step_flops == 2 * (2 * 6 * 4 * 2)
    assert ours.state_bytes == (2 * 6 * 2 + 4 * 2) * 4
    assert ours.extra_bytes == 6 * 2 * 4
    assert least_work(ENTRIES["galore_torch"], work).state_bytes * 2 == ours.state_bytes


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gap", "0"], "--gap must be at least 1"),
        (["--entries", "galore_svd"], "--baseline adamw_fused must be among"),
        (["--entries", "nonsense"], "invalid choice"),
    ],
)
def test_bad_arguments_are_named(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(argv)
    assert message in capsys.readouterr().err


def test_a_baseline_that_is_not_installed_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "galore_torch", None)
    with pytest.raises(SystemExit) as left:
        bench.main(["--workload", "tiny", "--entries", "galore_torch", "--baseline", "galore_torch"])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --baseline galore_torch: not installed: ")
    assert said.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_flag_without_a_gpu_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--gpu"])
    assert "--gpu needs a CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_whole_run_on_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    bench.main(["--gpu", "--workload", "tiny", "--gap", "4", "--out", str(out)])
    results: dict[str, Any] = json.loads(out.read_text())["workloads"][0]["results"]
    assert all(row["median_ms"] > 0 for row in results.values())
