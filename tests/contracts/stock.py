"""Images of exports by an environment that has diffusers and no stepdistill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contracts.cases import asked_of
from torch import Tensor

from stepdistill.export.contract import read_contract
from stepdistill.families.base import Family

PROGRAM = Path(__file__).with_name("without_stepdistill.py")


def job(
    export: Path, family: Family, count: int, seed: int, *, output: str = "images", teacher: str | None = None,
    **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """What is asked of an export: images for the family's example conditions, as its contract says but for ``options``.

    With a ``teacher``, also those of a fresh one under the export's scheduler, before and after it has loaded
    ``lora/``.
    """
    contract = read_contract(export)
    call = {**asked_of(family, count), **contract.call, **options}
    return {
        "export": str(export), "own_code": contract.own_code, "call": call, "seed": seed,
        "output": str(export / output), "teacher": teacher,
    }  # fmt: skip


def images_without_stepdistill(jobs: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Do all jobs in one process, which works in ``folder`` and caches code there."""
    (folder / "jobs.json").write_text(json.dumps(list(jobs)))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    done = subprocess.run(
        [sys.executable, "-I", str(PROGRAM), str(folder / "jobs.json")],
        env=environment, cwd=folder, capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def read_images(export: Path, output: str = "images") -> Tensor:
    """The images (B, C, H, W) of a job that was done."""
    return torch.from_numpy(np.load(export / f"{output}.npy")).movedim(-1, 1)
