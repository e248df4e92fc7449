"""Symmetric products in Triton: against their plain twin where they run interpreted, and compiled for absent GPUs."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

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
from tests.alone import run_alone

ROOT = Path(__file__).parent.parent

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run on the CPU with TRITON_INTERPRET=1 only"
)

SMALL = Tiles(16, 32, 1, 1)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (matrices, n, k): one element, less than a tile, a tile exactly, tiles and a rest, nothing to add up
SHAPES = [(1, 1, 1), (3, 5, 7), (1, 16, 32), (3, 20, 70), (1, 50, 101), (3, 17, 0)]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape),
}
# of a result, in units of its largest number
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, as torch does for whoever asks for determinism."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_twins(a: Tensor, b: Tensor, c: Tensor | None, **how: Any) -> Tensor:
    """Compare with the twin in float64; what is handed in stays as it is."""
    given = [x for x in (a, b, c) if x is not None]
    before = [x.clone() for x in given]
    found = kernel.symmetric(a, b, c, **how)
    numbers = {name: how[name] for name in ("alpha", "beta", "gamma") if name in how}
    expected = reference_matrix.symmetric(a.double(), b.double(), None if c is None else c.double(), **numbers)
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))
    assert found.dtype == a.dtype
    assert found.shape == (len(a), a.size(1), a.size(1))
    assert found.is_contiguous()
    assert torch.equal(found, found.mT)
    if found.numel():
        assert (found - expected).abs().max() <= TOLERANCES[a.dtype] * max(1.0, float(expected.abs().max()))
    return found


def matrices(shape: tuple[int, int, int], dtype: torch.dtype, layout: str = "contiguous") -> tuple[Tensor, Tensor]:
    """Return A (b, n, k) and a symmetric C (b, n, n)."""
    a, c = torch.randn(shape), torch.randn(shape[0], shape[1], shape[1])
    return LAYOUTS[layout](a.to(dtype)), LAYOUTS[layout]((c + c.mT).to(dtype))


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_equals_its_twin(shape: tuple[int, int, int], dtype: torch.dtype, parts: int) -> None:
    a, c = matrices(shape, dtype)
    assert_twins(a, a, None, tiles=SMALL, parts=parts)
    assert_twins(a, a, c, alpha=-0.7, beta=2.5, gamma=1.5, tiles=SMALL, parts=parts)


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_equals_its_twin_on_any_strides(dtype: torch.dtype, layout: str, parts: int) -> None:
    a, c = matrices((3, 20, 37), dtype, layout)
    assert_twins(a, a, c, alpha=-0.7, tiles=SMALL, parts=parts)


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 130, 40), (2, 40, 600)], ids=str)
def test_it_equals_its_twin_as_shipped(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    a, c = matrices(shape, dtype)
    assert parts_of(*shape[1:]) == (2 if shape[2] == 600 else 1)
    assert_twins(a, a, c, alpha=0.5, beta=-1.0, gamma=3.0)


@interpreted
@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 36), st.integers(0, 100)),
    parts=st.integers(1, 3),
    numbers=st.tuples(*[st.sampled_from([0.0, 1.0, -1.25, 3.0])] * 3),
    with_c=st.booleans(),
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 2),
    dtype=st.sampled_from(DTYPES),
)
def test_it_equals_its_twin_anywhere(
    shape: tuple[int, int, int],
    parts: int,
    numbers: tuple[float, float, float],
    with_c: bool,
    layouts: tuple[str, str],
    dtype: torch.dtype,
) -> None:
    alpha, beta, gamma = numbers
    a, c = matrices(shape, dtype, layouts[0])
    b = LAYOUTS[layouts[1]](a.clone()) if layouts[1] != "expanded" else a
    how = {"alpha": alpha, "beta": beta, "gamma": gamma, "tiles": SMALL, "parts": parts}
    assert_twins(a, b, c if with_c else None, **how)


@interpreted
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_what_does_not_commute_the_lower_triangle_is_kept_and_mirrored(dtype: torch.dtype, parts: int) -> None:
    a, b, c = (torch.randn(2, 40, 40).to(dtype) for _ in range(3))
    found = kernel.symmetric(a, b, c, tiles=SMALL, parts=parts)
    expected = a.double() @ b.mT.double() + c.double()
    expected = expected.tril() + expected.tril(-1).mT
    assert torch.equal(found, found.mT)
    assert (found - expected).abs().max() <= TOLERANCES[dtype] * expected.abs().max()


@interpreted
def test_bfloat16_is_rounded_to_nearest_and_to_even() -> None:
    # halfway between two numbers, up and down; just past it; the largest; negative
    values = [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, 3.3895314e38, -1 - 3 * 2.0**-8]
    for value in values:
        c = torch.zeros(1, 1, 1, dtype=torch.bfloat16)
        found = kernel.symmetric(c, c, c, gamma=value)
        assert torch.equal(found, torch.full_like(c, value)), value


@interpreted
@pytest.mark.filterwarnings("ignore:.*invalid value encountered.*:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_goes_to_its_row_and_column_and_what_is_not_read_does_not_matter(dtype: torch.dtype) -> None:
    a, c = matrices((1, 20, 20), dtype)
    a[0, 18, 3] = float("nan")
    found = kernel.symmetric(a, a, tiles=SMALL).isnan()[0]
    assert found[18].all()
    assert found[:, 18].all()
    assert found.sum() == 39
    bad = torch.full_like(c, float("nan"))
    assert torch.equal(kernel.symmetric(bad, bad, c, alpha=0.0), c)
    assert kernel.symmetric(c, c, bad, beta=0.0).isfinite().all()
    assert reference_matrix.symmetric(bad, bad, c, alpha=0.0).isfinite().all()
    assert reference_matrix.symmetric(c, c, bad, beta=0.0).isfinite().all()
    # above the diagonal C is not looked at
    above = torch.where(torch.ones_like(c).tril() == 1, c, bad)
    assert torch.equal(kernel.symmetric(a, a, above, alpha=0.0, tiles=SMALL), c)


@interpreted
@pytest.mark.parametrize("parts", [1, 4])
def test_a_matrix_gets_the_same_bits_in_every_stack(parts: int) -> None:
    a, c = matrices((3, 20, 130), torch.float32)
    together = kernel.symmetric(a, a, c, tiles=SMALL, parts=parts)
    assert torch.equal(together, kernel.symmetric(a, a, c, tiles=SMALL, parts=parts))
    for i in range(3):
        alone = kernel.symmetric(a[i : i + 1], a[i : i + 1], c[i : i + 1], tiles=SMALL, parts=parts)
        assert torch.equal(alone[0], together[i])


@interpreted
def test_it_reads_its_own_elements_only() -> None:
    """All three are parts of larger memories, and what is beside them is NaN."""
    memory = torch.full((3, 40, 80), float("nan"))
    a, c = memory[1:2, 3:36, 5:70], torch.full((3, 40, 40), float("nan"))[1:2, 3:36, 5:38]
    a.copy_(torch.randn(a.shape))
    c.copy_(torch.eye(33))
    for parts in (1, 2):
        assert_twins(a, a, c, tiles=SMALL, parts=parts)
    assert_twins(a.mT, a.mT, None, tiles=SMALL)


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
    a, c = matrices((2, 5, 7), torch.float64)
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
    shapes: list[tuple[int, ...]] = []
    real = kernel.symmetric

    def watched(a: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shapes.append(tuple(a.shape))
        return real(a, *args, **kwargs)

    monkeypatch.setattr(kernel, "symmetric", watched)
    return shapes


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
@pytest.mark.parametrize(
    ("name", "restarts", "factor"), [("you", (1, 3), 1.12), ("you", (1,), 2.0), ("polar_express", (1, 3, 4), 2.0)]
)
def test_small_singular_values_survive_the_gram_form(name: str, restarts: tuple[int, ...], factor: float) -> None:
    """With R W² in the place of W R W the errors would be 1.2 times those of whole matrices, 5 times and up to 35."""
    u, v = (torch.linalg.qr(torch.randn(3, m, 48, dtype=torch.float64)).Q for m in (48, 96))
    x = (u * 10 ** -torch.linspace(0, 5, 48)) @ v.mT
    x = reference_matrix.normalized(x, eps=0.0, dtype=torch.bfloat16)
    triples = table(name)
    exact = ops.newton_schulz(x.double(), triples, ops.Whole())
    plain = ops.gram_newton_schulz(x, triples, restarts, ops.Whole())
    with backend("triton"):
        found = ops.gram_newton_schulz(x, triples, restarts, ops.Whole())
    error, plain_error = ((y - exact).norm() / exact.norm() for y in (found, plain))
    assert error <= factor * plain_error


@interpreted
def test_ops_hands_every_argument_on(seen: list[tuple[int, ...]]) -> None:
    a, c = matrices((1, 5, 7), torch.float32)
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
