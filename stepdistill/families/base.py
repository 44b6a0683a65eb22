"""The interface of a teacher family.

A family hides how its networks are called (time convention, preconditioning, packing, sign, latents) behind one method,
:meth:`Family.call`, and how images become the networks' inputs and back behind :meth:`Family.encode` and
:meth:`Family.decode`. Methods, trainer, evaluation and export use a teacher through this interface only.
"""

from __future__ import annotations

import abc
import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stepdistill.batch import Batch, Cond, RawBatch
from stepdistill.diffusion.guidance import PLAIN, GuidanceRule, PipelineRescale
from stepdistill.diffusion.samplers import Sampler
from stepdistill.diffusion.schedule import NoiseSchedule, RectifiedFlow
from stepdistill.diffusion.schedulers import to_diffusers
from stepdistill.families.config import TeacherConfig
from stepdistill.families.visiting import tensors_of, visiting
from stepdistill.families.widening import widen_convolution

MIN_ALPHA = 0.005
"""Smallest signal with which a noise-predicting network can predict the clean image (:meth:`Family.sees_pure_noise`).
Linear and scaled linear betas end at 0.0063 (DDPM, DiT, PixArt) or 0.068 (Stable Diffusion), where published students
of few steps still predict noise (LCM of PixArt, arXiv 2401.05252); cosine schedules at 5e-5 and rescaled ones at 0."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Inputs of a student's network besides state, time and condition."""

    w: tuple[float, float] | None = None
    """Range of guidance weights ``w = guidance_scale - 1`` for which it is trained; None without this input."""
    s: bool = False
    """Whether it takes the time at which a step ends."""


