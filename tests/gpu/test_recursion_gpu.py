"""The Gram recursion on the hardware that the kernel is written for, against its plain twin."""

import os
from collections.abc import Callable, Iterator
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_optim import reference_matrix, reference_recursion
from lowrank_optim.coefficients import REGISTRY, table
from lowrank_optim.orthogonal import restarts

pytest.importorskip("triton", reason="triton is not installed")

from lowrank_optim.kernels import recursion as kernel
from lowrank_optim.kernels._launch import RECURSIONS, Tiles

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (matrices, n): one element, each padded side exactly, one less and one more, and more programs than run at once
SHAPES = [(1, 1), (5, 2), (5, 15), (1, 16), (5, 17), (3, 32), (1, 48), (7, 64), (2, 65), (1, 100), (300, 128)]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape),
}
# of a result, in units of its largest number
TOLERANCES = {torch.float32: 3e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
# tables whose Gram form does without a restart in float32
ONCE = [name for name in REGISTRY if restarts(table(name), once=True) == ()]


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, as torch does for whoever asks for determinism."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3, device="cuda").isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def normalized(x: Tensor) -> Tensor:
    return x / torch.linalg.matrix_norm(x, keepdim=True)


def exact_gram(x: Tensor) -> Tensor:
    """Return X Xᵀ in float32 whatever the settings of torch's own products are."""
    return (x.double() @ x.mT.double()).float()


def gram(batch: int, n: int, layout: str = "contiguous", device: str = "cuda") -> Tensor:
    """Return R of Gaussian matrices twice as long as high."""
    return LAYOUTS[layout](exact_gram(normalized(torch.randn(batch, n, 2 * n, device=device))))


def assert_twins(r: Tensor, name: str = "you", steps: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Compare with the twin in float64; what is handed in stays as it is."""
    before = r.clone()
    found = kernel.gram_recursion(r, table(name, steps), dtype=dtype)
    expected = reference_recursion.gram_recursion(r.double(), table(name, steps))
    assert torch.equal(r, before)
    assert found.dtype == dtype
    assert found.shape == r.shape
    assert found.is_contiguous()
    if found.numel():
        largest = expected.abs().max()
        assert (found - expected).abs().max() <= TOLERANCES[dtype] * largest
        assert (found - found.mT).abs().max() <= 2 * TOLERANCES[dtype] * largest
    return found


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_equals_its_twin(shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert_twins(gram(*shape), dtype=dtype)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [16, 33, 64, 128])
def test_it_equals_its_twin_on_any_strides(n: int, layout: str) -> None:
    assert_twins(gram(3, n, layout))


@settings(max_examples=50, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 128)),
    name=st.sampled_from(ONCE),
    steps=st.none() | st.integers(1, 3),
    layout=st.sampled_from(sorted(LAYOUTS)),
    dtype=st.sampled_from(DTYPES),
)
def test_it_equals_its_twin_anywhere(
    shape: tuple[int, int], name: str, steps: int | None, layout: str, dtype: torch.dtype
) -> None:
    assert_twins(gram(*shape, layout), name, steps, dtype)


@pytest.mark.parametrize("name", ONCE)
@pytest.mark.parametrize("n", [24, 64, 100, 128])
def test_it_makes_polynomials_of_singular_values(n: int, name: str) -> None:
    x = normalized(torch.randn(2, n, 3 * n, device="cuda"))
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    for a, b, c in table(name):
        s = s * (a + b * s**2 + c * s**4)
    expected = (u * s.unsqueeze(-2)) @ vh
    found = kernel.gram_recursion(exact_gram(x), table(name)).double() @ x.double()
    assert (found - expected).norm() <= 1e-4 * expected.norm()


def spectra(n: int) -> dict[str, Tensor]:
    """Matrices that half precision finds hard, in bfloat16."""
    u, v = (torch.linalg.qr(torch.randn(m, n, dtype=torch.float64)).Q for m in (n, 4 * n))
    first, steps = torch.arange(n), torch.linspace(0, 1, n, dtype=torch.float64)
    values = {"geometric": 10 ** (-3 * steps), "steep": 10 ** (-5 * steps), "rank 10": (first < 10).double()}
    values["two spikes"] = torch.where(first < 2, 1.0, 1e-3).double()
    matrices = {name: (u * s) @ v.mT for name, s in values.items()}
    matrices |= {"Gaussian": torch.randn(n, 4 * n).double(), "all alike": torch.ones(n, 4 * n).double()}
    return {name: normalized(x).bfloat16().unsqueeze(0).cuda() for name, x in matrices.items()}


@pytest.mark.parametrize("name", ONCE)
@pytest.mark.parametrize("n", [16, 48, 100, 128])
def test_it_needs_no_restart(n: int, name: str) -> None:
    """In tf32, without the other two products, errors would be up to 1."""
    for kind, x in spectra(n).items():
        exact = reference_matrix.newton_schulz(x.double(), table(name), reference_matrix.Whole())
        q = kernel.gram_recursion(exact_gram(x), table(name))
        error = float((q.double() @ x.double() - exact).norm() / exact.norm())
        assert error <= 1e-2, (kind, error)


@pytest.mark.parametrize("n", [5, 16, 33, 64, 128])
def test_zeros_give_the_product_of_the_slopes(n: int) -> None:
    found = kernel.gram_recursion(torch.zeros(2, n, n, device="cuda"), table("you"))
    slopes = prod(a for a, _, _ in table("you"))
    torch.testing.assert_close(found, slopes * torch.eye(n, device="cuda").expand(2, n, n), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("n", [20, 64, 128])
def test_nan_stays_in_its_matrix(n: int) -> None:
    r = gram(3, n)
    clean = kernel.gram_recursion(r, table("you"))
    r[1, 3, 4] = float("nan")
    found = kernel.gram_recursion(r, table("you"), dtype=torch.bfloat16)
    assert found[1].isnan().all()
    assert torch.equal(found[::2], clean[::2].bfloat16())


@pytest.mark.parametrize("n", [20, 64, 128])
def test_a_matrix_gets_the_same_bits_each_time_and_in_every_stack(n: int) -> None:
    """A barrier that is missing would be seen here."""
    r = gram(500, n)
    together = kernel.gram_recursion(r, table("you"))
    for _ in range(10):
        assert torch.equal(kernel.gram_recursion(r, table("you")), together)
    for i in (0, 123, 499):
        assert torch.equal(kernel.gram_recursion(r[i : i + 1], table("you"))[0], together[i])


def test_it_reads_its_own_elements_only() -> None:
    memory = torch.full((4, 140, 280), float("nan"), device="cuda")
    for n in (33, 100):
        r = memory[1:3, 3 : 3 + n, 5 : 5 + n]
        r.copy_(gram(2, n))
        assert_twins(r)


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
@pytest.mark.parametrize("tiles", [*RECURSIONS[:3], Tiles(64, 32, 4, 2), Tiles(64, 64, 4, 2)], ids=str)
def test_tiles_and_precision_can_be_swept(tiles: Tiles, precision: kernel.Precision) -> None:
    if precision == "ieee" and tiles.side * tiles.depth > 1024:
        pytest.skip("takes long to compile")
    r = gram(3, tiles.side)
    expected = reference_recursion.gram_recursion(r.double(), table("you"))
    found = kernel.gram_recursion(r, table("you"), tiles=tiles, precision=precision)
    assert (found - expected).abs().max() <= 3e-5 * expected.abs().max()


def test_it_runs_on_the_device_of_its_tensors() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    r = gram(2, 40, device="cuda:1")
    assert torch.cuda.current_device() == 0
    assert assert_twins(r).device == r.device
    assert torch.cuda.current_device() == 0


def test_a_second_call_does_not_wait_for_the_device() -> None:
    r = gram(2, 64)
    kernel.gram_recursion(r, table("you"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = kernel.gram_recursion(r, table("you"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.isfinite().all()
