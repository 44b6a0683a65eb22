"""The report of ``make gpu``: does everything work on this card, how fast, in how much memory, against what.

Parts can be run alone. Each writes its rows into ``<part>.json`` as they are made, so a run that is cut short leaves
what it had, and all parts together make ``report.md``.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from stepdistill.benchmark.gpu_checks import check_rows
from stepdistill.benchmark.gpu_cifar import check_data, cifar_rows
from stepdistill.benchmark.gpu_steps import CASES, reference_rows, step_rows
from stepdistill.benchmark.tables import markdown_table
from stepdistill.evaluation.results import machine, versions, write_result

Rows = Iterator[tuple[str, dict[str, Any]]]
PARTS = ("checks", "steps", "reference", "cifar")
TINY_CASES = tuple(dataclasses.replace(case, batch_size=2) for case in (CASES[0], CASES[3]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """A report in a folder.

    Attributes:
        folder: where the files are written.
        data: the ``.npz`` of CIFAR-10; with ``tiny`` not read.
        tiny: whether everything is small, for a CPU.
    """

    folder: Path
    data: Path
    tiny: bool

    def check(self, parts: Collection[str]) -> None:
        """Raise ``ValueError`` if one of the parts lacks its data."""
        if "cifar" in parts and not self.tiny:
            check_data(self.data)

    def rows(self, part: str) -> Rows:
        """Return the rows of a part, which are made as they are taken."""
        if part == "checks":
            return check_rows()
        if part == "cifar":
            return cifar_rows(self.folder / "cifar", self.data, tiny=self.tiny)
        make = {"steps": step_rows, "reference": reference_rows}[part]
        cases, repeats, minutes = (
            (TINY_CASES, 1, 5.0) if self.tiny else (CASES, 10, {"steps": 2.0, "reference": 1.0}[part])
        )
        return make(cases, tiny=self.tiny, repeats=repeats, minutes=minutes)

    def run(self, part: str) -> bool:
        """Make a part and write its JSON row by row; return whether no check of it failed."""
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        about = {"part": part, "tiny": self.tiny, "machine": machine(device), "versions": versions()}
        found: dict[str, dict[str, Any]] = {}
        begin = time.perf_counter()
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, row in self.rows(part):
            found[name] = row
            minutes = (time.perf_counter() - begin) / 60
            write_result(self.folder / f"{part}.json", {**about, "minutes": minutes, "rows": found})
            print(f"{part}: {name}: {brief(row)}", flush=True)
        return all(row.get("passed", True) for row in found.values())

    def write(self) -> Path:
        """Write the report of all parts that have been made, and return its path."""
        sections = []
        for part in PARTS:
            path = self.folder / f"{part}.json"
            if path.is_file():
                sections.append(section(json.loads(path.read_text(encoding="utf-8"))))
        path = self.folder / "report.md"
        path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
        return path


def section(result: dict[str, Any]) -> str:
    """Return the Markdown of a part."""
    lines: list[tuple[str, ...]] = [("what", "found"), ("---", "---")]
    for name, row in result["rows"].items():
        lines.append((name, brief(row)))
    where = f"{result['machine']['device']}, torch {result['versions']['torch']}"
    small = ", miniatures" if result["tiny"] else ""
    return f"## {result['part']}\n\n{where}, {result['minutes']:.1f} minutes{small}\n\n{markdown_table(lines)}"


def brief(row: dict[str, Any], prefix: str = "") -> str:
    """Return a row in words: ``seconds 0.12, tflops 310``, inner rows after their name."""
    words = []
    for name, value in row.items():
        if type(value) is dict:
            words.append(brief(value, f"{prefix}{name} "))
        elif type(value) is float:
            words.append(f"{prefix}{name} {value:.4g}")
        else:
            words.append(f"{prefix}{name} {value}")
    return ", ".join(words)
