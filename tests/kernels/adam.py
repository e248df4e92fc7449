"""Adam's kernel with moments in float32, against its plain twin."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from lowrank_optim import GaLoreAdamW, backend, reference
from lowrank_optim.kernels import adam
from tests.kernels import common

# one element, odd, one block exactly, several blocks and a rest
SHAPES = [(), (1,), (3, 5), (64,), (1000,), (1024,), (128, 129)]
LAYOUTS = common.LAYOUTS | {"expanded": lambda x: x.flatten()[0].expand(x.shape)}
NUMBERS = {"beta1": st.floats(0, 0.99), "beta2": st.floats(0.5, 0.9999), "eps": st.sampled_from([1e-8, 1e-3])}


def assert_twins(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: str,
    betas: tuple[float, float],
    eps: float = 1e-8,
    steps: int = 4,
    *,
    device: str,
) -> None:
    """Compare some steps with the twin's; the gradient stays as it is."""
    ours, twins = ([torch.zeros(shape, device=device) for _ in range(2)] for _ in range(2))
    for step in range(1, steps + 1):
        grad = LAYOUTS[layout](torch.randn(shape, device=device).to(dtype))
        before = grad.clone()
        direction = adam.adam_direction_(grad, *ours, betas=betas, eps=eps, step=step)
        expected = reference.adam_direction_(grad.float(), *twins, betas=betas, eps=eps, step=step)
        assert torch.equal(grad, before)
        assert direction.dtype == torch.float32
        assert direction.is_contiguous()
        # a difference of large numbers is rounded in another order
        torch.testing.assert_close(direction, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours, twins, rtol=1e-6, atol=1e-6)


def anywhere(shape: tuple[int, ...], beta1: float, beta2: float, eps: float, device: str) -> None:
    """It equals its twin for any of `NUMBERS`."""
    assert_twins(shape, torch.float32, "contiguous", (beta1, beta2), eps, steps=3, device=device)


def is_rounded_once(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """A direction is the one of float32, rounded."""
    grad = torch.randn(shape, device=device)
    moments = [torch.rand(shape, device=device) for _ in range(2)]
    numbers: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "step": 3}
    whole = adam.adam_direction_(grad, *(m.clone() for m in moments), **numbers)
    direction = adam.adam_direction_(grad, *moments, **numbers, dtype=dtype)
    assert torch.equal(direction, whole.to(dtype))


def trained(
    name: Any, widths: tuple[int, int, int], *, rank: int, basis: str, device: str, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], GaLoreAdamW]:
    """Return the weights of two layers after seven steps on a backend, and their optimizer."""
    torch.manual_seed(0)
    into, between, out = widths
    model = nn.Sequential(nn.Linear(into, between), nn.Tanh(), nn.Linear(between, out, bias=False)).to(device, dtype)
    opt = GaLoreAdamW(model.parameters(), rank=rank, update_proj_gap=3, scale=1.0, basis=basis)
    with backend(name):
        for _ in range(7):
            opt.zero_grad()
            model(torch.randn(32, into, device=device, dtype=dtype)).square().mean().backward()
            opt.step()
    return [p.detach() for p in model.parameters()], opt
