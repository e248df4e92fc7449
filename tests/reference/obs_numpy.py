"""The Optimal Brain Surgeon in NumPy, dense, with loops; no code of the package.

F is a dense matrix in double precision, `pruned` the indices that are to be zero.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
Indices = NDArray[np.integer[Any]]


def scores(weights: Array, fisher: Array) -> Array:
    return weights**2 / (2 * np.diagonal(np.linalg.inv(fisher)))


def rise(change: Array, fisher: Array) -> float:
    """By how much a quadratic loss rises from its minimum."""
    return float(change @ fisher @ change / 2)


def independent(weights: Array, fisher: Array, pruned: Indices) -> Array:
    """The change that sums what is best for each weight alone; the pruned ones are zero whatever it says."""
    inverse, change = np.linalg.inv(fisher), np.zeros_like(weights)
    for k in pruned:
        change -= weights[k] / inverse[k, k] * inverse[:, k]
    change[pruned] = -weights[pruned]
    return change


def joint(weights: Array, fisher: Array, pruned: Indices) -> Array:
    """The change δ that minimizes δᵀFδ/2 with δ = −w where it is pruned, by its Lagrange multipliers."""
    d, p = len(weights), len(pruned)
    rows = np.eye(d)[pruned]
    system = np.block([[fisher, rows.T], [rows, np.zeros((p, p))]])
    return np.linalg.solve(system, np.concatenate([np.zeros(d), -weights[pruned]]))[:d]


def lowest(values: Array, count: int, alive: NDArray[np.bool_]) -> Indices:
    """The first `count` indices in the order: pruned before, lowest score, lowest index."""
    order = sorted(range(len(values)), key=lambda k: (alive[k], values[k] if alive[k] else 0.0, k))
    return np.array(sorted(order[:count]), dtype=np.int64)


def pattern(values: Array, n: int, m: int) -> NDArray[np.bool_]:
    """Which entries of an (out, in) matrix an n:m pattern keeps: the n highest of m consecutive ones of a row."""
    keep = np.zeros(values.shape, dtype=bool)
    for i in range(values.shape[0]):
        for start in range(0, values.shape[1], m):
            group = sorted(range(start, start + m), key=lambda j: (values[i, j], j))
            keep[i, group[m - n :]] = True
    return keep
