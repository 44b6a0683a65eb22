"""FLUX.2: a flow transformer on patches of a VAE with batch statistics, conditioned on layers of a language model.

"klein" has a prompt through Qwen 3 and is guided as usual. "dev" has one through Mistral and takes its guidance scale
as an input, as FLUX.1-dev does. A distilled "klein" is refused: its pipeline leaves guidance out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from stepdistill.batch import Cond
from stepdistill.diffusion.native_grids import StepShiftedFlow
from stepdistill.diffusion.schedule import RectifiedFlow
from stepdistill.families.config import Resolution
from stepdistill.families.latent import PlainLatentFamily, TextToImageFamily
from stepdistill.families.prompts import default_of

PATCH = 2
"""Side in latents of the square that the VAE's latents are folded into."""


class Flux2(PlainLatentFamily, TextToImageFamily):
    """An opened ``Flux2Pipeline`` or ``Flux2KleinPipeline``."""

    component = "transformer"
    network_classes = ("Flux2Transformer2DModel",)
    pipeline_names = ("Flux2Pipeline", "Flux2KleinPipeline")
    parts = ("vae", "text_encoder", "tokenizer")
    hands_generators_on = False
    latents_per_token = PATCH**2
    processes = (RectifiedFlow,)
    feature_blocks = ("transformer_blocks", "single_transformer_blocks")
    lora_targets: ClassVar[tuple[str, ...]] = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
        "attn.add_v_proj", "attn.to_add_out", "ff.linear_in", "ff.linear_out", "ff_context.linear_in",
        "ff_context.linear_out", "attn.to_qkv_mlp_proj",
    )  # fmt: skip
    loads_lora = True

    def __init__(self, pipe: Any, *, resolution: Resolution | None = None, guidance_scale: float | None = None) -> None:
        takes_guidance = pipe.transformer.config.guidance_embeds
        check_model(pipe, None if takes_guidance else guidance_scale)
        super().__init__(pipe, resolution=resolution)
        channels, height, width = self.sample_shape
        self.sample_shape = (PATCH**2 * channels, height, width)
        self.pipeline_kwargs = {**self.pipeline_kwargs, "max_sequence_length": self.sequence_length}
        self.guidance_scale = None
        if takes_guidance:
            self.guidance_scale = default_of(pipe, "guidance_scale") if guidance_scale is None else guidance_scale
            self.pipeline_kwargs = {**self.pipeline_kwargs, "guidance_scale": self.guidance_scale}
            self.guidance_convention = "an input of the network, as FLUX.2-dev takes it"
        blocks = range(pipe.transformer.config.num_single_layers)
        outputs = tuple(f"single_transformer_blocks.{block}.attn.to_out" for block in blocks)  # else a list of layers
        self.lora_targets = (*self.lora_targets, *outputs)  # type: ignore[misc]  # of this teacher alone
        if self.scheduler_config.get("use_dynamic_shifting"):
            tokens, timesteps = height * width, self.scheduler_config["num_train_timesteps"]
            self.schedule = StepShiftedFlow(lambda steps: empirical_shift(tokens, steps), timesteps)

    @property
    def sequence_length(self) -> int:
        """Number of prompt tokens; the network also attends to padding, so it must be the same in every call."""
        return default_of(self.pipe, "max_sequence_length")

    def spatial_factor(self) -> int:
        return PATCH * super().spatial_factor()

    def native_size(self) -> tuple[int, int]:
        side = self.pipe.default_sample_size * self.pipe.vae_scale_factor
        return side, side

    @classmethod
    def tiny(cls, seed: int = 0, *, guidance_embeds: bool = False) -> Flux2:
        """Return FLUX.2-klein, or with ``guidance_embeds`` FLUX.2-dev."""
        from diffusers import (
            FlowMatchEulerDiscreteScheduler,
            Flux2KleinPipeline,
            Flux2Pipeline,
            Flux2Transformer2DModel,
        )
        from transformers import Qwen3ForCausalLM

        from stepdistill.families.tiny import tiny_mistral, tiny_patch_vae, tiny_qwen, tiny_qwen3

        torch.manual_seed(seed)
        tokenizer = tiny_qwen()
        transformer = Flux2Transformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=24, timestep_guidance_channels=16, axes_dims_rope=(2, 2, 2, 2),
            guidance_embeds=guidance_embeds,
        )  # fmt: skip
        for modulation in (transformer.double_stream_modulation_img, transformer.single_stream_modulation):
            modulation.linear.weight.data.mul_(8)  # a fresh network's gates are all but shut
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        if guidance_embeds:
            text_encoder = tiny_mistral(tokenizer, width=8)
            pipe: Any = Flux2Pipeline(scheduler, tiny_patch_vae(), text_encoder, tokenizer, transformer)
        else:
            text_encoder = tiny_qwen3(Qwen3ForCausalLM, tokenizer, width=8, layers=27)
            pipe = Flux2KleinPipeline(scheduler, tiny_patch_vae(), text_encoder, tokenizer, transformer)
        return cls(pipe, resolution=16)

    def embed(self, prompts: Sequence[str], *, null: bool = False) -> Cond:
        del null  # the empty prompt in the chat's template
        text, _ = self.pipe.encode_prompt(
            list(prompts), device=self.pipe.text_encoder.device, max_sequence_length=self.sequence_length
        )
        return {"encoder_hidden_states": text.float()}

    def null_cond(self, cond: Mapping[str, Tensor]) -> Cond:
        if self.guidance_scale is None:
            return super().null_cond(cond)
        raise ValueError(
            "guidance: expected guidance_scale: 1 in the method, and teacher.guidance_scale: FLUX.2-dev takes its "
            "guidance as an input"
        )

    def vae_encode(self, images: Tensor) -> Tensor:
        return pixel_unshuffle(super().vae_encode(images), PATCH)

    def vae_decode(self, latents: Tensor) -> Tensor:
        return super().vae_decode(pixel_shuffle(latents, PATCH))

    def pack(self, states: Tensor) -> Tensor:
        return states.flatten(2).transpose(1, 2)

    def unpack(self, packed: Tensor) -> Tensor:
        return packed.transpose(1, 2).unflatten(2, self.sample_shape[1:])

    def image_tokens(self, feature: Tensor, x_t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        del cond
        return feature[..., -x_t[0, 0].numel() :]  # single blocks have the prompt first

    def forward(self, network: nn.Module, x_t: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        count, _, height, width = x_t.shape
        text, scale = cond["encoder_hidden_states"].to(x_t.dtype), self.guidance_scale
        tokens = network(
            hidden_states=self.pack(x_t),
            timestep=timestep.to(x_t.dtype) / 1000,  # rounded first, as the pipeline does
            guidance=None if scale is None else torch.full((count,), scale, device=x_t.device),
            encoder_hidden_states=text,
            txt_ids=places(count, 1, 1, text.shape[1]).to(x_t.device),
            img_ids=places(count, height, width, 1).to(x_t.device),
        ).sample
        return tokens.transpose(1, 2).unflatten(2, (height, width))


def check_model(pipe: Any, guidance_scale: float | None) -> None:
    """Raise ``ValueError`` for a distilled model, or a guidance scale for a network without that input."""
    if pipe.config.get("is_distilled"):
        raise ValueError("teacher.path: model_index.json: expected is_distilled: false, a base model, got true")
    if guidance_scale is not None:
        raise ValueError(
            f"teacher.guidance_scale: got {guidance_scale}, but this teacher (guidance_embeds: false, as "
            "FLUX.2-klein) takes none; expected method.guidance_scale"
        )


def places(count: int, height: int, width: int, length: int) -> Tensor:
    """Return the places (count, height width length, 4) of tokens: 0, row, column, place in the prompt."""
    axes = (torch.arange(1), torch.arange(height), torch.arange(width), torch.arange(length))
    return torch.cartesian_prod(*axes).expand(count, -1, -1)


def empirical_shift(tokens: int, steps: int) -> float:
    """Return the shift of the grid of ``steps`` steps for images of ``tokens`` tokens, as FLUX.2's pipelines fit it."""
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    return math.exp(compute_empirical_mu(tokens, steps))
