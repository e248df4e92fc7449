"""Adam in a subspace in float64 NumPy, written from the formulas; shares no code with the package.

Everything is said for tall matrices, whose columns are compressed; a wide one is transposed on the way in and out.
Steps are counted t = 0, 1, ...; the basis is found again wherever the gap divides t.
"""

import numpy as np

from tests.reference import dct_numpy
from tests.reference.muon_numpy import applied


def advanced(m, v, r, betas):
    """Return the moments after R."""
    b1, b2 = betas
    return b1 * m + (1 - b1) * r, b2 * v + (1 - b2) * r * r


def corrected(m, v, betas, count, eps):
    """The direction of Adam; `count` is the number of steps in the moments, or one for each column."""
    b1, b2 = betas
    return (m / (1 - b1**count)) / (np.sqrt(v / (1 - b2**count)) + eps)


def moved(m, v, betas, count, old, new):
    """The moments after `count` steps in the old basis, expressed in the new one as statistics."""
    if count == 0:
        return m, v
    bc1, bc2 = 1 - betas[0] ** count, 1 - betas[1] ** count
    c = new.T @ old
    mean = m / bc1
    variance = v / bc2 - mean**2
    return m @ c.T, bc2 * np.abs(variance @ (c**2).T + (mean @ c.T) ** 2)


def orthonormal(matrix):
    """Q of the QR decomposition whose R has a positive diagonal."""
    q, r = np.linalg.qr(matrix)
    return q * np.where(np.diag(r) < 0, -1.0, 1.0)


def iterated(matrix, basis):
    """One block power iteration."""
    return orthonormal(matrix.T @ (matrix @ basis))


def followed(a, m, betas, count, q, rho):
    """What the basis is found from: the gradient, mixed with the corrected first moment."""
    if rho is None or count == 0:
        return a
    return rho * (m / (1 - betas[0] ** count)) @ q.T + (1 - rho) * a


def stretched(n, r, axis=1):
    """By how much Adam stretched each row, or the whole matrix."""
    return np.linalg.norm(n, axis=axis, keepdims=True) / (np.linalg.norm(r, axis=axis, keepdims=True) + 1e-8)


def limited(s, previous, betas, count, gamma):
    """S, at most γ times as long as the last, and its length; lengths are taken without the bias correction."""
    size = np.linalg.norm(s) / (np.sqrt(1 - betas[1] ** count) / (1 - betas[0] ** count))
    if previous is None or gamma is None:
        return s, size
    q = max(size / (previous + 1e-8), gamma) / gamma
    return s / q, size / q


def dct_adamw(
    weights,
    gradients,
    *,
    lr,
    betas,
    eps,
    weight_decay,
    rank,
    gap=1,
    ranking="l2",
    carry="rotate",
    ages=False,
    error_feedback=False,
    scale=1.0,
):
    """Return the weights after each gradient; the basis is made of columns of the DCT-II matrix.

    `ages` counts for each column by itself the steps since it entered.
    """
    wide = weights.shape[0] < weights.shape[1]
    w = weights.T if wide else weights
    long, short = w.shape
    columns = dct_numpy.matrix(short)
    indices = np.zeros(0, dtype=int)
    m = np.zeros((long, rank))
    v = np.zeros((long, rank))
    count = np.zeros(rank, dtype=int)
    error = np.zeros_like(w)
    for t, gradient in enumerate(gradients):
        a = (gradient.T if wide else gradient) + error
        if t % gap == 0:
            energy = (np.abs(a @ columns) ** {"l2": 2, "l1": 1}[ranking]).sum(axis=0)
            # a stable sort of the negated energies: equal ones by their index
            new = np.sort(np.argsort(-energy, kind="stable")[:rank])
            if t > 0 and carry == "rotate":
                product = columns[:, indices].T @ columns[:, new]
                m, v = m @ product, np.abs(v @ product)
            if carry == "reset":
                m, v, count = np.zeros_like(m), np.zeros_like(v), np.zeros_like(count)
            elif ages:
                known = dict(zip(indices, count, strict=False))
                count = np.array([known.get(index, 0) for index in new])
            indices = new
        q = columns[:, indices]
        r = a @ q
        if error_feedback:
            error = a - r @ q.T
        m, v = advanced(m, v, r, betas)
        count = count + 1
        w = applied(w, scale * corrected(m, v, betas, count, eps) @ q.T, lr, weight_decay)
        yield w.T if wide else w


