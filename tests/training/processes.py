"""Runs in forked processes, which a test may signal, stop and kill: forked, because importing costs seconds."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState


class Processes:
    """The ranks of a run, each a child of this process.

    Args:
        folder: where rank k's output goes, as ``rank-<k>.txt``.
        function: what each runs; its ``ValueError`` and ``SystemExit`` end it as they end the console command.
        world: number of ranks; with 1 there is no process group.
    """

    def __init__(self, folder: Path, function: Callable[[], object], world: int) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        port = _free_port()
        self.pids = [_fork(folder / f"rank-{rank}.txt", function, rank, world, port) for rank in range(world)]
        self.codes: dict[int, int] = {}

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to a rank that has not been waited for; one that has ended by itself stays as it is."""
        if rank not in self.codes:
            os.kill(self.pids[rank], number)

    def ended(self) -> bool:
        """Whether all ranks have ended; notes their codes, negative ones for signals."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def wait(self, seconds: float = 120.0) -> list[int]:
        """Return the codes by rank once all have ended."""
        wait_until(self.ended, seconds)
        return [self.codes[rank] for rank in range(len(self.pids))]

    def output(self, rank: int) -> str:
        """What a rank has printed."""
        return (self.folder / f"rank-{rank}.txt").read_text()


@contextlib.contextmanager
def started(folder: Path, function: Callable[[], object], world: int = 1) -> Iterator[Processes]:
    """Run ``function`` in forked processes; none of them outlives the context."""
    processes = Processes(folder, function, world)
    try:
        yield processes
    finally:
        if not processes.ended():
            for rank in set(range(world)) - processes.codes.keys():
                processes.kill(rank)
            processes.wait()


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def _fork(output: Path, function: Callable[[], object], rank: int, world: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = (os.fdopen(place, "w", buffering=1) for place in (1, 2))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        torch.set_num_threads(1)
        _forget_the_parents_processes()
        _forget_the_parents_random_state()
        if world > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
            # accelerate would otherwise give each process as many threads as there are cores
            fixed = {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            os.environ |= {name: str(value) for name, value in place.items()} | fixed
        _end(function)
    finally:
        os._exit(99)  # the child must never go on as a second pytest


def _end(function: Callable[[], object]) -> None:
    """Run a function, and leave as the console command would."""
    try:
        function()
        os._exit(0)
    except SystemExit as leaving:
        os._exit(int(leaving.code or 0))
    except ValueError as error:
        print(f"sentence: {error}", file=sys.stderr, flush=True)
        os._exit(2)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _forget_the_parents_processes() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _forget_the_parents_random_state() -> None:
    """Have random numbers of one's own, as a launched process has: what rests on them differs between ranks."""
    random.seed()
    np.random.seed()
    torch.seed()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
