"""Orthogonalized momentum in float64 NumPy, written from the formulas; shares no code with the package."""

from itertools import pairwise

import numpy as np

JORDAN = [(3.4445, -4.775, 2.0315)] * 5

FACTORS = {
    None: lambda m, n: np.sqrt(max(1.0, m / n)),
    "original": lambda m, n: np.sqrt(max(1.0, m / n)),
    "match_rms_adamw": lambda m, n: 0.2 * np.sqrt(max(m, n)),
    "rms_to_rms": lambda m, n: np.sqrt(m / n),
    "none": lambda m, n: 1.0,
}


def newton_schulz(x, triples, eps):
    """The odd polynomials of the iteration, applied to the singular values of X / max(‖X‖, eps)."""
    norm = np.sqrt((x * x).sum())
    if norm == 0:
        return np.zeros_like(x)
    u, s, vt = np.linalg.svd(x / max(norm, eps), full_matrices=False)
    for a, b, c in triples:
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vt


def advanced(m, g, momentum, nesterov, form):
    """Return the new momentum and what the update is made of."""
    share = 1 - momentum if form == "ema" else 1.0
    m = momentum * m + share * g
    return m, momentum * m + share * g if nesterov else m


def applied(w, direction, lr, weight_decay, cautious=False):
    """Decay where it is wanted, then subtract."""
    where = direction * w >= 0 if cautious else np.ones_like(w)
    return w - lr * weight_decay * where * w - lr * direction


def muon(
    weights,
    gradients,
    *,
    lr,
    weight_decay=0.0,
    momentum=0.95,
    nesterov=True,
    triples=JORDAN,
    eps=1e-7,
    adjust="original",
    form="ema",
    beta2=None,
    cautious=False,
    blocks=None,
):
    """Return the weights after each gradient; `blocks` are the numbers of rows of matrices stacked in this one."""
    w = weights.copy()
    m = np.zeros_like(w)
    mean_sq = np.zeros((w.shape[0], 1))
    edges = np.cumsum([0, *(blocks or [w.shape[0]])])
    for g in gradients:
        m, u = advanced(m, g, momentum, nesterov, form)
        direction = np.empty_like(w)
        for start, end in pairwise(edges):
            part = u[start:end]
            o = newton_schulz(part, triples, eps)
            if beta2 is not None:
                rows = mean_sq[start:end]
                rows[:] = beta2 * rows + (1 - beta2) * (o * o).mean(axis=1, keepdims=True)
                even = o / np.sqrt(rows)
                o = even * np.linalg.norm(o) / np.linalg.norm(even)
            factor = (o * part).sum() if adjust == "nuclear" else FACTORS[adjust](*part.shape)
            direction[start:end] = factor * o
        w = applied(w, direction, lr, weight_decay, cautious)
        yield w
