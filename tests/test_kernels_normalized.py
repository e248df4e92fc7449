"""The kernels that normalize: against their plain twin where they run interpreted, and compiled for GPUs not here."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_optim import reference_matrix

pytest.importorskip("triton", reason="triton is not installed")

from lowrank_optim.kernels import normalized as kernel
from lowrank_optim.kernels._launch import ELEMENTWISE, MOMENTUM_PARTS
from tests.ahead import Built, Job, assert_fits, compiled

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run on the CPU with TRITON_INTERPRET=1 only"
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (3, 5, 7), (2, 32, 32), (2, 100, 30), (1, 300, 513)]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: torch.stack([x, x], -1)[..., 0],
}


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, as torch does for whoever asks for determinism."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_twins(x: Tensor, dtype: torch.dtype, eps: float = 0.0, **how: int) -> Tensor:
    """Compare with the twin in float64, rounded once."""
    before = x.clone()
    found = kernel.normalized(x, eps=eps, dtype=dtype, **how)
    assert torch.equal(x, before)
    assert found.dtype == dtype
    assert found.shape == x.shape
    if not x.numel():
        return found
    expected = reference_matrix.normalized(x.double(), eps=eps, dtype=torch.float64)
    # a neighbour, where float32 has fallen on the other side
    bounds = {"rtol": 1.01 * torch.finfo(dtype).eps, "atol": 1e-44 if dtype == torch.float32 else 1e-7}
    torch.testing.assert_close(found.double(), expected, **bounds)
    return found


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_equals_its_twin(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(shape).to(dtype))
    for out in DTYPES:
        assert_twins(x, out)


@interpreted
@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 4), st.integers(0, 40), st.integers(0, 70)),
    size=st.sampled_from([1e-30, 1e-25, 1e-6, 1.0, 1e20, 1e30]),
    eps=st.sampled_from([0.0, 1e-7, 10.0]),
    parts=st.integers(1, 5),
)
def test_it_equals_its_twin_anywhere(shape: tuple[int, int, int], size: float, eps: float, parts: int) -> None:
    """Squares of these numbers are 0 or infinite in float32."""
    assert_twins(torch.randn(shape) * size, torch.float32, eps, parts=parts)


@interpreted
def test_a_matrix_gets_the_same_bits_in_every_stack() -> None:
    x = torch.randn(3, 40, 33)
    found = kernel.normalized(x, eps=0.0, dtype=torch.bfloat16)
    for i in range(3):
        assert torch.equal(kernel.normalized(x[i : i + 1], eps=0.0, dtype=torch.bfloat16)[0], found[i])


@interpreted
def test_zeros_stay_and_what_is_not_finite_says_so() -> None:
    x = torch.randn(4, 6, 8)
    x[0] = 0
    x[1, 2, 3] = float("nan")
    x[2, 2, 3] = float("inf")
    found = kernel.normalized(x, eps=1e-7, dtype=torch.float32)
    assert found[0].eq(0).all()
    assert found[1].isnan().all()
    assert found[2, 2, 3].isnan()
    torch.testing.assert_close(found[3].norm(), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("x", "dtype", "message"),
    [
        (torch.ones(4, 6), torch.float32, r"needs \(b, m, n\) .*not torch.float32 of shape \(4, 6\)"),
        (torch.ones(1, 4, 6).double(), torch.float32, r"not torch.float64 of shape"),
        (torch.ones(1, 4, 6), torch.float64, r"and torch.float64"),
    ],
)
def test_it_refuses_what_it_would_misread(x: Tensor, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernel.normalized(x, eps=0.0, dtype=dtype)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    """Both kernels as shipped, for what orthogonalization reads and writes."""
    block, warps = ELEMENTWISE
    counts = {"numel": "i32", "parts": "i32", "steps": "i32"}
    jobs = {}
    for kind in ("bf16", "fp32"):
        types = {"x_ptr": "*" + kind, "sums_ptr": "*fp64", **counts}
        plain, how = ("parts", "steps"), {"num_warps": warps}
        jobs[f"squares {kind}"] = Job("normalized", "squares_kernel", types, {"BLOCK": block}, plain, how)
        types = {**types, "out_ptr": "*fp16", "eps": "fp32"}
        constants = {"BLOCK": block, "PARTS": MOMENTUM_PARTS, "INTERPRETED": False}
        jobs[f"normalized {kind}"] = Job("normalized", "normalized_kernel", types, constants, plain, how)
    return compiled(jobs, tmp_path_factory.mktemp("ahead"))


def test_every_kernel_compiles_without_spills_and_with_wide_accesses(built: dict[str, Built]) -> None:
    for name, made in built.items():
        assert_fits(name, made)
        assert re.search(r"v4\.b32|dwordx4|dwordx2", made.text), name


def test_what_ships_is_what_is_imported() -> None:
    assert Path(kernel.__file__).resolve() == Path(__file__).parent.parent / "kernels" / "normalized.py"
