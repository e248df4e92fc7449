"""Momentum and its normalized update in two passes: interpreted, against the plain twin; compiled for absent GPUs."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_optim import reference, reference_matrix, reference_moments
from lowrank_optim._types import Tick
from lowrank_optim.momentum import FORMS, Momentum
from lowrank_optim.storage import STATE_DTYPES, storage

pytest.importorskip("triton", reason="triton is not installed")

from lowrank_optim.kernels import moments
from lowrank_optim.kernels import momentum as kernel
from lowrank_optim.kernels._launch import MOMENTUM_PARTS, launch_shape
from tests.ahead import SHARED, Built, Job, assert_fits, compiled

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run on the CPU with TRITON_INTERPRET=1 only"
)

State = dict[str, Tensor]

NAME = "momentum_buffer"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 5), (16, 16), (7, 101), (33, 65)]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: torch.stack([x, x], -1)[..., 0],
}
NUMBERS: dict[str, Any] = {"momentum": 0.95, "nesterov": True, "form": "ema", "eps": 1e-7}
# of a result, in units of its numbers: half the distance to the next
HALF = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, as torch does for whoever asks for determinism."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def fresh(shape: tuple[int, ...], state_dtype: str, count: int = 1) -> list[State]:
    """Return momenta that are zero."""

    def new(shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype)

    kept: Any = storage(state_dtype)
    return [kept.init(NAME, shape, new) for _ in range(count)]


def copies(states: list[State]) -> list[State]:
    return [{name: x.clone() for name, x in state.items()} for state in states]


def gradient(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Return numbers of very different magnitudes."""
    return (scale * torch.randn(shape) * torch.rand(shape) ** 4).to(dtype)


def assert_kept(ours: list[State], twins: list[State], state_dtype: str, scale: float = 1.0) -> None:
    """Scales and float32 are the same but for rounding, in units of `scale`; of the others a few are one apart."""
    for our, twin in zip(ours, twins, strict=True):
        for name, expected in twin.items():
            if expected.dtype == torch.int8:
                both = (our[name], expected)
                if state_dtype == "int4":
                    both = tuple(reference.unpack(x, 2 * x.numel()) for x in both)
                apart = (both[0].int() - both[1].int()).abs()
                assert apart.numel() == 0 or apart.max() <= 1
            else:
                near = 1e-6 if expected.dtype == torch.float32 else 2.0**-7
                torch.testing.assert_close(our[name], expected, rtol=near, atol=1e-6 * scale)
                apart = (our[name] != expected) & (expected.dtype == torch.bfloat16)
            assert apart.count_nonzero() <= 1 + expected.numel() / 1000


def assert_twins(
    shape: tuple[int, ...],
    state_dtype: str,
    *,
    grad_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    scale: float = 1.0,
    count: int = 1,
    rounds: int = 2,
    launch: tuple[int, int] | None = None,
    parts: int = MOMENTUM_PARTS,
    **numbers: Any,
) -> None:
    twins = fresh(shape, state_dtype, count)
    for step in range(1, rounds + 1):
        ours = copies(twins)
        grads = [LAYOUTS[layout](gradient(shape, grad_dtype, scale)) for _ in range(count)]
        before = [grad.clone() for grad in grads]
        # more than 31 bits, and such that counters wrap around
        seeds = [(0xFFFFFFF0 + 977 * i + step) % (1 << 32) for i in range(count)]
        how: dict[str, Any] = {"state_dtype": state_dtype, "seeds": seeds, **NUMBERS, **numbers}
        found = kernel.normalized_momenta_(grads, ours, **how, dtype=dtype, launch=launch, parts=parts)
        expected = reference_moments.normalized_momenta_(grads, twins, **how, dtype=torch.float32)
        assert all(torch.equal(x, y) for x, y in zip(grads, before, strict=True))
        assert found.dtype == dtype
        assert found.shape == (count, *shape)
        assert found.is_contiguous()
        # float16 has fewer small numbers
        torch.testing.assert_close(found.float(), expected, rtol=1e-5 + HALF[dtype], atol=1e-6)
        assert_kept(ours, twins, state_dtype, scale)


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
        ours = copies(theirs)


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_it_equals_its_twin(state_dtype: str, shape: tuple[int, ...]) -> None:
    assert_twins(shape, state_dtype)


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_in_two_launches_equal_their_twins(layout: str, dtype: torch.dtype) -> None:
    grad_dtype = DTYPES[(DTYPES.index(dtype) + 1) % 3]
    for state_dtype in ("bfloat16", "int4"):
        assert_twins((9, 31), state_dtype, grad_dtype=grad_dtype, dtype=dtype, layout=layout, count=3)


@interpreted
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("nesterov", [True, False])
def test_every_form_of_momentum(nesterov: bool, form: str) -> None:
    assert_twins((20, 30), "int8", nesterov=nesterov, form=form, momentum=0.8, rounds=3)


