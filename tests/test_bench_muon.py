"""The benchmark of orthogonalized momentum: formulas by hand, operations as counted, and one small run of the whole."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from experiments import bench, bench_costs, bench_measure
from experiments.bench_entries import ENTRIES, FAMILIES
from experiments.bench_flops import count, count_entry, newton_schulz_theory
from experiments.bench_workloads import WORKLOADS, Entry, Workload, gradient_sets, least_work, parameters

TINY = WORKLOADS["tiny"]
PEERS = ("heavyball", "pytorch_optimizer", "muon_optimizer")
OURS = tuple(name for name in FAMILIES["muon"].names if name not in PEERS)


@pytest.mark.parametrize(
    ("a", "standard", "symmetric", "gram", "gram_symmetric", "one_shot"),
    [(1, 30, 20, 36, 20, 20), (4, 90, 65, 60, 38, 29), (8, 170, 125, 92, 62, 41), (16, 330, 245, 156, 110, 65)],
)
def test_newton_schulz_in_units_of_the_cube(
    a: int, standard: int, symmetric: int, gram: int, gram_symmetric: int, one_shot: int
) -> None:
    n = 32
    theory = newton_schulz_theory((a * n, n))
    cubes = {form: flops / n**3 for form, flops in theory.items()}
    assert cubes["standard"] == standard
    assert cubes["standard, symmetric"] == symmetric
    assert cubes["Gram, one restart"] == gram
    assert cubes["Gram, one restart, symmetric"] == gram_symmetric
    assert cubes["Gram, symmetric"] == one_shot


def test_bytes_of_quantized_numbers() -> None:
    assert bench_costs.kept_bytes(1000, "float32") == 4000
    assert bench_costs.kept_bytes(1000, "bfloat16") == 2000
    # four blocks of 256, sixteen of 64
    assert bench_costs.kept_bytes(1000, "int8") == 1000 + 16
    assert bench_costs.kept_bytes(1000, "int4") == 500 + 64


def test_counted_products_in_place_and_decompositions() -> None:
    x, y, z = torch.randn(3, 4, 6, 8).unbind()
    one, two = x[0], y[0]

    def action() -> None:
        torch.zeros(4, 6, 6).baddbmm_(x, y.mT)
        torch.zeros(6, 6).addmm_(one, two.mT)
        torch.addmm(torch.zeros(6, 6), one, two.mT, out=torch.empty(6, 6))
        torch.linalg.qr(z.mT)
        torch.linalg.svd(one, full_matrices=False)
        torch.linalg.eigh(one @ one.mT)
        torch.fft.rfft(one.mT.contiguous(), dim=0)

    found, uncounted = count(action)
    product = 2 * 6 * 8 * 6
    assert found["baddbmm_"] == 4 * product
    assert found["addmm_"] == found["addmm"] == found["mm"] == product
    assert found["linalg_qr"] == 4 * (4 * 8 * 36 - 4 * 216 // 3)
    assert found["_linalg_svd"] == min(14 * 8 * 36 + 8 * 216, 6 * 8 * 36 + 20 * 216)
    assert found["_linalg_eigh"] == 9 * 216
    # six sequences of eight
    assert found["_fft_r2c"] == 6 * 60
    assert uncounted == []


def test_an_operation_without_a_formula_is_named() -> None:
    matrix = torch.eye(4)
    assert count(lambda: torch.linalg.inv(matrix))[1] == ["linalg_inv_ex"]
    assert count(lambda: matrix.sqrt().square()) == ({}, [])


@pytest.mark.parametrize("name", OURS)
def test_every_operation_is_counted_and_none_is_beneath_the_formula(name: str) -> None:
    for row in count_entry(ENTRIES[name], TINY, "cpu").values():
        assert row["uncounted"] == []
        assert row["counted"] >= row["formula"]
        assert row.get("refresh_counted", 0) >= row.get("refresh_formula", 0)


def test_torch_muon_is_the_standard_form() -> None:
    for shape, row in count_entry(ENTRIES["torch_muon"], TINY, "cpu").items():
        m, n = map(int, shape.split("x"))
        assert row["counted"] == row["formula"] == newton_schulz_theory((m, n))["standard"]


@pytest.mark.parametrize("name", OURS)
def test_state_is_the_formula(name: str) -> None:
    params = parameters(TINY, "cpu")
    optimizer = ENTRIES[name].build(params, TINY.rank, 3)
    for p, g in zip(params, gradient_sets(TINY, "cpu")[0], strict=True):
        p.grad = g.clone()
    optimizer.step()
    # the formula, and four bytes for each step counter
    assert 0 <= bench_measure.state_sizes(optimizer)[0] - least_work(ENTRIES[name], TINY).state_bytes <= 8


def test_least_work_of_muon_by_hand() -> None:
    work = Workload(((6, 4),), rank=2, dtype=torch.float32)
    peer = least_work(ENTRIES["muon_optimizer"], work)
    # weight and momentum twice, gradient once
    assert peer.step_bytes == 5 * 24 * 4
    assert peer.step_flops == 0
    assert peer.step_bfloat16_flops == 5 * (4 * 16 * 6 + 2 * 64)
    assert peer.extra_bytes == peer.refresh_extra_bytes == 2 * (24 + 2 * 16)
    lowrank = least_work(ENTRIES["lowrank_muon"], work)
    # the transform of six rows of four, the update lifted, and Newton–Schulz on 6×2
    assert lowrank.step_flops == 6 * 20 + 2 * 6 * 4 * 2 + min(5 * (3 * 4 * 6 + 8), 3 * 4 * 6 + 17 * 8)
    assert lowrank.state_bytes == 4 * (2 * 6 + 2)


def test_gradients_are_copied_where_one_optimizer_writes_to_them() -> None:
    def build(params: list[nn.Parameter], rank: int, gap: int) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(params, lr=0.1)
        optimizer.register_step_post_hook(lambda *_: [p.grad.zero_() for p in params if p.grad is not None])
        return optimizer

    sets = gradient_sets(TINY, "cpu")
    before = [[g.clone() for g in grads] for grads in sets]
    gradients = bench_measure.Gradients(sets, copied=True)
    entries = {"writer": Entry(build, bench_costs.adamw, writes_gradients=True), "torch_muon": ENTRIES["torch_muon"]}
    racers, _ = bench_measure.line_up(entries, TINY, 3, "cpu", gradients)
    bench_measure.race(racers, TINY, gradients, 3, 4, "cpu", firsts=1)
    assert all(torch.equal(a, b) for old, new in zip(before, sets, strict=True) for a, b in zip(old, new, strict=True))
    # and what the second one saw was whole
    assert all(bool(v["momentum_buffer"].any()) for v in racers["torch_muon"].optimizer.state.values())
    assert [len(racer.times) for racer in racers.values()] == [4, 4]


def test_an_optimizer_that_cannot_be_compiled_is_listed_with_its_reason() -> None:
    def build(params: list[nn.Parameter], rank: int, gap: int) -> torch.optim.Optimizer:
        raise RuntimeError("no compiler\nand a long story")

    gradients = bench_measure.Gradients(gradient_sets(TINY, "cpu"))
    _, absent = bench_measure.line_up(
        {"peer": Entry(build, bench_costs.adamw, compiles=True)}, TINY, 3, "cpu", gradients
    )
    assert absent == {"peer": "cannot be compiled here: no compiler"}
    with pytest.raises(RuntimeError, match="no compiler"):
        bench_measure.line_up({"ours": Entry(build, bench_costs.adamw)}, TINY, 3, "cpu", gradients)


def test_whole_run_of_the_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    names = ["torch_muon", "muon", "muon_int8", "lowrank_muon", "lowrank_muon_svd", "galore_svd", "galore_svd_int8"]
    argv = ["--family", "muon", "--workload", "tiny", "--gap", "4", "--rounds", "3"]
    bench.main([*argv, "--entries", *names, "--out", str(out)])
    printed = capsys.readouterr().out
    (report,) = json.loads(out.read_text())["workloads"]
    assert report["baseline"] == "torch_muon"
    assert list(report["results"]) == list(report["flops"]) == names
    for name, row in report["results"].items():
        assert f"| {name} |" in printed
        assert len(row["step_ms"]) == 3
        assert len(row["first_step_ms"]) == 1
        # medians of what was seen, not of the fastest
        assert row["median_ms"] == pytest.approx(sorted(row["step_ms"])[1], abs=1e-3)
        assert row["worst_ms"] == row["raw_worst_ms"]
    assert report["results"]["torch_muon"]["median_over_baseline"] == 1.0
    ratio = report["results"]["muon_int8"]["median_ms"] / report["results"]["muon"]["median_ms"]
    assert report["results"]["muon_int8"]["median_over_float32"] == pytest.approx(ratio)
    assert "median_over_float32" in report["results"]["galore_svd_int8"]
    assert "Newton–Schulz, 5 steps: standard" in printed
    assert "without a formula" not in printed


@pytest.mark.peers
@pytest.mark.parametrize("name", PEERS)
def test_peers_run_and_do_the_work_of_the_standard_form(name: str) -> None:
    module = {"muon_optimizer": "muon"}.get(name, name)
    pytest.importorskip(module)
    # compiling takes a minute and is not what is tested here
    with torch.compiler.set_stance("force_eager"):
        report = bench.bench(
            "tiny", ["torch_muon", name], gap=3, periods=1, baseline="torch_muon", device="cpu", rounds=2, flops=True
        )
    assert report["gradients_copied"]
    row: dict[str, Any] = report["results"][name]
    assert row["state_bytes"] - row["state_floor_bytes"] <= 64
    for shape in report["flops"][name].values():
        assert shape["counted"] == shape["formula"]
        assert shape["uncounted"] == []
