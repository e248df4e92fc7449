"""What the optimizer tells of a step, as metrics of a row: how well its bases fit, and how large its updates are."""

import contextlib
from statistics import fmean

import torch

from lowrank_optim import Diagnostics, ParamGroups

# a reading, and the metric that is its mean over matrices
MEANS = {
    "captured_energy": "basis/captured_energy",
    "effective_rank": "basis/effective_rank",
    "subspace_overlap": "basis/subspace_overlap",
    "update_rms": "update/rms",
}


class Diagnosis:
    """Listens to the steps that get a row, and makes metrics of what was said.

    Args:
        optimizer: Those of this package tell something; of any other there are no metrics.
        groups: What it was given; means are over the group "matrices".
        wanted: Listen at all.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, groups: ParamGroups, *, wanted: bool) -> None:
        self._diagnostics = Diagnostics(optimizer) if wanted else None
        self._matrices = {name for group in groups if group["name"] == "matrices" for name, _ in group["params"]}

    def listening(self, logged: bool) -> contextlib.AbstractContextManager[None]:
        """Listen within the block, if its step gets a row."""
        return self._diagnostics.listening() if logged and self._diagnostics else contextlib.nullcontext()

    def read(self) -> dict[str, float]:
        """The metrics of what was said since the last `read`: the means, then those of each parameter."""
        row: dict[str, float] = {}
        said = self._diagnostics.read() if self._diagnostics else {}
        for reading, mean in MEANS.items():
            values = [own[reading] for name, own in said.items() if name in self._matrices and reading in own]
            if values:
                row[mean] = fmean(values)
        # wandb takes a dot for a step into a dictionary, and then finds neither axis nor summary of a metric
        names = {name: name.replace(".", "/") for name in said}
        return row | {f"layers/{key}/{names[name]}": own[key] for name, own in said.items() for key in own}
