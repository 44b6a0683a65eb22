"""Stable Diffusion XL: conditioned on two text encoders, a pooled embedding, and the sizes of the image."""

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


class SDXL(TextToImageFamily):
    """An opened ``StableDiffusionXLPipeline``."""

    component = "unet"
    network_classes = ("UNet2DConditionModel",)
    pipeline_names = ("StableDiffusionXLPipeline",)
    parts = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
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
    def tiny(cls, seed: int = 0) -> SDXL:
        from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

        torch.manual_seed(seed)
        (tokenizer, text_encoder), (tokenizer_2, text_encoder_2) = tiny_clip(), tiny_clip(projection=True)
        unet = tiny_unet(
            cross_attention_dim=32, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=16 + 6 * 8,
        )  # fmt: skip
        scheduler = EulerDiscreteScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1
        )
        return cls(
            StableDiffusionXLPipeline(
                tiny_vae(scaling_factor=0.13025), text_encoder, text_encoder_2, tokenizer, tokenizer_2, unet, scheduler
            )
        )

    def embed(self, prompts: Sequence[str], *, null: bool = False) -> Cond:
        prompt, negative, pooled, negative_pooled = self.pipe.encode_prompt(
            list(prompts), device=self.pipe.text_encoder_2.device, do_classifier_free_guidance=null
        )
        if null:  # zeros or the embedding of "", by the pipeline's force_zeros_for_empty_prompt
            prompt, pooled = negative, negative_pooled
        return {"encoder_hidden_states": prompt.float(), "text_embeds": pooled.float()}

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
        height, width = self.image_size(x_t)
        # original size, crop, target size: the defaults of a call of the pipeline
        time_ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=dtype, device=x_t.device)
        return network(
            self.schedule.network_input(x_t, t).to(dtype),
            self.timesteps(t, s),
            encoder_hidden_states=cond["encoder_hidden_states"].to(dtype),
            timestep_cond=guidance_features(self.pipe, w, dtype),
            added_cond_kwargs={"text_embeds": cond["text_embeds"].to(dtype), "time_ids": time_ids.expand(len(x_t), -1)},
        ).sample

    def add_inputs(self, inputs: Inputs) -> None:
        extend_unet(self.network, inputs)
        self.add_second_time(inputs)
