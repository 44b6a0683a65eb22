"""``metrics.jsonl`` of a run: one JSON object for every logged step."""

from __future__ import annotations

import json
import os
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stepdistill.files.reading import parse_json
from stepdistill.files.schema import convert
from stepdistill.files.writing import writing_to

BLOCK = 64 * 2**10
"""Bytes that are read at a time."""


class MetricsLog:
    """The log in a run's folder.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"

    def append(self, step: int, stage: str, values: Mapping[str, float]) -> None:
        """Write one row.

        Raises:
            ValueError: if the file cannot be written.
        """
        row = {"step": step, "stage": stage, "time": round(time.time(), 2), **values}
        with writing_to(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield all rows.

        Raises:
            ValueError: naming a line that is no row.
        """
        with self.path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                yield parse_json(line, f"{self.path}: line {number}")

    def cut_after(self, step: int) -> None:
        """Remove the rows of later steps, which will be trained again.

        The file is read from its end, and is cut where it is: a kill leaves the old end or the new one. A line that is
        no row is named in a warning; it goes if a row after it goes.
        """
        if not self.path.is_file():
            return
        with writing_to(self.path):
            end = self._end_of(step)
            if end < self.path.stat().st_size:
                os.truncate(self.path, end)

    def _end_of(self, step: int) -> int:
        """Return the offset of the first row that is later than ``step``, of those at the end."""
        end, later = self.path.stat().st_size, False
        for begin, line in _lines_from_the_end(self.path):
            if not line.endswith(b"\n"):  # a kill may have cut the last line short
                end = begin
                continue
            try:
                found = _step_of(line, str(self.path))
            except ValueError as error:
                self._warn(begin, error)
                end = begin if later else end
                continue
            if found <= step:
                break
            end, later = begin, True
        return end

    def _warn(self, begin: int, error: ValueError) -> None:
        with self.path.open("rb") as file:
            number = file.read(begin).count(b"\n") + 1
        problem = str(error).removeprefix(f"{self.path}: ")
        warnings.warn(f"{self.path}: line {number}: {' '.join(problem.split())}; skipped", stacklevel=4)


def _step_of(line: bytes, name: str) -> int:
    row = parse_json(line.decode(errors="replace"), name)
    return convert(row.get("step"), int, "step")


def _lines_from_the_end(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file, the last one first, each with its offset; only what is needed of it is read."""
    with path.open("rb") as file:
        begin, tail = file.seek(0, os.SEEK_END), b""
        while begin:
            size = min(max(BLOCK, len(tail)), begin)  # grows with a long line, which is then not copied too often
            begin -= size
            file.seek(begin)
            tail = file.read(size) + tail
            whole = tail.find(b"\n") + 1 if begin else 0  # what comes before may be the end of a line
            place = begin + len(tail)
            for line in reversed(re.findall(rb"[^\n]*\n|[^\n]+", tail[whole:] if whole or not begin else b"")):
                place -= len(line)
                yield place, line
            tail = tail[: place - begin]
