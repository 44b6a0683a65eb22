"""Result files of ``benchmark`` and ``demo``, read and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NotRequired, TypedDict

from stepdistill.evaluation.results import Result, numbers_checked
from stepdistill.files.reading import read_json
from stepdistill.files.schema import ConfigError, convert
from stepdistill.files.words import shown

Number = int | float

Row = dict[str, Any]


class Training(TypedDict):
    """What the training of a student cost."""

    teacher_forwards: NotRequired[Number | None]
    cpu_minutes: NotRequired[Number | None]


class BenchmarkRow(TypedDict):
    """What every row of a benchmark has, and what a table or plot shows of some."""

    name: str
    kind: NotRequired[str]
    calls: Number
    steps: NotRequired[int]
    method: NotRequired[str]
    solver: NotRequired[str]
    pipeline: NotRequired[str]
    training: NotRequired[Training]
    start: NotRequired[str]
    seeds_of: NotRequired[str]
    teacher_guidance: NotRequired[Number | None]
    guidance_scale: NotRequired[Number | None]
    seconds_per_image: NotRequired[Number]


class BenchmarkSetting(TypedDict):
    """What the caption of a table says."""

    num_samples: int
    search_samples: int
    seed: int
    precision: str
    guidance_scales: list[Number]


class BenchmarkResult(TypedDict):
    """A result file of a benchmark."""

    metric: str
    setting: BenchmarkSetting
    rows: list[BenchmarkRow]


def read_report_result(path: Path) -> dict[str, Any]:
    """Read a result file of ``evaluate`` or, if it has rows, of ``benchmark``.

    Raises:
        ValueError: naming the file, if it is neither.
    """
    content = read_json(path)
    if "setting" not in content:
        raise ValueError(f"{path}: expected a result of evaluate or benchmark, got a file without 'setting'")
    if "rows" in content:
        return _checked(_converted(content, BenchmarkResult, path), path)
    return numbers_checked(_converted(content | {"name": content.get("name", "")}, Result, path), path)


def read_benchmark_result(path: Path) -> dict[str, Any]:
    """Read a result file of ``benchmark``.

    Raises:
        ValueError: naming the file, if it is no such result.
    """
    return _checked(read_json(path, BenchmarkResult), path)


def _converted(content: dict[str, Any], hint: Any, path: Path) -> dict[str, Any]:
    try:
        return convert(content, hint)
    except ConfigError as error:
        raise ConfigError(f"{path}: {problem}" for problem in error.problems) from None


def _checked(result: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return ``result`` if every row has the metric, and what the plots and comparisons of its kind need."""
    metric = result["metric"]
    interval = [f"{metric}_low", f"{metric}_high"]
    needed = {
        "teacher": ["seconds_per_image"],
        "student": ["seconds_per_image", *interval],
        "start": ["seconds_per_image", *interval],
        "solver": ["seconds_per_image", *interval],
    }
    for row in result["rows"]:
        what = f"{path}: row {shown(row['name'])}"
        for key in (metric, *needed.get(row.get("kind", ""), [])):
            if key not in row:
                raise ValueError(f"{what}: {key}: missing (expected number)")
            convert(row[key], Number, f"{what}: {key}")
        numbers_checked(row, path)
    return result
