"""Steepest descent under a norm for each role, in float64 NumPy, written from the formulas; shares none of ours."""

import numpy as np

from tests.reference.muon_numpy import advanced, applied, newton_schulz

YOU = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]


def direction(norm, u):
    """The steepest descent of ⟨·, u⟩ in the unit ball, in root-mean-square units; zeros stay zeros."""
    if norm == "spectral":
        m, n = u.shape
        return np.sqrt(m / n) * newton_schulz(u, YOU, 0.0)
    if norm == "sign":
        return np.sign(u) / u.shape[-1]
    axis = {"row": -1, "column": 0, "rms": None}[norm]
    root = np.sqrt(np.mean(u * u, axis=axis, keepdims=True))
    return np.divide(u, root, out=np.zeros_like(u), where=root > 0)


def steepest_descent(weights, gradients, *, norm, lr, weight_decay=0.0, momentum=0.95, nesterov=True):
    """Return the weights after each gradient."""
    w = weights.copy()
    m = np.zeros_like(w)
    for g in gradients:
        m, u = advanced(m, g, momentum, nesterov, "ema")
        w = applied(w, direction(norm, u), lr, weight_decay)
        yield w
