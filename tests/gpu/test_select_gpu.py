"""Columns of most energy, and Adam along them, on the hardware that the kernels are written for."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed")

from lowrank_optim.kernels import chosen_adam, select
from lowrank_optim.kernels._launch import ChosenTile
from tests.kernels import select as checks
from tests.kernels.common import DTYPES, few, hardware, no_waiting, poisoned, second_device
from tests.kernels.moments import NUMBERS, on
from tests.kernels.select import DIMS, ENERGIES, matrices, moved

pytestmark = hardware

DEVICE = "cuda"
# (matrices, n, r)
SIZES = [(1, 1, 1), (3, 33, 5), (2, 300, 300), (5, 1000, 999), (8, 4096, 1024), (2, 11008, 700), (1, 16384, 16384)]


@pytest.mark.parametrize("kind", ENERGIES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@poisoned(DEVICE)
def test_it_selects_what_its_twin_does(size: tuple[int, int, int], kind: str) -> None:
    checks.assert_selects(*size, kind, device=DEVICE)


@few
@given(n=st.integers(1, 4096), count=st.integers(1, 4), **checks.SELECTION)
def test_it_selects_what_its_twin_does_anywhere(**case: Any) -> None:
    checks.selects_anywhere(**case, device=DEVICE)


def test_warps_can_be_swept() -> None:
    for warps in (4, 8, 16, 32):
        for kind in ENERGIES:
            checks.assert_selects(2, 4096, 1024, kind, warps=warps, device=DEVICE)


def test_selection_writes_its_own_elements_only_and_needs_no_alignment() -> None:
    checks.selection_writes_its_own_elements_only(5001, 1001, 2, DEVICE)


@pytest.mark.parametrize("values", DTYPES, ids=str)
@pytest.mark.parametrize(
    "size", [(1, 1, 1), (5, 5, 3), (70, 33, 65), (1024, 256, 300), (4096, 1024, 64), (8192, 5000, 20)], ids=str
)
@pytest.mark.parametrize("dim", DIMS)
@poisoned(DEVICE)
def test_adam_equals_its_twin(dim: int, size: tuple[int, int, int], values: torch.dtype) -> None:
    checks.assert_twins(*size, dim, values=values, dtype=torch.bfloat16, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "padded", "sliced"])
@pytest.mark.parametrize("dim", DIMS)
@poisoned(DEVICE)
def test_many_of_any_layout_equal_their_twins(dim: int, layout: str, dtype: torch.dtype) -> None:
    checks.assert_twins(400, 120, 190, dim, count=3, values=torch.bfloat16, dtype=dtype, layout=layout, device=DEVICE)


@few
@given(n=st.integers(1, 600), m=st.integers(0, 100), tile=st.sampled_from([None, ChosenTile(32, 16, 4)]), **checks.HOW)
def test_adam_equals_its_twin_anywhere(**case: Any) -> None:
    checks.anywhere(**case, values=torch.bfloat16, dtype=torch.bfloat16, device=DEVICE)


@pytest.mark.parametrize("dim", DIMS)
def test_what_moves_in_parts_moves_as_what_moves_at_once(dim: int) -> None:
    """Many programs of a tile that is read and written while others are."""
    n, m = 4096, 512
    tiles = [ChosenTile(1024, 4, 16), ChosenTile(256, 16, 8), ChosenTile(64, 32, 4), ChosenTile(16, 16, 1)]
    coefficients = matrices(n, m, dim, 2, torch.bfloat16)
    checks.tiles_give_the_same_bits(coefficients, *moved(n, 1024, m, dim, 2), dim, tiles, DEVICE)


@pytest.mark.parametrize("dim", DIMS)
def test_steps_from_the_first_one_on(dim: int) -> None:
    checks.steps_equal_those_of_twins(1000, 300, 70, dim, 5, DEVICE)


@pytest.mark.parametrize("dim", DIMS)
def test_nothing_waits_for_the_device(dim: int) -> None:
    states, places = moved(512, 128, 64, dim, 3)
    ours, places = on(DEVICE, states), places.to(DEVICE)
    coefficients = [x.to(DEVICE) for x in matrices(512, 64, dim, 3, torch.bfloat16)]
    energies, indices = list(torch.rand(3, 512).to(DEVICE)), [state["basis_index"] for state in ours]
    how: dict[str, Any] = {"dim": dim, "steps": [1, 2, 3], **NUMBERS}
    # these compile
    select.select_columns_(energies, indices)
    chosen_adam.chosen_adam_directions_(coefficients, ours, places, **how)
    with no_waiting():
        places = select.select_columns_(energies, indices)
        found = chosen_adam.chosen_adam_directions_(coefficients, ours, places, **how)
    assert all(x.isfinite().all() for x in found)


def test_they_run_on_the_device_of_their_tensors() -> None:
    with second_device() as device:
        checks.assert_selects(1, 60, 20, "different", device=device)
        checks.assert_twins(60, 20, 9, -1, device=device)
