"""Columns of most energy, and Adam along them, on the hardware that the kernels are written for."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_optim import reference_columns

pytest.importorskip("triton", reason="triton is not installed")

from lowrank_optim.kernels import chosen_adam, select
from lowrank_optim.kernels._launch import ChosenTile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process"),
]

State = dict[str, Tensor]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DIMS = [-1, -2]
MOMENTS = ("exp_avg", "exp_avg_sq")
NUMBERS: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}
# (matrices, n, r)
SIZES = [(1, 1, 1), (3, 33, 5), (2, 300, 300), (5, 1000, 999), (8, 4096, 1024), (2, 11008, 700), (1, 16384, 16384)]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "padded": lambda x: torch.nn.functional.pad(x, (3, 2))[:, 3:-2],
    "sliced": lambda x: torch.stack([x, x], -1)[..., 0],
}
ENERGIES: dict[str, Callable[[Tensor], Tensor]] = {
    "different": lambda x: x,
    "equal": lambda x: torch.full_like(x, 2.0),
    "ties": lambda x: x.mul(2).round(),
    "zeros": lambda x: torch.where(x > 0.5, 1.0, torch.where(x > 0, 0.0, -0.0)),
    "extremes": lambda x: torch.where(x > 1, torch.inf, torch.where(x < -1, -torch.inf, x * 1e-42)),
    "nan": lambda x: torch.where(x.abs() < 0.4, torch.nan, x).copysign(torch.randn_like(x)),
}


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill what torch.empty returns with NaN or the largest number, as torch does for whoever asks for determinism."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3, device="cuda").isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def columns(n: int, r: int) -> Tensor:
    """Return r sorted columns of n."""
    return torch.randperm(n)[:r].sort().values.int()


def on(device: str, states: list[State]) -> list[State]:
    """Return copies of states on a device."""
    return [{name: x.detach().clone().to(device) for name, x in state.items()} for state in states]


def assert_selects(energies: Tensor, indices: list[Tensor], warps: int | None = None) -> None:
    """The twin is asked on the host."""
    ours, twins = [x.cuda() for x in indices], [x.clone() for x in indices]
    given = energies.cuda()
    places = select.select_columns_(given, ours, warps=warps)
    expected = reference_columns.select_columns_(energies, twins)
    assert torch.equal(given.cpu().view(torch.int32), energies.view(torch.int32))
    assert all(torch.equal(x.cpu(), y) for x, y in zip(ours, twins, strict=True))
    assert torch.equal(places.cpu(), expected)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", ENERGIES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_selects_what_its_twin_does(size: tuple[int, int, int], kind: str) -> None:
    count, n, r = size
    assert_selects(ENERGIES[kind](torch.randn(count, n)), [columns(n, r) for _ in range(count)])


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 4096), share=st.floats(0, 1), count=st.integers(1, 4), kind=st.sampled_from(sorted(ENERGIES)))
def test_it_selects_what_its_twin_does_anywhere(n: int, share: float, count: int, kind: str) -> None:
    r = round(share * n)
    assert_selects(ENERGIES[kind](torch.randn(count, n)), [columns(n, r) for _ in range(count)])


def test_warps_can_be_swept() -> None:
    for warps in (4, 8, 16, 32):
        for kind in ENERGIES.values():
            assert_selects(kind(torch.randn(2, 4096)), [columns(4096, 1024) for _ in range(2)], warps)


def test_selection_writes_its_own_elements_only_and_needs_no_alignment() -> None:
    memory = torch.full((2, 1003), 77, dtype=torch.int32, device="cuda")
    energies = torch.randn(2, 5003)[:, 1:-1]
    indices = [row[1:-1].copy_(columns(5001, 1001)) for row in memory]
    twins = [x.cpu() for x in indices]
    places = select.select_columns_(energies.cuda(), indices)
    assert torch.equal(places.cpu(), reference_columns.select_columns_(energies, twins))
    assert all(torch.equal(x.cpu(), y) for x, y in zip(indices, twins, strict=True))
    assert (memory[:, [0, -1]] == 77).all()


def moved(n: int, r: int, m: int, dim: int, count: int) -> tuple[list[State], Tensor]:
    """Return states whose columns were just selected among n, and where their moments are."""
    indices = [columns(n, r) for _ in range(count)]
    # about half of them stay
    energies = torch.rand(count, n)
    for energy, index in zip(energies, indices, strict=True):
        energy[index.long()] += 0.5 * (torch.rand(r) < 0.8)
    places = reference_columns.select_columns_(energies, indices)
    shape = (m, r) if dim == -1 else (r, m)
    states = [
        {"basis_index": index, "exp_avg": torch.randn(shape), "exp_avg_sq": torch.rand(shape)} for index in indices
    ]
    return states, places


def matrices(n: int, m: int, dim: int, count: int, dtype: torch.dtype) -> list[Tensor]:
    """Return coefficients along n columns."""
    return [torch.randn((m, n) if dim == -1 else (n, m)).to(dtype) for _ in range(count)]


def assert_twins(
    n: int,
    r: int,
    m: int,
    dim: int,
    *,
    count: int = 1,
    values: torch.dtype = torch.bfloat16,
    dtype: torch.dtype = torch.bfloat16,
    layout: str = "contiguous",
    tile: ChosenTile | None = None,
) -> None:
    """The twin is asked on the host."""
    twins, places = moved(n, r, m, dim, count)
    ours = on("cuda", twins)
    coefficients = matrices(n, m, dim, count, values)
    given = [LAYOUTS[layout](x.cuda()) for x in coefficients]
    how: dict[str, Any] = {"dim": dim, "steps": [3 + 5 * i for i in range(count)], "scale": 0.25, **NUMBERS}
    found = chosen_adam.chosen_adam_directions_(given, ours, places.cuda(), **how, dtype=dtype, tile=tile)
    expected = reference_columns.chosen_adam_directions_(coefficients, twins, places, **how)
    assert all(torch.equal(x.cpu(), y) for x, y in zip(given, coefficients, strict=True))
    half = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    for direction, whole, our, twin in zip(found, expected, on("cpu", ours), twins, strict=True):
        assert direction.dtype == dtype
        assert direction.is_contiguous()
        torch.testing.assert_close(direction.cpu().float(), whole, rtol=1e-5 + half, atol=1e-5)
        torch.testing.assert_close(our, twin, rtol=1e-6, atol=1e-6)
        assert torch.equal(our["basis_index"], twin["basis_index"])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("values", DTYPES, ids=str)
@pytest.mark.parametrize(
    "size", [(1, 1, 1), (5, 5, 3), (70, 33, 65), (1024, 256, 300), (4096, 1024, 64), (8192, 5000, 20)], ids=str
)
@pytest.mark.parametrize("dim", DIMS)
def test_adam_equals_its_twin(dim: int, size: tuple[int, int, int], values: torch.dtype) -> None:
    assert_twins(*size, dim, values=values)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", DIMS)
def test_many_of_any_layout_equal_their_twins(dim: int, layout: str, dtype: torch.dtype) -> None:
    assert_twins(400, 120, 190, dim, count=3, dtype=dtype, layout=layout)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 600),
    share=st.floats(0, 1),
    m=st.integers(0, 100),
    dim=st.sampled_from(DIMS),
    count=st.integers(1, 2),
    layout=st.sampled_from(sorted(LAYOUTS)),
    split=st.booleans(),
)
def test_adam_equals_its_twin_anywhere(
    n: int, share: float, m: int, dim: int, count: int, layout: str, split: bool
) -> None:
    tile = ChosenTile(32, 16, 4) if split else None
    assert_twins(n, round(share * n), m, dim, count=count, layout=layout, tile=tile)


@pytest.mark.parametrize("dim", DIMS)
def test_what_moves_in_parts_moves_as_what_moves_at_once(dim: int) -> None:
    """Many programs of a tile that is read and written while others are."""
    n, r, m = 4096, 1024, 512
    states, places = moved(n, r, m, dim, 2)
    places = places.cuda()
    coefficients = [x.cuda() for x in matrices(n, m, dim, 2, torch.bfloat16)]
    how: dict[str, Any] = {"dim": dim, "steps": [2, 9], **NUMBERS}
    results = []
    for tile in (ChosenTile(1024, 4, 16), ChosenTile(256, 16, 8), ChosenTile(64, 32, 4), ChosenTile(16, 16, 1)):
        ours = on("cuda", states)
        found = chosen_adam.chosen_adam_directions_(coefficients, ours, places, **how, tile=tile)
        results.append([*found, *(state[name] for state in ours for name in MOMENTS)])
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dim", DIMS)
def test_steps_from_the_first_one_on(dim: int) -> None:
    """A basis that is not there yet, and moves at each step."""
    n, r, m, count = 1000, 300, 70, 2
    shape = (m, r) if dim == -1 else (r, m)
    index = torch.zeros(r, dtype=torch.int32)
    twins = [{"basis_index": index.clone()} | {name: torch.zeros(shape) for name in MOMENTS} for _ in range(count)]
    ours = on("cuda", twins)
    for step in range(1, 6):
        coefficients = matrices(n, m, dim, count, torch.bfloat16)
        energies = torch.stack([x.float().square().sum(-2 if dim == -1 else -1) for x in coefficients])
        how: dict[str, Any] = {"dim": dim, "steps": [step, step + 1], **NUMBERS}
        places = select.select_columns_(energies.cuda(), [state["basis_index"] for state in ours])
        given = [x.cuda() for x in coefficients]
        found = chosen_adam.chosen_adam_directions_(given, ours, places, **how)
        places = reference_columns.select_columns_(energies, [state["basis_index"] for state in twins])
        expected = reference_columns.chosen_adam_directions_(coefficients, twins, places, **how)
        torch.testing.assert_close([x.cpu() for x in found], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(on("cpu", ours), twins, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dim", DIMS)
def test_nothing_waits_for_the_device(dim: int) -> None:
    states, places = moved(512, 128, 64, dim, 3)
    ours, places = on("cuda", states), places.cuda()
    coefficients = [x.cuda() for x in matrices(512, 64, dim, 3, torch.bfloat16)]
    energies = list(torch.rand(3, 512).cuda())
    how: dict[str, Any] = {"dim": dim, "steps": [1, 2, 3], **NUMBERS}
    # the first one compiles
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            places = select.select_columns_(energies, [state["basis_index"] for state in ours])
            found = chosen_adam.chosen_adam_directions_(coefficients, ours, places, **how)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(x.isfinite().all() for x in found)


def test_they_run_on_the_device_of_their_tensors() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    states, places = moved(60, 20, 9, -1, 1)
    ours = on("cuda:1", states)
    select.select_columns_([torch.rand(60, device="cuda:1")], [ours[0]["basis_index"].clone()])
    x = torch.rand(9, 60, device="cuda:1")
    found = chosen_adam.chosen_adam_directions_([x], ours, places.to("cuda:1"), dim=-1, steps=[1], **NUMBERS)
    assert found[0].device == x.device
    assert torch.cuda.current_device() == 0
