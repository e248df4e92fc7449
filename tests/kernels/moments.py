"""Adam with stored moments in one kernel, against its plain twin on the host."""

from collections.abc import Iterator
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from lowrank_optim import reference, reference_moments
from lowrank_optim.kernels import adam, moments
from lowrank_optim.storage import STATE_DTYPES, storage
from tests.kernels.common import LAYOUTS

State = dict[str, Tensor]

# one element, odd, a block of either kind exactly, blocks and a rest, more than a program's
SHAPES = [(1,), (3, 5), (64,), (256,), (7, 101), (33, 65)]
NUMBERS: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}
# moments, and whether they have a sign
ADAM = {"exp_avg": True, "exp_avg_sq": False}
# of a result, in units of its numbers: half the distance to the next
HALF = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
HOW = {
    "state_dtype": st.sampled_from(STATE_DTYPES),
    # a lerp takes 1 - (1 - beta1) in float32, which of a small one is another number
    "beta1": st.just(0.0) | st.floats(0.1, 0.99),
    "beta2": st.floats(0.5, 0.9999),
    "scale": st.sampled_from([1e-30, 1e-15, 1e-3, 1e3, 1e15]),
}


def fresh(
    shape: tuple[int, ...], state_dtype: str, count: int = 1, device: str = "cpu", signed: dict[str, bool] = ADAM
) -> list[State]:
    """Return moments that are zero."""

    def new(shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype, device=device)

    kept: Any = storage(state_dtype)
    moments = [[kept.init(name, shape, new, signed=of) for name, of in signed.items()] for _ in range(count)]
    return [dict(item for moment in state for item in moment.items()) for state in moments]


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
            found = our[name].cpu()
            atol = 2e-38 if name.startswith("exp_avg_sq") else 1e-6 * scale
            if expected.is_floating_point():
                near = 1e-6 if expected.dtype == torch.float32 else 2.0**-7
                torch.testing.assert_close(found, expected, rtol=near, atol=atol)
                apart = (found != expected) & (expected.dtype == torch.bfloat16)
            else:
                apart = (codes(found, state_dtype == "int4") - codes(expected, state_dtype == "int4")).abs()
                assert apart.numel() == 0 or apart.max() <= 1, name
            assert apart.count_nonzero() <= 1 + expected.numel() / 1000, name


def steps_of(
    shape: tuple[int, ...],
    state_dtype: str,
    twins: list[State],
    rounds: int,
    device: str,
    *,
    grad_dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    scale: float = 1.0,
) -> Iterator[tuple[int, list[State], list[Tensor], list[int]]]:
    """Hand out what steps begin with: their number, copies of the twins' states on a device, gradients and seeds.

    After each step the states are compared, and gradients must have stayed as they were.
    """
    count = len(twins)
    for step in range(1, rounds + 1):
        ours = on(device, twins)
        grads = [LAYOUTS[layout](gradient(shape, grad_dtype, scale).to(device)) for _ in range(count)]
        before = [grad.clone() for grad in grads]
        # more than 31 bits, and such that counters wrap around
        yield step, ours, grads, [(0xFFFFFFF0 + 977 * i + step) % (1 << 32) for i in range(count)]
        assert all(torch.equal(x, y) for x, y in zip(grads, before, strict=True))
        assert_kept(ours, twins, state_dtype, scale)


def assert_twins(
    shape: tuple[int, ...],
    state_dtype: str,
    *,
    dtype: torch.dtype = torch.float32,
    betas: tuple[float, float] = (0.9, 0.999),
    count: int = 1,
    rounds: int = 3,
    device: str,
    **drawn: Any,
) -> None:
    """Compare some steps with the twin's on the host; `drawn` says of what kind gradients are."""
    twins = fresh(shape, state_dtype, count)
    for step, ours, grads, seeds in steps_of(shape, state_dtype, twins, rounds, device, **drawn):
        how: dict[str, Any] = {"state_dtype": state_dtype, "betas": betas, "eps": 1e-8, "seeds": seeds}
        how |= {"steps": [step + 5 * i for i in range(count)], "scale": (1.0, 0.25, 128.0)[step % 3]}
        directions = adam.stored_adam_directions_(grads, ours, **how, dtype=dtype)
        expected = reference_moments.stored_adam_directions_([grad.cpu() for grad in grads], twins, **how)
        for direction, whole in zip(directions, expected, strict=True):
            assert direction.dtype == dtype
            assert direction.shape == shape
            assert direction.is_contiguous()
            bounds = {"rtol": 1e-5 + HALF[dtype], "atol": 1e-5 * how["scale"]}
            torch.testing.assert_close(direction.float().cpu(), whole, **bounds)


def anywhere(beta1: float, beta2: float, device: str, **case: Any) -> None:
    """It equals its twin for any of `HOW`."""
    assert_twins(**case, betas=(beta1, beta2), rounds=2, device=device)


