"""The kernels that normalize: against their plain twin where they run interpreted, and compiled for GPUs not here."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from lowrank_optim.kernels import normalized as kernel
from lowrank_optim.kernels._launch import ELEMENTWISE, MOMENTUM_PARTS
from tests.ahead import Built, Job, assert_fits, compiled
from tests.alone import ROOT
from tests.kernels import normalized as checks
from tests.kernels.common import DTYPES, LAYOUTS, interpreted, poisoned


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", checks.SHAPES, ids=str)
@poisoned("cpu")
def test_it_equals_its_twin(shape: tuple[int, int, int], dtype: torch.dtype, layout: str) -> None:
    checks.equals_its_twin(shape, dtype, layout, DTYPES, "cpu")


@interpreted
@settings(max_examples=25, deadline=None)
@given(shape=st.tuples(st.integers(0, 4), st.integers(0, 40), st.integers(0, 70)), **checks.HOW)
def test_it_equals_its_twin_anywhere(**case: Any) -> None:
    checks.anywhere(**case, device="cpu")


@interpreted
def test_a_matrix_gets_the_same_bits_in_every_stack() -> None:
    checks.bits_are_the_same((3, 40, 33), "cpu")


@interpreted
def test_zeros_stay_and_what_is_not_finite_says_so() -> None:
    checks.zeros_stay_and_what_is_not_finite_says_so(6, 8, "cpu")


@interpreted
def test_it_reads_its_own_elements_only() -> None:
    checks.its_own_elements_are_read_only(33, 40, "cpu")


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
    assert Path(kernel.__file__).resolve() == ROOT / "kernels" / "normalized.py"
