"""Columns of most energy, and Adam along them, against their plain twins on the host."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from lowrank_optim import reference_columns
from lowrank_optim.kernels import chosen_adam, select
from lowrank_optim.kernels._launch import ChosenTile
from tests.kernels import common
from tests.kernels.moments import HALF, NUMBERS, State, on

DIMS = [-1, -2]
MOMENTS = ("exp_avg", "exp_avg_sq")
LAYOUTS = common.LAYOUTS | {
    "padded": lambda x: torch.nn.functional.pad(x, (3, 2))[:, 3:-2],
    "padded transposed": lambda x: torch.nn.functional.pad(x.mT, (3, 2))[:, 3:-2].mT,
}
ENERGIES: dict[str, Callable[[Tensor], Tensor]] = {
    "different": lambda x: x,
    "equal": lambda x: torch.full_like(x, 2.0),
    "ties": lambda x: x.mul(2).round(),
    "zeros": lambda x: torch.where(x > 0.5, 1.0, torch.where(x > 0, 0.0, -0.0)),
    "extremes": lambda x: torch.where(x > 1, torch.inf, torch.where(x < -1, -torch.inf, x * 1e-42)),
    "nan": lambda x: torch.where(x.abs() < 0.4, torch.nan, x).copysign(torch.randn_like(x)),
}
# of hypothesis, for the selection and for Adam
SELECTION = {"share": st.floats(0, 1), "kind": st.sampled_from(sorted(ENERGIES))}
HOW = {
    "share": st.floats(0, 1),
    "dim": st.sampled_from(DIMS),
    "count": st.integers(1, 2),
    "layout": st.sampled_from(sorted(LAYOUTS)),
}


def columns(n: int, r: int) -> Tensor:
    """Return r sorted columns of n."""
    return torch.randperm(n)[:r].sort().values.int()


def assert_selected(energies: Tensor, indices: list[Tensor], twins: list[Tensor], places: Tensor) -> None:
    """Compare with what the twin selects, and where it finds that."""
    expected = reference_columns.select_columns_(energies.cpu(), twins)
    assert all(torch.equal(x.cpu(), y) for x, y in zip(indices, twins, strict=True))
    assert places.dtype == torch.int32
    assert torch.equal(places.cpu(), expected)


def assert_selects(
    count: int, n: int, r: int, kind: str, *, stacked: bool = True, warps: int | None = None, device: str
) -> None:
    """Compare with the twin, for energies of a kind; they stay as they are."""
    energies = ENERGIES[kind](torch.randn(count, n))
    twins = [columns(n, r) for _ in range(count)]
    ours, given = [x.clone().to(device) for x in twins], energies.clone().to(device)
    places = select.select_columns_(given if stacked else [x.clone() for x in given], ours, warps=warps)
    assert torch.equal(given.cpu().view(torch.int32), energies.view(torch.int32))
    assert_selected(energies, ours, twins, places)


def selects_anywhere(n: int, share: float, device: str, **case: Any) -> None:
    """It selects what its twin does for any of `SELECTION`."""
    assert_selects(n=n, r=round(share * n), device=device, **case)


def selection_writes_its_own_elements_only(n: int, r: int, count: int, device: str) -> None:
    """Of memory that is not aligned, too, where energies are as well."""
    memory = torch.full((count, r + 2), 77, dtype=torch.int32, device=device)
    energies = torch.randn(count, n + 2).to(device)[:, 1:-1]
    indices = [row[1:-1].copy_(columns(n, r)) for row in memory]
    twins = [x.clone().cpu() for x in indices]
    places = select.select_columns_(energies, indices)
    assert_selected(energies, indices, twins, places)
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


def matrices(n: int, m: int, dim: int, count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return coefficients along n columns."""
    return [torch.randn((m, n) if dim == -1 else (n, m)).to(dtype) for _ in range(count)]


def assert_twins(
    n: int,
    r: int,
    m: int,
    dim: int,
    *,
    count: int = 1,
    values: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    tile: ChosenTile | None = None,
    device: str,
) -> None:
    """Compare directions of a dtype, from coefficients of `values`, with the twin's; what is only read stays."""
    twins, places = moved(n, r, m, dim, count)
    ours, found_at = on(device, twins), places.clone().to(device)
    coefficients = matrices(n, m, dim, count, values)
    given = [LAYOUTS[layout](x.clone().to(device)) for x in coefficients]
    how: dict[str, Any] = {"dim": dim, "steps": [3 + 5 * i for i in range(count)], "scale": 0.25, **NUMBERS}
    found = chosen_adam.chosen_adam_directions_(given, ours, found_at, **how, dtype=dtype, tile=tile)
    expected = reference_columns.chosen_adam_directions_(coefficients, twins, places, **how)
    assert all(torch.equal(x.cpu(), y) for x, y in zip((*given, found_at), (*coefficients, places), strict=True))
    for direction, whole, our, twin in zip(found, expected, on("cpu", ours), twins, strict=True):
        assert direction.dtype == dtype
        assert direction.shape == twin["exp_avg"].shape
        assert direction.is_contiguous()
        torch.testing.assert_close(direction.cpu().float(), whole, rtol=1e-5 + HALF[dtype], atol=1e-5)
        torch.testing.assert_close(our, twin, rtol=1e-6, atol=1e-6)
        assert torch.equal(our["basis_index"], twin["basis_index"])


def anywhere(n: int, share: float, device: str, **case: Any) -> None:
    """Adam equals its twin for any of `HOW`."""
    assert_twins(n, round(share * n), device=device, **case)


def tiles_give_the_same_bits(
    coefficients: list[Tensor],
    states: list[State],
    places: Tensor,
    dim: int,
    tiles: Sequence[ChosenTile | None],
    device: str,
) -> None:
    """They do, whatever of the rank is moved at once."""
    given, places = [x.to(device) for x in coefficients], places.to(device)
    how: dict[str, Any] = {"dim": dim, "steps": [2 + 7 * i for i in range(len(given))], **NUMBERS}
    results = []
    for tile in tiles:
        ours = on(device, states)
        found = chosen_adam.chosen_adam_directions_(given, ours, places, **how, tile=tile)
        results.append([*found, *(state[name] for state in ours for name in MOMENTS)])
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


def steps_equal_those_of_twins(n: int, r: int, m: int, dim: int, rounds: int, device: str) -> None:
    """From the first one on: of a basis that is not there yet, and moves at each step."""
    shape, count = (m, r) if dim == -1 else (r, m), 2
    index = torch.zeros(r, dtype=torch.int32)
    twins = [{"basis_index": index.clone()} | {name: torch.zeros(shape) for name in MOMENTS} for _ in range(count)]
    ours = on(device, twins)
    for step in range(1, rounds + 1):
        coefficients = matrices(n, m, dim, count, torch.bfloat16)
        energies = torch.stack([x.float().square().sum(-3 - dim) for x in coefficients])
        how: dict[str, Any] = {"dim": dim, "steps": [step, step + 1], **NUMBERS}
        places = select.select_columns_(energies.to(device), [state["basis_index"] for state in ours])
        given = [x.to(device) for x in coefficients]
        found = chosen_adam.chosen_adam_directions_(given, ours, places, **how)
        places = reference_columns.select_columns_(energies, [state["basis_index"] for state in twins])
        expected = reference_columns.chosen_adam_directions_(coefficients, twins, places, **how)
        torch.testing.assert_close([x.cpu() for x in found], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(on("cpu", ours), twins, rtol=1e-6, atol=1e-6)
