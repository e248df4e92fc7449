"""F = λI + (1/n) Σ g gᵀ and its inverse in NumPy, dense and by the published recursions; no code of the package.

The rows of `rows` are the gradients, in the order of the recursions; n is `divisor`. All is computed in their dtype.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]


def matrix(rows: Array, damping: float, divisor: int, block_size: int | None = None) -> Array:
    """F, without what is outside its diagonal blocks."""
    size = rows.shape[1]
    block = np.arange(size) // (block_size or size)
    return damping * np.eye(size) + np.where(block[:, None] == block, rows.T @ rows / divisor, 0.0)


def woodbury(rows: Array, damping: float, divisor: int, x: Array) -> Array:
    """(x − Gᵀ (nλI + GGᵀ)⁻¹ G x)/λ."""
    inner = divisor * damping * np.eye(len(rows)) + rows @ rows.T
    return (x - np.linalg.solve(inner, rows @ x) @ rows) / damping


def push_through(rows: Array, damping: float, divisor: int, index: int) -> Array:
    """n Gᵀ (nλI + GGᵀ)⁻¹ e, which is F⁻¹ g for one of the rows."""
    inner = divisor * damping * np.eye(len(rows)) + rows @ rows.T
    return divisor * np.linalg.solve(inner, np.eye(len(rows))[index]) @ rows


def static_form(rows: Array, damping: float, divisor: int) -> tuple[Array, Array]:
    """All v = F⁻¹ g, with F of the gradients before g, and q = n + gᵀ v."""
    v, q = np.empty_like(rows), np.empty_like(rows[:, 0])
    for i, g in enumerate(rows):
        v[i] = g / damping - (v[:i] @ g / q[:i]) @ v[:i]
        q[i] = divisor + g @ v[i]
    return v, q


def static_solve(v: Array, q: Array, damping: float, x: Array) -> Array:
    return x / damping - (v @ x / q) @ v


def static_element(v: Array, q: Array, damping: float, i: int, j: int) -> float:
    return float((i == j) / damping - (v[:, i] * v[:, j] / q).sum())


def triangles(rows: Array, damping: float, divisor: int) -> tuple[Array, Array]:
    """D, upper triangular with gᵢᵀ F⁻¹ gⱼ for the F before gᵢ, and B, lower triangular with v = B G."""
    count = len(rows)
    d, b = np.triu(rows @ rows.T) / damping, np.eye(count, dtype=rows.dtype) / damping
    for i in range(count):
        share = d[:i, i] / (divisor + np.diagonal(d)[:i])
        d[i, i:] -= share @ d[:i, i:]
        b[i, :i] = -share @ b[:i, :i]
    return d, b


def dynamic_solve(rows: Array, d: Array, b: Array, damping: float, divisor: int, x: Array) -> Array:
    q = divisor + np.diagonal(d)
    c = rows @ x / damping
    for i in range(len(rows)):
        c[i] -= d[:i, i] @ (c[:i] / q[:i])
    return x / damping - (c / q) @ b @ rows


def eliminated(matrix: Array, right: Array) -> Array:
    """The solution by Gaussian elimination with pivots, which NumPy has for double precision only."""
    a, size = np.concatenate([matrix, right[:, None]], axis=1), len(right)
    for i in range(size):
        pivot = i + int(np.abs(a[i:, i]).argmax())
        a[[i, pivot]] = a[[pivot, i]]
        a[i + 1 :] -= np.outer(a[i + 1 :, i] / a[i, i], a[i])
    solution = np.zeros_like(right)
    for i in reversed(range(size)):
        solution[i] = (a[i, -1] - a[i, i + 1 : size] @ solution[i + 1 :]) / a[i, i]
    return solution


def precise(rows: Array, damping: float, divisor: int, x: Array | None = None) -> Array:
    """F⁻¹ x, or F⁻¹ g of the last row, with all of it in long double."""
    g, shift = rows.astype(np.longdouble), np.longdouble(damping)
    inner = g @ g.T + divisor * shift * np.eye(len(g), dtype=np.longdouble)
    if x is None:
        last = np.eye(len(g), dtype=np.longdouble)[-1]
        return (divisor * eliminated(inner, last) @ g).astype(np.float64)
    y = x.astype(np.longdouble)
    return ((y - eliminated(inner, g @ y) @ g) / shift).astype(np.float64)
