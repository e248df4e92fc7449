"""What becomes of the part of a gradient that its basis does not see."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from lowrank_optim import ops
from lowrank_optim._types import Basis, Factored, Lifted, Look, NewState, Scaled, State, Storage, Update

ScaleType = Literal["channel", "tensor"]
SCALE_TYPES = get_args(ScaleType)
# added to norms that are divided by, as published
_TINY = 1e-8
# γ of the norm-growth limiter, in both papers
GROWTH = 1.01
# added to a seed, so that an error is not rounded as a moment is
_APART = 0x1B873593


class _OneByOne:
    """Makes one update after the other."""

    def updates(self, basis: Basis, states: list[State], looks: list[Look]) -> list[Update]:
        """Return what to subtract from the weights."""
        return [self._update_(basis, state, look) for state, look in zip(states, looks, strict=True)]

    def _update_(self, basis: Basis, state: State, look: Look) -> Update:
        raise NotImplementedError


class _Plain(_OneByOne):
    """Looks at the gradient itself, and keeps nothing."""

    recovers: ClassVar[float] = 0.0
    held: ClassVar[int] = 0

    def init(self, shape: tuple[int, int], new: NewState) -> State:
        """Allocate nothing."""
        return {}

    def seen(self, state: State, grad: Tensor) -> Tensor:
        """Return the gradient."""
        return grad

    def forget_(self, state: State) -> None:
        """Keep going: there is nothing to forget."""


@dataclass(frozen=True)
class Drop(_Plain):
    """Nothing: the update is the direction, lifted (GaLore). State: none."""

    scale: float = 1.0

    def takes(self, grad: Tensor) -> bool:
        """Return True: the gradient is not looked at."""
        return True

    def updates(self, basis: Basis, states: list[State], looks: list[Look]) -> list[Update]:
        """Return the directions, lifted."""
        directions = [look.direction if self.scale == 1 else look.direction.mul_(self.scale) for look in looks]
        if (lift_all := getattr(basis, "lift_all", None)) is not None:
            return list(lift_all(states, directions))
        return [basis.lift(state, each) for state, each in zip(states, directions, strict=True)]


@dataclass(frozen=True)
class ErrorFeedback(_OneByOne):
    """It is added to the next gradient: A = G + E, E ← A − lift(project(A)).

    With `recovers` = c, what the first moment loses when its basis moves is added too, c times (LDAdam's generalized
    error feedback, arXiv 2410.16103, with c = β₁/(1 − β₁)). State: `error`, m·n numbers, kept as `storage` says.
    """

    held: ClassVar[int] = 1

    storage: Storage
    scale: float = 1.0
    recovers: float = 0.0

    def init(self, shape: tuple[int, int], new: NewState) -> State:
        """Allocate the error."""
        return self.storage.init("error", shape, new)

    def seen(self, state: State, grad: Tensor) -> Tensor:
        """Return the gradient and the error, in memory of their own."""
        return self.storage.read([state], "error", grad.shape, grad.dtype)[0] + grad

    def forget_(self, state: State) -> None:
        """Zero the error."""
        for name in ("error", "error_scale"):
            if name in state:
                state[name].zero_()

    def _update_(self, basis: Basis, state: State, look: Look) -> Update:
        """Return the direction, lifted; keep the error."""
        # memory of our own: see `seen`
        error = _plus_(look.matrix, basis.lift(state, look.coords), -1.0)
        for moment, sign in zip(look.lost, (1, -1), strict=False):
            _plus_(error, moment, sign * self.recovers)
        self.storage.write_([state], "error", [error], [look.tick.seed + _APART])
        return basis.lift(state, look.direction.mul_(self.scale))


@dataclass(frozen=True)
class SignDescent(_Plain):
    """Its signs are descended (FRUGAL, arXiv 2411.07837): U = α lift(N) + c sign(G − lift(R)). State: none.

    What rounding leaves of a gradient that lies in its basis has no sign: elements below 32 ε of the norm of their row
    (right) or column (left) are zero.
    """

    scale: float = 1.0
    share: float = 1.0

    def _update_(self, basis: Basis, state: State, look: Look) -> Update:
        """Return the direction, lifted, and the signs."""
        rest = _outside(basis, state, look)
        info = torch.finfo(rest.dtype)
        noise = _norms(look.matrix, rank_dim(basis)).mul_(32 * info.eps).clamp_(min=info.tiny)
        signs = rest.div_(noise).trunc_().sign_().mul_(self.share)
        return _plus_(signs, basis.lift(state, look.direction.mul_(self.scale)), 1.0)


@dataclass(frozen=True)
class Limiter:
    """A norm may grow by a factor γ from step to step and no more; what is beyond is scaled down to that (Fira).

    Norms are compared without bias correction, as published: that factor falls sevenfold within ten steps and then
    grows again, which is not the gradient's doing. State: `update_norm`, one number, 0 before the first.
    """

    growth: float
    betas: tuple[float, float]

    def init(self, new: NewState) -> State:
        """Allocate the norm."""
        return {"update_norm": new((1,))}

    def limit_(self, states: list[State], factors: Tensor, rests: Tensor, looks: list[Look]) -> None:
        """Divide the factors (k, ...) on parts of these norms by what is too much, and keep the norms that are left.

        A norm that is zero or not finite is no evidence: it limits nothing, and the one before it stays.
        """
        beta1, beta2 = self.betas
        steps = [look.tick.step for look in looks]
        norm = torch.linalg.vector_norm(rests.mul_(factors), dim=(-2, -1))
        torch._foreach_div_(list(norm.unbind()), [(1 - beta2**step) ** 0.5 / (1 - beta1**step) for step in steps])
        kept = [state["update_norm"] for state in states]
        before = torch.cat(kept)
        known = norm.isfinite() & (norm > 0)
        over = (norm / (before + _TINY)).clamp_(min=self.growth).div_(self.growth)
        over = torch.where(known & (before > 0), over, 1.0)
        torch._foreach_copy_(kept, list(torch.where(known, norm / over, before).unsqueeze(-1).unbind()))
        factors.div_(over.view(-1, 1, 1))


@dataclass(frozen=True)
class Fira(_Plain):
    """It is scaled as Adam scales what is inside, channel by channel (Fira, arXiv 2410.01623).

    φ = ‖N‖ / ‖R‖ of each row (right) or column (left) of coordinates, S = φ (G − t lift(R)), limited in its growth, and
    U = α lift(N) + c S. The paper has c = α and t = 1; its authors' code has c = 1 and t = α, so that for α < 1 a part
    of what is inside is used twice.
    """

    limiter: Limiter | None
    scale: float = 1.0
    share: float = 1.0
    taken: float = 1.0

    def init(self, shape: tuple[int, int], new: NewState) -> State:
        """Allocate the limiter's norm."""
        return {} if self.limiter is None else self.limiter.init(new)

    def updates(self, basis: Basis, states: list[State], looks: list[Look]) -> list[Update]:
        """Return the directions, lifted, and the rest as Adam would scale it."""
        dim = rank_dim(basis)
        inside = _all_norms([look.coords for look in looks], dim)
        factors = _ratios(looks, inside, dim)
        if self.limiter is not None:
            whole = _all_norms([look.matrix for look in looks], dim)
            self.limiter.limit_(states, factors, self._norms_outside(whole, inside), looks)
        return [self._update(basis, *one) for one in zip(states, looks, factors.unbind(), strict=True)]

    def _norms_outside(self, whole: Tensor, inside: Tensor) -> Tensor:
        """Return ‖G − t lift(R)‖ of each channel, by Pythagoras, so that no matrix is formed."""
        squares = whole.square_().sub_(inside.square_(), alpha=self.taken * (2 - self.taken))
        return squares.clamp_(min=0).sqrt_()

    def _update(self, basis: Basis, state: State, look: Look, factors: Tensor) -> Update:
        factors.mul_(self.share)
        inside = look.direction.mul_(self.scale).addcmul_(look.coords, factors, value=-self.taken)
        update = basis.lift(state, inside)
        if isinstance(update, Factored):
            return Scaled(look.matrix, factors, update)
        return update.addcmul_(look.matrix, factors)


