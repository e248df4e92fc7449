"""Symmetric products in Triton: against their plain twin where they run interpreted, and compiled for absent GPUs."""

from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_optim import backend, ops, reference_matrix
from lowrank_optim.coefficients import table

pytest.importorskip("triton", reason="triton is not installed")

from lowrank_optim.kernels import symmetric as kernel
from lowrank_optim.kernels._launch import ODD_TILES, SPLITS, TILES, Tiles, parts_of, tiles_for
from tests.alone import ROOT, run_alone
from tests.kernels import symmetric as checks
from tests.kernels.common import DTYPES, READABLE, interpreted, poisoned, shapes_seen

SMALL = Tiles(16, 32, 1, 1)
# (matrices, n, k): one element, less than a tile, a tile exactly, tiles and a rest, nothing to add up
SHAPES = [(1, 1, 1), (3, 5, 7), (1, 16, 32), (3, 20, 70), (1, 50, 101), (3, 17, 0)]


@interpreted
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@poisoned("cpu")
def test_it_equals_its_twin(shape: tuple[int, int, int], dtype: torch.dtype, parts: int) -> None:
    a, c = checks.matrices(shape, dtype, device="cpu")
    checks.assert_twins(a, a, None, tiles=SMALL, parts=parts)
    checks.assert_twins(a, a, c, alpha=-0.7, beta=2.5, gamma=1.5, tiles=SMALL, parts=parts)


@interpreted
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("layout", READABLE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@poisoned("cpu")
def test_it_equals_its_twin_on_any_strides(dtype: torch.dtype, layout: str, parts: int) -> None:
    a, c = checks.matrices((3, 20, 37), dtype, layout, device="cpu")
    checks.assert_twins(a, a, c, alpha=-0.7, tiles=SMALL, parts=parts)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 130, 40), (2, 40, 600)], ids=str)
@poisoned("cpu")
def test_it_equals_its_twin_as_shipped(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    a, c = checks.matrices(shape, dtype, device="cpu")
    assert parts_of(*shape[1:]) == (2 if shape[2] == 600 else 1)
    checks.assert_twins(a, a, c, alpha=0.5, beta=-1.0, gamma=3.0)


@interpreted
@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 36), st.integers(0, 100)),
    parts=st.integers(1, 3),
    numbers=checks.NUMBERS,
    with_c=st.booleans(),
    layouts=st.tuples(*[st.sampled_from(sorted(READABLE))] * 2),
    dtype=st.sampled_from(DTYPES),
)
def test_it_equals_its_twin_anywhere(
    shape: tuple[int, int, int],
    parts: int,
    numbers: dict[str, float],
    with_c: bool,
    layouts: tuple[str, str],
    dtype: torch.dtype,
) -> None:
    a, c = checks.matrices(shape, dtype, layouts[0], device="cpu")
    b = READABLE[layouts[1]](a.clone()) if layouts[1] != "expanded" else a
    checks.assert_twins(a, b, c if with_c else None, **numbers, tiles=SMALL, parts=parts)


@interpreted
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_what_does_not_commute_the_lower_triangle_is_kept_and_mirrored(dtype: torch.dtype, parts: int) -> None:
    checks.lower_triangle_is_mirrored(40, dtype, "cpu", tiles=SMALL, parts=parts)


@interpreted
def test_bfloat16_is_rounded_to_nearest_and_to_even() -> None:
    checks.bfloat16_is_nearest_and_even("cpu")


