"""Orthogonalization: the polar factor of a matrix, or an approximation of it in a few products."""

import contextlib
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim.coefficients import Coefficients, Triple, preconditioned, table

Method = Literal["auto", "newton_schulz", "gram", "eigh"]
METHODS: tuple[str, ...] = get_args(Method)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# what rounding adds to a Gram matrix may grow this much before the matrix is made again: 1e-4 of the result and less
_GROWTH = 5e5
# a first step steeper than this loses more at once
_STEEP = 4.5


class Plan(NamedTuple):
    """How matrices of one shape are orthogonalized: see `plan`."""

    method: Literal["newton_schulz", "gram", "eigh"]
    # of X
    dtype: torch.dtype
    # of what is made of its Gram matrix, where that differs
    recursion: torch.dtype | None = None
    # whether symmetric products leave a block out
    halves: bool = False
    # the steps before which the Gram form begins anew
    restarts: tuple[int, ...] = ()


def orthogonalize(
    x: Tensor,
    *,
    method: Method = "auto",
    coefficients: Coefficients = "you",
    steps: int | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Return the matrices of `x` with their singular values taken near 1."""
    return Spectral(method, coefficients, steps, eps)(x)


def plan(
    method: Method, shape: tuple[int, int], dtype: torch.dtype, device: str, triples: tuple[Triple, ...]
) -> Plan:
    m, n = shape
    short, long = min(m, n), max(m, n)
    half = dtype in (torch.float16, torch.bfloat16)
    if method == "eigh":
        return Plan("eigh", torch.float32 if device == "mps" else torch.float64)
    cpu = device == "cpu"
    # fp16 products on CPUs are emulated
    halves = cpu and short >= 384
    if method == "auto":
        method = "gram" if long >= 1.5 * short else "newton_schulz"
    if method == "newton_schulz":
        return Plan(method, dtype, None, halves)
    if half and cpu and short <= 256:
        return Plan(method, dtype, torch.float32, False, restarts(triples, half=False))
    return Plan(method, dtype, None, halves, restarts(triples, half=half))


def restarts(triples: tuple[Triple, ...], *, half: bool) -> tuple[int, ...]:
    """Return the steps before which the Gram form begins anew."""
    slopes = [a for a, _, _ in triples]
    steps = len(slopes)
    if half:
        if max(slopes) > _STEEP:
            return tuple(sorted({*range(1, steps, 2), steps - 1} - {0}))
        return tuple(range(3, steps, 2))
    found, growth = [], 1.0
    for step in range(1, steps):
        growth *= slopes[step - 1] ** 2
        if growth > _GROWTH:
            found.append(step)
            growth = 1.0
    return tuple(found)


@dataclass(frozen=True)
class Spectral:
    """Orthogonalization with its hyperparameters."""

    method: Method = "auto"
    coefficients: Coefficients = "you"
    steps: int | None = None
    eps: float = 0.0
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"Invalid method: {self.method!r}, must be one of {', '.join(METHODS)}")
        if not (isinstance(self.eps, int | float) and 0 <= self.eps < float("inf")):
            raise ValueError(f"Invalid eps: {self.eps!r}, must be a number >= 0")
        if self.dtype not in (None, *_DTYPES):
            raise ValueError(f"Invalid dtype: {self.dtype!r}, must be a floating-point dtype of 16 bits or more")
        table(self.coefficients, self.steps)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Return `x` orthogonalized, in `dtype`."""
        if x.dtype not in _DTYPES:
            raise TypeError(f"a matrix to orthogonalize must be real and of 16 bits or more, not {x.dtype}")
        if x.dim() < 2:
            raise ValueError(f"Invalid x: of shape {tuple(x.shape)}, must have two dimensions or more")
        dtype = x.dtype if self.dtype is None else self.dtype
        if x.numel() == 0:
            return torch.zeros_like(x, dtype=dtype)
        triples = table(self.coefficients, self.steps)
        how = plan(self.method, (x.size(-2), x.size(-1)), dtype, x.device.type, triples)
        matrices = x.reshape(-1, *x.shape[-2:])
        with _without_autocast(x.device.type):
            made = run(matrices, how, triples, eps=self.eps, precondition=preconditioned(self.coefficients))
        return made.to(dtype).view(x.shape)


def run(x: Tensor, how: Plan, triples: tuple[Triple, ...], *, eps: float, precondition: bool = False) -> Tensor:
    """Orthogonalize the matrices of `x` (b, m, n) as planned."""
    if how.method == "eigh":
        return ops.polar(ops.normalized(x, eps=eps, dtype=how.dtype))
    if precondition:
        wide = torch.promote_types(x.dtype, torch.float32)
        x = ops.almost_orthogonal(ops.normalized(x, eps=eps, dtype=wide)).to(how.dtype)
    else:
        x = ops.normalized(x, eps=eps, dtype=how.dtype)
    arithmetic = ops.Halves() if how.halves else ops.Whole(how.recursion)
    if how.method == "gram":
        return ops.gram_newton_schulz(x, triples, how.restarts, arithmetic)
    return ops.newton_schulz(x, triples, arithmetic)


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else contextlib.nullcontext()
