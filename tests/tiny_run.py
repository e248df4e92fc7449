"""A pretraining run of a second: two layers of width 32 on a text that the test writes."""

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiments.tracking import deterministic, read

ROOT = Path(__file__).parent.parent


def write_text(path: Path, size: int = 60_000) -> Path:
    """Words of a small vocabulary in a seeded order, enough for a loss that falls."""
    source = random.Random(5)
    words = ["".join(source.choices("abcdefgh", k=source.randint(2, 6))) for _ in range(40)]
    lines = (" ".join(source.choices(words, k=9)) for _ in range(size // 40))
    path.write_text("\n".join(lines))
    return path


def arguments(text: Path, run_dir: Path, *more: str) -> list[str]:
    """The command line of the tiny run; `more` comes last and wins."""
    model = ["--model.dim=32", "--model.layers=2", "--model.heads=2", "--model.ffn_dim=64"]
    optim = ["--optim.rank=8", "--optim.update_proj_gap=7", "--optim.lr=0.01"]
    shape = ["--train.batch_size=4", "--train.seq_len=32", "--train.steps=20", "--train.warmup=5", "--train.threads=1"]
    often = ["--train.log_every=1", "--train.save_every=5", "--train.eval_every=10", "--train.eval_batches=2"]
    place = [f"--data.path={text}", f"--run_dir={run_dir}", "--track.wandb=off"]
    return [*model, *optim, *shape, *often, *place, *more]


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """What two runs of one configuration have in common, to the bit."""
    return [deterministic(row) for row in read(run_dir / "metrics.jsonl")]


def spawn(
    argv: list[str], *, module: tuple[str, ...] = ("-m", "experiments.pretrain"), **more: Any
) -> subprocess.Popen[str]:
    """`python -m experiments.pretrain`, one thread, its output kept."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *module, *argv], env=env, cwd=ROOT, **pipes, **more)


def files(directory: Path) -> dict[str, bytes]:
    """Every file below a directory with its content: equal before and after means untouched."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
