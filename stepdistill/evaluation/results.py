"""Result files: settings, versions, machine."""

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
from stepdistill.evaluation.suite import Judge


def describe_setting(judge: Judge, **settings: Any) -> dict[str, Any]:
    """What makes a result comparable: settings, feature network, reference, versions."""
    return {
        **settings,
        "features": judge.features.describe(),
        "reference": judge.describe_reference(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of everything that numbers pass through."""
    packages = ("torch", "diffusers", "transformers", "numpy", "pillow")
    installed = {name: importlib.metadata.version(name) for name in packages}
    return {"stepdistill": stepdistill.__version__, **installed, "python": platform.python_version()}


def machine(device: torch.device) -> dict[str, Any]:
    """What seconds and memory were measured on."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": kind, "threads": torch.get_num_threads(), "cores": os.cpu_count()}


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
