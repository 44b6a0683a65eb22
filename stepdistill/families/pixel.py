"""Pixel-space UNets (``UNet2DModel``): unconditional, or conditioned on class labels.

The network takes images in [-1, 1], diffusers' timestep, and a class label if it has an embedding for one. EDM-style
networks (a Karras schedule) are preconditioned here: they take ``c_in x_t`` and return F.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, cast

import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UNet2DModel,
)
from torch import Tensor, nn

from stepdistill.batch import Batch, Cond, RawBatch
from stepdistill.diffusion.reading import read_schedule
from stepdistill.diffusion.samplers import Sampler
from stepdistill.diffusion.schedule import DiscreteVP, Karras, RectifiedFlow
from stepdistill.diffusion.schedulers import to_diffusers
from stepdistill.families.base import Family, Inputs
from stepdistill.families.config import TeacherConfig
from stepdistill.families.hub import expand_home
from stepdistill.families.loading import opening
from stepdistill.files.reading import read_json
from stepdistill.files.weights import read_network
from stepdistill.loading import read_index, refuse_pickles
from stepdistill.pipelines.class_conditional import ClassConditionalPipeline
from stepdistill.pipelines.condition_embedding import ConditionEmbedding


class Pixel(Family):
    """An opened ``UNet2DModel`` teacher."""

    component = "unet"
    network_classes = ("UNet2DModel",)
    parts = ()
    optional_parts = ("condition_embedding",)  # of a student, which is refused with a reason of its own
    predicts_pixels = True
    processes = (DiscreteVP, RectifiedFlow, Karras)
    feature_blocks = ("down_blocks", "mid_block")
    head = "conv_out"
    lora_targets = (
        "conv1", "conv2", "conv_shortcut", "conv", "conv_in", "conv_out", "time_emb_proj",
        "linear_1", "linear_2", "to_q", "to_k", "to_v", "to_out.0",
    )  # fmt: skip

    def __init__(
        self, network: UNet2DModel, scheduler_config: Mapping[str, Any], null_class: int | None = None
    ) -> None:
        size = network.config.sample_size
        if size is None:
            raise ValueError("unet/config.json: expected sample_size, the height (and width) of images; got none")
        height, width = (size, size) if isinstance(size, int) else size
        if network.config.class_embed_type is not None:
            raise ValueError(
                f"unet/config.json: class_embed_type: expected null, got {network.config.class_embed_type!r}; a "
                "student with further inputs cannot be distilled again"
            )
        if network.config.in_channels != network.config.out_channels:
            raise ValueError(
                f"unet/config.json: expected as many channels out as in, got {network.config.in_channels} in and "
                f"{network.config.out_channels} out: it also predicts a variance, or is conditioned on images"
            )
        labels = network.config.num_class_embeds
        if null_class is not None and (labels is None or not 0 <= null_class < labels):
            raise ValueError(
                f"teacher.null_class: got {null_class}, but the network "
                + ("has no class embedding" if labels is None else f"embeds the labels 0 to {labels - 1}")
            )
        self.network = network
        self.scheduler_config = dict(scheduler_config)
        self.schedule, self.prediction_type = read_schedule(scheduler_config)
        self.check_process()
        self.sample_shape = (network.config.in_channels, height, width)
        self.image_shape = self.sample_shape
        self.null_class = null_class
        self.num_classes = labels if labels is None or null_class is None else labels - 1

    @classmethod
    def load(cls, folder: Path, config: TeacherConfig) -> Pixel:
        for name in ("unet/config.json", "scheduler/scheduler_config.json"):
            if not (folder / name).is_file():
                raise ValueError(f"teacher.path: {folder / name} is missing")
        for name in ("resolution", "frames", "guidance_scale"):
            if getattr(config, name) is not None:
                raise ValueError(f"teacher.{name}: got {getattr(config, name)}, but a pixel teacher takes none")
        if config.lora or config.embeddings:
            key = "lora" if config.lora else "embeddings"
            raise ValueError(f"teacher.{key}: got {getattr(config, key)}, but a pixel teacher takes none")
        if (file := expand_home(config.path)).is_file():
            raise ValueError(
                f"teacher.path: {file}: expected a folder, because diffusers reads no single file of UNet2DModel"
            )
        if not config.trust_pickles:
            refuse_pickles(folder / "unet")
        dtype = getattr(torch, config.dtype)
        with opening(folder / "unet", config):
            network = read_network(
                folder / "unet", UNet2DModel, pickles=config.trust_pickles, dtype=dtype, variant=config.variant
            )
        scheduler_config = read_json(folder / "scheduler/scheduler_config.json")
        return cls(network, scheduler_config, cls._null_class(folder, config))

    @staticmethod
    def _null_class(folder: Path, config: TeacherConfig) -> int | None:
        if config.null_class is not None:
            return config.null_class
        null_class = read_index(folder).get("null_class")
        if type(null_class) not in (int, NoneType):
            raise ValueError(f"{folder / 'model_index.json'}: null_class: expected whole number, got {null_class!r}")
        return null_class

    @classmethod
    def tiny(cls, seed: int = 0, *, prediction_type: str = "v_prediction", num_classes: int | None = 3, size: int = 8,
             channels: int = 1, scheduler: Mapping[str, Any] | None = None) -> Pixel:  # fmt: skip
        torch.manual_seed(seed)
        network = UNet2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=8,
            num_class_embeds=None if num_classes is None else num_classes + 1,
        )
        config = scheduler or DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type).config
        return cls(network, config, num_classes)

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
        x_t = self.schedule.network_input(x_t, t)
        timestep = self.schedule.timestep(t).float()
        labels = cond.get("class_labels")
        if self.inputs != Inputs():
            embed = network.get_submodule("condition_embedding")
            labels = embed(labels, w, None if s is None else self.schedule.timestep(s))
        else:
            assert w is None and s is None, "this network takes neither a guidance weight nor a second time"
        return network(x_t.to(next(network.parameters()).dtype), timestep, class_labels=labels).sample

    def add_inputs(self, inputs: Inputs) -> None:
        """Move the label embedding into a :class:`ConditionEmbedding`, whose output a stock ``UNet2DModel`` adds.

        It is a child of the network, so that every role has its own (or its own adapters). In an exported pipeline it
        is a separate component.
        """
        if inputs == Inputs():
            return
        network: Any = self.network
        with torch.random.fork_rng([]):  # the same branches in every process and every resumed run
            torch.manual_seed(0)
            embedding = ConditionEmbedding(
                network.time_embedding.linear_2.out_features,
                num_class_embeds=network.config.num_class_embeds,
                w_range=inputs.w and list(inputs.w),
                takes_s=inputs.s,
            )
        if network.class_embedding is not None:
            embedding.class_embedding = network.class_embedding
        network.class_embedding = nn.Identity()
        network.register_to_config(class_embed_type="identity")
        network.condition_embedding = nn.Module.to(embedding, network.device, network.dtype)  # diffusers' own warns
        self.inputs = inputs

    def encode(self, raw: RawBatch) -> Batch:
        size = len(raw.indices)
        if self.num_classes is None:
            return Batch(raw.images, {}, size)
        if raw.labels is None:
            raise ValueError("data: the teacher is class-conditional, but the data has no labels")
        return Batch(raw.images, {"class_labels": raw.labels}, size)

    def decode(self, x0: Tensor) -> Tensor:
        return (x0 / 2 + 0.5).clamp(0, 1)

    def null_cond(self, cond: Mapping[str, Tensor]) -> Cond:
        if self.null_class is None:
            raise ValueError(
                "guidance needs a teacher with a null class: set teacher.null_class, "
                + ("but this teacher is unconditional" if self.num_classes is None else "if it was trained with one")
            )
        return {name: torch.full_like(labels, self.null_class) for name, labels in cond.items()}

    def example_cond(self, indices: Sequence[int]) -> Cond:
        if self.num_classes is None:
            return {}
        return {"class_labels": torch.tensor([index % self.num_classes for index in indices])}

    def pipeline(self, network: nn.Module, sampler: Sampler, guidance_scale: float = 1.0) -> DiffusionPipeline:
        scheduler = to_diffusers(sampler, self.scheduler_config)
        network, embedding = split_embedding(network)
        if embedding is None and self.num_classes is None and type(scheduler) is DDIMScheduler:
            return DDIMPipeline(network, scheduler)
        timesteps = sampler.pipeline_kwargs.get("timesteps")
        if embedding is None and self.num_classes is None and not timesteps and isinstance(scheduler, LCMScheduler):
            return DDPMPipeline(network, scheduler)
        if embedding is None and isinstance(scheduler, CMStochasticIterativeScheduler):
            return ConsistencyModelPipeline(network, scheduler)
        sigmas = sampler.times[:-1].tolist() if self.prediction_type == "flow" else None
        return ClassConditionalPipeline(
            network,
            scheduler,
            null_class=self.null_class,
            num_inference_steps=sampler.steps,
            guidance_scale=guidance_scale,
            sigmas=sigmas,
            noise_scale=self.schedule.initial_noise(torch.ones(1)).item(),
            eta=sampler.pipeline_kwargs.get("eta"),
            condition_embedding=embedding,
            timesteps=timesteps,
        )

    def teacher_pipeline(self, scheduler: Any | None) -> ClassConditionalPipeline:
        if scheduler is None:
            raise ValueError("solver: expected a teacher with betas; this one is a flow without a pipeline of its own")
        is_flow, sigmas = self.prediction_type == "flow", None
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):  # which by itself ends with a step from 0.001 to 0
            sigmas = torch.linspace(1, 1 / 50, 50, dtype=torch.float64).tolist()
        return ClassConditionalPipeline(
            self.network, scheduler, null_class=self.null_class, sigmas=sigmas, noise_scale=1.0 if is_flow else None
        )


def split_embedding(network: nn.Module) -> tuple[nn.Module, ConditionEmbedding | None]:
    """Return a stock ``UNet2DModel`` with the same weights, and the embedding of its further inputs if it has any."""
    stock = copy.copy(network)
    stock._modules = dict(network._modules)
    return stock, cast("ConditionEmbedding | None", stock._modules.pop("condition_embedding", None))
