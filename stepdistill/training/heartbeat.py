"""Naming the process of a run that is silent: stopped, killed, or waiting for something that does not come.

A process that waits for another one learns only that nothing comes. Each therefore writes a count into a file of its
own, ``output_dir/.alive/rank-<k>``, from a thread that goes on while the main thread waits. A rank whose count rests
was stopped or killed; one whose count goes on, but which lags behind all others, hangs. Only changes are compared, by
each process's own steady clock, so neither the clocks nor the names of hosts matter. Processes on hosts that do not
share the folder cannot see each other: they end at the timeout all the same, without the name.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch

from stepdistill.training.interruption import leave_now

SILENT = 2
"""Exit code of a process that gave up waiting for another one."""

WIDTH = 64
"""Bytes of a file, which is rewritten in place: that needs no new block, so a full disk stops no heart."""

PATIENCE = 5
"""Beats that are waited for before a rank counts as lost."""

BROKEN = ("Connection closed", "Connection reset", "Connection refused", "Broken pipe", "Timed out", "timed out")
"""What the backends say of a process at the other end that has ended."""


class LostProcessError(ValueError):
    """Another process of the run, or one of this process's data workers, does not answer any more."""


class Beat(NamedTuple):
    """What a rank's file said, and when it last said something new."""

    content: bytes
    position: int
    """How many times the main thread has called :meth:`Heartbeat.advance`."""
    alive_at: float
    moved_at: float


class Heartbeat:
    """``with heartbeat:`` watches the other processes of a run, and shows them that this one is alive.

    If another rank is silent for ``timeout`` seconds, the process prints which, and ends with code 2.

    Args:
        folder: the run's.
        rank: this process.
        world: number of processes; a single one does nothing.
        timeout: seconds.
    """

    def __init__(self, folder: Path, rank: int, world: int, timeout: float) -> None:
        self.folder, self.rank, self.world, self.timeout = folder / ".alive", rank, world, timeout
        self.interval = min(1.0, timeout / 5)
        self.position = 0
        self._beats: dict[int, Beat] = {}
        self._ended = threading.Event()

    def advance(self) -> None:
        """Note that the main thread has come one place further; all processes pass the same places."""
        self.position += 1

    def __enter__(self) -> Heartbeat:
        if self.world > 1:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path(self.rank), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            self._write(0)
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del error, trace
        if self.world == 1:
            return
        self._ended.set()
        self._thread.join()
        os.close(self._descriptor)
        # after an error the file stays, and its count rests: the others wait for this process
        if kind is None or kind is SystemExit:
            self._path(self.rank).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # until the last one has left
                self.folder.rmdir()

    def lost(self) -> list[int]:
        """Return the ranks that do not beat any more; called when waiting for them has failed."""
        if self.world == 1:
            return []
        asked = time.monotonic()
        time.sleep(PATIENCE * self.interval)
        # what was last seen alive just now may have been looked at for the first time
        return sorted(rank for rank, beat in self._beats.items() if beat.alive_at < asked + 2 * self.interval)

    def silent(self) -> list[int]:
        """Return the ranks that have been silent for the timeout."""
        now = time.monotonic()
        dead = sorted(rank for rank, beat in self._beats.items() if now - beat.alive_at > self.timeout)
        return dead or self._lagging(now)

    def _lagging(self, now: float) -> list[int]:
        """Return the ranks that all others wait for."""
        places = {rank: beat.position for rank, beat in self._beats.items()} | {self.rank: self.position}
        last = min(places.values())
        behind = sorted(rank for rank, place in places.items() if place == last)
        waited = self.rank not in behind and all(now - self._beats[rank].moved_at > self.timeout for rank in behind)
        return behind if waited else []

    def _run(self) -> None:
        count = 0
        while not self._ended.wait(self.interval):
            count += 1
            self._write(count)
            self._read()
            if ranks := self.silent():
                print(f"stepdistill: {_sentence(ranks, self.timeout)}", file=sys.stderr, flush=True)
                leave_now(SILENT)

    def _write(self, count: int) -> None:
        with contextlib.suppress(OSError):  # the others will take this one for silent, and say so
            os.pwrite(self._descriptor, f"{os.getpid()} {count} {self.position}".ljust(WIDTH).encode(), 0)

    def _read(self) -> None:
        now = time.monotonic()
        for rank in set(range(self.world)) - {self.rank}:
            try:
                content = self._path(rank).read_bytes()[:WIDTH]
            except OSError:
                self._beats.pop(rank, None)  # not begun yet, at the end, or on a host without this folder
                continue
            before = self._beats.get(rank, Beat(b"", -1, now, now))
            position = _position(content, before.position)
            self._beats[rank] = Beat(
                content,
                position,
                before.alive_at if content == before.content else now,
                before.moved_at if position == before.position else now,
            )

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}"


def _position(content: bytes, default: int) -> int:
    words = content.split()
    return int(words[2]) if len(words) == 3 and words[2].isdigit() else default


def _sentence(ranks: list[int], seconds: float) -> str:
    who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
    return (
        f"{who} did not answer for {seconds:g} s (train.timeout): stopped, killed, or hanging; "
        "the newest checkpoint is intact, so run the same command again"
    )


@contextlib.contextmanager
def naming_the_lost(heartbeat: Heartbeat) -> Iterator[None]:
    """Turn the errors that a lost process leaves behind into a sentence that names it.

    Raises:
        LostProcessError: naming the ranks that a failed exchange waited for, or the data worker that was killed.
    """
    try:
        yield
    except (RuntimeError, EOFError, ConnectionError) as error:
        with contextlib.suppress(RuntimeError):  # torch's own notice of a killed worker may come after the error
            time.sleep(0.1)
        if _is_of_a_worker(error):
            raise LostProcessError(
                f"rank {heartbeat.rank}: a data worker was killed or has ended ({_first_line(error)}); the newest "
                "checkpoint is intact, so run the same command again, with fewer data.num_workers if memory is short"
            ) from error
        if ranks := heartbeat.lost():
            raise LostProcessError(_sentence(ranks, PATIENCE * heartbeat.interval)) from error
        if _is_of_the_network(error):
            raise LostProcessError(
                f"rank {heartbeat.rank}: another process ended or did not answer ({_first_line(error)}); see "
                "its own message; the newest checkpoint is intact, so run the same command again"
            ) from error
        raise


@contextlib.contextmanager
def naming_a_failed_start() -> Iterator[None]:
    """Turn the errors of processes that did not find each other into a sentence.

    Raises:
        LostProcessError: with what the backend says.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_of_the_network(error):
            raise
        raise LostProcessError(
            f"the processes of the run did not find each other, or one ended ({_first_line(error)}); see its own "
            "message, and run the same command again"
        ) from error


def _is_of_the_network(error: BaseException) -> bool:
    return isinstance(error, torch.distributed.DistError) or any(phrase in str(error) for phrase in BROKEN)


def _is_of_a_worker(error: BaseException) -> bool:
    """Whether an error is what a killed data worker leaves behind: torch's notice, or a pipe that has no other end."""
    return isinstance(error, (EOFError, ConnectionError)) or "DataLoader worker (pid" in str(error)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(". ") or type(error).__name__
