"""The host's part of a step on a GPU, where there is none: Triton's own launch path over a driver that does nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments import bench_host
from tests.alone import ROOT

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, as Triton does")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_steps_are_timed_and_written(tmp_path: Path) -> None:
    out = tmp_path / "host.json"
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    words = [sys.executable, "-m", "experiments.bench_host", "--rounds", "2", "--layers", "1", "--out", str(out)]
    done = subprocess.run([*words, "--only", "DCTAdamW r=256"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    assert document["matrices"] == 7
    assert document["machine"]["versions"]["torch"] == torch.__version__
    (row,) = document["host"]
    assert row["optimizer"] == "DCTAdamW r=256"
    assert 0 < row["min_us"] <= row["median_us"]


def test_it_refuses_where_the_thing_itself_can_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match=r"see bench\.py for a GPU"):
        bench_host.pretend()
