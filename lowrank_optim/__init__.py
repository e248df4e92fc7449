"""Memory-efficient optimizers for PyTorch: one composition of basis, rule and storage."""

from lowrank_optim._backend import backend as backend
from lowrank_optim.allocation import Ranks as Ranks
from lowrank_optim.allocation import allocate_ranks as allocate_ranks
from lowrank_optim.apollo import APOLLOAdamW as APOLLOAdamW
from lowrank_optim.auon import AuON as AuON
from lowrank_optim.coefficients import polar_express_coefficients as polar_express_coefficients
from lowrank_optim.dct import DCTAdamW as DCTAdamW
from lowrank_optim.diagnostics import Diagnostics as Diagnostics
from lowrank_optim.fira import FiraAdamW as FiraAdamW
from lowrank_optim.fisher import InverseFisher as InverseFisher
from lowrank_optim.fisher_static import StaticInverseFisher as StaticInverseFisher
from lowrank_optim.galore import GaLoreAdamW as GaLoreAdamW
from lowrank_optim.ldadam import LDAdamW as LDAdamW
from lowrank_optim.lowrank_muon import LowRankMuon as LowRankMuon
from lowrank_optim.masks import Masks as Masks
from lowrank_optim.masks import sparsity_schedule as sparsity_schedule
from lowrank_optim.memory import MemoryMeter as MemoryMeter
from lowrank_optim.memory import StateBytes as StateBytes
from lowrank_optim.memory import adamw_state_bytes as adamw_state_bytes
from lowrank_optim.memory import state_bytes as state_bytes
from lowrank_optim.mfac import MFAC as MFAC
from lowrank_optim.muon import Muon as Muon
from lowrank_optim.orthogonal import orthogonalize as orthogonalize
from lowrank_optim.params import ParamGroups as ParamGroups
from lowrank_optim.params import param_groups as param_groups
from lowrank_optim.pruning import OBSPruner as OBSPruner
from lowrank_optim.pruning import obs_prune as obs_prune
from lowrank_optim.pruning import obs_scores as obs_scores
from lowrank_optim.steepest import SteepestDescent as SteepestDescent
from lowrank_optim.trion import Trion as Trion

__version__ = "0.1.0"
