"""The fast DCT, against its plain twin."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from lowrank_optim import cosine, reference
from lowrank_optim.kernels import dct as kernel
from tests.kernels.common import READABLE, distance

LAYOUTS = READABLE | {
    "rows": lambda x: torch.cat([x, x], -1)[:, : x.size(1)],
    "shifted": lambda x: torch.cat([x[:, :1], x], -1)[:, 1:],
}
HALF = {torch.bfloat16: 6e-3, torch.float16: 8e-4}
# Frobenius norm of the error, relative: constants, what is between the transforms and the result are rounded. Of large
# matrices it is half of that. Tensor cores make float32 of three products
TOLERANCES = {"cpu": HALF | {torch.float32: 1e-6}, "cuda": HALF | {torch.float32: 1e-5}}
HOW = {
    "dim": st.sampled_from([-1, -2]),
    "layout": st.sampled_from(["contiguous", "transposed", "sliced", "rows"]),
    "ranking": st.sampled_from(["l2", "l1"]),
}


def matrix(m: int, n: int, dim: int, dtype: torch.dtype, layout: str = "contiguous", *, device: str) -> Tensor:
    """Return a matrix with n elements along `dim` and m along the other."""
    return LAYOUTS[layout](torch.randn((m, n) if dim == -1 else (n, m), device=device).to(dtype))


def assert_twins(x: Tensor, dim: int, **how: Any) -> tuple[Tensor, Tensor]:
    """Compare with the twin in float64; what is handed in stays as it is."""
    how = {"out_dtype": x.dtype} | how
    before = x.clone()
    found, energies = kernel.dct_energies(x, dim, **how)
    assert torch.equal(x, before)
    assert found.dtype == how["out_dtype"]
    assert found.shape == x.shape
    assert energies.dtype == torch.float32
    assert energies.shape == (x.size(dim),)
    expected = reference.dct(x.double(), dim) if x.numel() else x.double()
    sums = (expected.abs() if how.get("ranking") == "l1" else expected.square()).sum(-3 - dim)
    tolerance = max(TOLERANCES[x.device.type][dtype] for dtype in (x.dtype, found.dtype))
    assert distance(found, expected) <= tolerance
    assert distance(energies, sums) <= 2 * tolerance
    return found, energies


def is_near(n: int, rows: int, device: str, factors: dict[torch.dtype, float]) -> None:
    """Of each result the error is at most so many times that of a product in bfloat16, whose result is rounded."""
    x = torch.randn(rows, n, device=device).bfloat16()
    expected = reference.dct(x.double(), -1)
    plain = x.double() @ cosine.dct_matrix(n, torch.bfloat16, x.device).double()
    for out_dtype, factor in factors.items():
        found, _ = kernel.dct_energies(x, -1, out_dtype=out_dtype)
        assert distance(found, expected) <= min(3e-3, factor * distance(plain.to(out_dtype), expected))


def bits_are_the_same(
    m: int, n: int, dtype: torch.dtype, device: str, alone: tuple[tuple[int, int], ...], times: int = 1
) -> None:
    """They are each time, along either dimension, and of a row, by programs of so many, in every matrix."""
    x = matrix(m, n, -1, dtype, device=device)
    together, energies = kernel.dct_energies(x, -1, out_dtype=torch.float32)
    for _ in range(times):
        again = kernel.dct_energies(x, -1, out_dtype=torch.float32)
        assert torch.equal(together, again[0])
        assert torch.equal(energies, again[1])
    for i, rows in alone:
        row, _ = kernel.dct_energies(x[i : i + 1], -1, out_dtype=torch.float32, rows=rows)
        assert torch.equal(row[0], together[i])
    columns, sums = kernel.dct_energies(x.mT.contiguous(), -2, out_dtype=torch.float32)
    assert torch.equal(columns.mT, together)
    assert torch.equal(sums, energies)


def nan_goes_to_its_row_and_all_sums(m: int, n: int, dtype: torch.dtype, device: str, rows: int | None = None) -> None:
    x = matrix(m, n, -1, dtype, device=device)
    x[m - 2, 7] = float("nan")
    found, energies = kernel.dct_energies(x, -1, out_dtype=dtype, rows=rows)
    assert found[m - 2].isnan().all()
    assert found.isfinite().sum() == (m - 1) * n
    assert energies.isnan().all()


def its_own_elements_are_read_only(n: int, corners: tuple[tuple[int, int], ...], dim: int, device: str) -> None:
    """What is beside the matrix in its memory is NaN."""
    for row, column in corners:
        memory = torch.full((n + row + 4, 3 * n), float("nan"), device=device)
        x = memory[row:, column:][:n, :n]
        x.copy_(torch.randn(n, n))
        assert_twins(x, dim)
        assert_twins(x.mT, dim)


def many_equal_each_alone(dim: int, dtype: torch.dtype, device: str) -> None:
    """Matrices of one shape in one launch get the bits that each gets, wherever and however it is stored."""
    x = matrix(10, 64, dim, dtype, device=device)
    others = [LAYOUTS[layout](torch.randn_like(x)) for layout in ("contiguous", "transposed", "sliced")]
    for xs in ([x, others[0]], [x, *others]):
        found, energies = kernel.all_dct_energies(xs, dim, out_dtype=dtype)
        assert found.shape == (len(xs), *x.shape)
        assert energies.shape == (len(xs), 64)
        for one, made, energy in zip(xs, found, energies, strict=True):
            expected = kernel.dct_energies(one, dim, out_dtype=dtype)
            assert torch.equal(made, expected[0])
            assert torch.equal(energy, expected[1])
