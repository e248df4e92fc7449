"""Every kernel on one device: its time, the least time that its bytes and operations allow, and the torch form's time.

Inputs take turns, so that together they do not stay in the device's cache. The result of each kernel is compared once
with that of its twin, from the same inputs in a higher precision where the twin is a formula.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.bench_targets import JORDAN, Action, Ceilings, Figures, WallTimer, sampled
from experiments.bench_workloads import llama_shapes
from lowrank_optim import reference, reference_apply, reference_matrix, reference_moments, reference_recursion
from lowrank_optim.kernels import adam, adamw, apply, dct, factored_add, momentum, recursion, symmetric

Draw = Callable[..., Tensor]
Shape = tuple[int, ...]

# of inputs that take turns: several times the largest cache
_ROTATION_BYTES, _SETS = 1 << 28, 64
_LR, _DECAY = 1e-3, 0.1
_ADAM: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8}
_MOMENTUM: dict[str, Any] = {"momentum": 0.95, "nesterov": True, "form": "ema", "eps": 1e-7, "seeds": [1]}


class Forms(NamedTuple):
    """One set of inputs: the kernel on it, the torch form, both results to compare, and the least work."""

    kernel: Action
    plain: Action
    check: Callable[[], tuple[Tensor, Tensor]]
    nbytes: int
    flops: float = 0.0


class Case(NamedTuple):
    """A kernel at one size; `make` draws new inputs."""

    kernel: str
    size: str
    # what the torch form is
    plain: str
    make: Callable[[], Forms]


def measure(case: Case, timer: WallTimer, ceilings: Ceilings) -> list[Figures]:
    """Return all figures of one case, as the only row."""
    forms = [case.make()]
    nbytes, flops = forms[0].nbytes, forms[0].flops
    got, expected = (x.double() for x in forms[0].check())
    error = float((got - expected).norm() / expected.norm())
    del got, expected
    forms += [case.make() for _ in range(min(_SETS, max(2, _ROTATION_BYTES // nbytes)) - 1)]
    figures = sampled([form.kernel for form in forms], timer)
    floor = ceilings.floor_ms(nbytes, flops)
    plain = sampled([form.plain for form in forms], timer)
    row: Figures = {"kernel": case.kernel, "size": case.size, "bytes": nbytes, "flops": flops, "sets": len(forms)}
    row |= {"floor_ms": floor, "floor_fraction": floor / figures["median_ms"], "relative_error": error} | figures
    return [row | {"torch": plain | {"form": case.plain}, "torch_over_kernel": plain["median_ms"] / row["median_ms"]}]


def cases(device: str, shrink: int = 1) -> Iterator[Case]:
    """Yield the cases; with `shrink` all sizes are that much smaller, for tests."""

    def s(n: int) -> int:
        return max(8, n // shrink)

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def case(kernel: str, size: str, plain: str, form: Callable[..., Forms], *arguments: Any) -> Case:
        return Case(kernel, size, plain, lambda: form(draw, *arguments))

    for batch, n, k in ((1, 4096, 4096), (1, 4096, 11008), (8, 1024, 11008), (32, 256, 4096)):
        yield case("symmetric: Gram", f"{batch}x{n}x{k}", "A @ Aᵀ", _gram, batch, s(n), s(k))
    for batch, n in ((1, 4096), (32, 1024)):
        yield case("symmetric: polynomial", f"{batch}x{n}x{n}", "baddbmm", _polynomial, batch, s(n))
    for batch, n in ((64, 64), (32, 128)):
        yield case("gram_recursion", f"{batch}x{n}x{n}", "its float32 twin", _recursion, batch, s(n))
    for kept in ("float32", "bfloat16", "int8", "int4"):
        yield case(f"adam, {kept}", "8x1024x4096", "its twin", _adam, kept, 8, (s(1024), s(4096)))
    for kept in ("float32", "int8", "int4"):
        yield case(f"momentum, {kept}", "4096x11008", "its twin", _momentum, kept, (s(4096), s(11008)))
    for how, seed in (("nearest", None), ("stochastic", 5)):
        yield case(f"apply, {how}", "11008x4096", "its twin", _apply, (s(11008), s(4096)), seed)
    for r, (m, n) in itertools.product((128, 256, 1024), ((4096, 4096), (11008, 4096), (4096, 11008))):
        yield case("factored_add, stochastic", f"{m}x{n}, r={r}", "addmm_ to nearest", _factored, s(m), s(n), s(r))
    rest: list[Shape] = [(s(32000), s(4096))] * 2 + [(s(4096),)] * 65
    yield case("adamw", "2 of 32000x4096, 65 of 4096", "AdamW(fused=True), moments in bfloat16", _adamw, rest)
    for m, n in dict.fromkeys(llama_shapes(1, 4096, 11008)):
        # the short side, which is transformed
        dim = -1 if m >= n else -2
        yield case("dct_energies", f"{m}x{n}, dim {dim}", "product, energies in float32", _dct, (s(m), s(n)), dim)


def _gram(draw: Draw, batch: int, n: int, k: int) -> Forms:
    a = draw(batch, n, k)

    def check() -> tuple[Tensor, Tensor]:
        return symmetric.symmetric(a, a), reference_matrix.symmetric(a.double(), a.double())

    # of the result one triangle
    flops = batch * n * (n + 1) * k
    return Forms(lambda: symmetric.symmetric(a, a), lambda: a @ a.mT, check, a.nbytes + 2 * batch * n * n, flops)


def _polynomial(draw: Draw, batch: int, n: int) -> Forms:
    x = draw(batch, n, n, dtype=torch.float32)
    r = ((x + x.mT) / (2 * n**0.5)).bfloat16()
    a, b, c = JORDAN[0]

    def form(symmetric: Callable[..., Tensor], r: Tensor) -> Tensor:
        return symmetric(r, r, r, alpha=c, beta=b, gamma=a)

    return Forms(
        lambda: form(symmetric.symmetric, r),
        lambda: torch.baddbmm(r, r, r, beta=b, alpha=c),
        lambda: (form(symmetric.symmetric, r), form(reference_matrix.symmetric, r.double())),
        2 * r.nbytes,
        batch * n * n * (n + 1),
    )


def _recursion(draw: Draw, batch: int, n: int) -> Forms:
    x = draw(batch, n, 4 * n, dtype=torch.float32)
    x /= x.norm(dim=(1, 2), keepdim=True)
    r = x @ x.mT

    def kernel() -> Tensor:
        return recursion.gram_recursion(r, JORDAN)

    # W from R, then Q W and R W², but for the first Q and the last R
    products = 4 * len(JORDAN) - 3
    return Forms(
        kernel,
        lambda: reference_recursion.gram_recursion(r, JORDAN),
        lambda: (kernel(), reference_recursion.gram_recursion(r.double(), JORDAN)),
        2 * r.nbytes,
        products * batch * n * n * (n + 1),
    )


def _state(draw: Draw, name: str, shape: Shape, kept: str, *, signed: bool = True) -> dict[str, Tensor]:
    """Return zeros as `kept` names them: codes and scales, in the shapes that the package has for them."""
    if kept in ("float32", "bfloat16"):
        return {name: draw(*shape, dtype=getattr(torch, kept)).zero_()}
    numel, eight = math.prod(shape), kept == "int8"
    codes = draw(*(shape if eight else (-(-numel // 2),)), dtype=torch.int8 if signed else torch.uint8).zero_()
    return {name: codes, f"{name}_scale": draw(-(-numel // (256 if eight else 64)), dtype=torch.float32).zero_()}


def _nbytes(states: list[dict[str, Tensor]]) -> int:
    return sum(x.nbytes for state in states for x in state.values())


def _copies(states: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{name: x.clone() for name, x in state.items()} for state in states]


def _adam(draw: Draw, kept: str, count: int, shape: Shape) -> Forms:
    grads = [draw(*shape, dtype=torch.float32) for _ in range(count)]
    states = [
        _state(draw, "exp_avg", shape, kept) | _state(draw, "exp_avg_sq", shape, kept, signed=False) for _ in grads
    ]
    how = _ADAM | {"state_dtype": kept, "steps": [3] * count, "seeds": list(range(count)), "dtype": torch.bfloat16}

    def check() -> tuple[Tensor, Tensor]:
        # from moments that are not zeros
        adam.stored_adam_directions_(grads, states, **how)
        ours, twins = _copies(states), _copies(states)
        got = adam.stored_adam_directions_(grads, ours, **how)
        exact = how | {"dtype": torch.float32}
        return torch.stack(got), torch.stack(reference_moments.stored_adam_directions_(grads, twins, **exact))

    return Forms(
        lambda: adam.stored_adam_directions_(grads, states, **how),
        lambda: reference_moments.stored_adam_directions_(grads, states, **how),
        check,
        # gradients and directions, and moments twice
        count * math.prod(shape) * (4 + 2) + 2 * _nbytes(states),
    )


def _momentum(draw: Draw, kept: str, shape: Shape) -> Forms:
    grads, states = [draw(*shape)], [_state(draw, "momentum_buffer", shape, kept)]
    how = _MOMENTUM | {"state_dtype": kept, "dtype": torch.float16}

    def check() -> tuple[Tensor, Tensor]:
        momentum.normalized_momenta_(grads, states, **how)
        ours, twins = _copies(states), _copies(states)
        got = momentum.normalized_momenta_(grads, ours, **how)
        return got, reference_moments.normalized_momenta_(grads, twins, **how | {"dtype": torch.float32})

    return Forms(
        lambda: momentum.normalized_momenta_(grads, states, **how),
        lambda: reference_moments.normalized_momenta_(grads, states, **how),
        check,
        # once for the norms, and again for what is divided by them
        math.prod(shape) * (2 + 2 + 2) + 3 * _nbytes(states),
    )


def _apply(draw: Draw, shape: Shape, seed: int | None) -> Forms:
    weight, update = draw(*shape), draw(*shape, dtype=torch.float16)
    how: dict[str, Any] = {"lr": _LR, "weight_decay": _DECAY}

    def check() -> tuple[Tensor, Tensor]:
        ours, twin = weight.clone(), weight.double()
        apply.apply_(ours, update, **how, seed=seed)
        reference_apply.apply_(twin, update.double(), **how)
        return ours, twin

    return Forms(
        lambda: apply.apply_(weight, update, **how, seed=seed),
        lambda: reference_apply.apply_(weight, update.float(), **how, seed=seed),
        check,
        2 * weight.nbytes + update.nbytes,
    )


def _factored(draw: Draw, m: int, n: int, r: int) -> Forms:
    weight, left, right = draw(m, n), draw(m, r), draw(r, n)
    how: dict[str, Any] = {"lr": _LR, "weight_decay": _DECAY}

    def check() -> tuple[Tensor, Tensor]:
        ours, twin = weight.clone(), weight.double()
        factored_add.apply_sum_(ours, (left, right), None, **how, seed=7)
        reference_apply.apply_sum_(twin, (left.double(), right.double()), None, **how)
        return ours, twin

    return Forms(
        lambda: factored_add.apply_sum_(weight, (left, right), None, **how, seed=7),
        lambda: weight.addmm_(left, right, beta=1 - _LR * _DECAY, alpha=-_LR),
        check,
        2 * weight.nbytes + left.nbytes + right.nbytes,
        2 * m * n * r,
    )


def _adamw(draw: Draw, shapes: list[Shape]) -> Forms:
    params = [torch.nn.Parameter(draw(*shape)) for shape in shapes]
    weights, grads = [p.detach() for p in params], [draw(*shape) for shape in shapes]
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    firsts, seconds = ([torch.zeros_like(w, dtype=torch.float32) for w in weights] for _ in range(2))
    torchs = torch.optim.AdamW(params, lr=_LR, weight_decay=_DECAY, fused=True)
    steps, how = [3] * len(params), _ADAM | {"lr": _LR, "weight_decay": _DECAY}

    def check() -> tuple[Tensor, Tensor]:
        some = slice(1, 3)
        w, g, m, v = ([x.clone() for x in xs[some]] for xs in (weights, grads, firsts, seconds))
        exact_w, exact_g, exact_m, exact_v = ([x.double() for x in xs] for xs in (w, g, m, v))
        adamw.adamw_(w, g, m, v, steps[some], **how)
        reference_apply.adamw_(exact_w, exact_g, exact_m, exact_v, steps[some], **how)
        return torch.cat([x.flatten() for x in w]), torch.cat([x.flatten() for x in exact_w])

    return Forms(
        lambda: adamw.adamw_(weights, grads, firsts, seconds, steps, **how),
        torchs.step,
        check,
        # weight and two float32 moments twice, gradient once
        sum(3 * w.nbytes + 2 * 8 * w.numel() for w in weights),
    )


def _dct(draw: Draw, shape: Shape, dim: int) -> Forms:
    x, n = draw(*shape), shape[dim]
    # rows are the transforms of the unit vectors
    matrix = reference.dct(torch.eye(n, device=x.device), -1).bfloat16()

    def plain() -> tuple[Tensor, Tensor]:
        found = x @ matrix if dim == -1 else matrix.mT @ x
        return found, found.float().square().sum(0 if dim == -1 else 1)

    return Forms(
        lambda: dct.dct_energies(x, dim, out_dtype=torch.bfloat16),
        plain,
        lambda: (dct.dct_energies(x, dim, out_dtype=torch.bfloat16)[0], reference.dct(x.double(), dim)),
        2 * x.nbytes + 4 * n,
        # of a fast transform, which has 5/2·n·log₂(n) for each row
        2.5 * x.numel() * math.log2(n),
    )
