"""Adam with stored moments on the hardware that the kernel is written for, against its plain twin on the host."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_optim import reference, reference_moments
from lowrank_optim.storage import STATE_DTYPES, storage

pytest.importorskip("triton", reason="triton is not installed")

from lowrank_optim.kernels import adam, moments

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process"),
]

State = dict[str, Tensor]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1,), (3, 5), (64,), (256,), (7, 101), (33, 65), (512, 300), (1 << 20,)]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "sliced": lambda x: torch.stack([x, x], -1)[..., 0],
}
NUMBERS: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}


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
    """Return moments that are zero."""

    def new(shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype)

    kept: Any = storage(state_dtype)
    return [kept.init("exp_avg", shape, new) | kept.init("exp_avg_sq", shape, new, signed=False) for _ in range(count)]


def on(device: str, states: list[State]) -> list[State]:
    """Return copies of states on a device."""
    return [{name: x.detach().clone().to(device) for name, x in state.items()} for state in states]


def gradient(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Return numbers of very different magnitudes."""
    return (scale * torch.randn(shape) * torch.rand(shape) ** 4).to(dtype)


def codes(x: Tensor, packed: bool) -> Tensor:
    return (reference.unpack(x, 2 * x.numel()) if packed else x).int()


def assert_kept(ours: list[State], twins: list[State], state_dtype: str, scale: float = 1.0) -> None:
    """Scales and float32 are the same but for rounding; codes are, but for a few that are one apart.

    A first moment is a sum of gradients of about `scale`, and may be much smaller than they are.
    """
    for our, twin in zip(ours, twins, strict=True):
        for name, expected in twin.items():
            atol = 2e-38 if name.startswith("exp_avg_sq") else 1e-6 * scale
            if expected.dtype == torch.float32:
                torch.testing.assert_close(our[name], expected, rtol=1e-6, atol=atol)
                continue
            apart = (codes(our[name], state_dtype == "int4") - codes(expected, state_dtype == "int4")).abs()
            if expected.dtype == torch.bfloat16:
                apart = our[name] != expected
                torch.testing.assert_close(our[name], expected, rtol=2.0**-7, atol=atol)
            assert apart.numel() == 0 or apart.max() <= 1, name
            assert apart.count_nonzero() <= 1 + expected.numel() / 1000, name


