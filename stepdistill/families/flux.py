"""FLUX.1: a flow transformer on packed latents, conditioned on a prompt through CLIP and T5.

"dev" is itself distilled to take its guidance scale as an input; ``teacher.guidance_scale`` sets that input for the
teacher and the student. "schnell" takes none. Neither makes an unconditional prediction in its pipeline's own call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle

from stepdistill.batch import Cond
from stepdistill.diffusion.schedule import NoiseSchedule, RectifiedFlow
from stepdistill.families.config import Resolution
from stepdistill.families.latent import PlainLatentFamily, TextToImageFamily

GUIDANCE_SCALE = 3.5  # the default of FluxPipeline


class Flux(PlainLatentFamily, TextToImageFamily):
    """An opened ``FluxPipeline``."""

    component = "transformer"
    network_classes = ("FluxTransformer2DModel",)
    pipeline_names = ("FluxPipeline",)
    parts = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    hands_generators_on = False
    latents_per_token = 4
    side_multiple = 2
    processes = (RectifiedFlow,)
    feature_blocks = ("transformer_blocks", "single_transformer_blocks")
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
        "attn.add_v_proj", "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj",
        "ff_context.net.2", "proj_mlp", "proj_out",
    )  # fmt: skip
    loads_lora = True

    def __init__(self, pipe: Any, *, resolution: Resolution | None = None, guidance_scale: float | None = None) -> None:
        if guidance_scale is not None and not pipe.transformer.config.guidance_embeds:
            raise ValueError(
                f"teacher.guidance_scale: got {guidance_scale}, but this teacher (guidance_embeds: false, as "
                "FLUX.1-schnell) takes none; leave it out"
            )
        super().__init__(pipe, resolution=resolution)
        self.pipeline_kwargs = {**self.pipeline_kwargs, "max_sequence_length": self.sequence_length}
        self.guidance_scale = None
        if pipe.transformer.config.guidance_embeds:
            self.guidance_scale = GUIDANCE_SCALE if guidance_scale is None else guidance_scale
            self.pipeline_kwargs = {**self.pipeline_kwargs, "guidance_scale": self.guidance_scale}
            self.guidance_convention = "an input of the network, as FLUX.1-dev takes it"
        _, height, width = self.sample_shape
        self.schedule = shifted_by_size(self.schedule, self.scheduler_config, height * width // 4)

    @property
    def sequence_length(self) -> int:
        """Number of prompt tokens that T5 reads: 256 for "schnell", as in its training, and 512 for "dev"."""
        return 512 if self.pipe.transformer.config.guidance_embeds else 256

    @classmethod
    def tiny(cls, seed: int = 0, *, guidance_embeds: bool = True) -> Flux:
        from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

        from stepdistill.families.tiny import tiny_clip, tiny_flux_vae, tiny_t5

        torch.manual_seed(seed)
        tokenizer, text_encoder = tiny_clip()
        tokenizer_2, text_encoder_2 = tiny_t5(width=32)
        transformer = FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(2, 2, 4), guidance_embeds=guidance_embeds,
        )  # fmt: skip
        vae = tiny_flux_vae()
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=guidance_embeds)
        return cls(
            FluxPipeline(scheduler, vae, text_encoder, tokenizer, text_encoder_2, tokenizer_2, transformer),
            resolution=16,
        )

    def embed(self, prompts: Sequence[str], *, null: bool = False) -> Cond:
        del null  # the network has no null prompt
        prompt, pooled, _ = self.pipe.encode_prompt(
            list(prompts), device=self.pipe.text_encoder.device, max_sequence_length=self.sequence_length
        )
        return {"encoder_hidden_states": prompt.float(), "pooled_projections": pooled.float()}

    def pack(self, states: Tensor) -> Tensor:
        return pack(states)

    def unpack(self, packed: Tensor) -> Tensor:
        return unpack(packed, *self.sample_shape[1:])

    def null_cond(self, cond: Mapping[str, Tensor]) -> Cond:
        del cond
        raise ValueError(
            "guidance: expected guidance_scale: 1 in the method, and for FLUX.1-dev teacher.guidance_scale: FLUX.1 "
            "takes its guidance as an input, or none"
        )

    def forward(self, network: nn.Module, x_t: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        _, _, height, width = x_t.shape
        text = cond["encoder_hidden_states"]
        guidance = (
            None if self.guidance_scale is None else torch.full((len(x_t),), self.guidance_scale, device=x_t.device)
        )
        tokens = network(
            hidden_states=pack(x_t),
            timestep=timestep.to(x_t.dtype) / 1000,  # rounded first, as the pipeline does
            guidance=guidance,
            img_ids=image_ids(x_t),
            txt_ids=torch.zeros(text.shape[1], 3, dtype=x_t.dtype, device=x_t.device),
            **{name: value.to(x_t.dtype) for name, value in cond.items()},
        ).sample
        return unpack(tokens, height, width)


def image_ids(x_t: Tensor) -> Tensor:
    """Return the places (H W / 4, 3) of the tokens of states (B, C, H, W): 0, row, column."""
    rows, columns = (torch.arange(side // 2, device=x_t.device) for side in x_t.shape[2:])
    return pad(torch.cartesian_prod(rows, columns), (1, 0)).to(x_t.dtype)


def pack(latents: Tensor) -> Tensor:
    """Return latents (B, C, H, W) as tokens (B, H W / 4, 4 C), one for every 2 x 2 square."""
    return pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Invert :func:`pack`."""
    return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


def shifted_by_size(schedule: NoiseSchedule, config: Mapping[str, Any], tokens: int) -> NoiseSchedule:
    """Return a schedule with the grid that a pipeline's call sets for images of ``tokens`` tokens.

    That is its own, unless its scheduler's config asks for a shift that follows the size.
    """
    if not config.get("use_dynamic_shifting"):
        return schedule
    return RectifiedFlow(dynamic_shift(config, tokens), config["num_train_timesteps"])


def dynamic_shift(config: Mapping[str, Any], tokens: int) -> float:
    """Return the shift of the grid for images of ``tokens`` tokens.

    ``mu``, by default the shift's logarithm, is linear in the tokens, as in ``FluxPipeline`` (Esser et al. 2024, arXiv
    2403.03206, Section 5.3.2, with FLUX.1's constants).
    """
    fewest, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = low + (high - low) * (tokens - fewest) / (most - fewest)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)
