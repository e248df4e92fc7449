"""Adam with stored moments in one kernel: interpreted, against its plain twin, and compiled for absent GPUs."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_optim import reference, reference_moments
from lowrank_optim.adam import _APART, Adam
from lowrank_optim.storage import STATE_DTYPES, storage

pytest.importorskip("triton", reason="triton is not installed")

from lowrank_optim._types import Tick
from lowrank_optim.kernels import adam, moments
from lowrank_optim.kernels._launch import launch_shape
from tests.ahead import SHARED, Built, Job, assert_fits, compiled
from tests.alone import ROOT
from tests.kernels import moments as checks
from tests.kernels.common import DTYPES, LAYOUTS, interpreted, poisoned
from tests.kernels.moments import NUMBERS, fresh, gradient, on


@pytest.mark.parametrize("shape", [(), (0, 3), *checks.SHAPES, (3, 256)], ids=str)
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_the_twin_keeps_what_storage_keeps(state_dtype: str, shape: tuple[int, ...]) -> None:
    ours, theirs = fresh(shape, state_dtype), fresh(shape, state_dtype)
    kept: Any = storage(state_dtype)
    for seed in (5, (1 << 32) - 3):
        for name in ("exp_avg", "exp_avg_sq"):
            moment = gradient(shape) if name == "exp_avg" else gradient(shape).square()
            kept.write_(theirs, name, [moment.clone()], [seed])
            reference_moments.write_moment_(ours[0], name, moment, state_dtype, seed)
            assert ours[0].keys() == theirs[0].keys()
            assert all(torch.equal(ours[0][key], theirs[0][key]) for key in ours[0])
            read = reference_moments.read_moment(ours[0], name, shape, state_dtype)
            assert torch.equal(read, kept.read(theirs, name, shape, torch.float32)[0])


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_the_twin_does_what_the_rule_does(state_dtype: str) -> None:
    shape = (40, 33)
    ours, theirs = fresh(shape, state_dtype, 2), fresh(shape, state_dtype, 2)
    rule = Adam(storage(state_dtype))
    ticks = [Tick(3, 0.25), Tick(8, 0.5)]
    grads = [gradient(shape) for _ in ticks]
    expected = rule.updates(grads, theirs, ticks)
    steps, seeds = [tick.step for tick in ticks], [tick.seed for tick in ticks]
    found = reference_moments.stored_adam_directions_(
        grads, ours, state_dtype=state_dtype, steps=steps, seeds=seeds, **NUMBERS
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    checks.assert_kept(ours, theirs, state_dtype)
    assert adam._APART.value == reference_moments._APART == _APART


@interpreted
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", checks.SHAPES, ids=str)
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
@poisoned("cpu")
def test_it_equals_its_twin(state_dtype: str, shape: tuple[int, ...], grad_dtype: torch.dtype) -> None:
    checks.assert_twins(shape, state_dtype, grad_dtype=grad_dtype, device="cpu")


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
@poisoned("cpu")
def test_many_in_one_launch_equal_their_twins(state_dtype: str, layout: str, dtype: torch.dtype) -> None:
    checks.assert_twins(
        (9, 31), state_dtype, grad_dtype=torch.float16, dtype=dtype, layout=layout, count=3, rounds=2, device="cpu"
    )


@interpreted
@settings(max_examples=25, deadline=None)
@given(shape=st.lists(st.integers(0, 40), min_size=0, max_size=2).map(tuple), count=st.integers(1, 2), **checks.HOW)
def test_it_equals_its_twin_anywhere(**case: Any) -> None:
    checks.anywhere(**case, device="cpu")


@interpreted
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_a_matrix_gets_the_same_bits_alone_and_among_others(state_dtype: str) -> None:
    found = checks.bits_are_the_same((20, 30), state_dtype, (7, 100), (1, 1 << 31), "cpu")
    assert reference.stacks(found)[0].shape == (3, 20, 30)


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8", "int4"])
def test_blocks_of_nan_inf_zero_and_of_the_smallest_numbers(state_dtype: str) -> None:
    checks.blocks_of_any_numbers(state_dtype, "cpu", 1e-37, 1e-44)


@interpreted
@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8", "int4"])
def test_what_does_not_change_is_kept_as_it_is(state_dtype: str) -> None:
    """Moments that the gradient leaves alone: m = g, v = g², but for rounding."""
    state = fresh((1024,), state_dtype)[0]
    sign = torch.randn(1024).sign()
    scale = 2.0 ** torch.randint(-8, 8, (1024 // 64, 1)).expand(-1, 64).reshape(-1)
    if state_dtype == "int8":
        scale = scale[0]
    reference_moments.write_moment_(state, "exp_avg", sign * scale, state_dtype, 1)
    reference_moments.write_moment_(state, "exp_avg_sq", scale.square().expand(1024), state_dtype, 1)
    before = on("cpu", [state])[0]
    for seed in range(3):
        adam.stored_adam_directions_(
            [sign * scale], [state], state_dtype=state_dtype, steps=[9], seeds=[seed], betas=(0.5, 0.5), eps=1e-8
        )
        assert all(torch.equal(state[key], before[key]) for key in state)


@interpreted
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_it_writes_its_own_elements_only_and_needs_no_alignment(state_dtype: str, count: int) -> None:
    checks.its_own_elements_are_written_only(327, state_dtype, count, "cpu")


def refused(match: str, grads: list[Tensor], states: list[checks.State], state_dtype: str = "int8", **how: Any) -> None:
    numbers: dict[str, Any] = {"steps": [1] * len(grads), "seeds": [0] * len(grads), **NUMBERS, **how}
    with pytest.raises(ValueError, match=match):
        adam.stored_adam_directions_(grads, states, state_dtype=state_dtype, **numbers)


def test_it_refuses_what_it_would_misread() -> None:
    grad, state = torch.ones(4, 100), fresh((4, 100), "int8")[0]
    refused("state_dtype must be one of 'float32', .*, not 'int2'", [grad], [state], "int2")
    refused(r"needs contiguous torch.int8 exp_avg of shape \(200,\)", [grad], [state], "int4")
    refused("needs contiguous torch.bfloat16 exp_avg of shape", [grad], [state], "bfloat16")
    for name, x in state.items():
        for bad in (x[:-1], x.double(), torch.stack([x, x], -1)[..., 0], x.to("meta")):
            refused(rf"of int8 moments needs contiguous {x.dtype} {name} of shape", [grad], [state | {name: bad}])
    refused("needs as much of everything", [grad, grad], [state])
    refused("needs as much of everything", [], [])
    refused("needs as much of everything", [grad], [state], seeds=[1, 2])
    refused(r"needs gradients of shape \(4, 100\), .* not torch.float64", [grad, grad.double()], [state, state])
    refused("needs float32, bfloat16 or float16 gradients", [grad.double()], [state])
    refused("needs a direction of float32, bfloat16 or float16", [grad], [state], dtype=torch.int8)
    assert all(not x.any() for x in state.values())


@interpreted
def test_a_program_may_be_of_other_sizes() -> None:
    checks.programs_may_be_of_other_sizes(3000, "int4", [(256, 1), (2048, 4)], "cpu")


# what a launch of each kind is: of the gradient, of the direction, whether from a table
LAUNCHES = [("fp32", "fp32", False), ("bf16", "bf16", True)]


def job(state_dtype: str, grad: str, direction: str, table: bool, whole: bool = True) -> Job:
    block, warps = launch_shape(1 << 20, interpreted=False, packed=state_dtype == "int4")
    size = moments.ROWS_OF[state_dtype]
    first = {"float32": "*fp32", "bfloat16": "*bf16"}.get(state_dtype, "*i8")
    second = first.replace("i8", "u8")
    scale = "*fp32" if size == 64 or state_dtype == "int8" else first
    numbers = ("beta1", "beta2", "weight1", "weight2", "ratio", "eps")
    types = {"grad_ptr": "*" + grad, "direction_ptr": "*" + direction, "table_ptr": "*i64"}
    types |= {"first_ptr": first, "first_scale_ptr": scale, "second_ptr": second, "second_scale_ptr": scale}
    types |= {"numel": "i32", "seed": "i32"} | dict.fromkeys(numbers, "fp32")
    constants = {"ROWS": block // size, "SIZE": size, "STORAGE": state_dtype, "TABLE": table, "ALIGNED": whole}
    unaligned = ("seed",) if whole else ("seed", "numel")
    options = {"num_warps": warps}
    targets = tuple(SHARED) if whole else ("sm_90a",)
    constants |= {"INTERPRETED": False}
    counted = whole and state_dtype in ("int8", "int4")
    return Job("adam", "adam_direction_kernel", types, constants, unaligned, options, targets, counted)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    jobs = {f"{kept} {launch[0]}": job(kept, *launch) for kept in STATE_DTYPES for launch in LAUNCHES}
    jobs |= {f"{kept} odd": job(kept, "fp32", "bf16", True, False) for kept in ("float32", "int4")}
    return compiled(jobs, tmp_path_factory.mktemp("ahead"))


def test_every_storage_compiles_without_spills(built: dict[str, Built]) -> None:
    assert len(built) == len(SHARED) * len(LAUNCHES) * len(STATE_DTYPES) + 2
    for name, one in built.items():
        assert_fits(name, one)
        # of sixteen elements, where there are eight of the others
        most = 128 if "odd" in name else 80 if "int4" in name else 64
        assert one.registers is None or one.registers <= most, name


def test_accesses_are_as_wide_as_the_elements_of_a_thread_let_them_be(built: dict[str, Built]) -> None:
    """Of eight elements 16 bytes at once of float32 and bfloat16, and 8 of bytes; 8 of sixteen in half a byte each."""
    wide = {"float32": "v4.b32", "bfloat16": "v4.b32", "int8": "v2.b32", "int4": "v2.b32"}
    for name, one in built.items():
        target, kept, kind = name.split()
        if kind == "odd":
            continue
        if target == "gfx942":
            # 4 elements a lane
            loads, stores = (len(re.findall(rf"(?:global|buffer)_{x}_dwordx4", one.text)) for x in ("load", "store"))
            assert loads >= (kind == "fp32") + 2 * (kept == "float32"), name
            assert stores >= (kind == "fp32") + 2 * (kept == "float32"), name
            assert not re.search(r"(?:global|buffer)_(?:load|store)_[us]?byte", one.text), name
            continue
        grads = (2 if kind == "fp32" else 1) * (2 if kept == "int4" else 1)
        for access in ("ld", "st"):
            assert f"{access}.global.{wide[kept]}" in one.text, name
            assert one.text.count(f"{access}.global.v4.b32") == grads + {"float32": 4, "bfloat16": 2}.get(kept, 0), name
            # nothing is read or written element by element but addresses, scales and what is in the table
            assert not re.search(rf"{access}\.global\.(?:b8|b16|s8|u8|u16)\b", one.text), name


def test_the_time_of_coded_moments_goes_into_few_instructions(built: dict[str, Built]) -> None:
    """On an H200 these kernels wait for nothing else: with 67 an element at .82 of a copy's speed, with 70 at .68."""
    for name, most in (("int8 fp32", 66), ("int4 fp32", 61)):
        block, warps = launch_shape(1 << 20, interpreted=False, packed="int4" in name)
        instructions = built[f"sm_90a {name}"].instructions
        assert instructions is not None
        assert 32 * warps * instructions / block <= most


def test_what_ships_is_what_is_imported() -> None:
    assert Path(moments.__file__).resolve() == ROOT / "kernels" / "moments.py"
