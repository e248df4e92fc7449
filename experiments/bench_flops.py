"""Operations of a step as torch's flop counter sees them, matrix by matrix, beside the formulas of `bench_costs`.

The counter knows products that return a new tensor; those that add to one in place and the decompositions get their
formulas here, and an operation that looks like one of these and has no formula is named, so that nothing is missed in
silence. Elementwise work is not counted.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from experiments.bench_costs import Cost, Shape, fft_flops, gram_flops, newton_schulz_flops, qr_flops
from experiments.bench_workloads import Entry, Workload, gradient_sets, parameters

aten = torch.ops.aten
# words in the names of products, transforms and decompositions, and names that have one and are none
_HEAVY = {"mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot", "matmul", "linalg", "fft"}
_HEAVY |= {"cholesky", "geqrf", "orgqr", "ormqr", "triangular", "lstsq"}
_LIGHT = {"linalg_vector_norm", "_linalg_check_errors"}


def _product(first: list[int], left: list[int], right: list[int], **_: Any) -> int:
    *batch, rows, inner = left
    return 2 * torch.Size(batch).numel() * rows * inner * right[-1]


def _qr(matrix: list[int], *_: Any, **__: Any) -> int:
    *batch, rows, columns = matrix
    return torch.Size(batch).numel() * qr_flops(max(rows, columns), min(rows, columns))


def _svd(matrix: list[int], *_: Any, **__: Any) -> int:
    # Golub and Van Loan: singular values and both sides' vectors, which is what LAPACK is asked for
    *batch, rows, columns = matrix
    long, short = max(rows, columns), min(rows, columns)
    counts = (14 * long * short**2 + 8 * short**3, 6 * long * short**2 + 20 * short**3)
    return torch.Size(batch).numel() * min(counts)


def _eigh(matrix: list[int], *_: Any, **__: Any) -> int:
    # the same: symmetric QR with vectors
    *batch, rows, _columns = matrix
    return torch.Size(batch).numel() * 9 * rows**3


def _real_fft(matrix: list[int], dims: list[int], *_: Any, **__: Any) -> int:
    (dim,) = dims
    return torch.Size(matrix).numel() // matrix[dim] * fft_flops(matrix[dim])


FORMULAS: dict[Any, Any] = {
    aten.addmm_: _product,
    aten.baddbmm_: _product,
    aten.linalg_qr: _qr,
    aten._linalg_svd: _svd,
    aten._linalg_eigh: _eigh,
    aten._fft_r2c: _real_fft,
}


class _Uncounted(TorchDispatchMode):
    """Collects the names of heavy operations for which there is no formula."""

    def __init__(self, known: Mapping[Any, Any]) -> None:
        super().__init__()
        self.known = known
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func._overloadpacket
        name = packet.__name__
        if packet not in self.known and name not in _LIGHT and _HEAVY & set(name.split("_")):
            self.names.add(name)
        return func(*args, **(kwargs or {}))


def count(action: Callable[[], object]) -> tuple[dict[str, int], list[str]]:
    """Operations by the name of the operation, and the heavy ones that could not be counted."""
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    uncounted = _Uncounted(counter.flop_registry)
    # a graph that was compiled shows the counter nothing
    with torch.compiler.set_stance("force_eager"), counter, uncounted:
        action()
    found = counter.get_flop_counts().get("Global", {})
    return {packet.__name__: flops for packet, flops in found.items()}, sorted(uncounted.names)


def _step(entry: Entry, work: Workload, gap: int, device: str) -> tuple[dict[str, int], list[str]]:
    # the second step: the first one finds all bases
    params = parameters(work, device)
    optimizer = entry.build(params, work.rank, gap)
    for grads in gradient_sets(work, device, 2):
        _feed(params, grads)
        counted = count(optimizer.step)
    return counted


def _feed(params: list[Any], grads: list[Tensor]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = g


def count_entry(entry: Entry, work: Workload, device: str) -> dict[str, Any]:
    """For each different shape: operations of a step, counted and by formula, and what a refresh adds to it."""
    rows = {}
    for shape in dict.fromkeys(work.shapes):
        one = Workload((shape,), work.rank, work.dtype)
        # turns are spread over the period, and one matrix has its in the middle
        by_name, uncounted = _step(entry, one, 1000, device)
        theory: Cost = entry.cost(shape, work.rank, work.dtype)
        row: dict[str, Any] = {
            "matrices": work.shapes.count(shape),
            "counted": sum(by_name.values()),
            "formula": theory.flops + theory.bfloat16_flops,
            "by_operation": by_name,
        }
        if entry.refreshes:
            every_step, more = _step(entry, one, 1, device)
            row["refresh_counted"] = sum(every_step.values()) - row["counted"]
            row["refresh_formula"] = theory.refresh_flops
            uncounted += more
        rows["x".join(map(str, shape))] = row | {"uncounted": sorted(set(uncounted))}
    return rows


def newton_schulz_theory(shape: Shape) -> dict[str, int]:
    """What five steps of Newton–Schulz need in each form, for comparison."""
    short, long = sorted(shape)
    return {
        "standard": newton_schulz_flops(short, long),
        "standard, symmetric": newton_schulz_flops(short, long, symmetric=True),
        "Gram, one restart": gram_flops(short, long, restarts=1),
        "Gram, one restart, symmetric": gram_flops(short, long, restarts=1, symmetric=True),
        "Gram": gram_flops(short, long),
        "Gram, symmetric": gram_flops(short, long, symmetric=True),
    }


def flop_report(entries: Mapping[str, Entry], work: Workload, device: str) -> dict[str, Any]:
    """What a report holds of operations: of every optimizer, and of Newton–Schulz alone."""
    shapes = {"x".join(map(str, shape)): shape for shape in dict.fromkeys(work.shapes)}
    return {
        "flops": {name: count_entry(entry, work, device) for name, entry in entries.items()},
        "newton_schulz_flops": {name: newton_schulz_theory(shape) for name, shape in shapes.items()},
    }
