"""The kernel that casts: against torch where it runs interpreted, and compiled for GPUs not here."""

import os
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from lowrank_optim import backend, ops
from lowrank_optim.kernels import cast as kernel
from lowrank_optim.kernels._launch import WIDE
from tests.ahead import Job, assert_fits, compiled

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run on the CPU with TRITON_INTERPRET=1 only"
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@interpreted
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (3, 5, 7), (2, 1024)], ids=str)
def test_it_rounds_as_torch_does(shape: tuple[int, ...]) -> None:
    for source in DTYPES:
        x = (torch.randn(shape) * 10 ** torch.randint(-8, 8, shape).float()).to(source)
        if x.numel() > 10:
            x.view(-1)[:4] = torch.tensor([float("nan"), float("inf"), -0.0, 1 + 2.0**-8]).to(source)
        for dtype in DTYPES:
            found = kernel.cast(x, dtype)
            assert found.dtype == dtype
            torch.testing.assert_close(found, x.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_it_refuses_what_it_would_misread() -> None:
    for x, dtype in (
        (torch.ones(4, 6).mT, torch.bfloat16),
        (torch.ones(3).double(), torch.bfloat16),
        (torch.ones(3), torch.float64),
    ):
        with pytest.raises(ValueError, match="needs contiguous float32, bfloat16 or float16"):
            kernel.cast(x, dtype)


@interpreted
def test_it_is_taken_between_16_bit_formats_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = kernel.cast
    monkeypatch.setattr(kernel, "cast", lambda x, dtype: seen.append(x.dtype) or real(x, dtype))
    x = torch.randn(4, 6)
    with backend("triton"):
        assert ops.cast(x, torch.bfloat16).dtype == torch.bfloat16
        assert ops.cast(x.half(), torch.float16).dtype == torch.float16
        assert seen == []
        torch.testing.assert_close(ops.cast(x.half().mT, torch.bfloat16), x.half().mT.bfloat16(), rtol=0, atol=0)
    assert seen == [torch.float16]


def test_it_compiles_without_spills_and_with_wide_accesses(tmp_path: Path) -> None:
    block, warps = WIDE
    types = {"x_ptr": "*fp16", "out_ptr": "*bf16", "numel": "i32"}
    constants = {"BLOCK": block, "INTERPRETED": False}
    for name, made in compiled(
        {"half": Job("cast", "cast_kernel", types, constants, (), {"num_warps": warps})}, tmp_path
    ).items():
        assert_fits(name, made)
        assert re.search(r"ld\.global\.v4\.b32|load_dwordx4", made.text), name
        assert re.search(r"st\.global\.v4\.b32|store_dwordx4", made.text), name
