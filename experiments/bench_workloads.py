"""What `bench` measures: matrices, synthetic gradients, the optimizers, and the least work each of them can do."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_optim import GaLoreAdamW, state_bytes

Shape = tuple[int, int]
LR = 1e-3
SCALE = 0.25
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
    # None: AdamW, no projection
    basis: str | None = None
    stagger: bool = False
    # ours keeps float32 state whatever the parameter's dtype; peers keep the parameter's dtype
    float32_state: bool = False


def _adamw(**options: Any) -> Entry:
    return Entry(lambda params, rank, gap: torch.optim.AdamW(params, lr=LR, weight_decay=0.0, **options))


def _galore_group(params: list[nn.Parameter], rank: int, gap: int) -> dict[str, Any]:
    return {"params": params, "rank": rank, "update_proj_gap": gap, "scale": SCALE, "proj_type": "std"}


def _galore(basis: str, stagger: bool) -> Entry:
    def build(params: list[nn.Parameter], rank: int, gap: int) -> torch.optim.Optimizer:
        return GaLoreAdamW([_galore_group(params, rank, gap)], lr=LR, basis=basis, stagger=stagger)

    return Entry(build, basis, stagger, float32_state=True)


def _galore_torch(params: list[nn.Parameter], rank: int, gap: int) -> torch.optim.Optimizer:
    # imports transformers and bitsandbytes, so only when asked for
    peer: Any = importlib.import_module("galore_torch")
    optimizer: torch.optim.Optimizer = peer.GaLoreAdamW(
        [_galore_group(params, rank, gap)], lr=LR, no_deprecation_warning=True
    )
    return optimizer


ENTRIES: dict[str, Entry] = {
    "adamw_loop": _adamw(foreach=False, fused=False),
    "adamw_foreach": _adamw(foreach=True),
    "adamw_fused": _adamw(fused=True),
    "galore_svd": _galore("svd", stagger=True),
    "galore_svd_unstaggered": _galore("svd", stagger=False),
    "galore_subspace": _galore("subspace", stagger=True),
    "galore_subspace_unstaggered": _galore("subspace", stagger=False),
    "galore_torch": Entry(_galore_torch, "svd"),
}


@dataclass(frozen=True)
class Work:
    """The least an optimizer can do: bytes to and from memory, floating-point operations, bytes it must hold."""

    step_bytes: int
    step_flops: int
    refresh_flops: tuple[int, ...]
    first_flops: int
    state_bytes: int
    extra_bytes: int
    refresh_extra_bytes: int


def _sides(shape: Shape, rank: int) -> tuple[int, int, int]:
    short, long = sorted(shape)
    return short, long, min(rank, short)


def _refresh_flops(basis: str, short: int, long: int, rank: int) -> int:
    # Householder QR of short × rank with Q formed
    qr = 4 * short * rank**2 - 4 * rank**3 // 3
    if basis == "sketch":
        return 2 * short * long * rank + qr
    if basis == "subspace":
        # G (G' Q)
        return 4 * short * long * rank + qr
    # Golub and Van Loan's counts for singular values and the short side's vectors: with and without a QR first
    return min(4 * long * short**2 + 8 * short**3, 2 * long * short**2 + 11 * short**3)


def least_work(entry: Entry, work: Workload) -> Work:
    """Floors for one step: everything read once, written once, nothing kept in between.

    AdamW reads weight, gradient and two moments and writes all but the gradient. GaLore reads weight, gradient, basis
    and two moments of rank × long side, writes the weight and the moments, and multiplies twice (down and back up);
    it must hold one matrix's coordinates, and a refresh must hold one new basis. The first step finds all bases, where
    refreshes are staggered by one product with a random matrix.
    """
    item = work.dtype.itemsize
    state_item = 4 if entry.float32_state else item
    if entry.basis is None:
        return Work(7 * work.numel * item, 0, (), 0, 2 * work.numel * item, 0, 0)
    sides = [_sides(shape, work.rank) for shape in work.shapes]
    return Work(
        step_bytes=sum(3 * s * n * item + (s * r + 4 * r * n) * state_item for s, n, r in sides),
        step_flops=sum(4 * s * n * r for s, n, r in sides),
        refresh_flops=tuple(_refresh_flops(entry.basis, *side) for side in sides),
        first_flops=sum(_refresh_flops("sketch" if entry.stagger else entry.basis, *side) for side in sides),
        state_bytes=sum((2 * r * n + s * r) * state_item for s, n, r in sides),
        extra_bytes=max(r * n * state_item for s, n, r in sides),
        refresh_extra_bytes=max((s * r + r * n) * state_item for s, n, r in sides),
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
    objects = [value for state in states for value in state.values() if not isinstance(value, Tensor)]
    counted = state_bytes(optimizer).total + sum(t.numel() * t.element_size() for t in tensors_inside(objects))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_inside(states)}
    return counted, sum(storages.values())
