"""Result files: versions, machine, writing, reading."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch

import stepdistill
from stepdistill.evaluation.metrics.table import directions
from stepdistill.files.reading import read_json
from stepdistill.files.schema import ConfigError, convert
from stepdistill.files.words import visible
from stepdistill.files.writing import atomic_write, check_new_file


class Result(TypedDict):
    """What every result of ``evaluate`` has, beside its numbers."""

    name: str
    setting: dict[str, Any]


def versions() -> dict[str, str]:
    """Return the versions of all packages that numbers pass through."""
    found = {"stepdistill": stepdistill.__version__}
    for name in ("torch", "diffusers", "transformers", "numpy", "pillow"):
        found[name] = importlib.metadata.version(name)
    return found | {"python": platform.python_version()}


def machine(device: torch.device) -> dict[str, Any]:
    """Return the machine on which seconds and memory are measured."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": kind, "threads": torch.get_num_threads(), "cores": os.cpu_count()}


def check_result_place(path: Path) -> None:
    """Raise ``ValueError`` if no result can be written at ``path``, or it would replace anything but an earlier one."""
    check_new_file(path)
    if not path.is_file() or not path.stat().st_size:
        return
    try:
        read_result(path)
    except ValueError:
        raise ValueError(f"{path}: expected a new file or an earlier result to replace, got another file") from None


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result file as a whole."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def read_result(path: Path) -> dict[str, Any]:
    """Read a result file of ``evaluate``; characters of its name that are not printed become escapes.

    Raises:
        ValueError: naming the file, if it is no such result, or a metric of it is no number.
    """
    try:
        result = read_json(path, Result)
    except ConfigError as error:
        raise ValueError(f"{path}: expected a result of evaluate; {'; '.join(error.problems)}") from None
    return numbers_checked(result, path) | {"name": visible(result["name"])}


def numbers_checked(result: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return ``result``, read from ``path``, if every metric that it has is a number, and an interval has both ends."""
    for metric in directions().keys() & result.keys():
        interval = [key for key in (f"{metric}_low", f"{metric}_high") if key in result]
        if len(interval) == 1:
            raise ValueError(f"{path}: {metric}: expected both ends of its interval, got {interval[0]} only")
        for key in (metric, *interval):
            convert(result[key], float, f"{path}: {key}")
    return result
