"""AuON in float64 NumPy, written from the paper's formulas and those of its authors' code; shares none with ours."""

import numpy as np

from tests.reference.muon_numpy import FACTORS, JORDAN, advanced, applied, newton_schulz


def cosh_rms(x, gamma):
    return np.sqrt(np.mean(np.cosh(gamma * x) ** 2))


def auon(
    weights,
    gradients,
    *,
    lr,
    weight_decay=0.0,
    momentum=0.95,
    nesterov=True,
    gamma=1.0,
    ns_steps=0,
    normalize=True,
    adjust="original",
):
    """Return the weights after each gradient."""
    w = weights.copy()
    m = np.zeros_like(w)
    for g in gradients:
        m, u = advanced(m, g, momentum, nesterov, "ema")
        x = u / (np.linalg.norm(u) + 1e-7)
        if ns_steps:
            x = newton_schulz(u, JORDAN[:ns_steps], 1e-7)
        if normalize:
            direction = FACTORS[adjust](*w.shape) * x / (cosh_rms(x, gamma) + 1e-8)
        else:
            direction = (x if ns_steps else u) / (cosh_rms(x, gamma) + 1e-8)
        w = applied(w, direction, lr, weight_decay)
        yield w
