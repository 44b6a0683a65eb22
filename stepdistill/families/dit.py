"""DiT: a class-conditional transformer on latents. It also predicts a variance, which no sampler here uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from stepdistill.batch import Cond, RawBatch
from stepdistill.diffusion.schedule import DiscreteVP
from stepdistill.families.latent import PlainLatentFamily

NULL_CLASS = 1000  # hard-coded in DiTPipeline


class DiT(PlainLatentFamily):
    """An opened ``DiTPipeline``."""

    component = "transformer"
    network_classes = ("DiTTransformer2DModel", "Transformer2DModel")  # the second in older files
    pipeline_names = ("DiTPipeline",)
    parts = ("vae",)
    hands_generators_on = False
    processes = (DiscreteVP,)
    feature_blocks = ("transformer_blocks",)
    lora_targets = (
        "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "linear", "linear_1", "linear_2",
        "proj", "proj_out_1", "proj_out_2",
    )  # fmt: skip

    def __init__(self, pipe: Any, **options: Any) -> None:
        super().__init__(pipe, **options)
        self.num_classes = pipe.transformer.config.num_embeds_ada_norm
        for module in self.network.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0  # the data drops labels, not the network

    @classmethod
    def tiny(cls, seed: int = 0) -> DiT:
        from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

        from stepdistill.families.tiny import tiny_vae

        torch.manual_seed(seed)
        transformer = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
            norm_num_groups=4, num_embeds_ada_norm=NULL_CLASS,
        )  # fmt: skip
        scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False)
        return cls(DiTPipeline(transformer, tiny_vae(), scheduler))

    def condition(self, raw: RawBatch) -> Cond:
        if raw.labels is None:
            raise ValueError("data: the teacher is class-conditional, but the data has no labels")
        return {"class_labels": raw.labels}

    def null_cond(self, cond: Mapping[str, Tensor]) -> Cond:
        if self.num_classes != NULL_CLASS:
            raise ValueError(
                f"guidance: expected guidance_scale: 1: DiTPipeline uses class {NULL_CLASS} as the null class, but the "
                f"teacher has {self.num_classes} classes"
            )
        return {name: torch.full_like(labels, NULL_CLASS) for name, labels in cond.items()}

    def example_cond(self, indices: Sequence[int]) -> Cond:
        assert self.num_classes is not None
        return {"class_labels": torch.tensor([index % self.num_classes for index in indices])}

    def forward(self, network: nn.Module, x_t: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        output = network(x_t, timestep=timestep, class_labels=cond["class_labels"]).sample
        return output[:, : x_t.shape[1]]  # the other channels, if any, are the variance