def projected_adamw(
    weights,
    gradients,
    *,
    lr,
    betas,
    eps,
    weight_decay,
    rank,
    gap=1,
    basis="svd",
    sketch=None,
    carry="keep",
    follow=None,
    error_feedback=False,
    residual=None,
    residual_scale=None,
    limiter=1.01,
    scale=1.0,
    svd=np.linalg.svd,
):
    """Return the weights after each gradient.

    A subspace iteration starts from `sketch`. `follow` is the share of the first moment in what the basis is found
    from. `residual_scale` stands before what the subspace leaves out and is `scale` unless given.
    `svd` decomposes: the signs of singular vectors are the library's choice, and moments that are kept see them.
    """
    wide = weights.shape[0] < weights.shape[1]
    w = weights.T if wide else weights
    long, short = w.shape
    share = scale if residual_scale is None else residual_scale
    q = np.zeros((short, rank))
    m = np.zeros((long, rank))
    v = np.zeros((long, rank))
    count = 0
    error = np.zeros_like(w)
    size = None
    for t, gradient in enumerate(gradients):
        a = (gradient.T if wide else gradient) + error
        if t % gap == 0:
            seen = followed(a, m, betas, count, q, follow)
            if basis == "svd":
                new = svd(seen)[2][:rank].T
            else:
                new = iterated(seen, orthonormal(a.T @ sketch) if t == 0 else q)
            if carry == "rotate":
                m, v = moved(m, v, betas, count, q, new)
            elif carry == "reset":
                m, v, count = np.zeros_like(m), np.zeros_like(v), 0
            q = new
        r = a @ q
        rest = a - r @ q.T
        if error_feedback:
            error = rest
        m, v = advanced(m, v, r, betas)
        count += 1
        n = corrected(m, v, betas, count, eps)
        u = scale * n @ q.T
        if residual == "sign":
            u = u + share * np.sign(rest)
        elif residual == "fira":
            s, size = limited(stretched(n, r) * rest, size, betas, count, limiter)
            u = u + share * s
        w = applied(w, u, lr, weight_decay)
        yield w.T if wide else w


def fira(
    weights,
    gradients,
    *,
    lr,
    betas,
    eps,
    weight_decay,
    rank,
    gap,
    scale,
    limiter=1.01,
    published_code=False,
    svd=np.linalg.svd,
):
    """Return the weights after each gradient; moments are kept when the basis changes.

    The published code differs from the paper in where the scale enters: the residual is G − scale·R Qᵀ, and is added
    unscaled.
    """
    wide = weights.shape[0] < weights.shape[1]
    w = weights.T if wide else weights
    m = np.zeros((w.shape[0], rank))
    v = np.zeros((w.shape[0], rank))
    size = None
    for t, gradient in enumerate(gradients):
        g = gradient.T if wide else gradient
        if t % gap == 0:
            q = svd(g)[2][:rank].T
        r = g @ q
        m, v = advanced(m, v, r, betas)
        n = corrected(m, v, betas, t + 1, eps)
        rest = g - (scale if published_code else 1.0) * r @ q.T
        s, size = limited(stretched(n, r) * rest, size, betas, t + 1, limiter)
        u = scale * n @ q.T + s if published_code else scale * (n @ q.T + s)
        w = applied(w, u, lr, weight_decay)
        yield w.T if wide else w


def apollo(
    weights,
    gradients,
    *,
    lr,
    betas,
    eps,
    weight_decay,
    projections,
    gap,
    scale,
    scale_type="channel",
    limiter=1.01,
):
    """Return the weights after each gradient; `projections` are r × short side, one for each refresh."""
    wide = weights.shape[0] < weights.shape[1]
    w = weights.T if wide else weights
    m = np.zeros((w.shape[0], projections[0].shape[0]))
    v = np.zeros_like(m)
    size = None
    for t, gradient in enumerate(gradients):
        g = gradient.T if wide else gradient
        r = g @ projections[t // gap].T
        m, v = advanced(m, v, r, betas)
        n = corrected(m, v, betas, t + 1, eps)
        factor = stretched(n, r, axis={"channel": 1, "tensor": None}[scale_type])
        s, size = limited(g * factor, size, betas, t + 1, limiter)
        w = applied(w, np.sqrt(scale) * s, lr, weight_decay)
        yield w.T if wide else w


def ldadamw(weights, gradients, *, lr, betas, eps, weight_decay, rank, rho, scale=1.0, svd=np.linalg.svd):
    """Return the weights after each gradient; the basis moves at every step, and the error of doing so is fed back."""
    wide = weights.shape[0] < weights.shape[1]
    w = weights.T if wide else weights
    m = np.zeros((w.shape[0], rank))
    v = np.zeros((w.shape[0], rank))
    error = np.zeros_like(w)
    for t, gradient in enumerate(gradients):
        a = (gradient.T if wide else gradient) + error
        if t == 0:
            q = svd(a)[2][:rank].T
            lost = np.zeros_like(w)
        else:
            new = iterated(followed(a, m, betas, t, q, rho), q)
            before = m @ q.T
            m, v = moved(m, v, betas, t, q, new)
            q = new
            lost = before - m @ q.T
        r = a @ q
        error = a - r @ q.T + betas[0] / (1 - betas[0]) * lost
        m, v = advanced(m, v, r, betas)
        w = applied(w, scale * corrected(m, v, betas, t + 1, eps) @ q.T, lr, weight_decay)
        yield w.T if wide else w
