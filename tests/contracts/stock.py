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
        "export": str(export), "own_code": contract.own_code, "call": call, "seed": seed, "count": count,
        "seeds_globally": not family.hands_generators_on, "output": str(export / output), "teacher": teacher,
    }  # fmt: skip


class StockDiffusers:
    """A process that has diffusers and no stepdistill: started by the first job, and kept for the next.

    Args:
        folder: where it works, and caches the code of exports.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[str] | None = None

    def generate_images(self, jobs: Sequence[Mapping[str, Any]]) -> None:
        """Do all jobs, in their order."""
        if self.process is None:
            self.process = self._start()
        assert self.process.stdin is not None and self.process.stdout is not None
        for one in jobs:
            self.process.stdin.write(json.dumps(one) + "\n")
            self.process.stdin.flush()
            assert self.process.stdout.readline() == "done\n", self._errors()[-3000:]

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.communicate(timeout=60)

    def _start(self) -> subprocess.Popen[str]:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(self.folder / "modules")}
        return subprocess.Popen(
            [sys.executable, "-I", str(PROGRAM)], env=environment, cwd=self.folder, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log.open("w"),
        )  # fmt: skip

    @property
    def _log(self) -> Path:
        return self.folder / "stderr.txt"

    def _errors(self) -> str:
        self.close()
        self.process = None
        return self._log.read_text()


def read_images(export: Path, output: str = "images") -> Tensor:
    """The images (B, C, H, W) of a job that was done."""
    return torch.from_numpy(np.load(export / f"{output}.npy")).movedim(-1, 1)
