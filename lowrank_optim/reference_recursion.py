"""The Gram form of Newton–Schulz as one function of the Gram matrix, in plain torch: what a fused kernel computes."""

from collections.abc import Sequence

import torch
from torch import Tensor

Triple = tuple[float, float, float]


def gram_recursion(r: Tensor, triples: Sequence[Triple]) -> Tensor:
    r"""Return Q with Q X = U p(S) Vᵀ for X = U S Vᵀ, R = X Xᵀ and p the composition of the steps x·(a + b·x² + c·x⁴).

    $$W_k = a_k + b_k R_k + c_k R_k^2, \qquad Q = W_1 W_2 \cdots, \qquad R_{k+1} = R_k W_k^2.$$

    There are no restarts: the precision of `r` has to allow for what rounding grows by, a_k² a step.

    Args:
        r: (b, n, n), symmetric.
        triples: (a, b, c) of each step; without any Q is I.
    """
    identity = torch.eye(r.size(-1), dtype=r.dtype, device=r.device)
    q = identity.expand_as(r)
    for step, (a, b, c) in enumerate(triples):
        w = a * identity + b * r + c * (r @ r)
        q = q @ w if step else w
        r = r @ w @ w
    return q.contiguous()
