"""GaLoreAdamW under the Hugging Face Trainer, on a tiny random LLaMA, with a resume. Needs transformers and accelerate.

Run: python examples/hf_trainer.py
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lowrank_optim import GaLoreAdamW, param_groups

config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, use_cache=False
)
rows = torch.randint(0, 256, (64, 32), generator=torch.Generator().manual_seed(0))
dataset = [{"input_ids": row, "labels": row} for row in rows]


def trainer(folder: str, steps: int) -> Trainer:
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    optimizer = GaLoreAdamW(param_groups(model, rank=8, scale=1.0, update_proj_gap=5), lr=1e-2)
    arguments = TrainingArguments(folder, max_steps=steps, save_steps=4, logging_steps=2, report_to=[], use_cpu=True)
    return Trainer(model=model, args=arguments, train_dataset=dataset, optimizers=(optimizer, None))


with tempfile.TemporaryDirectory() as folder:
    trainer(folder, 4).train()
    result = trainer(folder, 8).train(resume_from_checkpoint=True)
print(f"resumed to step {result.global_step}, training loss {result.training_loss:.3f}")
