"""Memory-efficient optimizers for PyTorch: one composition of basis, rule and storage."""

from lowrank_optim.galore import GaLoreAdamW as GaLoreAdamW
from lowrank_optim.memory import MemoryMeter as MemoryMeter
from lowrank_optim.memory import StateBytes as StateBytes
from lowrank_optim.memory import adamw_state_bytes as adamw_state_bytes
from lowrank_optim.memory import state_bytes as state_bytes
from lowrank_optim.ops import backend as backend
from lowrank_optim.params import ParamGroups as ParamGroups
from lowrank_optim.params import param_groups as param_groups

__version__ = "0.1.0"
