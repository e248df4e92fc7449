"""One thread, no network, reproducible: what every test may rely on."""

import os

# before torch and triton are imported: kernels run interpreted where there is no GPU
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)

# of torch's numbers in every test; another one looks for what only rare numbers show
SEED = int(os.environ.get("TEST_SEED", "0"))
# the same examples in every run, so that a red run is about the change; others by --hypothesis-profile=explore
hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.register_profile("explore", derandomize=False)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(SEED)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests import tiny_run

    return tiny_run.write_text(tmp_path_factory.mktemp("text") / "a.txt")


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run to its end; tests only look at it."""
    # most tests do without the experiments
    from experiments.pretrain import main
    from tests import tiny_run

    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    assert main(tiny_run.arguments(text, run_dir)) == 0
    return run_dir
