"""GaLore and AdamW in float64 NumPy, written from the papers' formulas; shares no code with the package."""

import numpy as np


def adamw(weights, gradients, *, lr, betas, eps, weight_decay):
    """Return the weights after each gradient."""
    b1, b2 = betas
    m = np.zeros_like(weights)
    v = np.zeros_like(weights)
    w = weights.copy()
    for t, g in enumerate(gradients, start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        w = w - lr * weight_decay * w - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        yield w


def galore(weights, gradients, *, lr, betas, eps, weight_decay, rank, gap, scale, proj_type, svd):
    """Return the weights after each gradient; refreshes at steps 0, gap, 2·gap, ...

    `svd` decomposes: the signs of singular vectors are the library's choice, and moments that are kept see them.
    """
    b1, b2 = betas
    rows, cols = weights.shape
    tall = rows >= cols
    side = {"std": "R" if tall else "L", "reverse_std": "L" if tall else "R", "left": "L", "right": "R", "full": "LR"}
    side = side[proj_type]
    w = weights.copy()
    m = v = None
    for t, g in enumerate(gradients):
        if t % gap == 0:
            u, _, vt = svd(g)
            p, q = u[:, :rank], vt[:rank].T
        r = g
        if "L" in side:
            r = p.T @ r
        if "R" in side:
            r = r @ q
        m = (1 - b1) * r if m is None else b1 * m + (1 - b1) * r
        v = (1 - b2) * r * r if v is None else b2 * v + (1 - b2) * r * r
        d = (m / (1 - b1 ** (t + 1))) / (np.sqrt(v / (1 - b2 ** (t + 1))) + eps)
        if "L" in side:
            d = p @ d
        if "R" in side:
            d = d @ q.T
        w = w - lr * weight_decay * w - lr * scale * d
        yield w
