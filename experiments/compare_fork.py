"""Runs of a comparison as forks of one process that has imported everything and read the text.

A new interpreter takes some seconds until its first step, a fork none. Each run is still a process of its own. Forking
needs a parent without threads and without a CUDA context, so this is for runs on the CPU, which set their own threads.
"""

import contextlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.compare_runs import Run, log_file
from experiments.data import Corpus, DataConfig, load_corpus


class Fork:
    """A process that runs `function` and ends with what it returns; the part of `subprocess.Popen` that is needed."""

    def __init__(self, function: Callable[[], int], log: Path) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            # numpy's thread pool, which handles forks; torch has run nothing in parallel here
            warnings.simplefilter("ignore", DeprecationWarning)
            self._pid = os.fork()
        self._code: int | None = None
        if self._pid == 0:
            # nothing of the parent's may run here, whatever happens
            code = 1
            try:
                _own_streams(log)
                code = function()
            except SystemExit as left:
                code = left.code if isinstance(left.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(OSError, ValueError):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)

    def poll(self) -> int | None:
        """The exit status, None while it runs."""
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        """The exit status, once it has ended."""
        code = self._wait(0)
        assert code is not None
        return code

    def terminate(self) -> None:
        """Asks it to stop."""
        if self._code is None:
            os.kill(self._pid, signal.SIGTERM)

    def _wait(self, options: int) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self._pid, options)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code


def _own_streams(log: Path) -> None:
    # its own session: an interrupt reaches it through the parent, once
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for number, path, flags in (
        (0, Path(os.devnull), os.O_RDONLY),
        (1, log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        file = os.open(path, flags, 0o644)
        os.dup2(file, number)
        os.close(file)
    os.dup2(1, 2)
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, closefd=False)  # noqa: SIM115  # live as long as the process
        for number, mode in ((0, "r"), (1, "w"), (2, "w"))
    )


class Remembered:
    """`load_corpus`, which reads the same data once; the order of the sequences is drawn later, from the seed."""

    def __init__(self) -> None:
        self._kept: dict[Any, Corpus] = {}

    def __call__(self, config: DataConfig, *, seq_len: int, vocab_size: int) -> Corpus:
        """The corpus of `config`."""
        key = (replace(config, seed=0), seq_len, vocab_size)
        if key not in self._kept:
            self._kept[key] = load_corpus(config, seq_len=seq_len, vocab_size=vocab_size)
        return replace(self._kept[key], seed=config.seed)


class Forks:
    """Starts runs as forks; the first one makes this process read the text.

    Args:
        out: Directory of the runs.
    """

    def __init__(self, out: Path) -> None:
        if not hasattr(os, "fork"):
            raise ValueError("--fork: this system cannot fork")
        self._out = out
        self._load = Remembered()
        self._ready = False

    def __call__(self, run: Run) -> Fork:
        """Starts one."""
        # slow to import, and needed only here
        from experiments import pretrain
        from experiments.config import parse

        options = run.options(self._out / run.key)
        if not self._ready:
            self._ready = True
            # what is wrong with it, the run itself says in its log
            with contextlib.suppress(SystemExit, ValueError, OSError), contextlib.redirect_stderr(None):
                c = parse(options)
                self._load(c.data, seq_len=c.train.seq_len, vocab_size=c.model.vocab_size)
        (self._out / run.key).mkdir(parents=True, exist_ok=True)
        return Fork(lambda: pretrain.main(options, self._load), log_file(run, self._out))
