"""The benchmark of kernels: floors by hand, every case on tiny matrices, and one small run of the whole on the CPU."""

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import bench, bench_targets
from experiments.bench_tables import kernel_tables
from experiments.bench_targets import Ceilings, WallTimer, sampled, target_parts

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CEILINGS = Ceilings(bytes_per_ms=1e6, flops_per_ms=1e9)


class Counting(WallTimer):
    """A clock by which every call takes two milliseconds, and the host one."""

    def __init__(self) -> None:
        self.ahead: list[float] = []

    def laps(self, action: Callable[[], object], count: int, ahead_ms: float = 0.0) -> list[float]:
        self.ahead.append(ahead_ms)
        for _ in range(count):
            action()
        return [2.0 * (i + 1) for i in range(count)]

    def host_ms(self, action: Callable[[], object]) -> float:
        action()
        return 1.0


def test_floors_by_hand() -> None:
    # memory and arithmetic side by side: the longer of both
    assert CEILINGS.floor_ms(3e6, 2e9) == 3.0
    assert CEILINGS.floor_ms(1e6, 2e9) == 2.0


def test_inputs_take_turns_and_samples_are_per_call() -> None:
    seen: list[int] = []
    timer = Counting()
    figures = sampled([lambda: seen.append(0), lambda: seen.append(1), lambda: seen.append(2)], timer)
    assert seen == [i % 3 for i in range(len(seen))]
    # a call takes two, so that a sample is of the fewest: two calls
    assert figures["calls"] == 2
    assert figures["times_ms"] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert (figures["median_ms"], figures["min_ms"], figures["host_ms"]) == (4.0, 1.0, 1.0)
    # the device has work for as long as the host launches
    assert timer.ahead == [3.0, 1.5 * 2 * 7]
    sampled([lambda: None], timer, with_host=True)
    assert timer.ahead[3:] == [0.0]


def test_short_calls_are_timed_together() -> None:
    class Short(Counting):
        def laps(self, action: Callable[[], object], count: int, ahead_ms: float = 0.0) -> list[float]:
            return [lap / 100 for lap in super().laps(action, count, ahead_ms)]

    assert sampled([lambda: None], Short())["calls"] == 20


def test_a_target_is_met_or_not_or_only_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_targets, "MOST", {"a": 1.5})
    assert [bench_targets.target("a", x)["met"] for x in (1.4, 1.5, 1.6)] == [True, True, False]
    assert bench_targets.target("b", 9.0, ours={}) == {
        "target": "b", "figure": 9.0, "most": None, "met": None, "ours": {}
    }  # fmt: skip


def test_ceilings_are_of_bytes_both_ways_and_of_two_operations() -> None:
    ceilings, figures = bench_targets.measure_ceilings(Counting(), shrink=1024)
    assert ceilings.bytes_per_ms == 2 * 4 * (1 << 28) // 1024**2 / 4.0
    assert ceilings.flops_per_ms == 2 * 8**3 / 4.0
    assert figures["copy_gb_per_s"] == ceilings.bytes_per_ms / 1e6
    assert figures["product_side"] == 8


def test_the_standard_form_is_muons() -> None:
    x = torch.randn(2, 16, 40)
    sigma = torch.linalg.svdvals(bench_targets.standard(x).float())
    assert sigma.min() > 0.5
    assert sigma.max() < 1.3


def test_targets_on_tiny_matrices_have_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_targets, "MOST", {"Muon in int8 ÷ in float32, step": 1e9})
    # the clocks of a CPU may say 0 for the shortest
    with torch.compiler.set_stance("force_eager"):
        found = {part.name: part.measure() for part in target_parts(WallTimer(), shrink=256, gap=3)}
    assert [len(rows) for rows in found.values()] == [2, 2, 2, 2, 14, 6]
    rows = [row for some in found.values() for row in some]
    assert len({row["target"] for row in rows}) == len(rows)
    assert all(math.isfinite(row["figure"]) and row["figure"] > 0 for row in rows)
    assert [row["target"] for row in rows if row["met"]] == ["Muon in int8 ÷ in float32, step"]
    for row in found["projected AdamW"]:
        ours = row["ours"]
        assert len(ours["times_ms"]) == 3
        assert ours["worst_ms"] >= ours["mean_ms"] >= ours["min_ms"] > 0
        if "worst step" in row["target"]:
            assert row["figure"] == pytest.approx(ours["worst_ms"] / ours["median_ms"])
        if "mean of a period" in row["target"]:
            assert row["figure"] == pytest.approx(ours["mean_ms"] / row["other"]["median_ms"])