def bits_are_the_same(
    shape: tuple[int, ...], state_dtype: str, steps: tuple[int, ...], seeds: tuple[int, ...], device: str
) -> list[Tensor]:
    """They are, of a matrix alone and among others; the first is at step 1 and then 2."""
    count = len(steps) + 1
    together, alone = (fresh(shape, state_dtype, count, device) for _ in range(2))
    how: dict[str, Any] = {"state_dtype": state_dtype, **NUMBERS}
    for step in (1, 2):
        grads = [gradient(shape).to(device) for _ in range(count)]
        numbers = {"steps": [step, *steps], "seeds": [step, *seeds]}
        found = adam.stored_adam_directions_(grads, together, **numbers, **how)
        for i in range(count):
            one = slice(i, i + 1)
            own = {name: values[one] for name, values in numbers.items()}
            direction = adam.stored_adam_directions_(grads[one], alone[one], **own, **how)
            assert torch.equal(direction[0], found[i])
            assert all(torch.equal(alone[i][key], together[i][key]) for key in alone[i])
    return found


def blocks_of_any_numbers(state_dtype: str, device: str, smallest: float, least: float) -> None:
    """NaN and Inf stay in their blocks, zeros and the smallest numbers are kept; below `least` any is as good."""
    size = moments.ROWS_OF[state_dtype]
    grad = gradient((5 * size + 3,))
    blocks = [grad[start : start + size] for start in range(0, grad.numel(), size)]
    blocks[0][5], blocks[1][9], blocks[5][2] = float("nan"), float("inf"), float("-inf")
    blocks[2].zero_()
    blocks[3].mul_(smallest)
    twins = fresh(grad.shape, state_dtype)
    ours = on(device, twins)
    how: dict[str, Any] = {"state_dtype": state_dtype, "steps": [1], "seeds": [3], **NUMBERS}
    found = adam.stored_adam_directions_([grad.to(device)], ours, **how)[0].cpu()
    expected = reference_moments.stored_adam_directions_([grad], twins, **how)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    for name in ("exp_avg", "exp_avg_sq"):
        kept = (on("cpu", ours), twins)
        read, wanted = (reference_moments.read_moment(s[0], name, grad.shape, state_dtype) for s in kept)
        assert torch.equal(read.isfinite(), wanted.isfinite())
        assert not read.isfinite().all()
        if state_dtype != "bfloat16":
            assert not torch.cat([read[: 2 * size], read[5 * size :]]).isfinite().any()
        good = slice(2 * size, 5 * size)
        assert read[good].isfinite().all()
        torch.testing.assert_close(read[good], wanted[good], rtol=1e-5, atol=least)
    # and so they are read again
    ones = torch.ones_like(grad)
    found = adam.stored_adam_directions_([ones.to(device)], ours, **how)[0].cpu()
    expected = reference_moments.stored_adam_directions_([ones], twins, **how)[0]
    assert torch.equal(found.isnan(), expected.isnan())


def within(states: list[State], device: str) -> tuple[list[Tensor], list[State]]:
    """Return memory full of 77, and states of zeros in it, each tensor off by one element."""
    whole, parts = [], []
    for state in states:
        memory = {name: torch.full((x.numel() + 2,), 77, dtype=x.dtype, device=device) for name, x in state.items()}
        whole += memory.values()
        parts.append({name: x[1:-1].zero_().view(state[name].shape) for name, x in memory.items()})
    return whole, parts


def its_own_elements_are_written_only(numel: int, state_dtype: str, count: int, device: str) -> None:
    """Of memory that is not aligned, too."""
    whole, parts = within(fresh((numel,), state_dtype, count), device)
    twins = on("cpu", parts)
    grads = gradient((count, numel + 2))
    how: dict[str, Any] = {"state_dtype": state_dtype, "steps": [1] * count, "seeds": [3] * count, **NUMBERS}
    adam.stored_adam_directions_([grad[1:-1] for grad in grads.to(device)], parts, **how)
    reference_moments.stored_adam_directions_([grad[1:-1] for grad in grads], twins, **how)
    assert_kept(parts, twins, state_dtype)
    assert all(x[0] == 77 and x[-1] == 77 for x in whole)


def programs_may_be_of_other_sizes(numel: int, state_dtype: str, launches: list[tuple[int, int]], device: str) -> None:
    grad, found = gradient((numel,)).to(device), []
    for launch in (*launches, None):
        state = fresh((numel,), state_dtype, device=device)
        how: dict[str, Any] = {"state_dtype": state_dtype, "steps": [1], "seeds": [5], **NUMBERS}
        direction = adam.stored_adam_directions_([grad], state, launch=launch, **how)[0]
        found.append([direction, *state[0].values()])
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))
