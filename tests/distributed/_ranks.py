"""Processes that stand for ranks, on gloo and the CPU."""

import datetime
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2
TIMEOUT = 60.0


class Ranks:
    """Two processes that live through the file, because most of a small test is importing torch in both."""

    def __init__(self) -> None:
        self._processes: list[tuple[Any, Connection]] = []

    def run(self, work: Callable[[int, Path], None], folder: Path) -> None:
        """Do `work` on every rank; raises what a rank raised, and starts afresh after that."""
        if not self._processes:
            self._start()
        for _, pipe in self._processes:
            pipe.send((work, folder))
        waiting = [pipe for _, pipe in self._processes]
        seconds, found = TIMEOUT, []
        while waiting:
            ready = cast("list[Connection]", wait(waiting, timeout=seconds))
            if not ready:
                found.append("a rank did not come to the end")
                break
            for pipe in ready:
                waiting.remove(pipe)
                try:
                    found += filter(None, [pipe.recv()])
                except EOFError:
                    found.append("a rank died")
            # where one rank has failed, the other may wait for it in vain
            seconds = 5.0 if found else TIMEOUT
        if found:
            self.close()
            pytest.fail("\n".join(found), pytrace=False)

    def close(self) -> None:
        for process, pipe in self._processes:
            pipe.close()
            process.terminate()
            process.join()
        self._processes.clear()

    def _start(self) -> None:
        context = mp.get_context("spawn")
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append((process, ours))


def _serve(rank: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            work, folder = pipe.recv()
        except EOFError:
            return
        try:
            # a file can be met at once
            meet, timeout = f"file://{folder / 'meet'}", datetime.timedelta(seconds=TIMEOUT)
            dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=WORLD, timeout=timeout)
            work(rank, folder)
            dist.barrier()
            dist.destroy_process_group()
        except BaseException:
            pipe.send(f"rank {rank}: {traceback.format_exc()}")
            return
        pipe.send(None)
