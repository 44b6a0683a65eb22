"""A lock that lets one run at a time use an output folder."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO

from stepdistill.training.checkpoint import CheckpointError


class RunLock:
    """``with RunLock(output_dir):`` lets one run at a time use a folder, which is made if needed. Main process only.

    It is the kernel's lock on ``output_dir/.lock``, so a killed run leaves none behind and process ids do not matter.
    The pid and host in the file are for messages, and for shared folders, on which such locks may not work.

    Raises:
        CheckpointError: on entry, if another run holds the folder, or it cannot be written to.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.path = Path(output_dir) / ".lock"

    def __enter__(self) -> RunLock:
        folder, host = self.path.parent, socket.gethostname()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+", encoding="utf-8")
            free = _try_lock(self._file)
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be used as output_dir: {error}") from error
        self._file.seek(0)
        holder = self._file.read()
        if not free or (holder and not holder.endswith(f" on {host}")):
            self._file.close()
            raise CheckpointError(f"{folder}: in use by another run ({holder}); if it has ended, remove {self.path}")
        os.register_at_fork(after_in_child=self._file.close)  # else data workers that outlive a run hold its lock
        self._file.truncate(0)
        self._file.write(f"pid {os.getpid()} on {host}")
        self._file.flush()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.truncate(0)  # not removed, because another process may have this file open
        self._file.close()


def _try_lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