class Family(abc.ABC):
    """One family of teachers, holding one opened teacher."""

    component: ClassVar[str]
    """The network's folder and argument in the pipeline: ``"unet"`` or ``"transformer"``."""
    network_classes: ClassVar[tuple[str, ...]]
    """Diffusers classes of networks by which a teacher of this family is recognised."""
    pipeline_names: ClassVar[tuple[str, ...]] = ()
    """Diffusers pipelines of this family, if networks of the class serve several; empty: any."""
    parts: ClassVar[tuple[str, ...]]
    """Parts of the pipeline beside the network and the scheduler; a teacher with others is refused."""
    optional_parts: ClassVar[tuple[str, ...]] = ()
    """Parts that a teacher may have or lack."""
    refused_parts: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """What other parts are, and why a teacher that has them is refused."""
    takes_text: ClassVar[bool] = False
    """Whether the condition is a prompt."""
    predicts_pixels: ClassVar[bool] = False
    """Whether clean images of the networks' space are pixels in [-1, 1]."""
    encodes_images: ClassVar[bool] = True
    """Whether :meth:`encode` takes images; else the data are prompts, or the teacher's own samples."""
    caches_latents: ClassVar[bool] = False
    """Whether frozen encoders of :attr:`pipe` make latents and embeddings, which can be cached."""
    loads_lora: ClassVar[bool] = False
    """Whether the stock pipeline has ``load_lora_weights``."""
    processes: ClassVar[tuple[type[NoiseSchedule], ...]]
    """The noise processes that :meth:`call` and the pipeline implement."""
    feature_blocks: ClassVar[tuple[str, ...]]
    """Sub-modules whose outputs are the features of a critic."""
    lora_targets: ClassVar[tuple[str, ...]]
    """Layers that get adapters."""
    head: ClassVar[str | None] = None
    """The last layer, where it is a convolution of the network's own output, which :meth:`widen` can repeat."""

    pipe: Any = None
    """The opened diffusers pipeline, of families that have one."""
    network: nn.Module
    schedule: NoiseSchedule
    prediction_type: str
    scheduler_config: Mapping[str, Any]
    sample_shape: tuple[int, ...]
    """(C, H, W) of the network's input; of a video family (C, F, H, W)."""
    image_shape: tuple[int, ...]
    """(C, H, W) of the images that :meth:`encode` takes and :meth:`decode` returns; of clips (C, F, H, W)."""
    frozen_modules: tuple[nn.Module, ...] = ()
    """VAE and text encoders: never trained, and not in checkpoints."""
    prompts: Sequence[str] = ()
    """Prompts of :meth:`example_cond`, in turn, of a family that takes text."""
    num_classes: int | None
    """Number of class labels; None for a teacher without labels."""
    inputs: Inputs = Inputs()
    """Inputs of the network besides state, time and condition; see :meth:`add_inputs`."""
    points: int = 1
    """Predictions that a call of a student's network gives, beside each other; see :meth:`widen`."""
    hands_generators_on: ClassVar[bool] = True
    """Whether the stock pipeline passes its generators to its scheduler; else a step's noise is the global one's."""
    guidance_convention: str = "diffusers: unconditional + guidance_scale * (conditional - unconditional); 1 is none"
    """What a call's ``guidance_scale`` means."""
    guidance_rule: GuidanceRule = PLAIN
    """What the teacher's own pipeline does with a guided prediction, see :mod:`stepdistill.families.guiding`."""
    can_rescale: ClassVar[PipelineRescale] = "none"
    """What that pipeline does if it is asked to rescale."""
    pipeline_kwargs: Mapping[str, Any] = MappingProxyType({})
    """Arguments with which a call of the pipeline samples as this family calls its networks, if it accepts them."""
    code: Mapping[str, bytes] = MappingProxyType({})
    """Python files of a teacher with its own code, by their path in its folder; its pipeline needs them."""

    @classmethod
    @abc.abstractmethod
    def load(cls, folder: Path, config: TeacherConfig) -> Family:
        """Open the teacher in ``folder``; raise ``ValueError`` with the name of the file that is wrong."""

    @classmethod
    @abc.abstractmethod
    def tiny(cls, seed: int = 0) -> Family:
        """Return a random miniature of the real classes, for tests without a download."""

    @classmethod
    def accepts_pipeline(cls, pipeline: str | None) -> bool:
        """Return whether a teacher in this diffusers pipeline (None: none, or a custom one) may be of this family."""
        return not cls.pipeline_names or pipeline in cls.pipeline_names

    @classmethod
    def parts_of(cls, pipeline: str | None) -> tuple[set[str], set[str]]:
        """Return the parts that a diffusers pipeline of this family needs, and those that it may have."""
        del pipeline
        return {cls.component, "scheduler", *cls.parts}, {*cls.optional_parts}

    def check_process(self) -> None:
        """Raise ``ValueError`` with the scheduler's name if the family does not implement its noise process."""
        if not isinstance(self.schedule, self.processes):
            known = " or ".join(process.__name__ for process in self.processes)
            raise ValueError(
                f"scheduler/scheduler_config.json: {self.scheduler_config.get('_class_name')}: expected a scheduler "
                f"of {known}, got one of {type(self.schedule).__name__}, which {type(self).__name__} does not implement"
            )

    @property
    def conditioning(self) -> str:
        """The kind of condition: ``"prompt"``, ``"class_labels"`` or ``"none"``."""
        if self.takes_text:
            return "prompt"
        return "none" if self.num_classes is None else "class_labels"

    def to(self, device: torch.device) -> None:
        """Move the frozen modules; the networks belong to the bank."""
        for module in self.frozen_modules:
            module.to(device)

    @contextlib.contextmanager
    def on_device(self, device: torch.device | str) -> Iterator[None]:
        """Have the frozen modules on ``device`` inside the context."""
        with visiting(tensors_of(self.frozen_modules), device):
            yield

    def check_guidance(self, guidance_scale: float) -> None:
        """Raise ``ValueError`` for a scale below 1, or one other than 1 if the teacher has no null condition."""
        if guidance_scale < 1:
            raise ValueError(f"method.guidance_scale: expected at least 1 (1 is no guidance), got {guidance_scale}")
        if guidance_scale != 1:
            self.null_cond(self.example_cond([0]))

    def sees_pure_noise(self, t: float = 1.0) -> bool:
        """Return whether the network can predict the clean image at time ``t``, by default in pure noise.

        A noise prediction with error ``e`` gives ``x_0 = (x_t - sigma eps) / alpha`` with error ``sigma / alpha e``,
        which grows without bound as alpha vanishes. Velocity, flow and sample predictions divide by nothing.
        """
        alpha_t, _ = self.schedule(torch.tensor([t], dtype=torch.float64))
        return self.prediction_type != "epsilon" or alpha_t.item() >= MIN_ALPHA

    def check_sampler(self, sampler: Sampler) -> None:
        """Raise ``ValueError`` if no scheduler, or no call of the pipeline, can express the sampler."""
        to_diffusers(sampler, self.scheduler_config)

    def later_noise(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Return the noise (B, C, H, W) that a step adds, drawn as the scheduler of this family's pipeline draws it."""
        shape = self.pack(torch.empty(1, *self.sample_shape)).shape[1:]
        return self.unpack(torch.stack([torch.randn(shape, generator=one) for one in generators]))

    def pack(self, states: Tensor) -> Tensor:
        """Return states (B, C, ...) as the pipeline's loop holds them and its scheduler sees them."""
        return states

    def unpack(self, packed: Tensor) -> Tensor:
        """Invert :meth:`pack`, for states of :attr:`sample_shape`."""
        return packed

    def image_tokens(self, feature: Tensor, x_t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Return the places of a block's output (B, C, N) that belong to the image, not to its prompt."""
        del x_t, cond
        return feature

    def guidance_arguments(self, scale: float) -> dict[str, Any]:
        """Return the arguments of the pipeline's call for the guidance scale ``scale``, 1 being none."""
        return {"guidance_scale": scale}

    def check_size(self, size: tuple[int, int], key: str) -> None:
        """Raise ``ValueError``, which names ``key``, unless the networks take images of this (height, width)."""
        if (own := self.image_shape[-2:]) != size:
            raise ValueError(f"{key}: expected {list(own)}, the teacher's only size, got {list(size)}")

    def use_captions(self, captions: Sequence[str], others: Sequence[str] = ()) -> None:
        """Use the training's captions as examples, and warn of those that are longer than the text encoder reads.

        Args:
            captions: one of every sample.
            others: further ones that are trained on.
        """
        del captions, others

    def with_prediction(self, prediction_type: str) -> Family:
        """Return the same family for networks of another prediction type, for students that change it."""
        other = copy.copy(self)
        other.prediction_type = prediction_type
        other.scheduler_config = {**self.scheduler_config, "prediction_type": prediction_type}
        return other

    def with_unit_times(self) -> Family:
        """Return the same family for networks that are told times on unit scale; ``ValueError`` if it is no flow.

        No scheduler can tell other networks such times.
        """
        if not isinstance(self.schedule, RectifiedFlow):
            kind = type(self.schedule).__name__
            raise ValueError(f"method.retime: expected 0, because only a flow's times can be rescaled, got {kind}")
        other = copy.copy(self)
        other.schedule = RectifiedFlow(self.schedule.shift, num_timesteps=1)
        other.scheduler_config = {**self.scheduler_config, "num_train_timesteps": 1}
        return other

    def add_inputs(self, inputs: Inputs) -> None:
        """Give the opened network further inputs, in place, before any role is forked from it.

        The new branches end in zeros, so the network's output stays the teacher's, bit for bit. Methods request
        inputs in :meth:`stepdistill.methods.base.Distiller.extra_inputs`.

        Raises:
            ValueError: if networks of this family cannot take them.
        """
        if inputs != Inputs():
            raise ValueError(
                f"teacher.family: networks of {type(self).__name__} take no inputs beyond time and condition"
            )

    def widen(self, points: int) -> None:
        """Make the opened network give ``points`` predictions a call, in place, before any role is forked from it.

        All are the teacher's, bit for bit, whose role keeps the first. Methods request it in
        :meth:`stepdistill.methods.base.Distiller.head_points`.

        Raises:
            ValueError: if networks of this family have no head that can be widened.
        """
        self.check_head(points)
        if points != 1 and self.head is not None:
            widen_convolution(self.network, self.head, points)
            self.points = points

    def check_head(self, points: int) -> None:
        """Raise ``ValueError`` if the network cannot give ``points`` predictions a call."""
        if points != 1 and self.head is None:
            raise ValueError(
                f"teacher.family: networks of {type(self).__name__} have no head that can be widened, which this "
                "method needs; expected a UNet (pixel, sd, sdxl)"
            )

    @abc.abstractmethod
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
        """Return the output of ``network`` at states (B, C, H, W) and times (B,), as ``prediction_type`` defines it.

        Args:
            network: a network of this family; extended if :meth:`add_inputs` was called.
            x_t: noisy images.
            t: times in (0, 1].
            cond: conditioning of the batch.
            w: guidance weights (B,), 0 is no guidance; None skips that branch, as for the teacher.
            s: target times (B,) in [0, t]; None skips that branch.
        """

    def timesteps(self, t: Tensor, s: Tensor | None = None) -> Tensor:
        """Return what the network embeds at times (B,): (B,) in float32, or with target times (B,) both, (B, 2)."""
        now = self.schedule.timestep(t).float()
        return now if s is None else torch.stack([now, self.schedule.timestep(s).float()], 1)

    @abc.abstractmethod
    def encode(self, raw: RawBatch) -> Batch:
        """Convert images and labels or captions to the networks' inputs."""

    @abc.abstractmethod
    def decode(self, x0: Tensor) -> Tensor:
        """Convert the networks' clean outputs (B, C, H, W) to images (B, C, H, W) in [0, 1]."""

    def embed(self, prompts: Sequence[str], *, null: bool = False) -> Cond:
        """Return the condition of prompts, or with ``null`` that of as many missing prompts.

        Raises:
            ValueError: if the family takes no text.
        """
        del prompts, null
        raise ValueError(f"{type(self).__name__}: these teachers take no text")

    @abc.abstractmethod
    def null_cond(self, cond: Mapping[str, Tensor]) -> Cond:
        """Return the null condition, in the shapes of ``cond``.

        Raises:
            ValueError: if the teacher was trained without one, so that it cannot be guided.
        """

    @abc.abstractmethod
    def example_cond(self, indices: Sequence[int]) -> Cond:
        """Return conditions for samples: functions of the index alone, up to an encoder's rounding."""

    @abc.abstractmethod
    def pipeline(self, network: nn.Module, sampler: Sampler, guidance_scale: float) -> Any:
        """Return the diffusers pipeline that samples ``network`` as ``sampler`` does."""

    @abc.abstractmethod
    def teacher_pipeline(self, scheduler: Any | None) -> Any:
        """Return the diffusers pipeline that samples the teacher.

        Args:
            scheduler: of a training-free solver; None is that of the teacher's own pipeline.

        Raises:
            ValueError: if the teacher has no pipeline of its own and ``scheduler`` is None.
        """
