"""The common part of latent diffusion families: the pipeline around the network, its VAE, its prompts.

A teacher is an opened diffusers pipeline. Its VAE and text encoders are used through it and never trained. Prompts are
embedded by its own ``encode_prompt``, so a student is trained on what the exported pipeline will feed it. Networks take
scaled latents; the VAE's config defines the scaling.
"""

from __future__ import annotations

import abc
import functools
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stepdistill.batch import Batch, Cond, RawBatch
from stepdistill.diffusion.fitted import fit_grid
from stepdistill.diffusion.reading import read_schedule
from stepdistill.diffusion.samplers import Sampler
from stepdistill.diffusion.schedulers import to_diffusers
from stepdistill.families.base import Family, Inputs
from stepdistill.families.config import Resolution, TeacherConfig, sides_of
from stepdistill.families.loading import open_pipeline
from stepdistill.families.prompts import EXAMPLE_PROMPTS, prompt_reader, warn_too_long
from stepdistill.families.second_time import LAYERS, give_second_time, two_time_pipeline
from stepdistill.families.vaes import (
    check_channels,
    dtype_of,
    latent_channels,
    latent_statistics,
    mode,
)
from stepdistill.loading import read_code


class LatentFamily(Family):
    """An opened latent diffusion pipeline.

    Args:
        pipe: the pipeline.
        resolution: side in pixels of its images, or their height and width; None for the size in its network's config.
        guidance_scale: the network's guidance input, for families that have one.
    """

    caches_latents = True
    latents_per_token: ClassVar[int] = 1
    """Places of the latent that the pipeline packs into one of the network's inputs."""
    side_multiple: ClassVar[int] = 1
    """Latents by which the height and the width must be divisible."""
    makes_clips: ClassVar[bool] = False
    """Whether its images are clips (C, F, H, W)."""
    scales_states: ClassVar[bool] = False
    """Whether the pipeline scales noise and states as schedulers in units of sigma (Euler, Heun) expect."""

    def __init__(self, pipe: Any, *, resolution: Resolution | None = None, guidance_scale: float | None = None) -> None:
        if guidance_scale is not None:
            raise ValueError(
                f"teacher.guidance_scale: got {guidance_scale}, but {type(self).__name__} takes no guidance as an "
                "input; expected method.guidance_scale"
            )
        self.pipe = pipe
        self.network = getattr(pipe, self.component)
        self.scheduler_config = json.loads(pipe.scheduler.to_json_string())
        self.schedule, self.prediction_type = read_schedule(self.scheduler_config)
        self.check_process()
        check_channels(self.network, pipe.vae, self.latents_per_token)
        factor, (height, width) = self.spatial_factor(), self.native_size()
        if resolution is not None:
            height, width = sides_of(resolution)
            self.check_size((height, width), "teacher.resolution")
        self.sample_shape = (latent_channels(pipe.vae), height // factor, width // factor)
        self.image_shape = (pipe.vae.config.get("in_channels", 3), height, width)
        self.pipeline_kwargs = {"height": height, "width": width, "use_resolution_binning": False}
        self.num_classes = None
        # training has no use for a safety checker, which takes a gigabyte
        parts = {name: part for name, part in pipe.components.items() if name not in (self.component, "safety_checker")}
        self.frozen_modules = tuple(
            part.requires_grad_(False).eval() for part in parts.values() if isinstance(part, nn.Module)
        )

    @classmethod
    def load(cls, folder: Path, config: TeacherConfig) -> LatentFamily:
        family = cls.from_pipe(open_pipeline(folder, cls.component, config), config)
        family.code = read_code(folder)
        return family

    @classmethod
    def from_pipe(cls, pipe: Any, config: TeacherConfig) -> LatentFamily:
        """Return the teacher in an opened pipeline."""
        if config.null_class is not None:
            raise ValueError(
                f"teacher.null_class: expected a pixel teacher, got {config.null_class} for {cls.__name__}"
            )
        if config.frames is not None and not cls.makes_clips:
            raise ValueError(f"teacher.frames: got {config.frames}, but {cls.__name__} makes images")
        options: dict[str, Any] = {"frames": config.frames} if cls.makes_clips else {}
        return cls(pipe, resolution=config.resolution, guidance_scale=config.guidance_scale, **options)

    def spatial_factor(self) -> int:
        """Return the side in pixels of the square that one latent covers."""
        config = self.pipe.vae.config
        return 2 ** (len(config.get("block_out_channels") or config["encoder_block_out_channels"]) - 1)

    def size_multiple(self) -> int:
        """Return the number of pixels by which the height and the width of images must be divisible."""
        return self.spatial_factor() * self.side_multiple

    def check_size(self, size: tuple[int, int], key: str) -> None:
        native, factor = self.native_size(), self.size_multiple()
        if native != size and "height" not in inspect.signature(type(self.pipe).__call__).parameters:
            raise ValueError(f"{key}: got {list(size)}, but {type(self.pipe).__name__} samples {native} only")
        if any(side < 1 or side % factor for side in size):
            raise ValueError(f"{key}: expected multiples of {factor}, got {list(size)}")

    def native_size(self) -> tuple[int, int]:
        """Return the (height, width) in pixels that the pipeline samples by default."""
        size = getattr(self.pipe, self.component).config.get("sample_size") or self.pipe.default_sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.spatial_factor(), width * self.spatial_factor()

    @torch.no_grad()
    def encode(self, raw: RawBatch) -> Batch:
        """Encode images as the mode of the VAE's posterior: no random draw, so caches and runs agree."""
        images = None if raw.images is None else self.to_latents(raw.images)
        return Batch(images, self.condition(raw), len(raw.indices))

    def to_latents(self, images: Tensor) -> Tensor:
        """Convert images (B, C, H, W) in [-1, 1] to the network's latents, float32."""
        vae = self.pipe.vae
        latents = self.vae_encode(images.to(vae.device, vae.dtype)).float()
        shift, scale = latent_statistics(vae, latents)
        # a cache returns contiguous latents; channels_last would select other kernels
        return ((latents - shift) * scale).contiguous()

    def decode(self, x0: Tensor) -> Tensor:
        vae = self.pipe.vae.to(x0.device)  # it may have stayed on another device
        shift, scale = latent_statistics(vae, x0)
        images = self.vae_decode((x0 / scale + shift).to(vae.dtype)).float()
        return (images / 2 + 0.5).clamp(0, 1)

    def vae_encode(self, images: Tensor) -> Tensor:
        """Return the VAE's own latents of images (B, C, ...) in [-1, 1]."""
        return mode(self.pipe.vae.encode(images))

    def vae_decode(self, latents: Tensor) -> Tensor:
        """Invert :meth:`vae_encode`."""
        return self.pipe.vae.decode(latents).sample

    def image_size(self, x_t: Tensor) -> tuple[int, int]:
        """Return the (height, width) in pixels of the images of states (B, C, ..., H, W)."""
        height, width = x_t.shape[-2:]
        return height * self.spatial_factor(), width * self.spatial_factor()

    @abc.abstractmethod
    def condition(self, raw: RawBatch) -> Cond:
        """Return the condition of a batch."""

    def check_sampler(self, sampler: Sampler) -> None:
        scheduler, call = self.make_scheduler(sampler), type(self.pipe).__call__
        start, expected = float(getattr(scheduler, "init_noise_sigma", 1.0)), self.schedule.initial_noise(torch.ones(1))
        if abs(start - expected.item()) > 1e-6 * start:
            raise ValueError(
                f"method: {type(scheduler).__name__} starts {type(self.pipe).__name__} from noise of {start:g}, its "
                f"teacher's from {expected.item():g}; expected a method of Euler steps, or of one step"
            )
        taken = {*inspect.signature(scheduler.step).parameters, "timesteps"}
        needed = {name for name in sampler.pipeline_kwargs if name in taken}
        if missing := sorted(needed - set(inspect.signature(call).parameters)):
            raise ValueError(
                f"method: a call of {type(self.pipe).__name__} passes no {', '.join(missing)} on to its scheduler, "
                "which this sampler needs; expected a method whose sampler does not (lcm, progressive, ...)"
            )

    def add_inputs(self, inputs: Inputs) -> None:
        if inputs.w is not None:
            super().add_inputs(inputs)
        self.add_second_time(inputs)

    def add_second_time(self, inputs: Inputs) -> None:
        """Extend the network by a second time, if that is among the inputs."""
        if inputs.s:
            give_second_time(self.network)
            self.lora_targets = (*self.lora_targets, *LAYERS)  # type: ignore[misc]  # of this teacher alone
        self.inputs = inputs

    def pipeline(self, network: nn.Module, sampler: Sampler, guidance_scale: float = 1.0) -> Any:
        del guidance_scale  # an argument of the call
        scheduler = self.make_scheduler(sampler)
        if "steps_offset" in scheduler.config:  # unused on a trailing grid; pipelines warn if it is not 1
            scheduler.register_to_config(steps_offset=1)
        kind = two_time_pipeline(type(self.pipe)) if self.inputs.s else type(self.pipe)
        return rebuild(self.pipe, kind=kind, **{self.component: network, "scheduler": scheduler})

    def make_scheduler(self, sampler: Sampler) -> Any:
        """Return the scheduler of a student's pipeline: with the grid itself, where no call can tell it."""
        scheduler = to_diffusers(sampler, self.scheduler_config)
        called = "sigmas" in inspect.signature(type(self.pipe).__call__).parameters
        if called or not sampler.schedule.explicit_sigmas(sampler.times[:-1]):
            return scheduler
        fitted = fit_grid(sampler.times, scheduler.config.num_train_timesteps)
        return type(scheduler).from_config(scheduler.config, **fitted)

    def teacher_pipeline(self, scheduler: Any | None) -> Any:
        if scheduler is not None:
            if not self.scales_states and float(scheduler.init_noise_sigma) != 1:
                raise ValueError(
                    f"solver: {type(self.pipe).__name__} does not scale its states as {type(scheduler).__name__} "
                    "expects; choose DDIM, DPM-Solver++ or UniPC"
                )
            self.pipe.scheduler = scheduler
        return self.pipe


class PlainLatentFamily(LatentFamily):
    """Latent families whose networks take state, time and condition only."""

    def call(
        self,
        network: nn.Module,
        x_t: Tensor,
        t: Tensor,
        cond: Mapping[str, Tensor],
        *,
        w: Tensor | None = None,
        s: Tensor | None = None,
    ) -> Tensor:
        assert w is None, "this network takes no guidance weight"
        assert s is None or self.inputs.s, "this network takes no second time"
        return self.forward(network, x_t.to(dtype_of(network)), self.timesteps(t, s), cond)

    @abc.abstractmethod
    def forward(self, network: nn.Module, x_t: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Return the output of :meth:`call`, given states in the network's precision and :meth:`timesteps`."""


class TextToImageFamily(LatentFamily):
    """A latent diffusion pipeline that is conditioned on prompts."""

    takes_text = True

    def __init__(self, pipe: Any, **options: Any) -> None:
        super().__init__(pipe, **options)
        self.prompts = EXAMPLE_PROMPTS
        self.null = self.embed([""], null=True)

    @abc.abstractmethod
    def embed(self, prompts: Sequence[str], *, null: bool = False) -> Cond:
        """Return the pipeline's own embedding of the prompts, or with ``null`` that of as many missing prompts."""

    def condition(self, raw: RawBatch) -> Cond:
        if raw.captions is None:
            raise ValueError("data: the teacher takes text, but the data has no captions")
        return self.embed(raw.captions)

    def null_cond(self, cond: Mapping[str, Tensor]) -> Cond:
        return {name: self._null_like(name, value).expand_as(value) for name, value in cond.items()}

    @functools.cached_property
    def _nulls(self) -> dict[tuple[str, torch.dtype, torch.device], Tensor]:
        """The parts of the null condition where they are used."""
        return {}

    def _null_like(self, name: str, value: Tensor) -> Tensor:
        """Return a part of the null condition in the type and on the device of ``value``; it is copied there once."""
        key = name, value.dtype, value.device
        if key not in self._nulls:  # a copy in every call would make the host wait for the GPU
            self._nulls[key] = self.null[name].to(value)
        return self._nulls[key]

    def example_prompts(self, indices: Sequence[int]) -> list[str]:
        """Return the prompts of :meth:`example_cond`."""
        return [self.prompts[index % len(self.prompts)] for index in indices]

    def example_cond(self, indices: Sequence[int]) -> Cond:
        return self.embed(self.example_prompts(indices))

    def use_captions(self, captions: Sequence[str], others: Sequence[str] = ()) -> None:
        self.prompts = tuple(captions)  # all: a Fréchet distance to the data's images needs the data's own captions
        tokenizer, limit = prompt_reader(self.pipe, self.pipeline_kwargs)
        warn_too_long(tokenizer, [*captions, *others], limit=limit)


def rebuild(pipe: Any, *, kind: Any = None, **parts: Any) -> Any:
    """Return the same pipeline with other parts, or of another class ``kind``; the rest is shared."""
    kind = kind or type(pipe)
    wanted = inspect.signature(kind.__init__).parameters
    parts = {**pipe.components, **parts}
    options = {name: value for name, value in pipe.config.items() if name in wanted and name not in parts}
    return kind(**parts, **options)
