"""A teacher's own samples beside the noise they came from: what DMD's regression learns from.

A folder of pairs is ``pairs.json`` (which teacher, which sampler, how many) and ``shard-00000.safetensors``, ...: each
``noise`` (N, ...) of unit variance, ``images`` (N, ...) as the network sees images, both in half precision, and one
tensor ``cond.<name>`` a condition. A pair is a function of (seed, index), so a run that was stopped and started again
makes the same ones, and a shard is there whole or not at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from stepdistill.batch import Cond
from stepdistill.config import fingerprint
from stepdistill.data.shards import Kind, Shards, agree, write_shards
from stepdistill.data.text import read_prompts
from stepdistill.diffusion.ode import solver_step
from stepdistill.families.base import Family
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.fingerprint import fingerprint_weights
from stepdistill.randomness import derive_seed

KIND = Kind(key="method.pairs", rows="pairs", manifest="pairs.json", script="scripts/make_pairs.py")


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
    prompts: str | None = None
    """Of a teacher that takes text, what is sampled, in turn: a ``.txt`` (one a line) or a ``.jsonl``."""
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
        ValueError: if the folder holds pairs of another teacher or sampler, the teacher cannot be guided, or it takes
            text and there are no prompts.
    """
    family.check_guidance(config.guidance_scale)
    if family.takes_text:
        family.use_captions(_prompts(config))
    folder = Path(config.output_dir)
    agree(folder / KIND.manifest, _manifest(family, config), KIND.rows)
    write_shards(folder, config.count, config.shard_size, lambda rows: _shard(family, config, rows), progress)
    return folder


def _prompts(config: PairsConfig) -> list[str]:
    if config.prompts is None or not Path(config.prompts).is_file():
        raise ValueError(
            f"pairs.prompts: found {config.prompts!r}; wanted a file of prompts, since the teacher takes text"
        )
    return read_prompts(Path(config.prompts))


def _manifest(family: Family, config: PairsConfig) -> dict[str, Any]:
    ignored = ("output_dir", "batch_size", "prompts")
    made = {key: value for key, value in dataclasses.asdict(config).items() if key not in ignored}
    if family.takes_text:
        made["prompts"] = fingerprint(list(family.prompts))
    return {"teacher_sha256": fingerprint_weights(family.network), "sample_shape": list(family.sample_shape)} | made


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
    teacher = _denoiser(family).guided(on_device, config.guidance_scale - 1)
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
        self.shards = Shards(folder, KIND)

    def __len__(self) -> int:
        return len(self.shards)

    def rows(self, indices: Sequence[int], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Cond]:
        """Unit noise (B, ...), images (B, ...), both float32, and conditions of the pairs at ``indices``."""
        columns = {name: self.shards.rows(name, indices).to(device) for name in self.shards.names}
        cond = {name.removeprefix("cond."): value for name, value in columns.items() if name.startswith("cond.")}
        return columns["noise"], columns["images"], cond

    def check_teacher(self, family: Family) -> None:
        """Raise ``ValueError`` unless they are of this teacher, to whose network no role has been added yet."""
        found, wanted = self.shards.manifest["teacher_sha256"], fingerprint_weights(family.network)
        if found != wanted:
            raise ValueError(
                f"method.pairs: {self.shards.folder} was made by the teacher {found}, but teacher.path is {wanted} "
                "(weights, in the precision of teacher.dtype); make pairs anew with scripts/make_pairs.py"
            )
