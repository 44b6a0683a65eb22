"""Stopping a run on a signal without losing work."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C, the end of a job, and the warning of a cluster that is about to end it."""

ECHO = 1.0
"""Seconds within which a launcher's signal repeats the terminal's, which went to all processes already."""


def exit_code(number: int) -> int:
    """Return the exit code of a run that was stopped by a signal after it finished and saved its step.

    >>> exit_code(signal.SIGTERM), exit_code(signal.SIGINT)
    (143, 130)
    """
    return 128 + number


def leave_now(code: int) -> None:
    """End this process and its data workers, from any thread, whatever the main thread waits for."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


class StopSignal:
    """Notes a signal for the loop to act on; a second one ends the process at once.

    ``with stop_signal:`` installs the handlers, and puts the former ones back at the end.

    Python runs handlers between two instructions of the main thread, which may be waiting for another process. A
    second signal is therefore noticed by a thread, to which the interpreter writes the number of every signal.

    Args:
        echo: seconds after the first signal in which further ones are the same request, see :data:`ECHO`.
    """

    def __init__(self, echo: float = 0.0) -> None:
        self.received = 0
        """Number of the first signal, 0 as long as none came."""
        self.echo = echo
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if not _handles_signals():
            return self
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        for number in SIGNALS:
            self._former[number] = signal.signal(number, self._request)
        self._former_descriptor = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._former:
            return
        signal.set_wakeup_fd(self._former_descriptor)
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._writer.shutdown(socket.SHUT_RDWR)  # ends the thread; a data worker may hold a copy of the descriptor
        self._thread.join()
        self._reader.close()
        self._writer.close()

    def _request(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.received = self.received or number

    def _watch(self) -> None:
        first = None
        while number := self._reader.recv(1):
            if number[0] not in SIGNALS:
                continue
            if first is None:
                first = time.monotonic()
            elif time.monotonic() - first >= self.echo:
                leave_now(exit_code(number[0]))


def _handles_signals() -> bool:
    """Whether this thread may handle signals; in any other than the main one, a run goes on without."""
    return threading.current_thread() is threading.main_thread()


class Agreement:
    """Tells all processes of a run together whether one of them was asked to stop.

    A single process knows at once. Several ask each other about once a second, but at least every ``log_every`` steps,
    and on every step that costs more than a second.

    Args:
        accelerator: the run's.
        log_every: steps between two rows of the log.
    """

    def __init__(self, accelerator: Accelerator, log_every: int) -> None:
        self.accelerator, self.log_every = accelerator, log_every
        self._asked_at: float | None = None
        self._asked_on = self._next = 0

    def on(self, step: int, received: int) -> int:
        """Return the signal on which to stop after ``step``, 0 for none; ``received`` is this process's."""
        if self.accelerator.num_processes == 1:
            return received
        if step < self._next:
            return 0
        asked = torch.tensor([[received, self._seconds(step)]], device=self.accelerator.device)
        agreed, seconds = self.accelerator.gather(asked).amax(dim=0).tolist()
        self._asked_at, self._asked_on = time.monotonic(), step
        self._next = step + steps_between(seconds, self.log_every)
        return int(agreed)

    def _seconds(self, step: int) -> float:
        """Return how long a step has taken since the last agreement; before the first one, long."""
        if self._asked_at is None:
            return 1.0
        return (time.monotonic() - self._asked_at) / (step - self._asked_on)


def steps_between(seconds: float, log_every: int) -> int:
    """Return after how many steps of ``seconds`` each the processes ask again.

    >>> steps_between(3.0, log_every=10), steps_between(0.2, log_every=10), steps_between(0.001, log_every=10)
    (1, 5, 10)
    """
    return max(1, min(log_every, int(1 / max(seconds, 1e-3))))
