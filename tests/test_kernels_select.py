"""Columns of most energy, and Adam along them: interpreted, against plain twins, and compiled for absent GPUs."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_optim import reference_columns
from lowrank_optim.columns import Identity

pytest.importorskip("triton", reason="triton is not installed")

from lowrank_optim.kernels import chosen_adam, select
from lowrank_optim.kernels._launch import CHOSEN_OTHERS, CHOSEN_TILES, SELECTABLE, ChosenTile, chosen_tile, select_warps
from tests.ahead import Job, assert_fits, compiled
from tests.kernels import select as checks
from tests.kernels.common import DTYPES, interpreted, poisoned
from tests.kernels.moments import NUMBERS, State, on
from tests.kernels.select import DIMS, ENERGIES, LAYOUTS, MOMENTS, columns, matrices, moved

# (matrices, n, r): one column, all columns, a block exactly, more than a chunk, the largest of all
SIZES = [(1, 1, 1), (1, 7, 7), (2, 33, 5), (1, 128, 64), (1, 300, 1), (1, 1000, 999), (1, SELECTABLE, 3000)]


@interpreted
@pytest.mark.parametrize("kind", ENERGIES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@poisoned("cpu")
def test_it_selects_what_its_twin_does(size: tuple[int, int, int], kind: str) -> None:
    checks.assert_selects(*size, kind, device="cpu")


@interpreted
@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 400), count=st.integers(1, 2), stacked=st.booleans(), **checks.SELECTION)
def test_it_selects_what_its_twin_does_anywhere(**case: Any) -> None:
    checks.selects_anywhere(**case, device="cpu")


@interpreted
@pytest.mark.parametrize("warps", [1, 2, 8])
def test_chunks_can_be_of_any_length(warps: int) -> None:
    for kind in ENERGIES:
        checks.assert_selects(1, 600, 270, kind, warps=warps, device="cpu")


@pytest.mark.parametrize("kind", ENERGIES)
def test_the_twin_selects_and_finds_what_a_basis_does(kind: str) -> None:
    n, r = 200, 60
    basis = Identity(r, "right", n)
    old = columns(n, r)
    energy = ENERGIES[kind](torch.randn(n))
    index, moment = old.clone(), torch.randn(5, r)
    place = reference_columns.select_columns_([energy], [index])[0]
    assert torch.equal(index, basis.select(energy).int())
    moved = basis.move({"basis_index": old}, {"basis_index": index}).first(moment)
    assert torch.equal(torch.where(place < 0, torch.zeros(()), moment[:, place.clamp(min=0)]), moved)


@interpreted
@pytest.mark.parametrize("old", [[0] * 6, [9, 9, 3, 1 << 30, -5, 3], [-1] * 6], ids=str)
def test_what_was_there_before_need_not_be_columns(old: list[int]) -> None:
    index, energy = torch.tensor(old, dtype=torch.int32), torch.randn(11)
    place = select.select_columns_([energy], [index])[0]
    assert torch.equal(index, energy.topk(6).indices.sort().values.int())
    assert ((place >= -1) & (place < 6)).all()
    for j in (place >= 0).nonzero().flatten():
        assert old[int(place[j])] == index[j]


@interpreted
@pytest.mark.parametrize("count", [1, 2])
def test_selection_writes_its_own_elements_only_and_needs_no_alignment(count: int) -> None:
    checks.selection_writes_its_own_elements_only(71, 21, count, "cpu")


ENERGY, INDEX = torch.ones(10), torch.zeros(4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("energies", "indices", "message"),
    [
        ([], [], "as many energies as indices, and some, not 0 and 0"),
        ([ENERGY], [INDEX] * 2, "as many energies as indices, and some, not 1 and 2"),
        ([ENERGY[:3]], [INDEX], r"r ≤ n ≤ 16384, not \(3,\) and \(4,\)"),
        ([torch.ones(SELECTABLE + 1)], [INDEX], r"r ≤ n ≤ 16384, not \(16385,\)"),
        ([torch.ones(2, 5)], [INDEX], r"energies \(n,\) and indices \(r,\).*not \(2, 5\)"),
        ([ENERGY.double()], [INDEX], r"contiguous energies of shape \(10,\), torch.float32 .*not torch.float64"),
        ([ENERGY, torch.ones(20)[::2]], [INDEX] * 2, r"contiguous energies .*strides \(2,\)"),
        ([ENERGY, ENERGY[:9]], [INDEX] * 2, r"contiguous energies of shape \(10,\).*not .*shape \(9,\)"),
        ([ENERGY], [INDEX.long()], r"contiguous indices of shape \(4,\), torch.int32 .*not torch.int64"),
        ([ENERGY], [INDEX.to("meta")], "contiguous indices .*on cpu, not .* on meta"),
    ],
)
def test_selection_refuses_what_it_would_misread(energies: Any, indices: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select.select_columns_(energies, indices)


@interpreted
@pytest.mark.parametrize("values", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1, 1), (5, 5, 3), (40, 9, 17), (70, 33, 65), (300, 257, 5)], ids=str)
@pytest.mark.parametrize("dim", DIMS)
@poisoned("cpu")
def test_adam_equals_its_twin(dim: int, size: tuple[int, int, int], values: torch.dtype) -> None:
    checks.assert_twins(*size, dim, values=values, device="cpu")


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", DIMS)
@poisoned("cpu")
def test_many_of_any_layout_equal_their_twins(dim: int, layout: str, dtype: torch.dtype) -> None:
    checks.assert_twins(40, 12, 19, dim, count=3, values=torch.bfloat16, dtype=dtype, layout=layout, device="cpu")


@interpreted
@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 60),
    m=st.integers(0, 20),
    tile=st.none() | st.sampled_from([4, 16, 32]).map(lambda along: ChosenTile(along, 16, 1)),
    **checks.HOW,
)
def test_adam_equals_its_twin_anywhere(**case: Any) -> None:
    checks.anywhere(**case, device="cpu")


@interpreted
@pytest.mark.parametrize("along", [1, 2])
@pytest.mark.parametrize("dim", DIMS)
def test_what_moves_in_parts_moves_as_what_moves_at_once(dim: int, along: int) -> None:
    """A few columns to the front and to the back, by all distances, into gaps and over them."""
    r, n = 5, 8
    sets = torch.combinations(torch.arange(n), r).int()
    order = torch.randperm(len(sets)).tolist()
    pairs = [(sets[0], sets[-1]), (sets[-1], sets[0]), *((sets[i], sets[j]) for i, j in enumerate(order[:8]))]
    states, places = [], []
    for old, new in pairs:
        index, energy = old.clone(), torch.zeros(n)
        energy[new.long()] = 1.0
        places.append(reference_columns.select_columns_([energy], [index])[0])
        assert torch.equal(index, new)
        shape = (1, r) if dim == -1 else (r, 1)
        states.append({"basis_index": index} | {name: torch.rand(shape) for name in MOMENTS})
    coefficients = matrices(n, 1, dim, len(pairs))
    tiles = [None, ChosenTile(along, 1, 1)]
    checks.tiles_give_the_same_bits(coefficients, states, torch.stack(places), dim, tiles, "cpu")


@interpreted
@pytest.mark.parametrize("dim", DIMS)
def test_steps_from_the_first_one_on(dim: int) -> None:
    checks.steps_equal_those_of_twins(50, 20, 6, dim, 3, "cpu")


@interpreted
@pytest.mark.parametrize("dim", DIMS)
def test_a_matrix_gets_the_same_bits_alone_and_among_others(dim: int) -> None:
    together, places = moved(60, 20, 9, dim, 3)
    alone = on("cpu", together)
    coefficients = matrices(60, 9, dim, 3, torch.bfloat16)
    steps = [1, 7, 100]
    found = chosen_adam.chosen_adam_directions_(coefficients, together, places, dim=dim, steps=steps, **NUMBERS)
    for i in range(3):
        some = slice(i, i + 1)
        direction = chosen_adam.chosen_adam_directions_(
            coefficients[some], alone[some], places[some], dim=dim, steps=steps[some], **NUMBERS
        )
        assert torch.equal(direction[0], found[i])
        assert all(torch.equal(alone[i][name], together[i][name]) for name in MOMENTS)
    assert found[0]._base is found[2]._base


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dim", DIMS)
def test_what_leaves_takes_its_infinities_along(dim: int) -> None:
    states, places = moved(60, 20, 9, dim, 1)
    gone = torch.ones(20, dtype=torch.bool)
    gone[places[0][places[0] >= 0].long()] = False
    assert gone.any()
    for name in MOMENTS:
        states[0][name].movedim(dim, 0)[gone] = float("inf") if name == "exp_avg" else float("nan")
    twins, coefficients = on("cpu", states), matrices(60, 9, dim, 1)
    how: dict[str, Any] = {"dim": dim, "steps": [2], **NUMBERS}
    found = chosen_adam.chosen_adam_directions_(coefficients, states, places, **how)
    torch.testing.assert_close(found, reference_columns.chosen_adam_directions_(coefficients, twins, places, **how))
    assert found[0].isfinite().all()
    # and a NaN among the coefficients goes to its own direction only
    coefficients[0].select(dim, int(states[0]["basis_index"][4]))[3] = float("nan")
    bad = chosen_adam.chosen_adam_directions_(coefficients, states, torch.arange(20).int()[None], **how)[0].isnan()
    assert bad.sum() == 1
    assert bad.select(dim, 4)[3]


@interpreted
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dim", DIMS)
def test_adam_writes_its_own_elements_only_and_needs_no_alignment(dim: int, count: int) -> None:
    parts, places = moved(60, 20, 9, dim, count)
    twins, whole = on("cpu", parts), []
    for state in parts:
        for name, x in state.items():
            memory = torch.full((x.numel() + 2,), 77, dtype=x.dtype)
            state[name] = memory[1:-1].view(x.shape).copy_(x)
            whole.append(memory)
    layout = LAYOUTS["padded" if dim == -1 else "padded transposed"]
    coefficients = [layout(x) for x in matrices(60, 9, dim, count, torch.bfloat16)]
    how: dict[str, Any] = {"dim": dim, "steps": [3] * count, **NUMBERS}
    found = chosen_adam.chosen_adam_directions_(coefficients, parts, places, **how)
    expected = reference_columns.chosen_adam_directions_(coefficients, twins, places, **how)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts, twins, rtol=1e-6, atol=1e-6)
    assert all(x[0] == 77 and x[-1] == 77 for x in whole)


def test_adam_copies_only_what_it_cannot_read() -> None:
    for dim in DIMS:
        for name, layout in LAYOUTS.items():
            given = [layout(torch.rand(6, 8)) for _ in range(2)]
            found = chosen_adam._readable(given, dim)
            assert all(torch.equal(x, y) for x, y in zip(given, found, strict=True))
            copied = found[1].data_ptr() != given[1].data_ptr()
            assert copied == (name == "sliced" or (dim == -1 and "transposed" in name)), (dim, name)
        given[1] = given[1].mT.contiguous().mT
        assert {x.stride() for x in chosen_adam._readable(given, dim)} == {(8, 1)}


def refused(match: str, coefficients: list[Tensor], states: list[State], places: Tensor, **how: Any) -> None:
    numbers: dict[str, Any] = {"dim": -1, "steps": [1] * len(coefficients), **NUMBERS, **how}
    with pytest.raises(ValueError, match=match):
        chosen_adam.chosen_adam_directions_(coefficients, states, places, **numbers)


def test_adam_refuses_what_it_would_misread() -> None:
    states, places = moved(10, 4, 6, -1, 1)
    state, x = states[0], torch.ones(6, 10)
    refused("as much of everything, and some, and dim -1 or -2, not 0, 0, 0 and -1", [], [], places)
    refused("not 1, 2, 1 and -1", [x], states * 2, places)
    refused("not 1, 1, 2 and -1", [x], states, places, steps=[1, 1])
    refused("not 1, 1, 1 and 0", [x], states, places, dim=0)
    refused("matrices of one shape and of float32, .*, not torch.float64", [x.double()], states, places)
    refused(r"not torch.float32 of shape \(60,\)", [x.flatten()], states, places)
    refused(r"not torch.float32 of shape \(5, 10\) .* after \(6, 10\)", [x, x[:5]], states * 2, places)
    refused("not torch.float16", [x, x.half()], states * 2, places)
    refused(r"torch.int32 places of shape \(1, 4\) .*not torch.int64", [x], states, places.long())
    refused(r"torch.int32 places of shape \(1, 4\) .*not .* of shape \(4,\)", [x], states, places[0])
    refused("torch.int32 places .* on cpu, not .* on meta", [x], states, places.to("meta"))
    refused("torch.int32 basis_index", [x], [state | {"basis_index": state["basis_index"].long()}], places)
    for name in MOMENTS:
        for bad in (state[name].bfloat16(), state[name].mT.contiguous(), state[name].mT.contiguous().mT):
            refused(rf"contiguous torch.float32 {name} of shape \(6, 4\)", [x], [state | {name: bad}], places)
    refused(r"contiguous torch.float32 exp_avg of shape \(4, 6\)", [x.mT], states, places, dim=-2)
    refused(
        "needs a direction of float32, bfloat16 or float16, not torch.float64",
        [x],
        states,
        places,
        dtype=x.double().dtype,
    )


RANKS = [1, 2, 15, 64, 100, 256, 1000, 1024, 4096, 5000, SELECTABLE]


def test_the_tables_are_whole() -> None:
    for block in (1 << i for i in range(7, 15)):
        warps = select_warps(block)
        assert warps in (1, 2, 4, 8, 16)
        assert block <= 2 * 32 * 16 * warps
    for dim in DIMS:
        assert len(CHOSEN_TILES[dim]) == 4
        for r in RANKS:
            for lanes in (32, 64):
                tile = chosen_tile(r, dim, lanes)
                assert all(number.bit_count() == 1 for number in tile)
                assert tile.along <= CHOSEN_TILES[dim][0]
                assert tile.along < 2 * r
                assert tile.others <= CHOSEN_OTHERS
                assert tile.warps * lanes <= 1024


def selection(block: int, whole: bool, n: int | None = None) -> Job:
    types = {"energy_ptr": "*fp32", "index_ptr": "*i32", "place_ptr": "*i32", "new_ptr": "*i32", "table_ptr": "*i64"}
    types |= {"n": "i32", "r": "i32", "length": "i32"}
    warps = select_warps(block)
    constants: dict[str, Any] = {"BLOCK": block, "CHUNK": min(block, 128 * warps), "TABLE": whole, "ALIGNED": whole}
    if n is not None:
        constants["n"] = n
    unaligned = ("r", "length", "new_ptr") if whole else ("energy_ptr", "index_ptr", "n", "r", "length", "new_ptr")
    return Job("select", "select_kernel", types, constants, unaligned, {"num_warps": warps})


def adam(dtype: str, r: int, dim: int, flipped: bool, lanes: int, whole: bool = True) -> Job:
    tile = chosen_tile(r, dim, lanes)
    types = {"first_ptr": "*fp32", "second_ptr": "*fp32", "index_ptr": "*i32", "place_ptr": "*i32", "table_ptr": "*i64"}
    types |= {"value_ptr": f"*{dtype}", "direction_ptr": f"*{dtype}"}
    types |= dict.fromkeys(("r", "others", "value_along", "value_others"), "i32")
    types |= dict.fromkeys(("beta1", "beta2", "weight1", "weight2", "ratio", "eps", "scale"), "fp32")
    constants = {"ALONG": tile.along, "OTHERS": tile.others, "DOWN": dim == -2, "SPLIT": r > tile.along}
    constants |= {"TABLE": whole, "ALIGNED": whole, "INTERPRETED": False}
    constants |= {"value_along" if (dim == -1) != flipped else "value_others": 1}
    # of one row or column of one coordinate all sizes and strides are constants
    constants |= dict.fromkeys(("r", "others", "value_along", "value_others"), 1) if r == 1 else {}
    unaligned = () if whole else ("first_ptr", "second_ptr", "value_ptr", "r", "others", "value_along", "value_others")
    options = {"num_warps": tile.warps, "num_stages": 1}
    # of float32 one says what both would
    targets = ("gfx942",) if lanes == 64 else ("sm_80", "sm_90a")[dtype == "fp32" :]
    return Job("chosen_adam", "chosen_adam_kernel", types, constants, unaligned, options, targets)


JOBS = {f"select {block}": selection(block, True) for block in (128, SELECTABLE)}
JOBS |= {"select odd": selection(4096, False), "select one": selection(128, False, 1)}
for _lanes in (32, 64):
    # along -2 the tile of 1024 is that of all that are larger
    for _dim, _flipped, _ranks in ((-1, False, (64, 1024, 8192)), (-2, False, (64, 1024)), (-2, True, (64, 1024))):
        for _r in _ranks if _lanes == 32 else (1024,):
            JOBS[f"{_lanes} {_dim} {_r} {_flipped}"] = adam("bf16", _r, _dim, _flipped, _lanes)
        JOBS[f"{_lanes} {_dim} odd {_flipped}"] = adam("bf16", 999, _dim, _flipped, _lanes, whole=False)
        if _lanes == 32:
            JOBS[f"{_lanes} {_dim} fp32 {_flipped}"] = adam("fp32", 1024, _dim, _flipped, _lanes)
JOBS |= {f"32 {_dim} one False": adam("bf16", 1, _dim, False, 32) for _dim in DIMS}


def test_all_compile_ahead_of_time_without_spills_and_read_wide(tmp_path: Path) -> None:
    found = compiled(JOBS, tmp_path)
    assert len(found) == sum(len(job.targets) for job in JOBS.values())
    for name, built in found.items():
        assert_fits(name, built, scalars="odd" in name)
        target, *kind = name.split()
        store, load = (
            ("(?:global|buffer)_store_dwordx4", "(?:global|buffer)_load_dwordx4")
            if target == "gfx942"
            else (r"st\.global\.v4\.b32", r"ld\.global\.v4\.b32")
        )
        stores, loads = (len(re.findall(access, built.text)) for access in (store, load))
        if kind[0] == "select":
            if kind[1] != "128":
                assert (loads > 0) == kind[1].isdigit(), (name, loads)
        elif kind[2] in ("1024", "fp32"):
            # both moments, which along the rank are gathered
            assert stores >= 2, name
            assert kind[1] == "-1" or loads >= 2, name
