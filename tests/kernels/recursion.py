"""The Gram recursion, against its plain twin."""

from math import prod

import torch
from hypothesis import strategies as st
from torch import Tensor

from lowrank_optim import reference_recursion
from lowrank_optim.coefficients import REGISTRY, table
from lowrank_optim.kernels import recursion as kernel
from lowrank_optim.orthogonal import restarts
from tests.kernels.common import DTYPES, READABLE

HALF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
# of a result, in units of its largest number; tensor cores make float32 of three products
TOLERANCES = {"cpu": HALF | {torch.float32: 1e-5}, "cuda": HALF | {torch.float32: 3e-5}}
# tables whose Gram form does without a restart in float32
ONCE = [name for name in REGISTRY if restarts(table(name), once=True) == ()]
HOW = {
    "name": st.sampled_from(ONCE),
    "steps": st.none() | st.integers(1, 3),
    "layout": st.sampled_from(sorted(READABLE)),
    "dtype": st.sampled_from(DTYPES),
}


def normalized(x: Tensor) -> Tensor:
    return x / torch.linalg.matrix_norm(x, keepdim=True)


def exact_gram(x: Tensor) -> Tensor:
    """Return X Xᵀ in float32 whatever the settings of torch's own products are."""
    return (x.double() @ x.mT.double()).float()


def gram(batch: int, n: int, layout: str = "contiguous", *, device: str) -> Tensor:
    """Return R of Gaussian matrices twice as long as high."""
    return READABLE[layout](exact_gram(normalized(torch.randn(batch, n, 2 * n, device=device))))


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
        assert (found - expected).abs().max() <= TOLERANCES[r.device.type][dtype] * largest
        assert (found - found.mT).abs().max() <= 2 * TOLERANCES[r.device.type][dtype] * largest
    return found


def anywhere(
    shape: tuple[int, int], name: str, steps: int | None, layout: str, dtype: torch.dtype, device: str
) -> None:
    """It equals its twin for any of `HOW`."""
    assert_twins(gram(*shape, layout, device=device), name, steps, dtype)


def is_a_polynomial_of_singular_values(n: int, name: str, device: str) -> None:
    x = normalized(torch.randn(2, n, 3 * n, device=device))
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    for a, b, c in table(name):
        s = s * (a + b * s**2 + c * s**4)
    expected = (u * s.unsqueeze(-2)) @ vh
    found = kernel.gram_recursion(exact_gram(x), table(name)).double() @ x.double()
    assert (found - expected).norm() <= 1e-4 * expected.norm()


def spectra(n: int, device: str) -> dict[str, Tensor]:
    """Matrices that half precision finds hard, in bfloat16."""
    u, v = (torch.linalg.qr(torch.randn(m, n, dtype=torch.float64)).Q for m in (n, 4 * n))
    first, steps = torch.arange(n), torch.linspace(0, 1, n, dtype=torch.float64)
    values = {"geometric": 10 ** (-3 * steps), "steep": 10 ** (-5 * steps), "rank 10": (first < 10).double()}
    values["two spikes"] = torch.where(first < 2, 1.0, 1e-3).double()
    matrices = {name: (u * s) @ v.mT for name, s in values.items()}
    matrices |= {"Gaussian": torch.randn(n, 4 * n).double(), "all alike": torch.ones(n, 4 * n).double()}
    return {name: normalized(x).bfloat16().unsqueeze(0).to(device) for name, x in matrices.items()}


def zeros_give_the_product_of_the_slopes(n: int, device: str) -> None:
    found = kernel.gram_recursion(torch.zeros(2, n, n, device=device), table("you"))
    slopes = prod(a for a, _, _ in table("you"))
    torch.testing.assert_close(found, slopes * torch.eye(n, device=device).expand(2, n, n), rtol=1e-5, atol=0.0)


def nan_stays_in_its_matrix(n: int, device: str) -> None:
    r = gram(3, n, device=device)
    clean = kernel.gram_recursion(r, table("you"))
    r[1, 3, 4] = float("nan")
    found = kernel.gram_recursion(r, table("you"), dtype=torch.bfloat16)
    assert found[1].isnan().all()
    assert torch.equal(found[::2], clean[::2].bfloat16())


def bits_are_the_same(count: int, n: int, device: str, alone: tuple[int, ...], times: int = 1) -> None:
    """They are, each time and in every stack."""
    r = gram(count, n, device=device)
    together = kernel.gram_recursion(r, table("you"))
    for _ in range(times):
        assert torch.equal(kernel.gram_recursion(r, table("you")), together)
    for i in alone:
        assert torch.equal(kernel.gram_recursion(r[i : i + 1], table("you"))[0], together[i])


def its_own_elements_are_read_only(n: int, device: str) -> None:
    """What is beside both matrices in their memory is NaN."""
    r = torch.full((4, n + 7, n + 47), float("nan"), device=device)[1:3, 3 : n + 3, 5 : n + 5]
    r.copy_(gram(2, n, device=device))
    assert_twins(r)