@interpreted
@pytest.mark.parametrize("parts", [1, 2, 1024])
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_a_matrix_may_be_cut_into_any_number_of_parts(state_dtype: str, parts: int) -> None:
    assert_twins((33, 35), state_dtype, launch=(256, 1), parts=parts, count=2, rounds=1)


@interpreted
@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 30)),
    state_dtype=st.sampled_from(STATE_DTYPES),
    momentum=st.floats(0, 0.99),
    nesterov=st.booleans(),
    form=st.sampled_from(FORMS),
    scale=st.sampled_from([1e-25, 1e-15, 1.0, 1e15, 1e25]),
    count=st.integers(1, 2),
)
def test_it_equals_its_twin_anywhere(
    shape: tuple[int, ...], state_dtype: str, scale: float, count: int, **numbers: Any
) -> None:
    assert_twins(shape, state_dtype, scale=scale, count=count, eps=0.0, rounds=2, **numbers)


@interpreted
@pytest.mark.parametrize("state_dtype", ["float32", "int8"])
@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e-25, 1e25, 1e37])
def test_squares_neither_vanish_nor_overflow(scale: float, state_dtype: str) -> None:
    for dtype in DTYPES:
        grad = scale * torch.randn(20, 20, dtype=torch.float64).clamp(-3, 3)
        how: dict[str, Any] = {"state_dtype": state_dtype, "seeds": [1], **NUMBERS, "eps": 0.0, "form": "sum"}
        found = kernel.normalized_momenta_([grad.float()], fresh((20, 20), state_dtype), dtype=dtype, **how)
        exact = grad.float().double() / grad.float().double().norm()
        torch.testing.assert_close(
            found[0].double(), exact, rtol=1e-5 + HALF[dtype], atol=1e-3 if scale < 1e-40 else 1e-7
        )


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_zeros_small_norms_nan_and_inf() -> None:
    how: dict[str, Any] = {"state_dtype": "float32", "seeds": [1], **NUMBERS, "form": "sum", "dtype": torch.float32}
    grad = torch.zeros(20, 20)
    for eps in (0.0, 1e-7):
        assert kernel.normalized_momenta_([grad], fresh((20, 20), "float32"), **how | {"eps": eps}).eq(0).all()
    grad[3, 4] = 1e-9
    found = kernel.normalized_momenta_([grad], fresh((20, 20), "float32"), **how)
    torch.testing.assert_close(found[0, 3, 4], torch.tensor(1.95e-2))
    grad[5, 6] = float("nan")
    assert kernel.normalized_momenta_([grad], fresh((20, 20), "float32"), **how).isnan().all()
    grad[5, 6] = float("inf")
    found = kernel.normalized_momenta_([grad], fresh((20, 20), "float32"), **how)[0]
    assert found.isnan().nonzero().tolist() == [[5, 6]]
    assert found.nan_to_num(0).eq(0).all()


@interpreted
def test_a_matrix_gets_the_same_bits_alone_and_among_others() -> None:
    for state_dtype in ("bfloat16", "int8"):
        together, alone = (fresh((20, 60), state_dtype, 3) for _ in range(2))
        grads, seeds = [gradient((20, 60)) for _ in range(3)], [1, 1 << 31, 7]
        how: dict[str, Any] = {"state_dtype": state_dtype, **NUMBERS, "dtype": torch.bfloat16, "launch": (256, 1)}
        found = kernel.normalized_momenta_(grads, together, seeds=seeds, **how)
        for i in range(3):
            one = slice(i, i + 1)
            assert torch.equal(kernel.normalized_momenta_(grads[one], alone[one], seeds=seeds[one], **how)[0], found[i])
            assert all(torch.equal(alone[i][key], together[i][key]) for key in alone[i])


@interpreted
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_it_writes_its_own_elements_only_and_needs_no_alignment(state_dtype: str) -> None:
    shape = (327,)
    whole, parts = [], []
    for state in fresh(shape, state_dtype, 2):
        memory = {name: torch.full((x.numel() + 2,), 77, dtype=x.dtype) for name, x in state.items()}
        whole += memory.values()
        parts.append({name: x[1:-1].zero_() for name, x in memory.items()})
    twins = copies(parts)
    grads = [gradient((2, 329))[i, 1:-1] for i in range(2)]
    how: dict[str, Any] = {"state_dtype": state_dtype, "seeds": [3, 4], **NUMBERS, "dtype": torch.float32}
    found = kernel.normalized_momenta_(grads, parts, **how)
    # a moment of one dimension is a row
    rows = [{name: x.view(1, -1) if x.shape == shape else x for name, x in state.items()} for state in twins]
    expected = reference_moments.normalized_momenta_([grad.view(1, -1) for grad in grads], rows, **how)
    torch.testing.assert_close(found, expected.squeeze(1), rtol=1e-5, atol=1e-6)
    assert_kept(parts, twins, state_dtype)
    assert all(x[0] == 77 and x[-1] == 77 for x in whole)


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
    assert Path(kernel.__file__).resolve() == Path(__file__).parent.parent / "kernels" / "momentum.py"
