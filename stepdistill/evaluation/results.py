"""Result files: versions, machine, writing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import stepdistill
from stepdistill.files.writing import atomic_write


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


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result file as a whole."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
