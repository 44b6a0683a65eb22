"""What a family of teachers has to say about itself.

A family hides how its networks are called (time convention, preconditioning, packing, sign, latents) behind one method,
:meth:`Family.call`, and one pair of maps between what users have and what networks see, :meth:`Family.encode` and
:meth:`Family.decode`. Methods, trainer, evaluation and export know nothing else of a teacher.
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
from stepdistill.diffusion.samplers import Sampler
from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.families.config import TeacherConfig


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a student's network sees besides state, time and condition."""

    w: tuple[float, float] | None = None
    """The range of guidance weights ``w = guidance_scale - 1`` it is trained for; None where it takes none."""
    s: bool = False
    """Whether it takes the time that a step leads to."""


class Family(abc.ABC):
    """One family of teachers, holding one opened teacher."""

    component: ClassVar[str]
    """The network's folder and argument in the pipeline: ``"unet"`` or ``"transformer"``."""
    network_classes: ClassVar[tuple[str, ...]]
    """Diffusers classes of networks by which a teacher is recognised."""
    pipeline_names: ClassVar[tuple[str, ...]] = ()
    """The diffusers pipelines that a teacher may be, where networks of the class serve several; empty: any."""
    takes_text: ClassVar[bool] = False
    """Whether the condition is a prompt."""
    loads_lora: ClassVar[bool] = False
    """Whether the stock pipeline has ``load_lora_weights``."""
    feature_blocks: ClassVar[tuple[str, ...]]
    """Sub-modules whose outputs are good features for a critic."""
    lora_targets: ClassVar[tuple[str, ...]]
    """Layers that get adapters."""

    network: nn.Module
    schedule: NoiseSchedule
    prediction_type: str
    scheduler_config: Mapping[str, Any]
    sample_shape: tuple[int, int, int]
    """(C, H, W) of what the network sees."""
    image_shape: tuple[int, int, int]
    """(C, H, W) of the images that :meth:`encode` takes and :meth:`decode` gives."""
    frozen_modules: tuple[nn.Module, ...] = ()
    """What encodes and decodes, beside the network: it is never trained, and no checkpoint holds it."""
    prompts: Sequence[str] = ()
    """Of a family that takes text: what :meth:`example_cond` asks for, in turn."""
    num_classes: int | None
    """How many classes a label may name, None for an unconditional teacher."""
    inputs: Inputs = Inputs()
    """What the network takes besides state, time and condition; see :meth:`add_inputs`."""
    guidance_convention: str = "diffusers: unconditional + guidance_scale * (conditional - unconditional); 1 is none"
    """What a call's ``guidance_scale`` means."""
    pipeline_kwargs: Mapping[str, Any] = MappingProxyType({})
    """What a call of the pipeline must be given, where it takes it, to sample as this family calls its networks."""
    code: Mapping[str, bytes] = MappingProxyType({})
    """Python files that the pipeline needs, by their place in its folder: of teachers that bring their own."""

    @classmethod
    @abc.abstractmethod
    def load(cls, folder: Path, config: TeacherConfig) -> Family:
        """Open the teacher in ``folder``. Raises ``ValueError`` naming the file that is wrong."""

    @classmethod
    @abc.abstractmethod
    def tiny(cls, seed: int = 0) -> Family:
        """A random miniature of the real classes, so that contract tests need no download."""

    @classmethod
    def accepts_pipeline(cls, pipeline: str | None) -> bool:
        """Whether a teacher in a diffusers pipeline of this class (None: in none, or in one of its own) may be ours."""
        return not cls.pipeline_names or pipeline in cls.pipeline_names

    @property
    def conditioning(self) -> str:
        """What a sample is asked for with: ``"prompt"``, ``"class_labels"`` or ``"none"``."""
        if self.takes_text:
            return "prompt"
        return "none" if self.num_classes is None else "class_labels"

    def to(self, device: torch.device) -> None:
        """Move what encodes and decodes; the networks belong to the bank."""
        for module in self.frozen_modules:
            module.to(device)

    @contextlib.contextmanager
    def on_device(self, device: torch.device | str) -> Iterator[None]:
        """What encodes and decodes is on ``device`` for a while, and then back where it was."""
        places = [next(module.parameters()).device for module in self.frozen_modules]
        self.to(torch.device(device))
        try:
            yield
        finally:
            for module, place in zip(self.frozen_modules, places, strict=True):
                module.to(place)

    def check_sampler(self, sampler: Sampler) -> None:
        """Raise ``ValueError`` if no scheduler, or no call of the pipeline, can express the sampler."""
        sampler.scheduler(self.scheduler_config)
        if "timesteps" in sampler.pipeline_kwargs:
            raise ValueError(
                "method.first_time: no pipeline of this teacher's is asked for timesteps; expected first_time: 1"
            )

    def use_captions(self, captions: Sequence[str]) -> None:
        """Take note of the training's captions: examples come from them, and those that are too long are counted."""
        del captions

    def with_prediction(self, prediction_type: str) -> Family:
        """The same family for networks of another prediction type, for students that change it."""
        other = copy.copy(self)
        other.prediction_type = prediction_type
        other.scheduler_config = {**self.scheduler_config, "prediction_type": prediction_type}
        return other

    def add_inputs(self, inputs: Inputs) -> None:
        """Give the opened network further inputs, in place, before any role is forked from it.

        The new branches end in zeros: whatever their inputs, the network still is the teacher, bit for bit. A
        method asks for them in :meth:`stepdistill.methods.base.Distiller.extra_inputs`.

        Raises:
            ValueError: if networks of this family cannot take them.
        """
        if inputs != Inputs():
            raise ValueError(
                f"teacher.family: networks of {type(self).__name__} take no inputs beyond time and condition"
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
        """The raw output of ``network`` at states (B, C, H, W) and times (B,), as ``prediction_type`` defines it.

        Args:
            network: a network of this family; extended if :meth:`add_inputs` was called.
            x_t: noisy images.
            t: times in (0, 1].
            cond: conditioning of the batch.
            w: guidance weights (B,), 0 is no guidance; None leaves that branch out, as for the teacher.
            s: target times (B,) in [0, t]; None leaves that branch out.
        """

    @abc.abstractmethod
    def encode(self, raw: RawBatch) -> Batch:
        """What users have -> what networks see."""

    @abc.abstractmethod
    def decode(self, x0: Tensor) -> Tensor:
        """What networks see -> images (B, C, H, W) in [0, 1]."""

    def embed(self, prompts: Sequence[str], *, null: bool = False) -> Cond:
        """The condition that prompts make, of families that take text; with ``null``, that of none in their place."""
        del prompts, null
        raise ValueError(f"{type(self).__name__}: these teachers take no text")

    @abc.abstractmethod
    def null_cond(self, cond: Mapping[str, Tensor]) -> Cond:
        """The conditioning that means "none", of the shapes of ``cond``.

        Raises:
            ValueError: if the teacher was trained without one, so that it cannot be guided.
        """

    @abc.abstractmethod
    def example_cond(self, indices: Sequence[int]) -> Cond:
        """Conditions for sample grids and evaluation: of the sample's index alone, up to an encoder's rounding."""

    @abc.abstractmethod
    def pipeline(self, network: nn.Module, sampler: Sampler, guidance_scale: float) -> Any:
        """The diffusers pipeline that samples ``network`` with the twin of ``sampler``."""


def check_guidance(guidance_scale: float, family: Family) -> None:
    """Raise ``ValueError`` for a scale below 1, or any other than 1 where the teacher has no "none" condition."""
    if guidance_scale < 1:
        raise ValueError(f"method.guidance_scale: found {guidance_scale}, wanted at least 1 (1 is no guidance)")
    if guidance_scale != 1:
        family.null_cond(family.example_cond([0]))
