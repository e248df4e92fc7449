"""The digits of scikit-learn, a small network that learns them, and how it is trained; for `experiments.prune`."""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]

TRAIN, VAL, TEST = 1000, 297, 500
SIZES = (64, 128, 64, 10)


@dataclass(frozen=True)
class Digits:
    """1797 pictures of 8×8, pixels from 0 to 1, in one fixed split."""

    train: Pair
    val: Pair
    test: Pair


@functools.cache
def load() -> Digits:
    """The data set ships with scikit-learn."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped,unused-ignore]

    found = load_digits()
    x = torch.tensor(found.data, dtype=torch.float32) / 16
    y = torch.tensor(found.target, dtype=torch.long)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    parts = order.split([TRAIN, VAL, TEST])
    return Digits(*((x[part], y[part]) for part in parts))


def network(seed: int) -> nn.Sequential:
    """An MLP; its matrices, which are pruned, hold 17 024 weights."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(SIZES):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def matrices(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What is pruned: everything but the biases."""
    return [(name, p) for name, p in model.named_parameters() if p.dim() > 1]


def batches(data: Pair, size: int, seed: int) -> Iterator[Pair]:
    """Batches without end, the data in a new order each time."""
    x, y = data
    generator = torch.Generator().manual_seed(seed)
    while True:
        for part in torch.randperm(len(x), generator=generator).split(size):
            yield x[part], y[part]


def train(
    model: nn.Module, data: Iterator[Pair], steps: int, lr: float, hold: Callable[[Any], Any] | None = None
) -> None:
    """AdamW, its rate falling to zero along a line."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2)
    if hold is not None:
        hold(optimizer)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        x, y = next(data)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()


@functools.cache
def dense(seed: int, steps: int) -> nn.Module:
    """The network before it is pruned, the same for all that begin with it; not to be changed."""
    model = network(seed)
    train(model, batches(load().train, 32, seed + 100), steps, lr=3e-3)
    return model


@torch.no_grad()
def accuracy(model: nn.Module, data: Pair) -> float:
    """The share that is right."""
    x, y = data
    return float((model(x).argmax(1) == y).double().mean())
