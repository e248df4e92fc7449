"""GaLoreAdamW in a plain training loop, with its memory beside AdamW's. Run: python examples/plain_loop.py"""

import torch
from torch import nn

from lowrank_optim import GaLoreAdamW, adamw_state_bytes, param_groups, state_bytes

torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(256, 128), nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128), nn.Linear(128, 256))
groups = param_groups(model, rank=16, scale=1.0, update_proj_gap=50, heads=r"^4$", other_lr=3e-3)
print(groups.describe())

optimizer = GaLoreAdamW(groups, lr=1e-2)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
for step in range(200):
    x = torch.randint(0, 256, (64,))
    loss = nn.functional.cross_entropy(model(x), (x * 7 + 3) % 256)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    if step % 50 == 0 or step == 199:
        print(f"step {step:3d}  loss {loss.item():.4f}")

ours, adamw = state_bytes(optimizer).total, adamw_state_bytes(model.parameters())
print(f"optimizer state: {ours:,} bytes; AdamW: {adamw:,} bytes")
