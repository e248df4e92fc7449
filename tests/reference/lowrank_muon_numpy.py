"""Low-rank Muon and Trion in float64 NumPy, written from the formulas; shares no code with the package.

Everything is said for tall matrices, whose columns are compressed; a wide one is transposed on the way in and out.
"""

import numpy as np

from tests.reference import dct_numpy
from tests.reference.muon_numpy import FACTORS, JORDAN, advanced, applied, newton_schulz


def chosen(columns, matrix, rank, power):
    """The `rank` columns along which the matrix has most energy, in their order."""
    energy = (np.abs(matrix @ columns) ** power).sum(axis=0)
    # a stable sort of the negated energies: equal ones by their index
    return columns[:, np.sort(np.argsort(-energy, kind="stable")[:rank])]


def fixed(name, size):
    return dct_numpy.matrix(size) if name == "dct" else np.eye(size)


def leading(matrix, rank):
    return np.linalg.svd(matrix)[2][:rank].T


def iterated(matrix, basis):
    """One block power iteration."""
    return np.linalg.qr(matrix.T @ (matrix @ basis))[0]


def low_rank_muon(
    weights,
    gradients,
    *,
    lr,
    rank,
    basis="dct",
    gap=1,
    offset=0,
    sketch=None,
    residual=None,
    weight_decay=0.0,
    momentum=0.95,
    nesterov=True,
    triples=JORDAN,
    eps=1e-7,
    adjust="original",
):
    """Return the weights after each gradient.

    The basis is found again, from the momentum as it will be, at the first step and wherever gap divides t − offset;
    the momentum is carried by the dense product of the two bases. A subspace iteration starts from `sketch`.
    """
    m, n = weights.shape
    wide = m < n
    short, long = min(m, n), max(m, n)
    w = weights.copy()
    q = np.zeros((short, rank))
    moment = np.zeros((long, rank))
    for t, gradient in enumerate(gradients):
        g = gradient.T if wide else gradient
        if rank and (t == 0 or (t - offset) % gap == 0):
            coming = momentum * moment @ q.T + (1 - momentum) * g
            if basis == "svd":
                new = leading(coming, rank)
            elif basis == "subspace":
                new = iterated(coming, np.linalg.qr(g.T @ sketch)[0] if t == 0 else q)
            else:
                new = chosen(fixed(basis, short), coming, rank, 2)
            moment = moment @ (q.T @ new)
            q = new
        r = g @ q
        moment, u = advanced(moment, r, momentum, nesterov, "ema")
        if residual is None:
            direction = newton_schulz(u, triples, eps) @ q.T
            scale = (direction * (u @ q.T)).sum()
        else:
            whole = u @ q.T + residual * (g - r @ q.T)
            direction = newton_schulz(whole, triples, eps)
            scale = (direction * whole).sum()
        factor = scale if adjust == "nuclear" else FACTORS[adjust](m, n)
        w = applied(w, factor * (direction.T if wide else direction), lr, weight_decay)
        yield w


def trion(
    weights,
    gradients,
    *,
    lr,
    rank,
    basis="dct",
    weight_decay=0.0,
    momentum=0.95,
    triples=JORDAN,
    eps=1e-7,
    adjust="rms_to_rms",
):
    """Return the weights after each gradient: full momentum, error feedback, sums of magnitudes."""
    m, n = weights.shape
    wide = m < n
    columns = fixed(basis, min(m, n))
    w = weights.copy()
    moment = np.zeros((max(m, n), min(m, n)))
    for gradient in gradients:
        b = moment + (gradient.T if wide else gradient)
        q = chosen(columns, b, rank, 1)
        p = b @ q
        rest = b - p @ q.T
        moment = momentum * b + (1 - momentum) * rest
        direction = newton_schulz(p, triples, eps) @ q.T
        w = applied(w, FACTORS[adjust](m, n) * (direction.T if wide else direction), lr, weight_decay)
        yield w
