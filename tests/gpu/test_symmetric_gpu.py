"""Symmetric products on the hardware that the kernel is written for, against their plain twin."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_optim import backend, ops, orthogonalize, reference_matrix
from lowrank_optim.coefficients import table

pytest.importorskip("triton", reason="triton is not installed")

from lowrank_optim.kernels import symmetric as kernel
from lowrank_optim.kernels._launch import ODD_TILES, TILES, Tiles

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (matrices, n, k): one element, odd, whole tiles of either side, a long K of few rows, tiles and a rest
SHAPES = [
    *[(1, 1, 1), (3, 5, 7), (1, 64, 64), (3, 17, 0), (3, 33, 70), (2, 130, 40), (5, 256, 4096), (1, 48, 50257)],
    *[(2, 511, 4099), (1, 1024, 2048), (3, 1200, 320), (1, 1037, 1111)],
]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape),
}
# of a result, in units of its largest number
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, as torch does for whoever asks for determinism."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3, device="cuda").isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def matrices(
    shape: tuple[int, int, int], dtype: torch.dtype, layout: str = "contiguous", device: str = "cuda"
) -> tuple[Tensor, Tensor]:
    """Return A (b, n, k) and a symmetric C (b, n, n)."""
    a, c = torch.randn(shape, device=device), torch.randn(shape[0], shape[1], shape[1], device=device)
    return LAYOUTS[layout](a.to(dtype)), LAYOUTS[layout]((c + c.mT).to(dtype))


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
    assert torch.equal(found, found.mT)
    if found.numel():
        assert (found - expected).abs().max() <= TOLERANCES[a.dtype] * max(1.0, float(expected.abs().max()))
    return found


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_equals_its_twin(shape: tuple[int, int, int], dtype: torch.dtype, layout: str) -> None:
    a, c = matrices(shape, dtype, layout)
    assert_twins(a, a, None)
    assert_twins(a, a, c, alpha=-0.7, beta=2.5, gamma=1.5)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("parts", [1, 2, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 192, 704), (3, 65, 333)], ids=str)
def test_every_tile_computes_every_shape(shape: tuple[int, int, int], dtype: torch.dtype, parts: int) -> None:
    a, c = matrices(shape, dtype)
    for tiles in (*TILES[a.itemsize].values(), ODD_TILES[a.itemsize]):
        assert_twins(a, a, c, alpha=0.5, gamma=2.0, tiles=tiles, parts=parts)


@settings(max_examples=50, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 300), st.integers(0, 1500)),
    parts=st.none() | st.integers(1, 5),
    numbers=st.tuples(*[st.sampled_from([0.0, 1.0, -1.25, 3.0])] * 3),
    with_c=st.booleans(),
    layout=st.sampled_from(sorted(LAYOUTS)),
    dtype=st.sampled_from(DTYPES),
)
def test_it_equals_its_twin_anywhere(
    shape: tuple[int, int, int],
    parts: int | None,
    numbers: tuple[float, float, float],
    with_c: bool,
    layout: str,
    dtype: torch.dtype,
) -> None:
    alpha, beta, gamma = numbers
    a, c = matrices(shape, dtype, layout)
    # the same numbers on other strides
    b = a.clone(memory_format=torch.contiguous_format)
    assert_twins(a, b, c if with_c else None, alpha=alpha, beta=beta, gamma=gamma, parts=parts)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [100, 1024])
def test_of_what_does_not_commute_the_lower_triangle_is_kept_and_mirrored(
    n: int, dtype: torch.dtype, parts: int
) -> None:
    a, b, c = (torch.randn(2, n, n, device="cuda").to(dtype) for _ in range(3))
    found = kernel.symmetric(a, b, c, parts=parts)
    expected = a.double() @ b.mT.double() + c.double()
    expected = expected.tril() + expected.tril(-1).mT
    assert torch.equal(found, found.mT)
    assert (found - expected).abs().max() <= TOLERANCES[dtype] * expected.abs().max()


def test_float32_is_not_multiplied_in_tf32() -> None:
    # 1 + 2⁻²⁰ is 1 there
    a = torch.full((1, 64, 64), 1 + 2.0**-20, device="cuda")
    found = kernel.symmetric(a, torch.ones_like(a))
    assert torch.equal(found, torch.full_like(found, 64 * (1 + 2.0**-20)))


def test_bfloat16_is_rounded_to_nearest_and_to_even() -> None:
    for value in (1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, 3.3895314e38, -1 - 3 * 2.0**-8):
        c = torch.zeros(1, 1, 1, dtype=torch.bfloat16, device="cuda")
        assert torch.equal(kernel.symmetric(c, c, c, gamma=value), torch.full_like(c, value)), value


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_goes_to_its_row_and_column_and_what_is_not_read_does_not_matter(dtype: torch.dtype) -> None:
    a, c = matrices((1, 200, 200), dtype)
    a[0, 180, 3] = float("nan")
    found = kernel.symmetric(a, a).isnan()[0]
    assert found[180].all()
    assert found.sum() == 399
    bad = torch.full_like(c, float("nan"))
    assert torch.equal(kernel.symmetric(bad, bad, c, alpha=0.0), c)
    assert kernel.symmetric(c, c, bad, beta=0.0).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 256, 4096), (4, 1024, 512)], ids=str)
def test_a_matrix_gets_the_same_bits_each_time_and_in_every_stack(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    a, c = matrices(shape, dtype)
    together = kernel.symmetric(a, a, c)
    for _ in range(5):
        assert torch.equal(kernel.symmetric(a, a, c), together)
    for i in range(len(a)):
        assert torch.equal(kernel.symmetric(a[i : i + 1], a[i : i + 1], c[i : i + 1])[0], together[i])


def test_it_reads_its_own_elements_only() -> None:
    memory = torch.full((3, 400, 800), float("nan"), device="cuda")
    a, c = memory[1:2, 3:336, 5:700], torch.full((3, 400, 400), float("nan"), device="cuda")[1:2, 3:336, 5:338]
    a.copy_(torch.randn(a.shape))
    c.copy_(torch.eye(333))
    for parts in (1, 3):
        assert_twins(a, a, c, parts=parts)


@pytest.mark.parametrize("large", ["result", "operand"])
def test_it_addresses_more_elements_than_fit_32_bits(large: str) -> None:
    shape = (1, 46400, 64) if large == "result" else (3, 1024, 1 << 20)
    free, _ = torch.cuda.mem_get_info()
    if free < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    a = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
    last = kernel.symmetric(a, a)[-1, -1]
    expected = a[-1].float() @ a[-1, -1].float()
    assert (last - expected).abs().max() <= 2.0**-8 * expected.abs().max()


def test_it_runs_on_the_device_of_its_tensors() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    a, c = matrices((2, 100, 900), torch.bfloat16, device="cuda:1")
    assert torch.cuda.current_device() == 0
    assert assert_twins(a, a, c).device == a.device
    assert torch.cuda.current_device() == 0
    with pytest.raises(ValueError, match="needs c of .* on cuda:1, not .* on cuda:0"):
        kernel.symmetric(a, a, c.to("cuda:0"))


def test_a_product_does_not_wait_for_the_device() -> None:
    for shape in ((2, 100, 900), (1, 1024, 64)):
        a, c = matrices(shape, torch.bfloat16)
        kernel.symmetric(a, a, c)
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = kernel.symmetric(a, a, c)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert found.isfinite().all()


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 256, 1024), (1, 1500, 1100), (3, 77, 300)], ids=str)
@pytest.mark.parametrize(("method", "products"), [("newton_schulz", 10), ("gram", 12)])
def test_orthogonalizing_on_the_kernel_is_no_farther_from_the_truth(
    method: Any, products: int, shape: tuple[int, int, int], dtype: torch.dtype, seen: list[tuple[int, ...]]
) -> None:
    x = torch.randn(shape, device="cuda").to(dtype)
    exact = orthogonalize(x.double(), method="newton_schulz")
    # auto is whatever is known to be fastest, which is not this kernel yet
    orthogonalize(x, method=method)
    with backend("torch"):
        plain = orthogonalize(x, method=method)
    assert seen == []
    with backend("triton"):
        found = orthogonalize(x, method=method)
    # where the Gram form has nothing to save in half precision it begins anew at each step
    oblong = max(shape[1:]) >= 1.75 * min(shape[1:])
    assert len(seen) == (products if oblong or dtype == torch.float32 else 10)
    error, plain_error = ((y.double() - exact).norm() / exact.norm() for y in (found, plain))
    assert error <= 2 * plain_error + 1e-6


@pytest.mark.parametrize(
    ("name", "restarts", "factor"), [("you", (1, 3), 1.12), ("you", (1,), 2.0), ("polar_express", (1, 3, 4), 2.0)]
)
def test_small_singular_values_survive_the_gram_form(name: str, restarts: tuple[int, ...], factor: float) -> None:
    """With R W² in the place of W R W the errors would be 1.2 times those of whole matrices, 5 times and up to 35."""
    u, v = (torch.linalg.qr(torch.randn(3, m, 48, dtype=torch.float64)).Q for m in (48, 96))
    x = (u * 10 ** -torch.linspace(0, 5, 48)) @ v.mT
    x = reference_matrix.normalized(x, eps=0.0, dtype=torch.bfloat16).cuda()
    triples = table(name)
    exact = ops.newton_schulz(x.double(), triples, ops.Whole())
    plain = ops.gram_newton_schulz(x, triples, restarts, ops.Whole())
    with backend("triton"):
        found = ops.gram_newton_schulz(x, triples, restarts, ops.Whole())
    error, plain_error = ((y - exact).norm() / exact.norm() for y in (found, plain))
    assert error <= factor * plain_error


def test_a_step_equals_that_of_a_cpu() -> None:
    """But for the order of sums."""
    r = reference_matrix.normalized(torch.randn(2, 96, 200), eps=0.0, dtype=torch.float32)
    a, b, c = table("you")[0]
    expected = reference_matrix.newton_schulz(r, [(a, b, c)], reference_matrix.Whole())
    with backend("triton"):
        found = ops.newton_schulz(r.cuda(), [(a, b, c)], ops.Whole()).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_tiles_can_be_swept() -> None:
    a, _ = matrices((1, 300, 300), torch.float16)
    for side, depth, warps in ((64, 32, 4), (128, 32, 8), (128, 64, 4)):
        assert_twins(a, a, None, tiles=Tiles(side, depth, warps, 2))
