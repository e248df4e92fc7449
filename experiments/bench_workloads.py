"""What `bench` measures on: matrices, synthetic gradients, what an optimizer is to it, and the least that it can do."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from experiments.bench_costs import CostOf, Shape
from lowrank_optim import state_bytes

# three sets: prime to the usual gaps, so that two refreshes in a row do not meet the same gradient
GRADIENT_SETS = 3


@dataclass(frozen=True)
class Workload:
    """The matrices of one model: their shapes, the rank GaLore uses at this size, and the parameters' dtype."""

    shapes: tuple[Shape, ...]
    rank: int
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of parameters."""
        return sum(m * n for m, n in self.shapes)


def llama_shapes(layers: int, dim: int, ffn: int) -> tuple[Shape, ...]:
    """Weights of `layers` LLaMA blocks as `nn.Linear` holds them: q, k, v, o, gate, up, down."""
    return ((*[(dim, dim)] * 4, (ffn, dim), (ffn, dim), (dim, ffn))) * layers


# GaLore's own sizes and ranks; the larger ones hold a few of the layers, enough for a time per layer
WORKLOADS = {
    "tiny": Workload(((24, 16), (16, 40)), rank=4, dtype=torch.float32),
    "25m": Workload(llama_shapes(8, 512, 1376), rank=128, dtype=torch.float32),
    "1b": Workload(llama_shapes(2, 2048, 5461), rank=512, dtype=torch.bfloat16),
    "7b": Workload(llama_shapes(1, 4096, 11008), rank=1024, dtype=torch.bfloat16),
}


def gradient_sets(work: Workload, device: str, count: int = GRADIENT_SETS) -> list[list[Tensor]]:
    """Full-rank gradients with singular values like 1/i, whose subspace turns a little from set to set."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    sets: list[list[Tensor]] = [[] for _ in range(count)]
    for m, n in work.shapes:
        k = min(m, n)
        sigma = 1e-3 / torch.arange(1, k + 1, device=device)
        left, right = normal(m, k), normal(k, n)
        for grads in sets:
            grads.append((((left + 0.3 * normal(m, k)) * sigma) @ right).to(work.dtype))
    return sets


def parameters(work: Workload, device: str) -> list[nn.Parameter]:
    """One optimizer's own copy of the weights; every copy starts from the same values."""
    generator = torch.Generator(device).manual_seed(1)
    draw = (torch.randn(shape, generator=generator, device=device) * 0.02 for shape in work.shapes)
    return [nn.Parameter(weight.to(work.dtype)) for weight in draw]


Build = Callable[[list[nn.Parameter], int, int], torch.optim.Optimizer]


@dataclass(frozen=True)
class Entry:
    """One optimizer of the benchmark; `build(params, rank, gap)` raises ImportError where a peer is not installed."""

    build: Build
    cost: CostOf
    # it finds bases, each matrix in its own turn or all at once
    refreshes: bool = False
    stagger: bool = False
    # it leaves something else in `p.grad`: then every optimizer of the run is handed fresh copies
    writes_gradients: bool = False
    # its first steps compile: they are made before anything is timed
    compiles: bool = False
    # the entry that this one is, but for how its state is kept
    float32_form: str | None = None
    # how it was run, where that is not plain
    note: str = ""


@dataclass(frozen=True)
class Work:
    """The least an optimizer can do: bytes to and from memory, floating-point operations, bytes it must hold."""

    step_bytes: int
    step_flops: int
    step_bfloat16_flops: int
    refresh_flops: tuple[int, ...]
    first_flops: int
    state_bytes: int
    extra_bytes: int
    refresh_extra_bytes: int


def least_work(entry: Entry, work: Workload) -> Work:
    """Floors for one step: everything read once, written once, nothing kept in between.

    An optimizer reads weight, gradient and state and writes all but the gradient and its bases; one matrix at a time,
    so what it must hold is what the largest one needs.
    """
    item = work.dtype.itemsize
    costs = [entry.cost(shape, work.rank, work.dtype) for shape in work.shapes]
    return Work(
        step_bytes=3 * work.numel * item + sum(2 * cost.moments + cost.basis for cost in costs),
        step_flops=sum(cost.flops for cost in costs),
        step_bfloat16_flops=sum(cost.bfloat16_flops for cost in costs),
        refresh_flops=tuple(cost.refresh_flops for cost in costs if cost.refresh_flops),
        first_flops=sum(cost.first_flops for cost in costs),
        state_bytes=sum(cost.moments + cost.basis for cost in costs),
        extra_bytes=max(cost.extra for cost in costs),
        refresh_extra_bytes=max(max(cost.extra, cost.refresh_extra) for cost in costs),
    )


def tensors_inside(value: Any) -> list[Tensor]:
    """Every tensor reachable from a piece of optimizer state, including those inside projector objects."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()
    todo = [value]
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found[id(item)] = item
        elif isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, (list, tuple)):
            todo += item
        elif hasattr(item, "__dict__"):
            todo += vars(item).values()
    return list(found.values())


def state_sizes(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Bytes of state as `state_bytes` counts them plus those inside objects, and bytes of the storages kept alive.

    The two differ where state is a view: a slice of an SVD factor keeps the whole factor in memory.
    """
    states = list(optimizer.state.values())
    # `state_bytes` looks into containers
    seen = (Tensor, dict, list, tuple)
    objects = [value for state in states for value in state.values() if not isinstance(value, seen)]
    counted = state_bytes(optimizer).total + sum(t.numel() * t.element_size() for t in tensors_inside(objects))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_inside(states)}
    return counted, sum(storages.values())