@dataclass(frozen=True)
class GradientScaling(_Plain):
    """The gradient itself, scaled as Adam scales its coordinates, so that nothing is lifted (APOLLO, arXiv 2412.05270).

    s = ‖N‖ / ‖R‖ of each row (right) or column (left) of coordinates, or of all of them ("tensor"), and U = √α s G,
    limited in its growth.
    """

    limiter: Limiter | None
    scale: float = 1.0
    scale_type: ScaleType = "channel"

    def init(self, shape: tuple[int, int], new: NewState) -> State:
        """Allocate the limiter's norm."""
        return {} if self.limiter is None else self.limiter.init(new)

    def updates(self, basis: Basis, states: list[State], looks: list[Look]) -> list[Update]:
        """Return the gradients, scaled."""
        dim = None if self.scale_type == "tensor" else rank_dim(basis)
        factors = _ratios(looks, _all_norms([look.coords for look in looks], dim), dim)
        if self.limiter is not None:
            self.limiter.limit_(states, factors, _all_norms([look.matrix for look in looks], dim), looks)
        if self.scale != 1:
            factors.mul_(self.scale**0.5)
        return [Scaled(look.matrix, factor) for look, factor in zip(looks, factors.unbind(), strict=True)]


def rank_dim(basis: Basis) -> int:
    """Return the dimension of coordinates that is not one of the matrix."""
    return -1 if basis.side == "right" else -2


def _norms(x: Tensor, dim: int | None) -> Tensor:
    """Return the norms over one dimension, or over both."""
    if dim == -2:
        # two passes, in parts that stay in a cache: along the first dimension vector_norm is ten times slower on a CPU
        parts = torch.tensor_split(x, max(1, x.numel() // ops.part_size(x.device)), dim)
        return torch.stack([part.square().sum(dim, keepdim=True) for part in parts]).sum(0).sqrt_()
    over = (-2, -1) if dim is None else dim
    norms: Tensor = torch.linalg.vector_norm(x, dim=over, keepdim=True)
    return norms


def _all_norms(xs: list[Tensor], dim: int | None) -> Tensor:
    """Return the norms of each, stacked."""
    return torch.cat([_norms(some, dim) for some in ops.stacks(xs)])


def _ratios(looks: list[Look], inside: Tensor, dim: int | None) -> Tensor:
    """Return ‖direction‖ / ‖coordinates‖ over one dimension, or over both, stacked."""
    return _all_norms([look.direction for look in looks], dim).div_(inside + _TINY)


def _outside(basis: Basis, state: State, look: Look) -> Tensor:
    """Return the matrix without what of it lies in the basis, in memory of its own."""
    inside = basis.lift(state, look.coords)
    if isinstance(inside, Factored):
        return torch.addmm(look.matrix, *inside, alpha=-1)
    return torch.sub(look.matrix, inside)


def _plus_(x: Tensor, update: Lifted, alpha: float) -> Tensor:
    return x.addmm_(*update, alpha=alpha) if isinstance(update, Factored) else x.add_(update, alpha=alpha)
