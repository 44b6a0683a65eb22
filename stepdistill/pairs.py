"""A teacher's own samples beside the noise they came from: what DMD's regression learns from.

A folder of pairs is ``pairs.json`` (which teacher, which sampler, how many) and ``shard-00000.safetensors``, ...: each
``noise`` (N, ...) of unit variance, ``images`` (N, ...) as the network sees images, both in half precision, and one
tensor ``cond.<name>`` a condition. A pair is a function of (seed, index), so a run that was stopped and started again
makes the same ones, and a shard is there whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stepdistill.denoiser import Cond, Denoiser
from stepdistill.families.base import Family
from stepdistill.networks import CopyBank
from stepdistill.randomness import derive_seed
from stepdistill.run import fingerprint_weights
from stepdistill.trajectory import check_guidance, lead, solver_step

MANIFEST = "pairs.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """The ``pairs`` section: how a teacher samples deterministically, and how much."""

    output_dir: str
    count: int = 10_000
    solver: Literal["euler", "heun"] = "heun"
    """Euler is DDIM; Heun takes two calls a step, except the last."""
    steps: int = 18
    guidance_scale: float = 1.0
    """Of the teacher; 1 is none."""
    batch_size: int = 100
    shard_size: int = 1000
    """Pairs a file: what a stopped run loses at most."""
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("count", "steps", "batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: found {getattr(self, name)}, wanted at least 1")


def make_pairs(family: Family, config: PairsConfig, progress: Callable[[int], object] = lambda done: None) -> Path:
    """Write ``config.count`` pairs, those that are not there yet; returns their folder.

    Args:
        family: an opened teacher, on the device it shall run on.
        config: the ``pairs`` section.
        progress: told how many pairs there are, after every shard.

    Raises:
        ValueError: if the folder holds pairs of another teacher or sampler, or the teacher cannot be guided.
    """
    check_guidance(config.guidance_scale, family)
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    _agree(folder / MANIFEST, _manifest(family, config))
    for number in range(math.ceil(config.count / config.shard_size)):
        indices = range(number * config.shard_size, min(config.count, (number + 1) * config.shard_size))
        path = shard_path(folder, number)
        if not path.is_file():
            temporary = path.with_suffix(".part")
            save_file(_shard(family, config, indices), temporary)
            os.replace(temporary, path)
        progress(indices.stop)
    return folder


def shard_path(folder: Path, number: int) -> Path:
    """The file of shard ``number``."""
    return folder / f"shard-{number:05d}.safetensors"


def _manifest(family: Family, config: PairsConfig) -> dict[str, Any]:
    ignored = ("output_dir", "batch_size")
    made = {key: value for key, value in dataclasses.asdict(config).items() if key not in ignored}
    return {"teacher_sha256": fingerprint_weights(family.network), "sample_shape": list(family.sample_shape)} | made


def _agree(path: Path, wanted: dict[str, Any]) -> None:
    """Write the manifest, or check it against the one that is there."""
    if not path.is_file():
        path.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    if changed := [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]:
        lines = [f"{key}: was {found.get(key)!r}, is {wanted.get(key)!r}" for key in changed]
        raise ValueError(
            f"{path} is of other pairs; restore these or choose another output_dir:\n  - " + "\n  - ".join(lines)
        )


def _shard(family: Family, config: PairsConfig, indices: range) -> dict[str, Tensor]:
    parts = [
        _sample(family, config, indices[begin : begin + config.batch_size])
        for begin in range(0, len(indices), config.batch_size)
    ]
    return {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}


@torch.no_grad()
def _sample(family: Family, config: PairsConfig, indices: Sequence[int]) -> dict[str, Tensor]:
    """Noise, rounded to half precision before it is used, and where the teacher's ODE leads from it."""
    device = next(family.network.parameters()).device
    generators = [torch.Generator().manual_seed(derive_seed(config.seed, index)) for index in indices]
    noise = torch.stack([torch.randn(family.sample_shape, generator=g) for g in generators]).half()
    cond = family.example_cond(indices)
    on_device = {name: value.to(device) for name, value in cond.items()}
    teacher = lead(family, _denoiser(family), on_device, config.guidance_scale - 1)
    x = family.schedule.initial_noise(noise.float().to(device))
    times = family.schedule.grid(config.steps).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        for t, s in zip(times[:-1], times[1:], strict=True):
            x = solver_step(teacher, x, t.expand(len(x)), s.expand(len(x)), family.schedule, config.solver)
    pairs = {"noise": noise, "images": x.half().cpu()}
    return pairs | {f"cond.{name}": value.contiguous() for name, value in cond.items()}


def _denoiser(family: Family) -> Denoiser:
    return Denoiser(family, CopyBank(family.network), "teacher")


class Pairs:
    """The pairs in a folder, read row by row: they need not fit into memory.

    Args:
        folder: what :func:`make_pairs` wrote.

    Raises:
        ValueError: if there are none, or if they are not complete.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        self.count, self.shard_size = self.manifest["count"], self.manifest["shard_size"]
        self.shards = [self._open(number) for number in range(math.ceil(self.count / self.shard_size))]

    def __len__(self) -> int:
        return self.count

    def rows(self, indices: Sequence[int], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Cond]:
        """Unit noise (B, ...), images (B, ...), both float32, and conditions of the pairs at ``indices``."""
        places = [divmod(index, self.shard_size) for index in indices]
        columns = {
            name: torch.cat([_single(self.shards[shard].get_slice(name)[row : row + 1]) for shard, row in places])
            for name in self.shards[0].keys()  # noqa: SIM118  # an open file, no dict
        }
        columns = {name: column.to(device) for name, column in columns.items()}
        cond = {name.removeprefix("cond."): value for name, value in columns.items() if name.startswith("cond.")}
        return columns["noise"], columns["images"], cond

    def check_teacher(self, family: Family) -> None:
        """Raise ``ValueError`` unless they are of this teacher, to whose network no role has been added yet."""
        found, wanted = self.manifest["teacher_sha256"], fingerprint_weights(family.network)
        if found != wanted:
            raise ValueError(
                f"method.pairs: {self.folder} was made by the teacher {found}, but teacher.path is {wanted} "
                "(weights, in the precision of teacher.dtype); make pairs anew with scripts/make_pairs.py"
            )

    def _open(self, number: int) -> Any:
        path = shard_path(self.folder, number)
        if not path.is_file():
            raise ValueError(f"method.pairs: {path} is missing; run scripts/make_pairs.py again, it goes on from there")
        try:
            shard = safe_open(path, framework="pt")
            rows = shard.get_slice("images").get_shape()[0]
        except (OSError, SafetensorError) as error:
            raise ValueError(f"method.pairs: {path} cannot be read: {error}; remove it and make it anew") from error
        wanted = min(self.shard_size, self.count - number * self.shard_size)
        if rows != wanted:
            raise ValueError(f"method.pairs: {path} holds {rows} pairs, wanted {wanted}; remove it and make it anew")
        return shard


def _single(row: Tensor) -> Tensor:
    """A row in single precision: under autocast, the CPU joins no halves."""
    return row.float() if row.is_floating_point() else row


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"method.pairs: no {MANIFEST} in {folder}; make pairs with scripts/make_pairs.py first")
    return json.loads(path.read_text(encoding="utf-8"))