@interpreted
@pytest.mark.filterwarnings("ignore:.*invalid value encountered.*:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_goes_to_its_row_and_column_and_what_is_not_read_does_not_matter(dtype: torch.dtype) -> None:
    checks.nan_goes_to_its_row_and_column(20, dtype, "cpu", tiles=SMALL)


def test_the_twin_does_not_read_what_does_not_matter() -> None:
    _, c = checks.matrices((1, 20, 20), torch.float32, device="cpu")
    bad = torch.full_like(c, float("nan"))
    assert reference_matrix.symmetric(bad, bad, c, alpha=0.0).isfinite().all()
    assert reference_matrix.symmetric(c, c, bad, beta=0.0).isfinite().all()


@interpreted
@pytest.mark.parametrize("parts", [1, 4])
def test_a_matrix_gets_the_same_bits_in_every_stack(parts: int) -> None:
    checks.bits_are_the_same((3, 20, 130), torch.float32, "cpu", tiles=SMALL, parts=parts)


@interpreted
def test_it_reads_its_own_elements_only() -> None:
    checks.its_own_elements_are_read_only(33, 65, "cpu", (1, 2), tiles=SMALL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(4, 6),) * 2, r"needs a of shape \(b, n, k\).*not torch.float32 of shape \(4, 6\)"),
        ((torch.ones(1, 4, 6).double(),) * 2, r"float32, bfloat16 or float16, not torch.float64"),
        ((torch.ones(1, 4, 6), torch.ones(1, 6, 4)), r"needs b of shape \(1, 4, 6\).*not .* of shape \(1, 6, 4\)"),
        ((torch.ones(1, 4, 6), torch.ones(1, 4, 6).half()), r"needs b of .* torch.float32.*, not torch.float16"),
        ((torch.ones(1, 4, 6), torch.ones(1, 4, 6, device="meta")), r"needs b of .*on cpu, not .* on meta"),
        ((torch.ones(2, 4, 6),) * 2 + (torch.ones(4, 4),), r"needs c of shape \(2, 4, 4\).*not .* of shape \(4, 4\)"),
        ((torch.ones(2, 4, 6),) * 2 + (torch.ones(2, 4, 4).half(),), r"needs c of .* torch.float32.*not torch.float16"),
    ],
)
def test_it_refuses_what_it_would_misread(arguments: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernel.symmetric(*arguments)


def test_the_table_is_whole() -> None:
    cpu, own = torch.device("cpu"), TILES["sm_90a"]
    whole = partial(tiles_for, device=cpu, aligned=True)
    assert whole(1, 2) == whole(511, 2) == own[2][1]
    assert whole(512, 2) == whole(1 << 20, 2) == own[2][512]
    assert whole(1, 4) == whole(1 << 20, 4) == own[4][1]
    assert {tiles_for(n, size, cpu, aligned=False) for n in (1, 1 << 20) for size in (2, 4)} == set(ODD_TILES.values())
    assert all(min(sides) == 1 and list(sides) == sorted(sides) for of in TILES.values() for sides in of.values())
    assert list(SPLITS) == sorted(SPLITS)
    # a long K only, and short sides only
    assert [parts_of(n, 1 << 20) for n in (1, 64, 65, 256, 257, 511, 512)] == [32, 32, 32, 16, 4, 4, 1]
    for side, (length, most) in SPLITS.items():
        assert [parts_of(side, k) for k in (0, length, 2 * length, 1 << 20)] == [1, 1, 2, most]


def test_operands_are_aligned_where_every_row_begins_so() -> None:
    x = torch.zeros(4, 64, 96, dtype=torch.bfloat16)
    for good in (x, x.mT, x[1:], x[:, :32, 16:32], x.mT[:1]):
        assert kernel._aligned(*good.shape[1:], *good.stride())
    for bad in (x[:, :, 1:], x[:, :, 8:], x[:, 1:], x[..., ::3], torch.zeros(1, 64, 97)[..., :96]):
        assert not kernel._aligned(*bad.shape[1:], *bad.stride())


def test_the_twin_takes_every_number() -> None:
    a, c = checks.matrices((2, 5, 7), torch.float64, device="cpu")
    eye = torch.eye(5, dtype=torch.float64)
    for alpha in (0.0, 1.0, -0.5):
        for beta in (0.0, 2.0):
            for gamma in (0.0, 3.0):
                expected = alpha * (a @ a.mT) + gamma * eye
                found = reference_matrix.symmetric(a, a, alpha=alpha, beta=beta, gamma=gamma)
                torch.testing.assert_close(found, expected)
                found = reference_matrix.symmetric(a, a, c, alpha=alpha, beta=beta, gamma=gamma)
                torch.testing.assert_close(found, expected + beta * c)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that the kernel was given."""
    return shapes_seen(monkeypatch, kernel, "symmetric")


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 24, 70), (1, 70, 24)], ids=str)
def test_newton_schulz_on_the_kernel_is_no_farther_from_the_truth(
    shape: tuple[int, int, int], dtype: torch.dtype, seen: list[tuple[int, ...]]
) -> None:
    x = reference_matrix.normalized(torch.randn(shape), eps=0.0, dtype=dtype)
    triples = table("you")
    for restarts, products in ((None, 10), ((1, 3), 12)):

        def made(x: Tensor, restarts: tuple[int, ...] | None = restarts) -> Tensor:
            arithmetic = ops.Whole()
            if restarts is None:
                return ops.newton_schulz(x, triples, arithmetic)
            return ops.gram_newton_schulz(x, triples, restarts, arithmetic)

        exact = made(x.double())
        for name in ("auto", "torch"):
            with backend(name):
                plain = made(x)
        assert seen == []
        with backend("triton"):
            found = made(x)
        # each product that is symmetric went there, and each is of the short side
        assert [s[:2] for s in seen] == [(shape[0], 24)] * products
        seen.clear()
        error, plain_error = ((y - exact).norm() / exact.norm() for y in (found, plain))
        assert error <= 1.5 * plain_error


@interpreted
@pytest.mark.parametrize(("name", "restarts", "factor"), checks.RESTARTS)
def test_small_singular_values_survive_the_gram_form(name: str, restarts: tuple[int, ...], factor: float) -> None:
    checks.small_singular_values_survive(name, restarts, factor, "cpu")


@interpreted
def test_ops_hands_every_argument_on(seen: list[tuple[int, ...]]) -> None:
    a, c = checks.matrices((1, 5, 7), torch.float32, device="cpu")
    plain = ops.symmetric(a, a, c, alpha=0.5, beta=2.0, gamma=3.0)
    assert seen == []
    with backend("triton"):
        found = ops.symmetric(a, a, c, alpha=0.5, beta=2.0, gamma=3.0)
    assert seen == [(1, 5, 7)]
    torch.testing.assert_close(found, plain)


@interpreted
def test_ops_says_why_it_cannot() -> None:
    x = torch.ones(1, 4, 6, dtype=torch.float64)
    with backend("triton"), pytest.raises(RuntimeError, match=r"backend\('triton'\): a symmetric product of torch.flo"):
        ops.symmetric(x, x)


ALONE = """
import torch
from lowrank_optim import backend, ops
x = torch.ones(1, 2, 2)
with backend("triton"):
    try:
        ops.symmetric(x, x)
    except RuntimeError as error:
        print(error)
"""


def test_a_cpu_without_the_interpreter_is_refused() -> None:
    assert run_alone(ALONE).strip() == (
        "backend('triton'): a Tensor on cpu needs a CUDA device, or TRITON_INTERPRET=1 set before Triton is imported"
    )


def test_what_ships_is_what_is_imported() -> None:
    assert Path(kernel.__file__).resolve() == ROOT / "kernels" / "symmetric.py"
