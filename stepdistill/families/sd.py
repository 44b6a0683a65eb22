"""Stable Diffusion 1.x and 2.x: a ``UNet2DConditionModel`` on latents with a prompt through one CLIP encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.batch import Cond
from stepdistill.diffusion.schedule import DiscreteVP, Karras
from stepdistill.families.base import Inputs
from stepdistill.families.latent import TextToImageFamily
from stepdistill.families.tiny import tiny_clip, tiny_unet, tiny_vae
from stepdistill.families.unet import (
    UNET_LORA_TARGETS,
    check_unet,
    extend_unet,
    guidance_features,
    start_as_stock_pipelines,
)


class SD(TextToImageFamily):
    """An opened ``StableDiffusionPipeline``."""

    component = "unet"
    network_classes = ("UNet2DConditionModel",)
    pipeline_names = ("StableDiffusionPipeline",)
    parts = ("vae", "text_encoder", "tokenizer")
    scales_states = True
    processes = (DiscreteVP, Karras)
    feature_blocks = ("down_blocks", "mid_block")
    lora_targets = UNET_LORA_TARGETS
    head = "conv_out"
    can_rescale = "deviation"
    loads_lora = True

    def __init__(self, pipe: Any, **options: Any) -> None:
        check_unet(pipe.unet)
        super().__init__(pipe, **options)
        start_as_stock_pipelines(self.schedule)

    @classmethod
    def tiny(cls, seed: int = 0, *, prediction_type: str = "epsilon") -> SD:
        from diffusers import DDIMScheduler, StableDiffusionPipeline

        torch.manual_seed(seed)
        tokenizer, text_encoder = tiny_clip()
        scheduler = DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction_type,
            clip_sample=False, steps_offset=1,
        )  # fmt: skip
        return cls(
            StableDiffusionPipeline(
                tiny_vae(), text_encoder, tokenizer, tiny_unet(cross_attention_dim=16), scheduler,
                safety_checker=None, feature_extractor=None, requires_safety_checker=False,
            )
        )  # fmt: skip

    def embed(self, prompts: Sequence[str], *, null: bool = False) -> Cond:
        positive, negative = self.pipe.encode_prompt(list(prompts), self.pipe.text_encoder.device, 1, null)
        return {"encoder_hidden_states": (negative if null else positive).float()}

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
        assert s is None or self.inputs.s, "this network takes no second time"
        dtype = next(network.parameters()).dtype
        return network(
            self.schedule.network_input(x_t, t).to(dtype),
            self.timesteps(t, s),
            encoder_hidden_states=cond["encoder_hidden_states"].to(dtype),
            timestep_cond=guidance_features(self.pipe, w, dtype),
        ).sample

    def add_inputs(self, inputs: Inputs) -> None:
        extend_unet(self.network, inputs)
        self.add_second_time(inputs)
