"""AdamW on many tensors in one launch: against its plain twin and torch's own, and compiled for absent GPUs."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_optim import reference_apply

pytest.importorskip("triton", reason="triton is not installed")

from lowrank_optim.kernels import adamw
from lowrank_optim.kernels._launch import ADAMW
from tests.ahead import Built, Job, assert_fits, compiled
from tests.alone import ROOT
from tests.kernels import adamw as checks
from tests.kernels.adamw import HOW
from tests.kernels.common import DTYPES, interpreted


@interpreted
@pytest.mark.parametrize("rounding", ["nearest", "chance"])
@pytest.mark.parametrize("grads", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_equals_its_twin(dtype: torch.dtype, grads: torch.dtype, rounding: str) -> None:
    checks.equals_its_twin(checks.SHAPES, dtype, grads, rounding, "cpu")


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")
@pytest.mark.parametrize("seed", [0, -7, 2**31 - 100, 2**40 + 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chance_has_the_very_bits_of_the_twin(dtype: torch.dtype, seed: int) -> None:
    """Of numbers of few bits nothing is rounded in float32, and so nothing but chance decides."""
    ours = checks.Tensors([(5000,)], [dtype], [dtype], "cpu")
    ours.params[0].copy_(torch.randint(-127, 128, (5000,)).div(64))
    ours.grads[0].zero_()
    ours.exp_avgs[0].copy_(torch.randint(-127, 128, (5000,)))
    # a quarter of it is 3, which 1 − 1/4 takes to 4
    ours.exp_avg_sqs[0].fill_(12.0)
    twins = ours.twin()
    how: dict[str, Any] = {"lr": 2.0**-9, "betas": (0.5, 0.25), "eps": 0.0, "weight_decay": 0.0, "seeds": [seed]}
    reference_apply.adamw_(*twins.arguments, **how)
    adamw.adamw_(*ours.arguments, **how)
    assert torch.equal(ours.params[0], twins.params[0])


@interpreted
@settings(max_examples=20, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 20), max_size=3).map(tuple), min_size=0, max_size=5),
    dtypes=st.lists(st.tuples(*[st.sampled_from(DTYPES)] * 2), min_size=5, max_size=5),
    on_device=st.booleans(),
    chance=st.booleans(),
    **checks.NUMBERS,
)
def test_it_equals_its_twin_anywhere(
    shapes: list[tuple[int, ...]],
    dtypes: list[tuple[torch.dtype, torch.dtype]],
    lr: float,
    on_device: bool,
    chance: bool,
    **numbers: Any,
) -> None:
    params, grads = zip(*dtypes, strict=True)
    tensors = checks.Tensors(shapes, params[: len(shapes)], grads[: len(shapes)], "cpu")
    seeds = list(range(len(shapes))) if chance else None
    rate = torch.tensor(lr) if on_device else lr
    checks.assert_twins(tensors, lr=rate, eps=1e-3, seeds=seeds, shape=(256, 1), **numbers)


@interpreted
def test_of_float32_it_does_as_torch() -> None:
    checks.of_float32_it_does_as_torch([(30, 20), (7,), (4096,)], "cpu")


@interpreted
def test_its_twin_does_as_torch_on_one_element() -> None:
    p = torch.nn.Parameter(torch.tensor([1.5]))
    p.grad = torch.tensor([0.5])
    torch.optim.AdamW([p], **HOW).step()
    ours = torch.tensor([1.5])
    reference_apply.adamw_([ours], [p.grad], [torch.zeros(1)], [torch.zeros(1)], [1], **HOW)
    torch.testing.assert_close(ours, p.detach())


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("start", [0, 1])
def test_it_writes_its_own_elements_only(start: int, dtype: torch.dtype) -> None:
    checks.its_own_elements_are_written_only(start, dtype, "cpu")


@interpreted
def test_gradients_may_have_any_strides() -> None:
    ours = checks.Tensors([(30, 20)] * 3, [torch.bfloat16] * 3, [torch.bfloat16] * 3, "cpu")
    grad = ours.grads[0]
    ours.grads = [grad.mT.contiguous().mT, torch.stack([grad, grad], -1)[..., 0], grad[:1].expand(30, 20)]
    checks.assert_twins(ours, **HOW)


@interpreted
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nan_stays_where_it_is() -> None:
    ours = checks.Tensors([(100,), (100,)], [torch.bfloat16] * 2, [torch.float32] * 2, "cpu")
    ours.grads[0][7] = float("nan")
    adamw.adamw_(*ours.arguments, **HOW, seeds=[1, 2])
    assert ours.params[0].isnan().nonzero().flatten().tolist() == [7]
    assert ours.params[1].isfinite().all()


@interpreted
def test_tensors_of_the_same_dtypes_are_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    grids: list[int] = []

    class Watched:
        def __getitem__(self, grid: tuple[int]) -> Any:
            grids.append(grid[0])
            return lambda *args, **kwargs: None

    monkeypatch.setattr(adamw, "adamw_kernel", Watched())
    ours = checks.Tensors([(64,)] * 4 + [(100,)], [torch.bfloat16] * 5, [torch.bfloat16] * 5, "cpu")
    adamw.adamw_(*ours.arguments, **HOW, shape=(32, 1))
    # elements that 16 does not divide are read one by one, and not in the launch of the others
    assert grids == [8, 4]
    grids.clear()
    adamw.adamw_([], [], [], [], [], **HOW)
    empty = checks.Tensors([(0, 3)], [torch.float32], [torch.float32], "cpu")
    adamw.adamw_(*empty.arguments, **HOW)
    assert grids == []


def good() -> dict[str, Any]:
    numbers = {name: [torch.ones(4, 6)] for name in checks.NAMES}
    return numbers | {"steps": [1]} | HOW


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        pytest.param({"params": [torch.ones(4, 6).double()]}, "not of torch.float64", id="double"),
        pytest.param({"params": [torch.ones(6, 4).mT]}, r"not weight .* strides \(1, 4\) on", id="strides"),
        pytest.param({"grads": [torch.ones(6, 4)]}, r", gradient torch.float32 of shape \(6, 4\)", id="gradient"),
        pytest.param({"grads": [torch.ones(4, 6).double()]}, ", gradient torch.float64", id="gradient's dtype"),
        pytest.param({"exp_avgs": [torch.ones(4, 6).half()]}, ", moments torch.float16", id="dtype"),
        pytest.param({"exp_avg_sqs": [torch.ones(6, 4).mT]}, r", and .* strides \(1, 4\)", id="moment's strides"),
        pytest.param({"exp_avg_sqs": [torch.ones(24)]}, r", and torch.float32 of shape \(24,\)", id="shape"),
        pytest.param({"exp_avgs": [torch.ones(4, 6, device="meta")]}, "on meta, and", id="device"),
        pytest.param({"steps": [0]}, "counted from 1, not 0", id="step"),
        pytest.param({"steps": [1, 2]}, r"as many of each .*\[1, 1, 1, 1, 2, 1\]", id="count"),
        pytest.param({"seeds": []}, r"as many of each .*\[1, 1, 1, 1, 1, 0\]", id="seeds"),
        pytest.param({"lr": torch.ones(1)}, "needs lr as a number or a float tensor of no dimensions", id="lr"),
    ],
)
def test_what_would_be_misread_is_refused(bad: dict[str, Any], message: str) -> None:
    arguments = good() | bad
    before = arguments["params"][0].clone()
    with pytest.raises(ValueError, match=message):
        adamw.adamw_(**arguments)
    assert torch.equal(arguments["params"][0], before)


def job(dtype: str, grad: str, *, aligned: bool = True, on_device: bool = False, chance: bool = True) -> Job:
    types = dict.fromkeys(("decay", "beta2", "weight1", "weight2", "eps"), "fp32")
    types |= {"table_ptr": "*i64", "owners_ptr": "*i32", "lr": "*fp32" if on_device else "fp32"}
    constants = {"PARAM": dtype, "GRAD": grad, "BLOCK": ADAMW[0], "ALIGNED": aligned, "LR_ON_DEVICE": on_device}
    constants |= {"STOCHASTIC": chance, "INTERPRETED": False}
    return Job("adamw", "adamw_kernel", types, constants, (), {"num_warps": ADAMW[1]})


JOBS = {
    "bf16 bf16": job("bf16", "bf16"),
    "fp16 fp32": job("fp16", "fp32", on_device=True),
    "fp32 fp32": job("fp32", "fp32", chance=False),
    "bf16 bf16 unaligned": job("bf16", "bf16", aligned=False),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    """The kernel as shipped, compiled for three GPUs in one process that has none of them."""
    return compiled(JOBS, tmp_path_factory.mktemp("ahead"))


def test_every_shipped_configuration_compiles_without_spills_and_fits(built: dict[str, Built]) -> None:
    assert {name.split(" ", 1)[1] for name in built} == set(JOBS)
    for name, one in built.items():
        assert_fits(name, one)


def test_addresses_from_the_table_are_read_in_whole_vectors(built: dict[str, Built]) -> None:
    # eight elements of each thread: what is of 2 bytes is one access, what is of 4 are two
    size = {"fp32": 2, "bf16": 1, "fp16": 1}
    for name, one in built.items():
        target, dtype, grad, *unaligned = name.split()
        if unaligned:
            assert "v4.b32" not in one.text, name
            continue
        if target == "gfx942":
            # there a thread has four elements: of 2 bytes they are half a vector
            assert len(re.findall("(?:global|buffer)_load_dwordx4", one.text)) >= 2 + (grad == "fp32"), name
            assert len(re.findall("(?:global|buffer)_store_dwordx4", one.text)) >= 2, name
            continue
        assert len(re.findall(r"ld\.global\S*\.v4\.b32", one.text)) == 4 + size[dtype] + size[grad], name
        assert len(re.findall(r"st\.global\S*\.v4\.b32", one.text)) == 4 + size[dtype], name
        assert len(re.findall(r"st\.global", one.text)) == 4 + size[dtype], name


def test_what_ships_is_what_is_imported() -> None:
    assert Path(adamw.__file__).resolve() == ROOT / "kernels" / "adamw.py"
