"""Momentum and its normalized update on the hardware that the kernels are written for, against the plain twin."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_optim import reference, reference_moments
from lowrank_optim.momentum import FORMS
from lowrank_optim.storage import STATE_DTYPES, storage

pytest.importorskip("triton", reason="triton is not installed")

from lowrank_optim.kernels import momentum as kernel
from lowrank_optim.kernels._launch import MOMENTUM_PARTS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process"),
]

State = dict[str, Tensor]

NAME = "momentum_buffer"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 5), (16, 16), (7, 101), (33, 65), (1024, 1031), (2048, 1024)]
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
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3, device="cuda").isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def fresh(shape: tuple[int, ...], state_dtype: str, count: int = 1) -> list[State]:
    """Return momenta that are zero."""

    def new(shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype)

    kept: Any = storage(state_dtype)
    return [kept.init(NAME, shape, new) for _ in range(count)]


def on(device: str, states: list[State]) -> list[State]:
    """Return copies of states on a device."""
    return [{name: x.detach().clone().to(device) for name, x in state.items()} for state in states]


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
    device: str = "cuda",
    launch: tuple[int, int] | None = None,
    parts: int = MOMENTUM_PARTS,
    **numbers: Any,
) -> None:
    twins = fresh(shape, state_dtype, count)
    for step in range(1, rounds + 1):
        ours = on(device, twins)
        grads = [LAYOUTS[layout](gradient(shape, grad_dtype, scale).to(device)) for _ in range(count)]
        before = [grad.clone() for grad in grads]
        # more than 31 bits, and such that counters wrap around
        seeds = [(0xFFFFFFF0 + 977 * i + step) % (1 << 32) for i in range(count)]
        how: dict[str, Any] = {"state_dtype": state_dtype, "seeds": seeds, **NUMBERS, **numbers}
        found = kernel.normalized_momenta_(grads, ours, **how, dtype=dtype, launch=launch, parts=parts)
        expected = reference_moments.normalized_momenta_([g.cpu() for g in grads], twins, **how, dtype=torch.float32)
        assert all(torch.equal(x, y) for x, y in zip(grads, before, strict=True))
        assert found.dtype == dtype
        assert found.shape == (count, *shape)
        assert found.is_contiguous()
        # float16 has fewer small numbers
        torch.testing.assert_close(found.float().cpu(), expected, rtol=1e-5 + HALF[dtype], atol=1e-6)
        assert_kept(on("cpu", ours), twins, state_dtype, scale)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_it_equals_its_twin(state_dtype: str, shape: tuple[int, ...]) -> None:
    assert_twins(shape, state_dtype)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("layout", "dtype"), list(zip(LAYOUTS, DTYPES, strict=True)))
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_many_in_two_launches_equal_their_twins(state_dtype: str, layout: str, dtype: torch.dtype) -> None:
    assert_twins((90, 310), state_dtype, grad_dtype=torch.bfloat16, dtype=dtype, layout=layout, count=5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("nesterov", [True, False])
def test_every_form_of_momentum(nesterov: bool, form: str) -> None:
    assert_twins((200, 300), "int8", nesterov=nesterov, form=form, momentum=0.8, rounds=3)


@pytest.mark.parametrize("parts", [1, 7, MOMENTUM_PARTS])
@pytest.mark.parametrize("launch", [(2048, 4), (2048, 8)], ids=str)
def test_launches_may_be_of_other_sizes(launch: tuple[int, int], parts: int) -> None:
    for state_dtype in ("float32", "int8"):
        assert_twins((333, 350), state_dtype, launch=launch, parts=parts, count=2, rounds=1)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 100), st.integers(1, 100)),
    state_dtype=st.sampled_from(STATE_DTYPES),
    momentum=st.floats(0, 0.99),
    form=st.sampled_from(FORMS),
    scale=st.sampled_from([1e-25, 1e-15, 1.0, 1e15, 1e25]),
    count=st.integers(1, 3),
)
def test_it_equals_its_twin_anywhere(
    shape: tuple[int, ...], state_dtype: str, scale: float, count: int, **numbers: Any
) -> None:
    assert_twins(shape, state_dtype, scale=scale, count=count, eps=0.0, rounds=2, **numbers)


@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1e25, 1e37])
def test_squares_neither_vanish_nor_overflow(scale: float) -> None:
    for dtype in DTYPES:
        grad = (scale * torch.randn(200, 200, dtype=torch.float64).clamp(-3, 3)).float()
        how: dict[str, Any] = {"state_dtype": "float32", "seeds": [1], **NUMBERS, "eps": 0.0, "form": "sum"}
        state = on("cuda", fresh((200, 200), "float32"))
        found = kernel.normalized_momenta_([grad.cuda()], state, dtype=dtype, **how)[0].cpu()
        exact = grad.double() / grad.double().norm()
        torch.testing.assert_close(found.double(), exact, rtol=1e-5 + HALF[dtype], atol=1e-7)


def test_zeros_small_norms_nan_and_inf() -> None:
    how: dict[str, Any] = {"state_dtype": "float32", "seeds": [1], **NUMBERS, "form": "sum", "dtype": torch.float32}

    def found(grad: Tensor, **other: Any) -> Tensor:
        state = on("cuda", fresh((20, 20), "float32"))
        return kernel.normalized_momenta_([grad.cuda()], state, **how | other)[0].cpu()

    grad = torch.zeros(20, 20)
    for eps in (0.0, 1e-7):
        assert found(grad, eps=eps).eq(0).all()
    grad[3, 4] = 1e-9
    torch.testing.assert_close(found(grad)[3, 4], torch.tensor(1.95e-2))
    grad[5, 6] = float("nan")
    assert found(grad).isnan().all()
    grad[5, 6] = float("inf")
    assert found(grad).isnan().nonzero().tolist() == [[5, 6]]
    assert found(grad).nan_to_num(0).eq(0).all()


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_a_matrix_gets_the_same_bits_each_time_and_in_every_stack(state_dtype: str) -> None:
    shape = (1000, 2008)
    grads, seeds = [gradient(shape).cuda() for _ in range(3)], [1, 1 << 31, 7]
    how: dict[str, Any] = {"state_dtype": state_dtype, **NUMBERS, "dtype": torch.bfloat16}
    together = on("cuda", fresh(shape, state_dtype, 3))
    found = kernel.normalized_momenta_(grads, together, seeds=seeds, **how)
    for _ in range(3):
        alone = on("cuda", fresh(shape, state_dtype, 3))
        for i in range(3):
            one = slice(i, i + 1)
            assert torch.equal(kernel.normalized_momenta_(grads[one], alone[one], seeds=seeds[one], **how)[0], found[i])
            assert all(torch.equal(alone[i][key], together[i][key]) for key in alone[i])


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_it_writes_its_own_elements_only_and_needs_no_alignment(state_dtype: str) -> None:
    shape = (1, 3270)
    whole, parts = [], []
    for state in fresh(shape, state_dtype, 2):
        memory = {name: torch.full((x.numel() + 2,), 77, dtype=x.dtype, device="cuda") for name, x in state.items()}
        whole += memory.values()
        parts.append({name: x[1:-1].zero_().view(state[name].shape) for name, x in memory.items()})
    twins = on("cpu", parts)
    grads = gradient((2, 1, 3272))[..., 1:-1]
    how: dict[str, Any] = {"state_dtype": state_dtype, "seeds": [3, 4], **NUMBERS, "dtype": torch.float32}
    found = kernel.normalized_momenta_(list(grads.cuda().unbind()), parts, **how).cpu()
    expected = reference_moments.normalized_momenta_(list(grads.unbind()), twins, **how)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert_kept(on("cpu", parts), twins, state_dtype)
    assert all(x[0] == 77 and x[-1] == 77 for x in whole)


def test_it_addresses_more_elements_than_fit_32_bits() -> None:
    numel = (1 << 31) + 1000
    free, _ = torch.cuda.mem_get_info()
    if free < 10 * numel:
        pytest.skip("needs 20 GB of free GPU memory")
    grad = torch.ones(1, numel, dtype=torch.bfloat16, device="cuda")
    codes = torch.zeros(1, numel, dtype=torch.int8, device="cuda")
    state = {"momentum_buffer": codes, "momentum_buffer_scale": torch.zeros(-(-numel // 256), device="cuda")}
    how: dict[str, Any] = {"state_dtype": "int8", "seeds": [3], **NUMBERS, "dtype": torch.bfloat16}
    found = kernel.normalized_momenta_([grad], [state], **how)[0, 0]
    for part in (slice(0, 10), slice(-10, None), slice((1 << 31) - 5, (1 << 31) + 5)):
        torch.testing.assert_close(found[part].float().cpu(), torch.full((10,), numel**-0.5), rtol=2.0**-8, atol=0.0)
        assert codes[0, part].eq(127).all()


def test_it_runs_on_the_device_of_its_tensors() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    assert torch.cuda.current_device() == 0
    assert_twins((100, 30), "int8", count=2, device="cuda:1")
    assert torch.cuda.current_device() == 0


def test_a_step_does_not_wait_for_the_device() -> None:
    grads = [torch.zeros(100, 30, device="cuda") for _ in range(3)]
    states = on("cuda", fresh((100, 30), "int8", 3))
    how: dict[str, Any] = {"state_dtype": "int8", "seeds": [3] * 3, **NUMBERS, "dtype": torch.bfloat16}
    kernel.normalized_momenta_(grads, states, **how)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = kernel.normalized_momenta_(grads, states, **how)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.eq(0).all()