def assert_twins(
    shape: tuple[int, ...],
    state_dtype: str,
    *,
    grad_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    betas: tuple[float, float] = (0.9, 0.999),
    scale: float = 1.0,
    count: int = 1,
    rounds: int = 3,
    device: str = "cuda",
) -> None:
    twins = fresh(shape, state_dtype, count)
    for step in range(1, rounds + 1):
        ours = on(device, twins)
        grads = [LAYOUTS[layout](gradient(shape, grad_dtype, scale).to(device)) for _ in range(count)]
        before = [grad.clone() for grad in grads]
        how: dict[str, Any] = {
            "state_dtype": state_dtype,
            "betas": betas,
            "eps": 1e-8,
            "steps": [step + 5 * i for i in range(count)],
            # more than 31 bits, and such that counters wrap around
            "seeds": [(0xFFFFFFF0 + 977 * i + step) % (1 << 32) for i in range(count)],
        }
        directions = adam.stored_adam_directions_(grads, ours, **how, dtype=dtype)
        expected = reference_moments.stored_adam_directions_([g.cpu() for g in grads], twins, **how)
        assert all(torch.equal(x, y) for x, y in zip(grads, before, strict=True))
        for direction, whole in zip(directions, expected, strict=True):
            assert direction.dtype == dtype
            assert direction.shape == shape
            assert direction.is_contiguous()
            half = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
            torch.testing.assert_close(direction.float().cpu(), whole, rtol=1e-5 + half, atol=1e-5)
        assert_kept(on("cpu", ours), twins, state_dtype, scale)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_it_equals_its_twin(state_dtype: str, shape: tuple[int, ...]) -> None:
    assert_twins(shape, state_dtype)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("layout", "dtype"), list(zip(LAYOUTS, DTYPES, strict=True)))
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_many_in_one_launch_equal_their_twins(state_dtype: str, layout: str, dtype: torch.dtype) -> None:
    assert_twins((90, 31), state_dtype, grad_dtype=torch.bfloat16, dtype=dtype, layout=layout, count=5, rounds=2)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 70), min_size=0, max_size=2).map(tuple),
    state_dtype=st.sampled_from(STATE_DTYPES),
    beta1=st.floats(0, 0.99),
    beta2=st.floats(0.5, 0.9999),
    scale=st.sampled_from([1e-30, 1e-15, 1e-3, 1e3, 1e15]),
    count=st.integers(1, 3),
)
def test_it_equals_its_twin_anywhere(
    shape: tuple[int, ...], state_dtype: str, beta1: float, beta2: float, scale: float, count: int
) -> None:
    assert_twins(shape, state_dtype, betas=(beta1, beta2), scale=scale, count=count, rounds=2)


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_a_matrix_gets_the_same_bits_alone_and_among_others(state_dtype: str) -> None:
    shape = (200, 304)
    together, alone = (on("cuda", fresh(shape, state_dtype, 4)) for _ in range(2))
    for step in (1, 2):
        grads = [gradient(shape).cuda() for _ in range(4)]
        how: dict[str, Any] = {"state_dtype": state_dtype, **NUMBERS}
        steps, seeds = [step, 7, 100, 2], [step, 1, 1 << 31, 16]
        found = adam.stored_adam_directions_(grads, together, steps=steps, seeds=seeds, **how)
        for i in range(4):
            one = slice(i, i + 1)
            direction = adam.stored_adam_directions_(grads[one], alone[one], steps=steps[one], seeds=seeds[one], **how)
            assert torch.equal(direction[0], found[i])
            assert all(torch.equal(alone[i][key], together[i][key]) for key in alone[i])


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8", "int4"])
def test_blocks_of_nan_inf_zero_and_of_the_smallest_numbers(state_dtype: str) -> None:
    size = moments.ROWS_OF[state_dtype]
    grad = gradient((5 * size + 3,))
    blocks = [grad[start : start + size] for start in range(0, grad.numel(), size)]
    blocks[0][5], blocks[1][9], blocks[5][2] = float("nan"), float("inf"), float("-inf")
    blocks[2].zero_()
    blocks[3].mul_(1e-36)
    twins = fresh(grad.shape, state_dtype)
    ours = on("cuda", twins)
    how: dict[str, Any] = {"state_dtype": state_dtype, "steps": [1], "seeds": [3], **NUMBERS}
    found = adam.stored_adam_directions_([grad.cuda()], ours, **how)[0].cpu()
    expected = reference_moments.stored_adam_directions_([grad], twins, **how)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    for name in ("exp_avg", "exp_avg_sq"):
        kept = (on("cpu", ours), twins)
        read, wanted = (reference_moments.read_moment(s[0], name, grad.shape, state_dtype) for s in kept)
        assert torch.equal(read.isfinite(), wanted.isfinite())
        if state_dtype != "bfloat16":
            assert not torch.cat([read[: 2 * size], read[5 * size :]]).isfinite().any()
        good = slice(2 * size, 5 * size)
        assert read[good].isfinite().all()
        torch.testing.assert_close(read[good], wanted[good], rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_it_writes_its_own_elements_only_and_needs_no_alignment(state_dtype: str, count: int) -> None:
    shape = (3270,)
    whole, parts = [], []
    for state in fresh(shape, state_dtype, count):
        memory = {name: torch.full((x.numel() + 2,), 77, dtype=x.dtype, device="cuda") for name, x in state.items()}
        whole += memory.values()
        parts.append({name: x[1:-1].zero_() for name, x in memory.items()})
    twins = on("cpu", parts)
    grads = [gradient((count, 3272))[i, 1:-1] for i in range(count)]
    how: dict[str, Any] = {"state_dtype": state_dtype, "steps": [1] * count, "seeds": [3] * count, **NUMBERS}
    adam.stored_adam_directions_(list(torch.stack(grads).cuda().unbind()), parts, **how)
    reference_moments.stored_adam_directions_(grads, twins, **how)
    assert_kept(on("cpu", parts), twins, state_dtype)
    assert all(x[0] == 77 and x[-1] == 77 for x in whole)


@pytest.mark.parametrize("state_dtype", ["int8", "int4"])
def test_programs_may_be_of_other_sizes(state_dtype: str) -> None:
    grad, found = gradient((10007,)).cuda(), []
    for launch in ((2048, 4), (4096, 8), None):
        state = on("cuda", fresh(grad.shape, state_dtype))
        how: dict[str, Any] = {"state_dtype": state_dtype, "steps": [1], "seeds": [5], **NUMBERS}
        direction = adam.stored_adam_directions_([grad], state, launch=launch, **how)[0]
        found.append([direction, *state[0].values()])
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


def test_it_addresses_more_elements_than_fit_32_bits() -> None:
    numel = (1 << 31) + 1000
    free, _ = torch.cuda.mem_get_info()
    if free < 10 * numel:
        pytest.skip("needs 20 GB of free GPU memory")
    grad = torch.ones(numel, dtype=torch.bfloat16, device="cuda")
    state = {
        "exp_avg": torch.zeros(numel, dtype=torch.int8, device="cuda"),
        "exp_avg_sq": torch.zeros(numel, dtype=torch.uint8, device="cuda"),
        "exp_avg_scale": torch.zeros(-(-numel // 256), device="cuda"),
        "exp_avg_sq_scale": torch.zeros(-(-numel // 256), device="cuda"),
    }
    how: dict[str, Any] = {"state_dtype": "int8", "steps": [1], "seeds": [3], "dtype": torch.bfloat16, **NUMBERS}
    direction = adam.stored_adam_directions_([grad], [state], **how)[0]
    for part in (slice(0, 10), slice(-10, None), slice((1 << 31) - 5, (1 << 31) + 5)):
        assert direction[part].eq(1).all()
        assert state["exp_avg"][part].eq(127).all()
        assert state["exp_avg_sq"][part].eq(255).all()
    torch.testing.assert_close(state["exp_avg_scale"][-3:].cpu(), torch.full((3,), 0.1))


def test_it_runs_on_the_device_of_its_tensors() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    assert torch.cuda.current_device() == 0
    assert_twins((1000,), "int8", count=2, device="cuda:1")
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("count", [1, 3])
def test_a_step_does_not_wait_for_the_device(count: int) -> None:
    grads = [torch.zeros(1000, device="cuda") for _ in range(count)]
    states = on("cuda", fresh((1000,), "int8", count))
    how: dict[str, Any] = {"state_dtype": "int8", "steps": [1] * count, "seeds": [3] * count, **NUMBERS}
    adam.stored_adam_directions_(grads, states, **how)
    torch.cuda.set_sync_debug_mode("error")
    try:
        directions = adam.stored_adam_directions_(grads, states, **how)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(direction.eq(0).all() for direction in directions)
