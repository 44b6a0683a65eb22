"""A lock that lets one run at a time use an output folder."""

from __future__ import annotations

import fcntl
import io
import os
import re
import shlex
import socket
from pathlib import Path
from typing import TextIO

from stepdistill.training.checkpoint import CheckpointError

LONGEST = 500
"""Characters of a lock that are read."""


class RunLock:
    """``with RunLock(output_dir):`` lets one run at a time use a folder, which is made if needed. Main process only.

    It is the kernel's lock on ``output_dir/.lock``, so a killed run leaves none behind and process ids do not matter.
    The pid and host in the file are for messages, and for shared folders, on which such locks may not work.

    Raises:
        CheckpointError: on entry, if another run holds the folder, or it cannot be written to.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.path = Path(output_dir) / ".lock"
        self._file: TextIO = io.StringIO()

    def __enter__(self) -> RunLock:
        try:
            return self._enter()
        except OSError as error:
            self._file.close()
            raise CheckpointError(f"{self.path.parent}: cannot be used as output_dir: {error}") from error

    def _enter(self) -> RunLock:
        folder, host = self.path.parent, socket.gethostname()
        folder.mkdir(parents=True, exist_ok=True)
        self._file = os.fdopen(_open_no_link(self.path), "a+", encoding="utf-8", errors="replace")
        free = _try_lock(self._file)
        self._file.seek(0)
        holder = self._file.read(LONGEST)
        if problem := self._problem(holder, free, host):
            self._file.close()
            raise CheckpointError(problem)
        os.register_at_fork(after_in_child=self._file.close)  # else data workers that outlive a run hold its lock
        self._file.truncate(0)
        self._file.write(f"pid {os.getpid()} on {host}")
        self._file.flush()
        return self

    def _problem(self, holder: str, free: bool, host: str) -> str | None:
        """Return why the folder cannot be used, None if it can."""
        if holder and not re.fullmatch(r"pid \d+ on \S*", holder):
            return f"{self.path}: expected the lock of a run, got other content; move it away"
        if not free:
            return f"{self.path.parent}: in use by another run ({holder})"
        if holder and not holder.endswith(f" on {host}"):
            return (
                f"{self.path.parent}: in use by another run ({holder}); if it has ended, remove its lock, because that "
                f"cannot be seen from {host}: rm {shlex.quote(str(self.path))}"
            )
        return None

    def __exit__(self, *_: object) -> None:
        self._file.truncate(0)  # not removed, because another process may have this file open
        self._file.close()


def _open_no_link(path: Path) -> int:
    """Open a file that is emptied later: never one elsewhere to which a link leads."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)


def _try_lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
