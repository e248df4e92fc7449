"""How a state tensor is kept between steps."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lowrank_optim._types import NewState, State, Storage


@dataclass(frozen=True)
class Full:
    """As the mathematics has it: float32, or float64 for float64 parameters. The moment is worked on in place."""

    def init(self, name: str, shape: Sequence[int], new: NewState, *, signed: bool = True) -> State:
        """Allocate `name` in the dtype of the mathematics."""
        return {name: new(shape)}

    def read(self, state: State, name: str) -> Tensor:
        """Return the stored tensor itself."""
        return state[name]

    def write_(self, state: State, name: str, value: Tensor) -> None:
        """Copy `value` unless it is the stored tensor."""
        if value is not state[name]:
            state[name].copy_(value)


_STORAGES: dict[str, Storage] = {"float32": Full()}
STATE_DTYPES = tuple(_STORAGES)


def storage(state_dtype: str) -> Storage:
    """Return the storage of this name; one of `STATE_DTYPES`."""
    return _STORAGES[state_dtype]
