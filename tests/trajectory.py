"""Given gradients, step by step: what the tests of each optimizer compare with its reference."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

SHAPES = {"tall": (24, 10), "wide": (10, 24), "square": (16, 16)}


def gradients(shape: Sequence[int], count: int = 50, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Gradients with a decaying spectrum and separated singular values, so that their vectors are well defined."""
    generator = torch.Generator().manual_seed(seed)
    m, n = shape
    short = min(m, n)
    spectrum = 0.8 ** torch.arange(short, dtype=torch.float64)
    found = []
    for _ in range(count):
        u, _ = torch.linalg.qr(torch.randn(m, short, generator=generator, dtype=torch.float64))
        v, _ = torch.linalg.qr(torch.randn(n, short, generator=generator, dtype=torch.float64))
        found.append(((u * spectrum) @ v.T).to(dtype))
    return found


def run(optimizer: torch.optim.Optimizer, p: Tensor, grads: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the weights after each gradient, which must be left as it is."""
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
        assert torch.equal(p.grad, grad)
        yield p.detach().clone()


def assert_equals_reference(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    reference: Callable[[np.ndarray, list[np.ndarray]], Iterable[np.ndarray]],
    shape: Sequence[int],
    *,
    steps: int = 50,
    atol: float = 1e-10,
) -> None:
    """Compare the weights of float64 parameters after each of some steps."""
    p = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    grads = gradients(shape, steps) if len(shape) == 2 else list(torch.randn(steps, *shape, dtype=torch.float64))
    expected = reference(p.detach().numpy().copy(), [g.numpy() for g in grads])
    count = 0
    for ours, theirs in zip(run(make([p]), p, grads), expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=atol)
        count += 1
    assert count == steps


def assert_same_weights(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    other: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    shape: Sequence[int],
    *,
    steps: int = 50,
    atol: float = 1e-10,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Compare two optimizers on the same start and gradients, after each step."""
    start = torch.randn(shape, dtype=dtype)
    grads = gradients(shape, steps, dtype=dtype) if len(shape) == 2 else list(torch.randn(steps, *shape, dtype=dtype))
    one, two = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    for ours, theirs in zip(run(make([one]), one, grads), run(other([two]), two, grads), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
