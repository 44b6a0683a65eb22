"""``metrics.jsonl`` of a run: one JSON object for every logged step."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepdistill.files.writing import atomic_write


class MetricsLog:
    """The log in a run's folder.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"

    def append(self, step: int, stage: str, values: Mapping[str, float]) -> None:
        """Write one row."""
        row = {"step": step, "stage": stage, "time": round(time.time(), 2), **values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def cut_after(self, step: int) -> list[dict[str, Any]]:
        """Remove the rows of later steps, which will be trained again, and return those that stay."""
        if not self.path.is_file():
            return []
        lines, rows = [], []
        for line in self.path.read_text(encoding="utf-8").splitlines(True):
            if not line.endswith("\n"):  # a kill may have cut the last line short
                continue
            row = json.loads(line)
            if row["step"] <= step:
                lines.append(line)
                rows.append(row)
        with atomic_write(self.path) as partial:
            partial.write_text("".join(lines), encoding="utf-8")
        return rows
