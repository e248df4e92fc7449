"""Coefficients of Newton–Schulz iterations: a registry, a generator, and the check that every set passes.

One step of an iteration takes a singular value x to x·(a + b·x² + c·x⁴) for its triple (a, b, c). A set of triples is a
composition of such polynomials, meant to take (0, 1] near 1.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

Triple = tuple[float, float, float]
Coefficients = str | Sequence[float] | Sequence[Sequence[float]]

# rounding takes the largest singular value of a normalized matrix above 1: a set must still work up to 1 + SAFETY
SAFETY = 0.01
# no published set comes near it within (0, 1 + SAFETY], and what does grows on to 1e90
_CEILING = 4.0
# the degree-5 truncation of the Taylor series, where the interval has shrunk to the point 1
_LIMIT: Triple = (15 / 8, -10 / 8, 3 / 8)


@dataclass(frozen=True)
class Table:
    """A published set.

    Attributes:
        name: what `coefficients=` takes.
        triples: (a, b, c) of each step.
        source: where it was published.
        output_range: what singular values in [3e-3, 1] become.
        normalization: what is done to a matrix first: "frobenius", or "aol", which scales its rows.
        generate: for sets that are defined for any number of steps.
    """

    name: str
    triples: tuple[Triple, ...]
    source: str
    output_range: tuple[float, float]
    normalization: Literal["frobenius", "aol"] = "frobenius"
    generate: Callable[[int], tuple[Triple, ...]] | None = None


def table(coefficients: Coefficients, steps: int | None = None) -> tuple[Triple, ...]:
    """Return the triples of so many steps, checked.

    Args:
        coefficients: a name in `REGISTRY`, one (a, b, c), or a sequence of them. A sequence shorter than `steps`
            repeats its last triple, a longer one is cut.
        steps: None takes the sequence's own length.

    Raises:
        ValueError: for an unknown name, fewer than 1 step, what is not triples of finite numbers, and a set that is
            negative or grows beyond bounds somewhere on (0, 1 + `SAFETY`].
    """
    return _table(coefficients if isinstance(coefficients, str) else _triples(coefficients), steps)


def preconditioned(coefficients: Coefficients) -> bool:
    """Say whether a table is made for matrices whose rows have been scaled (`Table.normalization` "aol")."""
    return isinstance(coefficients, str) and REGISTRY[coefficients].normalization == "aol"


@lru_cache(maxsize=256)
def _table(coefficients: str | tuple[Triple, ...], steps: int | None) -> tuple[Triple, ...]:
    if steps is not None and not (isinstance(steps, int) and not isinstance(steps, bool) and steps >= 1):
        raise ValueError(f"Invalid steps: {steps!r}, must be an int >= 1 or None")
    if not isinstance(coefficients, str):
        triples = coefficients
    elif coefficients not in REGISTRY:
        raise ValueError(f"Invalid coefficients: {coefficients!r}, must be one of {', '.join(REGISTRY)}, or triples")
    else:
        entry = REGISTRY[coefficients]
        triples = entry.generate(steps) if entry.generate is not None and steps is not None else entry.triples
    count = len(triples) if steps is None else steps
    triples = (*triples[:count], *(triples[-1:] * (count - len(triples))))
    _check(triples)
    return triples


def polar_express_coefficients(
    steps: int, lower: float = 1e-3, *, safety: float = SAFETY, cushion: float = 0.02407327424182761
) -> tuple[Triple, ...]:
    """Return the set that is nearest to 1 on [lower, 1] in the maximum norm, step by step.

    Each step takes the odd polynomial of degree 5 that deviates least from 1 on the interval that the steps before
    have left, found by Remez's exchange algorithm (Polar Express, arXiv 2505.16932).

    Args:
        steps: how many triples.
        lower: the smallest singular value that matters, relative to the Frobenius norm.
        safety: what rounding may add to the largest singular value: all steps but the last are the polynomials of
            x / (1 + safety). 0 is for exact arithmetic only, and `orthogonalize` refuses it.
        cushion: an interval's lower end counts as at least this fraction of its upper one, which keeps the first
            steps from sending middling singular values to nearly 0; the default is the paper's, 0 the best set in
            exact arithmetic (CANS, arXiv 2506.10935).

    Raises:
        ValueError: for `steps` below 1, `lower` outside (0, 1), a negative `safety`, `cushion` outside [0, 1).

    Example:
        >>> a, b, c = polar_express_coefficients(5)[0]
        >>> round(a, 3), round(b, 3), round(c, 3)
        (8.205, -22.902, 16.461)
    """
    if not (isinstance(steps, int) and steps >= 1):
        raise ValueError(f"Invalid steps: {steps!r}, must be an int >= 1")
    if not 0 < lower < 1:
        raise ValueError(f"Invalid lower: {lower!r}, must be in (0, 1)")
    if not (safety >= 0 and math.isfinite(safety)):
        raise ValueError(f"Invalid safety: {safety!r}, must be a number >= 0")
    if not 0 <= cushion < 1:
        raise ValueError(f"Invalid cushion: {cushion!r}, must be in [0, 1)")
    return _polar_express(steps, lower, safety, cushion)


@lru_cache(maxsize=64)
def _polar_express(steps: int, lower: float, safety: float, cushion: float) -> tuple[Triple, ...]:
    triples: list[Triple] = []
    upper = 1.0
    for step in range(1, steps + 1):
        a, b, c = _minimax(max(lower, cushion * upper), upper)
        # the cushion has moved the interval that the polynomial is centred on: centre it again
        centre = 2 / (_at((a, b, c), lower) + _at((a, b, c), upper))
        f = 1 + safety if step < steps else 1.0
        triples.append((a * centre / f, b * centre / f**3, c * centre / f**5))
        lower = _at(triples[-1], lower)
        upper = 2 - lower
    return tuple(triples)


def _minimax(lower: float, upper: float) -> Triple:
    """Return the odd polynomial of degree 5 that deviates least from 1 on [lower, upper], by Remez's exchange."""
    if lower > (1 - 1e-4) * upper:
        # the points of the exchange are one point to working precision, and the error is below 1e-11
        a, b, c = _LIMIT
        return a / upper, b / upper**3, c / upper**5
    q, r = (3 * lower + upper) / 4, (lower + 3 * upper) / 4
    error = math.inf
    # it converges quadratically; the bound is for the last bit, which may not settle
    for _ in range(50):
        # p(x) = 1 ∓ e at four points, with the signs in turn
        points = ((lower, 1.0), (q, -1.0), (r, 1.0), (upper, -1.0))
        a, b, c, found = _solved([[x, x**3, x**5, sign, 1.0] for x, sign in points])
        if abs(found - error) < 1e-15:
            break
        error = found
        # the two extrema between the ends: where a + 3bx² + 5cx⁴ = 0
        root = math.sqrt(9 * b * b - 20 * a * c)
        q, r = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
    return a, b, c


