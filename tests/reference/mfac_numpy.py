"""M-FAC from its formulas, dense and in float64: F is formed, and solved."""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass
class DenseMFAC:
    """One window over flat parameters; `blocks` are the sizes of those that F does not connect."""

    num_grads: int
    damping: float
    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    decoupled: bool = False
    divisor: str = "window"
    relative: bool = False
    blocks: tuple[int, ...] | None = None
    window: deque[Array] = field(default_factory=deque)
    average: Array | None = None

    def step(self, weights: Array, grad: Array) -> Array:
        """Return the weights after one step."""
        if not self.decoupled:
            grad = grad + self.weight_decay * weights
        self.window.append(grad)
        if len(self.window) > self.num_grads:
            self.window.popleft()
        update = self.direction(grad)
        before = np.zeros_like(update) if self.average is None else self.average
        self.average = self.momentum * before + (1 - self.momentum) * update
        decay = self.lr * self.weight_decay if self.decoupled else 0.0
        return (1 - decay) * weights - self.lr * self.average

    def direction(self, grad: Array) -> Array:
        """Return F⁻¹ of a gradient."""
        rows = np.array(self.window)
        count = self.num_grads if self.divisor == "window" else len(rows)
        found, start = np.empty_like(grad), 0
        for size in self.blocks or (len(grad),):
            part = rows[:, start : start + size]
            damping = self.damping * (np.square(part).sum() / len(rows) if self.relative else 1.0)
            fisher = damping * np.eye(size) + part.T @ part / count
            found[start : start + size] = np.linalg.solve(fisher, grad[start : start + size])
            start += size
        return found
