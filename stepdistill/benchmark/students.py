"""The students of a benchmark: trained or exported before it, if they are missing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from stepdistill.config import read_config
from stepdistill.files.words import nearest
from stepdistill.training.config import resolve
from stepdistill.training.run import Run


class StudentRow(NamedTuple):
    """An exported student at a number of network calls per image, or (None) at that of its contract."""

    name: str
    folder: str
    calls: int | None


def student_rows(students: Mapping[str, str], calls: Sequence[int]) -> list[StudentRow]:
    """Return the rows of a table: every student at every number of ``calls``, or as its contract says if there is none.

    At n calls a student is the export ``pipeline-<n>-steps`` beside its own, which methods in stages write, or else its
    own, called with n steps.
    """
    if not calls:
        return [StudentRow(name, folder, None) for name, folder in students.items()]
    rows = []
    for name, folder in students.items():
        for n in calls:
            staged = Path(folder).with_name(f"pipeline-{n}-steps")
            place = str(staged) if is_pipeline(staged) else folder
            rows.append(StudentRow(f"{name}, {n} call{'s' if n > 1 else ''}", place, n))
    return rows


def is_pipeline(folder: Path) -> bool:
    """Whether a folder holds a diffusers pipeline."""
    return (folder / "model_index.json").is_file()


def check_students(students: Mapping[str, str]) -> None:
    """Raise ``ValueError`` for the first of the named folders that holds no pipeline."""
    for name, folder in students.items():
        if not is_pipeline(Path(folder)):
            siblings = [str(path) for path in Path(folder).parent.glob("pipeline*")]
            raise ValueError(f"students.{name}: no pipeline in {folder}{nearest(folder, siblings)}")


def train_missing(runs: Sequence[str]) -> None:
    """Train every run that has not exported its student yet.

    Args:
        runs: the path of a configuration each, followed by ``key=value`` for the keys that are changed.
    """
    for command in runs:
        path, *overrides = command.split()
        config = resolve(read_config(path, overrides))
        if not is_pipeline(Path(config.train.output_dir) / "pipeline"):
            print(f"training {command}", flush=True)
            Run(config).train()


def export_missing(students: Mapping[str, str]) -> None:
    """Export students for other numbers of steps, which the names of missing folders tell: ``pipeline-2-steps``."""
    for folder in map(Path, students.values()):
        steps, config = re.fullmatch(r"pipeline-(\d+)-steps?", folder.name), folder.parent / "config.yaml"
        if steps and config.is_file() and not is_pipeline(folder):
            Run(resolve(read_config(config, [f"method.steps={steps[1]}"]))).export_checkpoint(folder)
