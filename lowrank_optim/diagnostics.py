"""How well bases fit, and how large updates are: numbers of a step, parameter by parameter."""

import contextlib
from collections.abc import Iterator

import torch

from lowrank_optim import probes


class Diagnostics:
    """Listens to steps of an optimizer of this package, and tells what they said.

    - `captured_energy`: ‖R‖² / ‖G‖², the share of a gradient's energy that its coordinates hold, in [0, 1] for an
      orthonormal basis (for APOLLO's random one it is 1 on average).
    - `effective_rank`: (tr C)² / ‖C‖² of the coordinates' Gram matrix C: r where all directions are alike, 1 where one
      dominates; the same however the basis is turned.
    - `subspace_overlap`: ‖P_newᵀ P_old‖² / r of a basis that is found again in this step: 1 if it is the same subspace,
      about r / n if it is another one by chance. Only where one was found again.
    - `update_rms`: the root mean square of what is subtracted from the weight, before the learning rate.

    The first three are those of projected matrices, the last is everybody's. A step that is listened to costs Gram
    matrices, of the coordinates and of an update's two factors, one more look at the gradient, and a copy of a basis
    that is found again; one that is not, nothing. So listen to the steps that are logged. Nothing waits for a device
    before `read`. Where parameters are DTensors, every rank listens and reads.

    Args:
        optimizer: whose parameters are meant; where it knows their names, readings are under these, else under their
            numbers in its groups, which are those of `state_dict`.

    Example:
        >>> from lowrank_optim import DCTAdamW
        >>> layer = torch.nn.Linear(8, 16)
        >>> opt = DCTAdamW(layer.named_parameters(), rank=4)
        >>> diagnostics = Diagnostics(opt)
        >>> layer(torch.ones(2, 8)).square().mean().backward()
        >>> with diagnostics.listening():
        ...     opt.step()
        >>> {name: sorted(readings) for name, readings in diagnostics.read().items()}
        {'weight': ['captured_energy', 'effective_rank', 'update_rms'], 'bias': ['update_rms']}
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._probe = probes.Probe()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to the steps that are made within the block; of each number the last one is kept."""
        with probes.listen(self._probe):
            yield

    def read(self) -> dict[str, dict[str, float]]:
        """Return what was said since the last `read`, by parameter; of several matrices in one parameter the mean."""
        said, self._probe.readings = self._probe.readings, {}
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name, pid in self._names():
            for reading, values in said.get(pid, {}).items():
                mean = torch.stack([_whole(value).reshape(()).float() for value in values]).mean()
                found.setdefault(name, {})[reading] = mean
        # one wait for all
        numbers = iter(_floats([value for readings in found.values() for value in readings.values()]))
        return {name: {reading: next(numbers) for reading in readings} for name, readings in found.items()}

    def _names(self) -> Iterator[tuple[str, int]]:
        place = 0
        for group in self._optimizer.param_groups:
            names = group.get("param_names")
            for i, p in enumerate(group["params"]):
                yield str(place) if names is None else names[i], id(p)
                place += 1


def _whole(value: torch.Tensor) -> torch.Tensor:
    """Return a number of a sharded parameter as a plain tensor."""
    gather = getattr(value, "full_tensor", None)
    return value if gather is None else gather()


def _floats(values: list[torch.Tensor]) -> list[float]:
    if not values:
        return []
    if len({value.device for value in values}) > 1:
        return [float(value) for value in values]
    floats: list[float] = torch.stack(values).tolist()
    return floats
