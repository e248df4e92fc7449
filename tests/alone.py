"""A process of its own, in which kernels are not interpreted."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_alone(code: str, *args: str, **environment: str) -> str:
    """Run in a process where nothing is interpreted, and return what it printed."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
