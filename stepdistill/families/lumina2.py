"""Lumina-Image 2.0: a flow transformer whose sequence is prompt and image together, the prompt through Gemma 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.batch import Cond
from stepdistill.diffusion.schedule import RectifiedFlow
from stepdistill.families.flux import shifted_by_size
from stepdistill.families.latent import PlainLatentFamily, TextToImageFamily
from stepdistill.families.prompts import default_of, masked


class Lumina2(PlainLatentFamily, TextToImageFamily):
    """An opened ``Lumina2Pipeline``."""

    component = "transformer"
    network_classes = ("Lumina2Transformer2DModel",)
    pipeline_names = ("Lumina2Pipeline",)
    parts = ("vae", "text_encoder", "tokenizer")
    hands_generators_on = False
    side_multiple = 2
    processes = (RectifiedFlow,)
    feature_blocks = ("layers",)
    lora_targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
    loads_lora = True
    can_rescale = "row"

    def __init__(self, pipe: Any, **options: Any) -> None:
        super().__init__(pipe, **options)
        # the pipeline's norm is over rows of pixels, which no paper asks for: only teacher.guidance_rescale turns it on
        self.pipeline_kwargs = {
            **self.pipeline_kwargs, "cfg_normalization": False, "max_sequence_length": self.sequence_length,
        }  # fmt: skip
        # the pipeline takes the number of channels for that of tokens
        self.schedule = shifted_by_size(self.schedule, self.scheduler_config, self.sample_shape[0])

    @property
    def sequence_length(self) -> int:
        """Number of prompt tokens that Gemma reads."""
        return default_of(self.pipe, "max_sequence_length")

    @classmethod
    def tiny(cls, seed: int = 0) -> Lumina2:
        from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

        from stepdistill.families.tiny import tiny_deep_vae, tiny_gemma

        torch.manual_seed(seed)
        tokenizer, text_encoder = tiny_gemma(width=16, layers=2)
        transformer = Lumina2Transformer2DModel(
            sample_size=4, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
            num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 4, 4), axes_lens=(300, 32, 32),
            cap_feat_dim=16,
        )  # fmt: skip
        scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
        return cls(Lumina2Pipeline(transformer, scheduler, tiny_deep_vae(), text_encoder, tokenizer))

    def embed(self, prompts: Sequence[str], *, null: bool = False) -> Cond:
        embedded = self.pipe.encode_prompt(
            list(prompts),
            null,
            negative_prompt=[""] * len(prompts),  # which, other than prompts, has no system prompt
            device=self.pipe.text_encoder.device,
            max_sequence_length=self.sequence_length,
        )
        return masked(embedded, null)

    def image_tokens(self, feature: Tensor, x_t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Return those behind the prompt's, which has another length in every row."""
        _, _, height, width = x_t.shape
        first = cond["encoder_attention_mask"].sum(1, keepdim=True).long()
        places = first + torch.arange(height * width // 4, device=feature.device)
        return feature.gather(2, places.unsqueeze(1).expand(-1, feature.shape[1], -1))

    def forward(self, network: nn.Module, x_t: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return -network(
            hidden_states=x_t,
            timestep=1 - timestep / self.scheduler_config["num_train_timesteps"],
            encoder_hidden_states=cond["encoder_hidden_states"].to(x_t.dtype),
            encoder_attention_mask=cond["encoder_attention_mask"],
        ).sample