def test_the_matrices_are_those_of_a_model_and_of_one_layer() -> None:
    measured = {part.name: part.measure for part in target_parts(WallTimer())}
    work = {name: getattr(measured[name], "args", ())[0] for name in ("projected AdamW", "Muon")}
    layer = 4 * 4096 * 4096 + 3 * 4096 * 11008
    assert {name: w.numel for name, w in work.items()} == {"projected AdamW": 32 * layer, "Muon": layer}
    assert {w.dtype for w in work.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--family", "kernels"], "--family kernels needs --gpu"),
        (["--gpu", "--family", "kernels", "--workload", "tiny"], "--family kernels takes no --workload"),
        (["--family", "kernels", "--rounds", "3"], "--family kernels takes no --rounds"),
    ],
)
def test_bad_arguments_are_named(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(argv)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "family"),
    [
        (["--gpu"], "kernels"),
        (["--gpu", "--out", "x.json"], "kernels"),
        (["--gpu", "--family", "kernels"], "kernels"),
        (["--gpu", "--workload", "7b"], "galore"),
        (["--gpu", "--family", "muon"], "muon"),
        ([], "galore"),
    ],
)
def test_a_gpu_measures_kernels_unless_told_otherwise(
    argv: list[str], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert bench._arguments(argv).family == family


def test_results_go_by_the_devices_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(document: dict[str, Any], timer: WallTimer, save: Callable[[], None]) -> None:
        ceilings = {"copy_gb_per_s": 4300.0, "bfloat16_tflop_per_s": 760.0, "product_side": 8192}
        document |= {"ceilings": ceilings, "kernels": [], "targets": [], "failures": []}
        save()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(bench, "machine", lambda device: {"device": "NVIDIA H200 (x1)", "versions": {"cuda": "13"}})
    monkeypatch.setattr(bench, "CudaTimer", WallTimer)
    monkeypatch.setattr(bench, "bench_kernels", measured)
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    bench.main(["--gpu"])
    bench.main(["--gpu", "--out", str(tmp_path / "there" / "x.json")])
    document = json.loads((tmp_path / "nvidia_h200_x1.json").read_text())
    assert document["command"] == "python -m experiments.bench --gpu"
    assert document["machine"]["capability"] == [9, 0]
    assert (tmp_path / "there" / "x.json").exists()
    assert "Copy 4300 GB/s, bfloat16 product of 8192³ 760 TFLOP/s" in capsys.readouterr().out


needs_triton = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")


def kernel_cases(shrink: int) -> Iterator[Any]:
    from experiments import bench_kernels

    yield from bench_kernels.cases("cpu", shrink)


@needs_triton
def test_floors_count_what_must_move_by_hand() -> None:
    counted = {}
    for case in kernel_cases(shrink=64):
        forms = case.make()
        counted.setdefault((case.kernel, case.size), (forms.nbytes, forms.flops))
    assert len(counted) == 4 + 2 + 2 + 4 + 3 + 2 + 9 + 1 + 3
    # A of 64·64 read, the result written; a triangle of 64·65/2 products of 64 terms
    assert counted["symmetric: Gram", "1x4096x4096"] == (2 * 2 * 64 * 64, 64 * 65 * 64)
    assert counted["symmetric: polynomial", "32x1024x1024"] == (2 * 2 * 32 * 16 * 16, 32 * 16 * 16 * 17)
    # 8·16·64 numbers: gradient, direction, two moments twice
    assert counted["adam, float32", "8x1024x4096"] == (8 * 16 * 64 * (4 + 2 + 16), 0.0)
    assert counted["adam, int8", "8x1024x4096"] == (8 * 16 * 64 * (4 + 2 + 4) + 2 * 2 * 8 * 4 * 4, 0.0)
    assert counted["momentum, float32", "4096x11008"] == (64 * 172 * (2 + 2 + 2 + 3 * 4), 0.0)
    assert counted["apply, nearest", "11008x4096"] == (64 * 172 * 6, 0.0)
    assert counted["factored_add, stochastic", "4096x11008, r=1024"] == (
        2 * (2 * 64 * 172 + 16 * (64 + 172)), 2 * 64 * 172 * 16
    )  # fmt: skip
    assert counted["adamw", "2 of 32000x4096, 65 of 4096"] == ((2 * 500 * 64 + 65 * 64) * 22, 0.0)
    assert counted["dct_energies", "4096x11008, dim -2"] == (2 * 2 * 64 * 172 + 4 * 64, 2.5 * 64 * 172 * 6)


@needs_triton
def test_every_kernel_agrees_with_its_twin_on_tiny_matrices() -> None:
    for case in kernel_cases(shrink=128):
        forms = case.make()
        got, expected = (x.double() for x in forms.check())
        error = float((got - expected).norm() / expected.norm())
        # what rounding to bfloat16 does, at random or not; float32 has less
        assert error < (1e-5 if "recursion" in case.kernel else 4e-3), (case.kernel, case.size)
        forms.plain()


@needs_triton
def test_whole_run_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments import bench_kernels

    def failing() -> Any:
        raise RuntimeError("out of something\nand more")

    sizes = ("1x4096x11008", "4096x4096, r=256")
    wanted = [case for case in bench_kernels.cases("cpu", 64) if case.size in sizes]
    chosen = [*wanted, bench_kernels.Case("broken", "1x1", "none", failing)]
    monkeypatch.setattr(bench_kernels, "cases", lambda device, shrink: chosen)
    monkeypatch.setattr(bench_kernels, "_ROTATION_BYTES", 1 << 16)
    rows = [bench_targets.target("a", 2.0, ours={"median_ms": 4.0, "host_ms": 3.0})]
    monkeypatch.setattr(bench, "target_parts", lambda timer, shrink: [bench_targets.Part("a", lambda: rows)])
    out = tmp_path / "results" / "cpu.json"
    document: dict[str, Any] = {"machine": {"device": "cpu", "versions": {"torch": "2", "triton": "3"}}}
    saved: list[int] = []

    def save() -> None:
        saved.append(len(document["kernels"]))
        bench._save(document, out)

    bench.bench_kernels(document, WallTimer(), save, shrink=64)
    # after each part
    assert saved == [1, 2, 2, 2]
    found = json.loads(out.read_text())
    assert found == document
    assert found["failures"] == [{"part": "broken 1x1", "error": "RuntimeError: out of something"}]
    ceilings = found["ceilings"]
    assert [row["kernel"] for row in found["kernels"]] == [case.kernel for case in wanted]
    for row in found["kernels"]:
        floor = max(
            row["bytes"] / (ceilings["copy_gb_per_s"] * 1e6), row["flops"] / (ceilings["bfloat16_tflop_per_s"] * 1e9)
        )
        assert row["floor_ms"] == pytest.approx(floor)
        assert row["floor_fraction"] == pytest.approx(floor / row["median_ms"])
        assert row["sets"] == min(64, max(2, (1 << 16) // row["bytes"]))
        assert len(row["times_ms"]) == len(row["torch"]["times_ms"]) == bench_targets.SAMPLES
        assert row["torch_over_kernel"] == pytest.approx(row["torch"]["median_ms"] / row["median_ms"])
    printed = kernel_tables(found)
    assert "### cpu: torch 2, triton 3" in printed
    for row in found["kernels"]:
        assert f"| {row['kernel']} | {row['size']} |" in printed
    assert "| a | 2.000 |  |  | 4 |  | 3 |" in printed
    assert printed.endswith("Failed: broken 1x1, RuntimeError: out of something.\n")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_device_is_timed_and_not_the_host() -> None:
    timer = bench_targets.CudaTimer()
    x = torch.randn(4096, 4096, device="cuda")
    figures = sampled([lambda: x.mul_(1.0), lambda: x.add_(0.0)], timer)
    # 134 MB, at 1 to 20 TB/s
    assert 0.005 < figures["min_ms"] < 0.2
    assert 0.005 < timer.busy_ms(lambda: x.mul_(1.0)) < 0.2
    before = x.clone()
    timer.replay(lambda: x.mul_(2.0))()
    torch.cuda.synchronize()
    # once while it was tried, once as a graph
    assert torch.equal(x, 4 * before)
