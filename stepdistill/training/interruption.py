"""Stopping a run on a signal without losing work."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

INTERRUPTED = 143
"""Exit code of a run that was stopped by SIGTERM after it finished and saved its step."""


class StopSignal:
    """Notes a SIGTERM for the loop to act on; a second one ends the process at once.

    ``with stop_signal:`` installs the handler, and puts the former one back at the end.
    """

    def __init__(self) -> None:
        self.requested = False
        self._former: Any = None

    def __enter__(self) -> StopSignal:
        if _handles_signals():
            self._former = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        if _handles_signals():
            signal.signal(signal.SIGTERM, self._former)

    def _request(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.requested = True
        signal.signal(number, signal.SIG_DFL)


def _handles_signals() -> bool:
    """Whether this thread may handle signals; in any other than the main one, a run goes on without."""
    return threading.current_thread() is threading.main_thread()
