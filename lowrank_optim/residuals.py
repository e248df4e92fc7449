"""What becomes of the part of a gradient that its basis does not see."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from lowrank_optim._types import Basis, Factored, Lifted, Look, NewState, Scaled, State, Storage, Tick, Update

ScaleType = Literal["channel", "tensor"]
SCALE_TYPES = get_args(ScaleType)
# added to norms that are divided by, as published
_TINY = 1e-8
# γ of the norm-growth limiter, in both papers
GROWTH = 1.01
# added to a seed, so that an error is not rounded as a moment is
_APART = 0x1B873593


class _Plain:
    """Looks at the gradient itself, and keeps nothing."""

    held: ClassVar[int] = 0
    recovers: ClassVar[float] = 0.0

    def init(self, shape: tuple[int, int], new: NewState) -> State:
        return {}

    def seen(self, state: State, grad: Tensor) -> Tensor:
        return grad


@dataclass(frozen=True)
class Drop(_Plain):
    """Nothing: the update is the direction, lifted (GaLore). State: none."""

    scale: float = 1.0

    def update_(self, basis: Basis, state: State, look: Look) -> Update:
        """Return the direction, lifted."""
        return basis.lift(state, look.direction.mul_(self.scale))


@dataclass(frozen=True)
class ErrorFeedback:
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

    def update_(self, basis: Basis, state: State, look: Look) -> Update:
        """Return the direction, lifted; keep the error."""
        # memory of our own: see `seen`
        error = _plus_(look.matrix, basis.lift(state, look.coords), -1.0)
        for moment, sign in zip(look.lost, (1, -1), strict=False):
            _plus_(error, moment, sign * self.recovers)
        self.storage.write_([state], "error", [error], [look.tick.seed + _APART])
        return basis.lift(state, look.direction.mul_(self.scale))


@dataclass(frozen=True)
class SignDescent(_Plain):
    """Its signs are descended (FRUGAL, arXiv 2411.07837): U = α lift(N) + c sign(G − lift(R)). State: none."""

    scale: float = 1.0
    share: float = 1.0

    def update_(self, basis: Basis, state: State, look: Look) -> Update:
        """Return the direction, lifted, and the signs."""
        signs = _outside(basis, state, look).sign_().mul_(self.share)
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

    def limit_(self, state: State, factors: Tensor, squares: Tensor, tick: Tick) -> None:
        """Divide the factors on channels of these sums of squares by what is too much, and keep the norm left."""
        # channels that are not finite, or whose squares are not, are left out
        made = squares * factors.square()
        norm = torch.where(made.isfinite(), made, 0.0).sum().sqrt()
        beta1, beta2 = self.betas
        norm.div_((1 - beta2**tick.step) ** 0.5 / (1 - beta1**tick.step))
        before = state["update_norm"]
        over = (norm / (before + _TINY)).clamp_(min=self.growth).div_(self.growth)
        over = torch.where(before > 0, over, 1.0)
        before.copy_(norm / over)
        factors.div_(over)


@dataclass(frozen=True)
class Fira(_Plain):
    """It is scaled as Adam scales what is inside, channel by channel (Fira, arXiv 2410.01623).

    φ = ‖N‖ / ‖R‖ of each row (right) or column (left) of coordinates, S = φ (G − t lift(R)), limited in its growth, and
    U = α lift(N) + c S. The paper has c = α and t = 1; its authors' code has c = 1 and t = α, so that for α < 1 a part
    of what is inside is used twice.
    """

    limiter: "Limiter | None"
    scale: float = 1.0
    share: float = 1.0
    taken: float = 1.0

    def init(self, shape: tuple[int, int], new: NewState) -> State:
        """Allocate the limiter's norm."""
        return {} if self.limiter is None else self.limiter.init(new)

    def update_(self, basis: Basis, state: State, look: Look) -> Update:
        """Return the direction, lifted, and the rest as Adam would scale it."""
        factors = _ratio(look, rank_dim(basis))
        if self.limiter is not None:
            # ‖G − t lift(R)‖² of each channel by Pythagoras, so that no matrix is formed
            squares = _squares(look.matrix, rank_dim(basis))
            squares.sub_(_squares(look.coords, rank_dim(basis)), alpha=self.taken * (2 - self.taken)).clamp_(min=0)
            self.limiter.limit_(state, factors, squares, look.tick)
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

    def update_(self, basis: Basis, state: State, look: Look) -> Update:
        """Return the gradient, scaled."""
        whole = self.scale_type == "tensor"
        factors = _ratio(look, None if whole else rank_dim(basis))
        if self.limiter is not None:
            squares = _squares(look.matrix, None if whole else rank_dim(basis))
            self.limiter.limit_(state, factors, squares, look.tick)
        return Scaled(look.matrix, factors.mul_(self.scale**0.5))


def rank_dim(basis: Basis) -> int:
    """Return the dimension of coordinates that is not one of the matrix."""
    return -1 if basis.side == "right" else -2


def _squares(x: Tensor, dim: int | None) -> Tensor:
    """Return the sums of squares over one dimension, or over both."""
    if dim == -1:
        # and two passes where it is not the last: along the first vector_norm is ten times slower on a CPU
        norms: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return norms.square_()
    return x.square().sum((-2, -1) if dim is None else dim, keepdim=True)


def _ratio(look: Look, dim: int | None) -> Tensor:
    """Return ‖direction‖ / ‖coordinates‖ over one dimension, or over both."""
    direction, coords = (_squares(x, dim).sqrt_() for x in (look.direction, look.coords))
    return direction.div_(coords.add_(_TINY))


def _outside(basis: Basis, state: State, look: Look) -> Tensor:
    """Return the matrix without what of it lies in the basis, in memory of its own."""
    inside = basis.lift(state, look.coords)
    if isinstance(inside, Factored):
        return torch.addmm(look.matrix, *inside, alpha=-1)
    return torch.sub(look.matrix, inside)


def _plus_(x: Tensor, update: Lifted, alpha: float) -> Tensor:
    return x.addmm_(*update, alpha=alpha) if isinstance(update, Factored) else x.add_(update, alpha=alpha)
