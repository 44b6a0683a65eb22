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
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from stepdistill.data import RawBatch
from stepdistill.denoiser import Cond
from stepdistill.sampling import Sampler
from stepdistill.schedule import DiscreteVP, Karras, NoiseSchedule, RectifiedFlow
from stepdistill.trust import how


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The ``teacher`` section."""

    path: str
    """A diffusers pipeline folder, a folder with ``unet/`` and ``scheduler/``, a hub id, or ``embedded``."""
    revision: str | None = None
    """Commit or tag of a hub id."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the frozen teacher's weights; students always train in float32."""
    family: str | None = None
    """Overrides the detection: the name of a file in ``stepdistill/families``."""
    null_class: int | None = None
    """The class label that means "no class", where the teacher was trained with one."""
    resolution: int | None = None
    """Side in pixels of the (square) images, where not the one that the teacher samples at when nobody says."""
    guidance_scale: float | None = None
    """What a teacher that takes guidance as an input (FLUX.1-dev) is asked with; others are guided by the method."""
    trust_remote_code: bool = False
    """Whether Python files that lie in the teacher's folder may run; its student's export then brings them along."""
    trust_pickles: bool = False
    """Whether weights may be read that are there as pickles (``.bin``) only; what is exported is safetensors."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """What methods see: clean images in the network's space (B, C, H, W) and their conditions."""

    images: Tensor | None
    """None for data-free training."""
    cond: Cond
    size: int

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        images = None if self.images is None else self.images.to(device, non_blocking=True)
        return Batch(
            images, {name: tensor.to(device, non_blocking=True) for name, tensor in self.cond.items()}, self.size
        )

    @property
    def x0(self) -> Tensor:
        """The clean images, for methods that train on them."""
        assert self.images is not None, "this method trains on images; Run checks that the data has some"
        return self.images


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
    frozen: tuple[nn.Module, ...] = ()
    """What encodes and decodes, beside the network: it is never trained, and no checkpoint holds it."""
    prompts: Sequence[str] = ()
    """Of a family that takes text: what :meth:`example_cond` asks for, in turn."""
    num_classes: int | None
    """How many classes a label may name, None for an unconditional teacher."""
    inputs: Inputs = Inputs()
    """What the network takes besides state, time and condition; see :meth:`extend`."""
    guidance_convention: str = "diffusers: unconditional + guidance_scale * (conditional - unconditional); 1 is none"
    """What a call's ``guidance_scale`` means."""
    call_options: Mapping[str, Any] = MappingProxyType({})
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
    def serves(cls, pipeline: str | None) -> bool:
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
        for module in self.frozen:
            module.to(device)

    @contextlib.contextmanager
    def visiting(self, device: torch.device | str) -> Iterator[None]:
        """What encodes and decodes is on ``device`` for a while, and then back where it was."""
        places = [next(module.parameters()).device for module in self.frozen]
        self.to(torch.device(device))
        try:
            yield
        finally:
            for module, place in zip(self.frozen, places, strict=True):
                module.to(place)

    def check_sampler(self, sampler: Sampler) -> None:
        """Raise ``ValueError`` if no scheduler, or no call of the pipeline, can express the sampler."""
        sampler.scheduler(self.scheduler_config)
        if "timesteps" in sampler.call_options:
            raise ValueError("method.first: no pipeline of this teacher's is asked for timesteps; wanted first: 1")

    def use_captions(self, captions: Sequence[str]) -> None:
        """Take note of the training's captions: examples come from them, and those that are too long are counted."""
        del captions

    def with_prediction(self, prediction_type: str) -> Family:
        """The same family for networks of another prediction type, for students that change it."""
        other = copy.copy(self)
        other.prediction_type = prediction_type
        other.scheduler_config = {**self.scheduler_config, "prediction_type": prediction_type}
        return other

    def extend(self, inputs: Inputs) -> None:
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
            network: a network of this family; extended if :meth:`extend` was called.
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
        """Conditions for sample grids and evaluation, a pure function of the sample's index."""

    @abc.abstractmethod
    def pipeline(self, network: nn.Module, sampler: Sampler, guidance_scale: float) -> Any:
        """The diffusers pipeline that samples ``network`` with the twin of ``sampler``."""


def cannot_open(folder: Path, config: TeacherConfig, error: Exception) -> ValueError:
    """What to raise where diffusers raises ``error`` at a teacher's folder."""
    fetched = not (config.trust_pickles or Path(config.path).exists())
    hint = f"; pickles (.bin) are not fetched from a hub id: if it has no other, {how('trust_pickles')}"
    return ValueError(f"teacher.path: {folder}: diffusers cannot open it: {error}{hint if fetched else ''}")


def read_schedule(config: Mapping[str, Any]) -> tuple[NoiseSchedule, str]:
    """The noise schedule and prediction type that a diffusers scheduler config stands for.

    Raises:
        ValueError: for a scheduler whose process is unknown here, or an epsilon-network asked to see pure noise.
    """
    name = config.get("_class_name", "DDPMScheduler")
    if "FlowMatch" in name or config.get("prediction_type") == "flow_prediction":
        shift = config.get("shift", config.get("flow_shift", 1.0)) or 1.0
        return RectifiedFlow(shift, config.get("num_train_timesteps", 1000)), "flow"
    if name.startswith("EDM"):
        keys = ("sigma_min", "sigma_max", "sigma_data", "rho")
        return Karras(**{key: config[key] for key in keys if key in config}), "edm"
    if name == "CMStochasticIterativeScheduler":
        keys = ("sigma_min", "sigma_max", "sigma_data", "rho")
        return Karras(**{key: config[key] for key in keys if key in config}, noise_scale=1000.0), "edm"
    if "beta_schedule" not in config and "trained_betas" not in config:
        raise ValueError(f"scheduler: cannot read the noise process of {name!r}: it has no betas and is no flow")
    schedule = DiscreteVP.from_config(config)
    prediction_type = config.get("prediction_type", "epsilon")
    alpha_1, _ = schedule(torch.ones(1))
    if prediction_type == "epsilon" and alpha_1.item() == 0:
        raise ValueError(
            "scheduler: prediction_type 'epsilon' at zero terminal SNR (alpha_T = 0) cannot tell the clean image; "
            "wanted 'v_prediction' or 'sample', or rescale_betas_zero_snr: false"
        )
    return schedule, prediction_type
