"""Qwen-Image: a flow transformer on packed latents of a video VAE, conditioned on a prompt through Qwen 2.5 VL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from stepdistill.batch import Cond
from stepdistill.diffusion.guidance import GuidanceRule
from stepdistill.diffusion.schedule import RectifiedFlow
from stepdistill.families.flux import pack, shifted_by_size, unpack
from stepdistill.families.latent import PlainLatentFamily, TextToImageFamily
from stepdistill.families.prompts import default_of

NO_PROMPT = " "
"""What stands for no prompt in Qwen-Image's own examples; its template makes tokens of it."""


class QwenImage(PlainLatentFamily, TextToImageFamily):
    """An opened ``QwenImagePipeline``."""

    component = "transformer"
    network_classes = ("QwenImageTransformer2DModel",)
    pipeline_names = ("QwenImagePipeline",)
    parts = ("vae", "text_encoder", "tokenizer")
    hands_generators_on = False
    latents_per_token = 4
    side_multiple = 2
    processes = (RectifiedFlow,)
    feature_blocks = ("transformer_blocks",)
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
        "attn.add_v_proj", "attn.to_add_out", "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj",
        "txt_mlp.net.2",
    )  # fmt: skip
    loads_lora = True
    guidance_rule = GuidanceRule("token")
    guidance_convention = "true_cfg_scale of QwenImagePipeline, which keeps the conditional norm; 1 is none"

    def __init__(self, pipe: Any, **options: Any) -> None:
        if pipe.transformer.config.guidance_embeds:
            raise ValueError("teacher.path: transformer/config.json: expected guidance_embeds: false, got true")
        super().__init__(pipe, **options)
        self.pipeline_kwargs = {**self.pipeline_kwargs, "max_sequence_length": self.sequence_length}
        _, height, width = self.sample_shape
        self.schedule = shifted_by_size(self.schedule, self.scheduler_config, height * width // 4)

    @property
    def sequence_length(self) -> int:
        """Number of prompt tokens that the network is given."""
        return default_of(self.pipe, "max_sequence_length")

    def spatial_factor(self) -> int:
        return self.pipe.vae_scale_factor

    @classmethod
    def tiny(cls, seed: int = 0) -> QwenImage:
        from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel

        from stepdistill.families.tiny import tiny_frames_vae, tiny_qwen, tiny_qwen_vl

        torch.manual_seed(seed)
        tokenizer = tiny_qwen()
        text_encoder = tiny_qwen_vl(tokenizer, width=16)
        transformer = QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=16, axes_dims_rope=(4, 2, 2),
        )  # fmt: skip
        scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        )
        pipe = QwenImagePipeline(scheduler, tiny_frames_vae(), text_encoder, tokenizer, transformer)
        return cls(pipe, resolution=16)

    def guidance_arguments(self, scale: float) -> dict[str, Any]:
        # without a negative prompt the scale is ignored
        return {"true_cfg_scale": scale} | ({"negative_prompt": NO_PROMPT} if scale > 1 else {})

    def embed(self, prompts: Sequence[str], *, null: bool = False) -> Cond:
        text, mask = self.pipe.encode_prompt(
            [NO_PROMPT] * len(prompts) if null else list(prompts),
            device=self.pipe.text_encoder.device,
            max_sequence_length=self.sequence_length,
        )
        if mask is None:  # all prompts are of one length
            mask = torch.ones(text.shape[:2], dtype=torch.long, device=text.device)
        missing = self.sequence_length - text.shape[1]
        return {
            "encoder_hidden_states": pad(text.float(), (0, 0, 0, missing)),
            "encoder_hidden_states_mask": pad(mask, (0, missing)),
        }

    def vae_encode(self, images: Tensor) -> Tensor:
        return super().vae_encode(images.unsqueeze(2)).squeeze(2)  # a clip of one frame

    def vae_decode(self, latents: Tensor) -> Tensor:
        return super().vae_decode(latents.unsqueeze(2)).squeeze(2)

    def pack(self, states: Tensor) -> Tensor:
        return pack(states)

    def unpack(self, packed: Tensor) -> Tensor:
        return unpack(packed, *self.sample_shape[1:])

    def forward(self, network: nn.Module, x_t: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        _, _, height, width = x_t.shape
        tokens = network(
            hidden_states=pack(x_t),
            timestep=timestep.to(x_t.dtype) / 1000,  # rounded first, as the pipeline does
            encoder_hidden_states=cond["encoder_hidden_states"].to(x_t.dtype),
            encoder_hidden_states_mask=cond["encoder_hidden_states_mask"],
            img_shapes=[[(1, height // 2, width // 2)]] * len(x_t),
        ).sample
        return unpack(tokens, height, width)
