"""The benchmark of M-FAC: bytes by hand, windows that are consistent, and one small run of the whole."""

import json
from pathlib import Path

import pytest
import torch

from experiments import bench_fisher
from experiments.bench_fisher import CONTENDERS, SIZES
from experiments.bench_workloads import parameters
from lowrank_optim import MFAC

TINY = SIZES["tiny"]
OPTIMIZERS = tuple(name for name in CONTENDERS if name.startswith("mfac"))


@pytest.mark.parametrize("name", CONTENDERS)
def test_state_is_the_formula_to_the_byte(name: str) -> None:
    made = CONTENDERS[name].make(TINY, "cpu")
    assert made.kept == made.formula
    made.action()


def test_the_formula_by_hand() -> None:
    # 24·16 + 16·40 numbers, 8 gradients; one ring with three counts, two counters of steps
    ring, steps = 16 * 8 * 8 + 24, 2 * 4
    assert bench_fisher.mfac_bytes(TINY, {}) == 4 * 8 * 1024 + ring + steps
    assert bench_fisher.mfac_bytes(TINY, {}, state_dtype="bfloat16") == 2 * 8 * 1024 + ring + steps
    assert bench_fisher.mfac_bytes(TINY, {}, momentum=0.9) == 4 * 9 * 1024 + ring + steps
    assert bench_fisher.mfac_bytes(TINY, {}, scope="parameter") == 4 * 8 * 1024 + 2 * ring + steps
    # rank 4 of both: 24·4 + 4·40
    assert bench_fisher.mfac_bytes(TINY, {"basis": 12}, rank=0.25) == 4 * 8 * 256 + ring + steps + 12


def test_sizes_are_what_they_are_called() -> None:
    assert [len(SIZES[name].work.shapes) for name in ("25m", "6m")] == [56, 14]
    assert 25e6 < SIZES["25m"].work.numel < 26e6
    # a round may hold two at a time
    assert SIZES["25m"].window_bytes == SIZES["6m"].window_bytes < 4e9


def test_a_window_that_is_filled_is_one_that_has_been_pushed() -> None:
    params = parameters(TINY.work, "cpu")
    optimizer = MFAC(params, num_grads=TINY.num_grads, damping=1e-5)
    bench_fisher.fill(optimizer, params, torch.Generator().manual_seed(0))
    rows = torch.cat([optimizer.state[p]["window"].flatten(1) for p in params], 1).double()
    state = optimizer.state[params[0]]
    assert int(torch.linalg.matrix_rank(rows)) == TINY.num_grads
    torch.testing.assert_close(state["gram"], rows @ rows.T, rtol=1e-4, atol=1e-8)
    for p in params:
        p.grad = torch.randn_like(p) * bench_fisher.SCALE
    optimizer.step()
    rows = torch.cat([optimizer.state[p]["window"].flatten(1) for p in params], 1).double()
    shifted = rows @ rows.T + TINY.num_grads * 1e-5 * torch.eye(TINY.num_grads, dtype=torch.float64)
    # products of what filled it are in float32
    torch.testing.assert_close(state["gram_inverse"], torch.linalg.inv(shifted), rtol=1e-3, atol=1.0)
    assert int(state["window_step"]) == 1


def test_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    bench_fisher.main(["--size", "tiny", "--rounds", "2", "--out", str(out)])
    printed = capsys.readouterr().out
    document = json.loads(out.read_text())
    (report,) = document["sizes"]
    assert document["command"].startswith("python -m experiments.bench_fisher --size tiny")
    assert list(report["results"]) == list(CONTENDERS)
    assert set(OPTIMIZERS) < set(CONTENDERS)
    for name, row in report["results"].items():
        assert f"| {name} |" in printed
        assert (len(row["own_ms"]), len(row["floor_ms"])) == (2, 2)
        assert row["state_bytes"] == row["state_formula_bytes"]
        assert row["median_over_floor"] == pytest.approx(row["median_ms"] / row["floor_median_ms"])


def test_a_wrong_argument_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_fisher.main(["--rounds", "0"])
    assert "--rounds must be at least 1, got 0" in capsys.readouterr().err
