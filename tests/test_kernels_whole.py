"""Whole optimizers on the kernels, interpreted, against the same ones on plain torch."""

import contextlib
import copy
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_optim import Diagnostics, GaLoreAdamW, LowRankMuon, Muon, backend, ops, orthogonalize
from lowrank_optim.coefficients import table
from lowrank_optim.orthogonal import Plan, plan

pytest.importorskip("triton", reason="triton is not installed")

from lowrank_optim.kernels import adamw, momentum, recursion
from tests.kernels.common import shapes_seen

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run on the CPU with TRITON_INTERPRET=1 only"
)

SHAPES = [(12, 20), (20, 12), (12, 20), (8, 3, 2, 2), (7,)]


def moved(kind: Any, name: Any, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """Return how far each parameter has gone in a few steps."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    before = [p.detach().float().clone() for p in params]
    opt = kind(params, lr=0.1, weight_decay=0.1, **options)
    with backend(name):
        for step in range(3):
            for p in params:
                p.grad = (torch.randn(p.shape) + 0.2 * step).to(dtype)
            opt.step()
    return [p.detach().float() - start for p, start in zip(params, before, strict=True)]


KEPT = [("float32", torch.float32), ("float32", torch.bfloat16), ("bfloat16", torch.float32), ("int8", torch.bfloat16)]
# by a name: which optimizer, its options, and how many of the above it is tried with
KINDS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "muon": (Muon, {"ns_dtype": "float32"}, 4),
    "muon-sum": (Muon, {"ns_dtype": "float32", "momentum_form": "sum", "nesterov": False}, 1),
    "muon-by-chance": (Muon, {"ns_dtype": "float32", "stochastic_rounding": True}, 2),
    "muon-cautious": (Muon, {"ns_dtype": "float32", "cautious": True}, 2),
    "lowrank-muon": (LowRankMuon, {"rank": 4, "ns_dtype": "float32"}, 2),
    "galore": (GaLoreAdamW, {"rank": 4, "basis": "random"}, 4),
    "galore-scaled": (GaLoreAdamW, {"rank": 4, "basis": "random", "scale": 2.0, "maximize": True}, 1),
}


@pytest.mark.parametrize(
    ("kind", "options", "state_dtype", "dtype"),
    [
        pytest.param(kind, options, *kept, id=f"{name}-{kept[0]}-{kept[1]}")
        for name, (kind, options, count) in KINDS.items()
        for kept in KEPT[:count]
    ],
)
def test_steps_equal_those_on_torch(kind: Any, options: dict[str, Any], state_dtype: str, dtype: torch.dtype) -> None:
    options = options | {"state_dtype": state_dtype}
    expected, found = (moved(kind, name, dtype, **options) for name in ("torch", "triton"))
    for ours, theirs in zip(found, expected, strict=True):
        # a code or a bfloat16 that falls on the other side of a boundary is another by a whole step of its grid
        limit = 1e-4 if dtype == torch.float32 and state_dtype == "float32" else 2e-2
        assert float((ours - theirs).norm() / theirs.norm()) < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_directions_of_16_bits_are_added_to_every_weight(dtype: torch.dtype) -> None:
    expected, found = (moved(LowRankMuon, name, dtype, rank=4, method="newton_schulz") for name in ("torch", "triton"))
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chance", [False, True])
@pytest.mark.filterwarnings("ignore:GaLoreAdamW. no parameter group has a rank:RuntimeWarning")
def test_what_is_adamw_alone_is_one_launch_for_each_shape(
    chance: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = shapes_seen(monkeypatch, adamw, "adamw_")
    options = {"rank": None, "stochastic_rounding": chance, "maximize": True}
    expected, found = (moved(GaLoreAdamW, name, dtype, **options) for name in ("torch", "triton"))
    assert seen == [SHAPES[0], SHAPES[0], SHAPES[1], SHAPES[3], SHAPES[4]] * 3
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.filterwarnings("ignore:GaLoreAdamW. no parameter group has a rank:RuntimeWarning")
def test_a_run_of_adamw_resumes_bit_for_bit_and_goes_on_with_a_listener() -> None:
    """With one, who wants to see updates, weights are written one by one."""

    def run(steps: int, listener: bool = False, resume: int | None = None) -> tuple[Tensor, dict[str, Any]]:
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(6, 70).bfloat16())
        opt = GaLoreAdamW([p], rank=None, lr=0.1, stochastic_rounding=True)
        for step in range(steps):
            p.grad = torch.full_like(p, 0.1 * (step + 1))
            if step == resume:
                state = copy.deepcopy(opt.state_dict())
                opt = GaLoreAdamW([p], rank=None)
                opt.load_state_dict(state)
            with backend("triton"), Diagnostics(opt).listening() if listener else contextlib.nullcontext():
                opt.step()
        return p.detach(), opt.state_dict()["state"][0]

    whole, state = run(4)
    weights, other = run(4, resume=2)
    assert torch.equal(weights, whole)
    assert all(torch.equal(state[name], other[name]) for name in state)
    weights, other = run(4, listener=True)
    torch.testing.assert_close(weights, whole, rtol=2.0**-7, atol=0)
    torch.testing.assert_close(other, state, rtol=1e-5, atol=1e-8)


def test_the_kernels_do_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def watch(module: Any, name: str) -> None:
        real = getattr(module, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, watched)

    for module, name in (
        (momentum, "normalized_momenta_"),
        (adamw, "adamw_"),
        (recursion, "gram_recursion"),
    ):
        watch(module, name)
    moved(Muon, "torch", torch.float32)
    assert seen == []
    moved(Muon, "triton", torch.float32, ns_coefficients="you", split=None)
    assert set(seen) == {"normalized_momenta_", "adamw_", "gram_recursion"}


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 40, 33), (64, 100), (3, 100, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_matrices_are_orthogonalized_in_one_kernel(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    triples = table("you")
    assert plan("auto", shape[-2:], dtype, "cpu", triples, kernels=True) == Plan("recursion", torch.float32)
    with backend("triton"):
        found = orthogonalize(x)
    exact = orthogonalize(x.double(), method="newton_schulz")
    assert found.dtype == dtype
    assert float((found - exact).norm() / exact.norm()) < (1e-4 if dtype == torch.float32 else 3e-3)


def test_what_the_recursion_has_no_room_for_is_done_step_by_step() -> None:
    steep = table("deepseek")
    assert plan("auto", (32, 64), torch.float32, "cpu", steep, kernels=True).method != "recursion"
    assert plan("auto", (65, 65), torch.float32, "cpu", table("you"), kernels=True).method != "recursion"
    assert plan("newton_schulz", (8, 8), torch.float32, "cpu", table("you"), kernels=True).method == "newton_schulz"
    x = torch.randn(3, 16, 20).double()
    assert not torch.equal(ops.normalized(x, eps=0.0, dtype=torch.float64), x)
