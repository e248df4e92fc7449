"""Momentum and its normalized update in two passes: interpreted, against the plain twin; compiled for absent GPUs."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_optim import reference_matrix, reference_moments
from lowrank_optim._types import Tick
from lowrank_optim.momentum import FORMS, Momentum
from lowrank_optim.storage import STATE_DTYPES, storage

pytest.importorskip("triton", reason="triton is not installed")

from lowrank_optim.kernels import moments
from lowrank_optim.kernels import momentum as kernel
from lowrank_optim.kernels._launch import MOMENTUM_PARTS, launch_shape
from tests.ahead import SHARED, Built, Job, assert_fits, compiled
from tests.alone import ROOT
from tests.kernels import momentum as checks
from tests.kernels.common import DTYPES, LAYOUTS, interpreted, poisoned
from tests.kernels.moments import assert_kept, gradient, on
from tests.kernels.momentum import NUMBERS, fresh


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_the_twin_does_what_the_rule_does(state_dtype: str, nesterov: bool, form: Any) -> None:
    shape = (40, 33)
    ours, theirs = fresh(shape, state_dtype, 2), fresh(shape, state_dtype, 2)
    rule = Momentum(storage(state_dtype), None, nesterov=nesterov, form=form)
    for step in (1, 2):
        ticks = [Tick(step, 0.25), Tick(step + 7, 0.5)]
        grads = [gradient(shape) for _ in ticks]
        updates = rule.updates(grads, theirs, ticks)
        expected = reference_matrix.normalized(torch.stack(updates), eps=1e-7, dtype=torch.bfloat16)
        how: dict[str, Any] = {"state_dtype": state_dtype, **NUMBERS, "nesterov": nesterov, "form": form}
        seeds = [tick.seed for tick in ticks]
        found = reference_moments.normalized_momenta_(grads, ours, seeds=seeds, dtype=torch.bfloat16, **how)
        torch.testing.assert_close(found, expected, rtol=2.0**-7, atol=1e-6)
        assert_kept(ours, theirs, state_dtype)
        ours = on("cpu", theirs)


@interpreted
@pytest.mark.parametrize("shape", checks.SHAPES, ids=str)
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
@poisoned("cpu")
def test_it_equals_its_twin(state_dtype: str, shape: tuple[int, ...]) -> None:
    checks.assert_twins(shape, state_dtype, device="cpu")


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@poisoned("cpu")
def test_many_in_two_launches_equal_their_twins(layout: str, dtype: torch.dtype) -> None:
    grad_dtype = DTYPES[(DTYPES.index(dtype) + 1) % 3]
    for state_dtype in ("bfloat16", "int4"):
        checks.assert_twins(
            (9, 31), state_dtype, grad_dtype=grad_dtype, dtype=dtype, layout=layout, count=3, device="cpu"
        )


@interpreted
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("nesterov", [True, False])
def test_every_form_of_momentum(nesterov: bool, form: str) -> None:
    checks.assert_twins((20, 30), "int8", nesterov=nesterov, form=form, momentum=0.8, rounds=3, device="cpu")


@interpreted
@pytest.mark.parametrize("parts", [1, 2, 1024])
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_a_matrix_may_be_cut_into_any_number_of_parts(state_dtype: str, parts: int) -> None:
    checks.assert_twins((33, 35), state_dtype, launch=(256, 1), parts=parts, count=2, rounds=1, device="cpu")


@interpreted
@settings(max_examples=20, deadline=None)
@given(shape=st.tuples(st.integers(1, 40), st.integers(1, 30)), count=st.integers(1, 2), **checks.HOW)
def test_it_equals_its_twin_anywhere(**case: Any) -> None:
    checks.anywhere(**case, device="cpu")


@interpreted
@pytest.mark.parametrize("state_dtype", ["float32", "int8"])
@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e-25, 1e25, 1e37])
def test_squares_neither_vanish_nor_overflow(scale: float, state_dtype: str) -> None:
    checks.squares_neither_vanish_nor_overflow(scale, state_dtype, 20, "cpu")


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_zeros_small_norms_nan_and_inf() -> None:
    checks.zeros_small_norms_nan_and_inf("cpu")


@interpreted
def test_a_matrix_gets_the_same_bits_alone_and_among_others() -> None:
    for state_dtype in ("bfloat16", "int8"):
        checks.bits_are_the_same((20, 60), state_dtype, "cpu", launch=(256, 1))


@interpreted
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_it_writes_its_own_elements_only_and_needs_no_alignment(state_dtype: str) -> None:
    checks.its_own_elements_are_written_only(327, state_dtype, "cpu")


@interpreted
def test_a_moment_of_one_dimension_is_a_row() -> None:
    grad = gradient((327,))
    how: dict[str, Any] = {"state_dtype": "int8", "seeds": [3], **NUMBERS, "dtype": torch.float32}
    found = kernel.normalized_momenta_([grad], fresh((327,), "int8"), **how)
    row = kernel.normalized_momenta_([grad.view(1, -1)], fresh((1, 327), "int8"), **how)
    assert torch.equal(found, row.squeeze(1))


def test_of_nothing_there_is_nothing() -> None:
    how: dict[str, Any] = {"state_dtype": "int8", "seeds": [0, 1], **NUMBERS, "dtype": torch.bfloat16}
    found = kernel.normalized_momenta_([torch.ones(0, 5)] * 2, fresh((0, 5), "int8", 2), **how)
    assert found.shape == (2, 0, 5)
    assert found.dtype == torch.bfloat16


def test_it_refuses_what_it_would_misread() -> None:
    grad, state = torch.ones(4, 100), fresh((4, 100), "int8")[0]
    how: dict[str, Any] = {"state_dtype": "int8", "seeds": [0], **NUMBERS, "dtype": torch.bfloat16}
    for match, grads, states, other in [
        ("form must be 'ema' or 'sum', not 'mean'", [grad], [state], {"form": "mean"}),
        ("needs a result of float32, bfloat16 or float16, not torch.int8", [grad], [state], {"dtype": torch.int8}),
        ("state_dtype must be one of", [grad], [state], {"state_dtype": "int2"}),
        (r"needs contiguous torch.int8 momentum_buffer of shape \(200,\)", [grad], [state], {"state_dtype": "int4"}),
        ("needs as much of everything", [grad, grad], [state], {}),
        ("needs as much of everything", [grad], [state], {"seeds": []}),
        (r"needs gradients of shape \(4, 100\)", [grad, grad.mT], [state, state], {"seeds": [0, 1]}),
        ("needs float32, bfloat16 or float16 gradients, not torch.float64", [grad.double()], [state], {}),
    ]:
        with pytest.raises(ValueError, match=match):
            kernel.normalized_momenta_(grads, states, **how | other)
    assert all(not x.any() for x in state.values())


def job(name: str, state_dtype: str, grad: str, out: str, whole: bool = True) -> Job:
    block, warps = launch_shape(1 << 20, interpreted=False)
    size = moments.ROWS_OF[state_dtype]
    kept = {"float32": "*fp32", "bfloat16": "*bf16"}.get(state_dtype, "*i8")
    types = {"grad_ptr": "*" + grad, "kept_ptr": kept, "scale_ptr": kept if kept != "*i8" else "*fp32"}
    types |= {"sums_ptr": "*fp64", "out_ptr": "*" + out, "table_ptr": "*i64"}
    types |= dict.fromkeys(("numel", "parts", "steps"), "i32") | dict.fromkeys(("momentum", "weight", "eps"), "fp32")
    constants = {"ROWS": block // size, "SIZE": size, "STORAGE": state_dtype, "NESTEROV": True, "ALIGNED": whole}
    if name == "momentum_kernel":
        constants |= {"PARTS": MOMENTUM_PARTS, "INTERPRETED": False}
    unaligned = ("parts", "steps") if whole else ("parts", "steps", "numel")
    targets = tuple(SHARED) if whole else ("sm_90a",)
    return Job("momentum", name, types, constants, unaligned, {"num_warps": warps}, targets)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    names = {"squares": "momentum_squares_kernel", "update": "momentum_kernel"}
    jobs = {
        f"{short} {kept} bf16": job(name, kept, "bf16", "bf16")
        for short, name in names.items()
        for kept in STATE_DTYPES
    }
    jobs |= {f"{short} float32 fp32": job(name, "float32", "fp32", "fp32") for short, name in names.items()}
    jobs |= {f"{short} int4 odd": job(name, "int4", "fp32", "bf16", False) for short, name in names.items()}
    return compiled(jobs, tmp_path_factory.mktemp("ahead"))


def test_every_storage_compiles_without_spills(built: dict[str, Built]) -> None:
    assert len(built) == len(SHARED) * 2 * (len(STATE_DTYPES) + 1) + 2
    for name, one in built.items():
        assert_fits(name, one)
        assert one.registers is None or one.registers <= (128 if "odd" in name else 64), name


def test_accesses_are_as_wide_as_eight_elements_a_thread_let_them_be(built: dict[str, Built]) -> None:
    """16 bytes at once of float32 and bfloat16, 8 of bytes, and 4 of two codes in a byte."""
    wide = {"float32": "v4.b32", "bfloat16": "v4.b32", "int8": "v2.b32", "int4": "b32"}
    for name, one in built.items():
        target, part, kept, grad = name.split()
        if grad == "odd":
            continue
        if target == "gfx942":
            # 4 elements a lane
            loads, stores = (len(re.findall(rf"(?:global|buffer)_{x}_dwordx4", one.text)) for x in ("load", "store"))
            assert loads >= (grad == "fp32") + (kept == "float32"), name
            assert stores >= (part == "update") * ((grad == "fp32") + (kept == "float32")), name
            assert not re.search(r"(?:global|buffer)_(?:load|store)_[us]?byte", one.text), name
            continue
        both = (2 if grad == "fp32" else 1) + {"float32": 2, "bfloat16": 1}.get(kept, 0)
        for access in ("ld", "st") if part == "update" else ("ld",):
            assert f"{access}.global.{wide[kept]}" in one.text, name
            assert one.text.count(f"{access}.global.v4.b32") == both, name
            assert not re.search(rf"{access}\.global\.(?:b8|b16|s8|u8|u16)\b", one.text), name


def test_what_ships_is_what_is_imported() -> None:
    assert Path(kernel.__file__).resolve() == ROOT / "kernels" / "momentum.py"
