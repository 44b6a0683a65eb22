"""Pairs of noise and the image that a teacher's ODE makes of it: DMD's regression, and a teacher's samples as data.

A folder of pairs is ``pairs.json`` (which teacher and encoders, which sampler, how many) and
``shard-00000.safetensors``, ...: each holds ``noise`` (N, ...) of unit variance, ``images`` (N, ...) as the network
sees images, both in half precision, and one tensor ``cond.<name>`` per condition. A pair is a function of (seed,
index), so a run that was stopped and started again makes the same pairs; a shard is complete or absent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from stepdistill.batch import Batch, Cond, RawBatch
from stepdistill.config import changed_keys, fingerprint_json
from stepdistill.data.base import DataConfig, Dataset
from stepdistill.data.latent_cache import encoders
from stepdistill.data.prompts import first_prompts
from stepdistill.data.shard_writing import write_or_check_manifest, write_shards
from stepdistill.data.shards import ShardFormat, Shards, concatenate
from stepdistill.diffusion.ode import Solver, solver_step
from stepdistill.diffusion.schedule import DiscreteVP
from stepdistill.families.base import Family
from stepdistill.files.places import Place
from stepdistill.files.precision import Precision
from stepdistill.files.ranges import GuidanceScale, PositiveInt, Seed
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.fingerprint import fingerprint_weights
from stepdistill.randomness import derive_seed

FORMAT = ShardFormat(key="method.pairs", rows="pairs", manifest="pairs.json", script="scripts/make_pairs.py")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """The ``pairs`` section: how a teacher samples deterministically, and how many pairs."""

    output_dir: Place
    count: PositiveInt = 10_000
    solver: Literal["euler", "heun"] = "heun"
    """Euler is DDIM; Heun calls the network twice a step, except in the last."""
    steps: PositiveInt = 18
    guidance_scale: GuidanceScale = 1.0
    """Guidance of the teacher; 1 is none."""
    prompts: Place | None = None
    """Prompts for a teacher that takes text, used in turn: a file as in :mod:`stepdistill.data.prompts`."""
    batch_size: PositiveInt = 100
    shard_size: PositiveInt = 1000
    """Pairs per file, which is the most that a stopped run loses."""
    precision: Precision = "fp32"
    seed: Seed = 0


def make_pairs(family: Family, config: PairsConfig, progress: Callable[[int], object] = lambda done: None) -> Path:
    """Write those of ``config.count`` pairs that are missing, and return their folder.

    Args:
        family: an opened teacher, on the device that samples.
        config: the ``pairs`` section.
        progress: called after every shard with the number of pairs so far.

    Raises:
        ValueError: if the folder holds pairs of another teacher or sampler, the teacher cannot be guided or has fewer
            timesteps than ``config.steps``, or it takes text and prompts are missing, or takes none and there are some.
    """
    family.check_guidance(config.guidance_scale)
    if isinstance(family.schedule, DiscreteVP) and config.steps > family.schedule.num_timesteps:
        most = family.schedule.num_timesteps
        raise ValueError(f"pairs.steps: expected at most the teacher's {most} timesteps, got {config.steps}")
    if family.takes_text:
        family.use_captions(_prompts(config))
    elif config.prompts is not None:
        raise ValueError(f"pairs.prompts: expected none, because the teacher takes no text, got {config.prompts!r}")
    folder = Path(config.output_dir)
    write_or_check_manifest(folder / FORMAT.manifest, _manifest(family, config), FORMAT.rows)
    write_shards(folder / FORMAT.manifest, FORMAT.rows, lambda rows: _shard(family, config, rows), progress)
    return folder


def _prompts(config: PairsConfig) -> list[str]:
    if config.prompts is None or not Path(config.prompts).is_file():
        raise ValueError(
            f"pairs.prompts: expected a file of prompts, because the teacher takes text, got {config.prompts!r}"
        )
    return first_prompts(Path(config.prompts))


def _manifest(family: Family, config: PairsConfig) -> dict[str, Any]:
    teacher = {"teacher_sha256": fingerprint_weights(family.network), "sample_shape": list(family.sample_shape)}
    manifest: dict[str, Any] = teacher | dataclasses.asdict(config)
    for ignored in ("output_dir", "batch_size", "prompts"):
        del manifest[ignored]
    if family.caches_latents:
        manifest["encoders"] = encoders(family)
    if family.takes_text:
        manifest["prompts"] = fingerprint_json(list(family.prompts))
    if config.guidance_scale != 1 and (rule := guidance_of(family)):
        manifest["guidance"] = rule
    return manifest


def guidance_of(family: Family) -> list[Any]:
    """Return how a teacher guides if that is not as its family does by default, as a JSON value; else nothing."""
    rule = family.guidance_rule
    return [] if rule == type(family).guidance_rule else [rule.rescale, rule.amount, *rule.interval]


def _shard(family: Family, config: PairsConfig, indices: range) -> dict[str, Tensor]:
    parts = []
    for begin in range(0, len(indices), config.batch_size):
        parts.append(_sample(family, config, indices[begin : begin + config.batch_size]))
    return concatenate(parts)


@torch.no_grad()
def _sample(family: Family, config: PairsConfig, indices: Sequence[int]) -> dict[str, Tensor]:
    """Return noise, rounded to half precision before it is used, and the images that the teacher's ODE makes of it."""
    device = next(family.network.parameters()).device
    noise = torch.stack([_noise(family, config.seed, index) for index in indices]).half()
    cond = family.example_cond(indices)
    on_device = {name: value.to(device) for name, value in cond.items()}
    teacher = _denoiser(family).guided(on_device, config.guidance_scale - 1)
    x = family.schedule.initial_noise(noise.float().to(device))
    times = family.schedule.grid(config.steps).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        for t, s in zip(times[:-1], times[1:], strict=True):
            solver: Solver = config.solver if s > 0 else "euler"  # as a Heun step to clean data is
            x = solver_step(teacher, x, t.expand(len(x)), s.expand(len(x)), family.schedule, solver)
    pairs = {"noise": noise, "images": x.half().cpu()}
    return pairs | {f"cond.{name}": value.contiguous() for name, value in cond.items()}