def _solved(rows: list[list[float]]) -> list[float]:
    """Solve the linear equations `rows`, each with its right side at its end, by elimination with pivoting."""
    size = len(rows)
    for i in range(size):
        rows[i:] = sorted(rows[i:], key=lambda row: -abs(row[i]))
        for below in rows[i + 1 :]:
            factor = below[i] / rows[i][i]
            below[:] = [x - factor * y for x, y in zip(below, rows[i], strict=True)]
    solution: list[float] = []
    for i, row in reversed(list(enumerate(rows))):
        known = sum(x * y for x, y in zip(row[i + 1 : size], solution, strict=True))
        solution.insert(0, (row[size] - known) / row[i])
    return solution


def _at(triple: Triple, x: float) -> float:
    a, b, c = triple
    return x * (a + x * x * (b + x * x * c))


def _check(triples: tuple[Triple, ...]) -> None:
    """Follow the interval (0, 1 + SAFETY] exactly through all steps."""
    top = 1 + SAFETY
    for step, triple in enumerate(triples, 1):
        a, b, c = triple
        # p(x)/x is a parabola in x² and p has at most two extrema, so a few points decide
        vertex = [-b / (2 * c)] if c != 0 else []
        inner = 9 * b * b - 20 * a * c
        extrema = [(-3 * b + s * math.sqrt(inner)) / (10 * c) for s in (-1, 1)] if c != 0 and inner >= 0 else []
        extrema += [-a / (3 * b)] if c == 0 and b != 0 else []
        points = [top, *(math.sqrt(y) for y in (*vertex, *extrema) if 0 < y < top * top)]
        low, high = (f(points, key=lambda x: _at(triple, x)) for f in (min, max))
        if a <= 0:
            raise ValueError(f"Invalid coefficients: a = {a!r} in step {step}, must be positive")
        for x in (low, high):
            if not 0 < _at(triple, x) <= _CEILING:
                raise ValueError(
                    f"Invalid coefficients: step {step}, {triple!r}, takes {x:.6g} to {_at(triple, x):.6g}, must stay "
                    f"in (0, {_CEILING:g}] for singular values up to {1 + SAFETY:g}, which rounding produces"
                )
        top = _at(triple, high)


def _triples(values: Sequence[float] | Sequence[Sequence[float]]) -> tuple[Triple, ...]:
    triples: list[Triple] = []
    try:
        rows: Sequence[Any] = [values] if isinstance(values[0], int | float) else values
        for a, b, c in rows:
            triples.append((float(a), float(b), float(c)))
    except (TypeError, ValueError, IndexError, KeyError):
        triples = []
    if not triples or not all(math.isfinite(x) for triple in triples for x in triple):
        raise ValueError(f"Invalid coefficients: {values!r}, must be a name, one (a, b, c), or a sequence of them")
    return tuple(triples)


def _registry() -> dict[str, Table]:
    jordan: Triple = (3.4445, -4.7750, 2.0315)
    you: tuple[Triple, ...] = (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    )
    thousandths = (
        (3955, -8306, 5008),
        (3735, -6681, 3463),
        (3799, -6499, 3211),
        (4019, -6385, 2906),
        (2677, -3029, 1162),
        (2172, -1833, 682),
    )
    modula = tuple((a / 1024, b / 1024, c / 1024) for a, b, c in thousandths)
    turbo: tuple[Triple, ...] = (
        (4.6051, -9.6552, 5.6769),
        (4.7505, -6.0861, 2.1790),
        (2.7763, -2.3190, 0.5523),
        (2.4231, -2.2861, 0.8193),
    )
    express = polar_express_coefficients
    cans = partial(express, cushion=0.0)
    return {
        entry.name: entry
        for entry in (
            Table("jordan", (jordan,) * 5, "K. Jordan et al., Muon, 2024", (0.682, 1.202)),
            Table("you", you, "Y. Jiacheng, 2025, in Dion and Gram Newton-Schulz", (0.978, 1.145)),
            Table("modula", modula, "Modula, 2025", (0.996, 0.999)),
            Table("polar_express", express(5), "Polar Express, arXiv 2505.16932", (0.866, 1.134), generate=express),
            Table("cans", cans(5), "CANS, arXiv 2506.10935", (0.877, 1.123), generate=cans),
            Table("turbo", turbo, "Turbo-Muon, arXiv 2512.04632", (0.426, 1.05), normalization="aol"),
            Table("deepseek", (jordan,) * 8 + ((2.0, -1.5, 0.5),) * 2, "DeepSeek-V4", (1.0, 1.001)),
        )
    }


REGISTRY = _registry()
