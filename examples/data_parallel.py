"""Two processes, gradients averaged by DDP, optimizer state split by ZeroRedundancyOptimizer.

Run: torchrun --standalone --nproc_per_node 2 examples/data_parallel.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from lowrank_optim import GaLoreAdamW, param_groups, state_bytes

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)))
groups = param_groups(model.module, rank=8, scale=1.0)
# torch's ZeRO takes no names
optimizer = ZeroRedundancyOptimizer(groups.unnamed(), optimizer_class=GaLoreAdamW, lr=1e-2)

data = torch.Generator().manual_seed(rank)
for step in range(100):
    x = torch.randn(32, 64, generator=data)
    loss = (model(x) - x.roll(1, dims=1)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 25 == 0 and rank == 0:
        print(f"step {step:3d}  loss {loss.item():.4f}")

print(f"rank {rank} keeps {state_bytes(optimizer.optim).total:,} bytes of optimizer state")
# DDP's reducer must go before the group that it talks through
del model, optimizer, loss
dist.barrier()
dist.destroy_process_group()