def _noise(family: Family, seed: int, index: int) -> Tensor:
    generator = torch.Generator().manual_seed(derive_seed(seed, index))
    return torch.randn(family.sample_shape, generator=generator)


def _denoiser(family: Family) -> Denoiser:
    return Denoiser(family, CopyBank(family.network), "teacher")


class Pairs:
    """The pairs in a folder, read row by row; they need not fit into memory.

    Args:
        folder: what :func:`make_pairs` wrote.
        key: the key of the configuration that names it.

    Raises:
        ValueError: if there are none, or some are missing.
    """

    def __init__(self, folder: str | Path, key: str = FORMAT.key) -> None:
        self.key, self.shards = key, Shards(folder, dataclasses.replace(FORMAT, key=key))
        layout = self.shards.layout()
        if missing := {"noise", "images"} - set(layout):
            raise ValueError(f"{key}: {folder}: expected noise and images in it, but {missing.pop()} is missing")

    def __len__(self) -> int:
        return len(self.shards)

    def rows(self, indices: Sequence[int], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Cond]:
        """Return unit noise (B, ...), images (B, ...) and conditions of pairs, in single precision."""
        noise, images = (self.shards.rows(name, indices).to(device).float() for name in ("noise", "images"))
        cond = {name: self.shards.rows(f"cond.{name}", indices) for name in self.shards.cond_names}
        return noise, images, Batch(None, cond, len(noise)).to(torch.device(device)).widened().cond

    @property
    def forwards(self) -> int:
        """Teacher forwards that made the pairs: Heun calls the network twice a step, except in the last."""
        steps = self.shards.entry("steps", int)
        calls = 2 * steps - 1 if self.shards.entry("solver", str) == "heun" else steps
        return len(self) * calls * (1 if self.shards.entry("guidance_scale", float) == 1 else 2)

    def check_teacher(self, family: Family) -> None:
        """Raise ``ValueError`` unless this teacher made them; no role may have been added to its network yet."""
        maker, teacher = self.shards.entry("teacher_sha256", str), fingerprint_weights(family.network)
        if maker != teacher:
            raise ValueError(
                f"{self.key}: {self.shards.folder} was made by the teacher {maker}, but teacher.path is {teacher} "
                "(weights, in the precision of teacher.dtype); make the pairs again with scripts/make_pairs.py"
            )
        self._check_encoders(family)
        rule = guidance_of(family) if self.shards.entry("guidance_scale", float) != 1 else []
        if (made_with := self.shards.manifest.get("guidance", [])) != rule:
            raise ValueError(
                f"{self.key}: {self.shards.folder} was made by a teacher guided by {made_with or 'default'}, but "
                f"teacher.guidance_rescale and teacher.guidance_interval ask for {rule or 'default'}; make pairs again"
            )
        shape, found = list(family.sample_shape), self.shards.layout()["images"][1]
        if found != shape:
            raise ValueError(f"{self.key}: {self.shards.folder}: expected samples {shape}, got {found}")

    def _check_encoders(self, family: Family) -> None:
        """Raise ``ValueError`` unless conditions and latents are this teacher's too."""
        if not family.caches_latents:
            return
        known = "encoders" in self.shards.manifest
        made = self.shards.entry("encoders", dict[str, str]) if known else {}
        if changed := changed_keys(made, encoders(family)):
            raise ValueError(
                f"{self.key}: {self.shards.folder}: expected pairs of this teacher's {', '.join(changed)}, got "
                f"{'those of another' if known else 'an older folder, which does not tell'}; make the pairs again with "
                f"{FORMAT.script}"
            )


class PairDataset(Dataset):
    """The images of pairs as data: a teacher's own samples, and the conditions they were sampled under.

    Args:
        config: the ``data`` section.
        family: the opened teacher, which made them.

    Raises:
        ValueError: if another teacher made them, some are missing, or the section asks for what they do not hold.
    """

    num_classes = None
    flip = False
    is_encoded = True

    def __init__(self, config: DataConfig, family: Family) -> None:
        if config.flip or config.caption_dropout:
            raise ValueError(
                f"data: expected flip: false and caption_dropout: 0, got {config.flip} and {config.caption_dropout:g}: "
                "pairs hold no mirrored images and no empty captions"
            )
        self.pairs = Pairs(str(config.path), "data.path")
        self.pairs.check_teacher(family)
        self.size, self.version = family.image_shape, self.pairs.shards.version
        self._length = min(len(self.pairs), config.max_samples or len(self.pairs))

    def __len__(self) -> int:
        return self._length

    def name(self, index: int) -> str:
        """Return ``<folder>[index]``."""
        return f"{self.pairs.shards.folder}[{index}]"

    def load(self, indices: Sequence[int]) -> RawBatch:
        """Return indices only; :meth:`read_encoded` reads the rest."""
        return RawBatch(None, None, None, tuple(indices))

    def read_encoded(self, raw: RawBatch) -> Batch:
        """Return samples as the network sees them, and their conditions."""
        _, images, cond = self.pairs.rows(raw.indices)
        return Batch(images, cond, len(raw.indices))
