"""Orthogonalization: the polar factor of a matrix, or an approximation of it in a few products."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lowrank_optim import ops, passes
from lowrank_optim._half import HALF
from lowrank_optim.coefficients import Coefficients, Triple, preconditioned, table

Method = Literal["auto", "newton_schulz", "gram", "eigh"]
METHODS: tuple[str, ...] = get_args(Method)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# what rounding does to a Gram matrix in float32 may grow this much: to 3e-3 of the result where that is of low rank
_GROWTH = 1e5
# tables with a steeper step lose more of a half-precision Gram matrix
_STEEP = 4.5
# the Gram form saves multiplications from this ratio of the sides on
_OBLONG = 1.75
# short sides: below the one rounding in half precision leaves no room for it, from the other on halves save time
_SMALL, _HALVES = 64, 512


class Plan(NamedTuple):
    """How matrices of one shape are orthogonalized; `plan` says why."""

    method: Literal["newton_schulz", "gram", "recursion", "eigh"]
    # of X
    dtype: torch.dtype
    # the steps before which the Gram form begins anew
    restarts: tuple[int, ...] = ()
    # whether symmetric products leave a block out
    halves: bool = False


def orthogonalize(
    x: Tensor,
    *,
    method: Method = "auto",
    coefficients: Coefficients = "you",
    steps: int | None = None,
    eps: float = 0.0,
) -> Tensor:
    r"""Return U p(S) Vᵀ for each matrix x = U S Vᵀ, with p(S) near 1: nearly its polar factor, in a few products.

    $$X \leftarrow X / \max(\lVert X\rVert_F, \epsilon), \qquad
    X \leftarrow a_k X + (b_k X X^\top + c_k (X X^\top)^2) X$$

    for each step k. p is the composition of the odd polynomials x·(aₖ + bₖ·x² + cₖ·x⁴), so the result is odd, does not
    change with the scale of `x`, and commutes with rotations from either side. Zeros give zeros, NaN gives NaN.

    Args:
        x: (..., m, n), real, of 16 bits or more. Leading dimensions count matrices. It is not written to, and the
            result shares no memory with it. Products run in its dtype, but for `method` "auto" on a GPU, where those of
            16 bits are float16, and those of short sides up to 64 float32; normalization is in float32 or float64.
        method: what computes p.
            "newton_schulz" multiplies m×n matrices as the formula does: for the short side n and the long side a·n
            2·steps·(2a + 1)·n³ operations.
            "gram" multiplies n×n matrices and comes back to m×n ones only where rounding asks for it (Gram
            Newton–Schulz): 5 steps take 2·(6a + 11)·n³ and not 2·(10a + 5)·n³. The same p, in half precision with at
            most twice the rounding error.
            "eigh" returns the exact polar factor U Vᵀ by an eigendecomposition of the Gram matrix in float64, whatever
            the coefficients; singular values below 1e-7 of the largest give 0. On a GPU it waits for the device.
            "auto" (the default) takes one of the first two, by shape, dtype and device; see `plan`. For float16 on a
            CPU, which cannot multiply it, it computes in float32.
        coefficients: a name in `coefficients.REGISTRY` ("you", the default, for its accuracy on real spectra;
            "jordan", "polar_express", "modula", "cans", "turbo", "deepseek"), one (a, b, c) for all steps, or a
            sequence of them: too short, it repeats its last triple; too long, it is cut.
        steps: how many; None takes as many as the coefficients have (5 for "you").
        eps: matrices of a smaller norm are divided by `eps` instead. 0, the default, means never.

    Returns:
        A tensor of the shape and dtype of `x`, without a graph: gradients do not flow through it.

    Raises:
        ValueError: for fewer than two dimensions, an unknown method, a negative `eps`, `steps` below 1, or coefficients
            that are negative or grow beyond bounds where rounding can take a singular value.
        TypeError: for integer, boolean, complex or 8-bit tensors.

    References:
        Newton–Schulz for optimizers: K. Jordan et al., Muon, 2024, https://kellerjordan.github.io/posts/muon.
        The Gram form: Dao-AILab, Gram Newton-Schulz, 2026, https://github.com/Dao-AILab/gram-newton-schulz.

    Example:
        >>> x = torch.tensor([[3.0, 0.0], [0.0, -0.1]])
        >>> orthogonalize(x, method="eigh")
        tensor([[ 1.,  0.],
                [ 0., -1.]])
    """
    return Spectral(method, coefficients, steps, eps)(x)


@dataclass(frozen=True)
class Spectral:
    """`orthogonalize` with its hyperparameters, computing in `dtype` and returning that; None is the input's own."""

    method: Method = "auto"
    coefficients: Coefficients = "you"
    steps: int | None = None
    eps: float = 0.0
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"Invalid method: {self.method!r}, must be one of {', '.join(METHODS)}")
        if not (isinstance(self.eps, int | float) and 0 <= self.eps < math.inf):
            raise ValueError(f"Invalid eps: {self.eps!r}, must be a number >= 0")
        if self.dtype is not None and self.dtype not in _DTYPES:
            raise ValueError(f"Invalid dtype: {self.dtype!r}, must be one of {', '.join(map(str, _DTYPES))}")
        table(self.coefficients, self.steps)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the matrices of `x` (..., m, n) orthogonalized."""
        if x.dtype not in _DTYPES:
            raise TypeError(f"Invalid x: of {x.dtype}, must be real and of 16 bits or more")
        if x.dim() < 2:
            raise ValueError(f"Invalid x: of shape {tuple(x.shape)}, must have two dimensions or more")
        dtype = x.dtype if self.dtype is None else self.dtype
        if x.numel() == 0:
            return torch.empty(x.shape, dtype=dtype, device=x.device)
        x = x.detach()
        # a tensor that is more than one has its own ways to multiply
        device = x.device.type if type(x) is Tensor else "other"
        triples = table(self.coefficients, self.steps)
        shape = (x.size(-2), x.size(-1))
        how = plan(self.method, shape, dtype, device, triples, kernels=passes.in_one_pass(x))
        scaled = preconditioned(self.coefficients)
        # no decorator: the compiler of torch does not look into a decorated call
        with torch.no_grad(), ops.without_autocast(x.device.type):
            made = run(x.reshape(-1, *x.shape[-2:]), how, triples, eps=self.eps, scaled=scaled)
            return ops.cast(made, dtype).reshape(x.shape)

    def planned(self, shape: tuple[int, int], device: str) -> Plan | None:
        """Return how kernels orthogonalize matrices of this shape, if all that comes first is to normalize them."""
        triples = table(self.coefficients, self.steps)
        how = None if self.dtype is None else plan(self.method, shape, self.dtype, device, triples, kernels=True)
        return None if how is None or how.method == "eigh" or preconditioned(self.coefficients) else how

    def of_normalized(self, x: Tensor, how: Plan) -> Tensor:
        """Return matrices (b, m, n) that are normalized and in the dtype of `how` orthogonalized, in that dtype."""
        return _iterate(x, how, table(self.coefficients, self.steps))


def run(x: Tensor, how: Plan, triples: tuple[Triple, ...], *, eps: float, scaled: bool = False) -> Tensor:
    """Orthogonalize the matrices of `x` (b, m, n) as planned; `scaled` is for tables that want rows scaled first."""
    if how.halves and len(x) > torch.get_num_threads():
        # a matrix for each thread: what all of them need stays in the caches
        out = torch.empty(x.shape, dtype=how.dtype, device=x.device)
        size = torch.get_num_threads()
        for part, made in zip(torch.split(x, size), torch.split(out, size), strict=True):
            made.copy_(run(part, how, triples, eps=eps, scaled=scaled))
        return out
    if how.method == "eigh":
        return ops.polar(ops.normalized(x, eps=eps, dtype=how.dtype))
    if scaled:
        wide = torch.promote_types(x.dtype, torch.float32)
        x = ops.almost_orthogonal(ops.normalized(x, eps=eps, dtype=wide)).to(how.dtype)
    else:
        x = ops.normalized(x, eps=eps, dtype=how.dtype)
    return _iterate(x, how, triples)


def _iterate(x: Tensor, how: Plan, triples: tuple[Triple, ...]) -> Tensor:
    """Do the steps as planned, on matrices whose norms are at most 1."""
    if how.method == "recursion":
        return ops.gram_recursion(x, triples)
    arithmetic = ops.Halves() if how.halves else ops.Whole()
    if how.method == "gram":
        return ops.gram_newton_schulz(x, triples, how.restarts, arithmetic)
    return ops.newton_schulz(x, triples, arithmetic)


def plan(
    method: Method,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: str,
    triples: tuple[Triple, ...],
    *,
    kernels: bool = False,
) -> Plan:
    """Choose how matrices of this shape are orthogonalized.

    On a CPU by measurement (2 cores with AVX512-BF16): `experiments/results/bench_muon_cpu.json` has the whole steps.
    There batches of symmetric products by halves pay from short sides of 512 on, and float16 does not pay at all.

    On a GPU by measurement on an H200 (`experiments/results`): 16-bit products are made in float16, which is as fast as
    bfloat16 and eight times as fine, so that three steps may go together between restarts; with kernels, short sides of
    at most 64 are done in one launch in float32, where launches and not products take the time. The Gram form is for
    short sides of 256 and more.

    Args:
        method: as for `orthogonalize`.
        shape: (m, n).
        dtype: that X is to have.
        device: its type.
        triples: the coefficients.
        kernels: whether those that are written for a device run there.
    """
    m, n = shape
    short, long = min(m, n), max(m, n)
    cpu, fine = device == "cpu", device == "cuda" and method == "auto" and dtype in HALF
    if method == "eigh":
        # there are devices that have no float64
        return Plan("eigh", torch.float32 if device == "mps" else torch.float64)
    if method == "auto" and kernels and dtype != torch.float64 and short <= _SMALL and _at_once(triples):
        return Plan("recursion", torch.float32)
    if method == "auto":
        # a CPU multiplies float16 a hundred times slower; a GPU as fast as bfloat16, and eight times as finely
        dtype = torch.float32 if cpu and dtype == torch.float16 else torch.float16 if fine else dtype
        method = "gram" if _gram_pays(short, long, device) else "newton_schulz"
    if method == "newton_schulz":
        return Plan(method, dtype, halves=cpu and short >= _HALVES)
    if dtype in HALF and (short < _SMALL or long < _OBLONG * short):
        # nothing to save, or nothing to spare: anew at each step is the standard form
        return Plan(method, dtype, tuple(range(1, len(triples))), cpu and short >= _HALVES)
    if fine:
        # float16 has room for three steps at a time: no worse than the standard form in bfloat16 on any spectrum tried
        return Plan(method, dtype, tuple(range(2, len(triples), 3)))
    once = cpu and dtype == torch.float32 and short <= 512 and long >= 4 * short
    return Plan(method, dtype, restarts(triples, once=once), cpu and short >= _HALVES and not once)


def _gram_pays(short: int, long: int, device: str) -> bool:
    return long >= _OBLONG * short and (device == "cpu" or (device == "cuda" and short >= 256))


def _at_once(triples: tuple[Triple, ...]) -> bool:
    """Return whether float32 has room for all steps without beginning anew."""
    return math.prod([a for a, _, _ in triples[:-1]]) ** 2 <= _GROWTH


def restarts(triples: tuple[Triple, ...], *, once: bool = False) -> tuple[int, ...]:
    """Return the steps before which the Gram form begins anew.

    One step first and then two at a time; of steep tables only the second and the third go together, and of long steep
    ones none. More would save more, and on most matrices lose little. But what a group multiplies X by has entries
    near the product of its slopes a, and where all entries of a matrix are alike their rounding adds up: in bfloat16
    three steps in one group move the singular value of such a matrix by a tenth, which sends later steps out of their
    range, and five turn its direction around. With these restarts every table of the registry keeps its output range
    on such matrices, and stays within twice the error of the standard form in half precision on five spectra
    (Gaussian, geometric down to 1e-3 and to 1e-5, rank 10, two spikes).

    Args:
        triples: the coefficients.
        once: none, where float32 allows it.
    """
    slopes, steps = [a for a, _, _ in triples], len(triples)
    if once and _at_once(triples):
        return ()
    if max(slopes) > _STEEP:
        return tuple(step for step in range(1, steps) if step != 2 or steps > 5)
    return tuple(range(1, steps, 2))
