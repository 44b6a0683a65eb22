"""Wan 2.1 and 2.2 text to video: a flow transformer on latents of clips, with a prompt through UMT5.

A clip has 4 k + 1 frames, of which the first and every four further ones are one latent frame; one frame is an image.
The pipeline's call takes no times: the exported scheduler is fitted to the student's grid. The two experts of Wan 2.2
A14B are refused: a student of one of them would be sampled in turn with the other. Wan 2.2 TI2V-5B tells its network
one time a token, which for clips from prompts are all equal: it is called with one a sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.batch import Cond
from stepdistill.diffusion.schedule import RectifiedFlow
from stepdistill.families.latent import PlainLatentFamily, TextToImageFamily
from stepdistill.families.prompts import default_of

SIDE = 16
"""Pixels by which the pipeline wants the height and the width to be divisible, whatever its VAE."""


EXPERTS = (
    "one of two experts (Wan 2.2 A14B): a student of one would be sampled in turn with the other; expected a teacher "
    "of one network, such as Wan 2.1 or Wan 2.2 TI2V-5B"
)
"""What a second network is, and why it is refused."""


class Wan(PlainLatentFamily, TextToImageFamily):
    """An opened ``WanPipeline``."""

    component = "transformer"
    network_classes = ("WanTransformer3DModel",)
    pipeline_names = ("WanPipeline",)
    parts = ("vae", "text_encoder", "tokenizer")
    hands_generators_on = False
    makes_clips = True
    processes = (RectifiedFlow,)
    feature_blocks = ("blocks",)
    lora_targets = (
        "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_v",
        "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2",
    )  # fmt: skip
    loads_lora = True
    refused_parts = MappingProxyType({"transformer_2": EXPERTS})

    def __init__(self, pipe: Any, *, frames: int | None = None, **options: Any) -> None:
        if pipe.config.boundary_ratio is not None:
            raise ValueError(
                f"teacher.path: model_index.json: boundary_ratio: got {pipe.config.boundary_ratio}, {EXPERTS}"
            )
        super().__init__(pipe, **options)
        frames, stride = frames or default_of(pipe, "num_frames"), pipe.vae_scale_factor_temporal
        if (frames - 1) % stride:
            raise ValueError(f"teacher.frames: expected 1 more than a multiple of {stride}, got {frames}")
        channels, *size = self.sample_shape
        self.sample_shape = (channels, (frames - 1) // stride + 1, *size)
        self.image_shape = (3, frames, *self.image_shape[1:])
        length = self.sequence_length
        self.pipeline_kwargs = {**self.pipeline_kwargs, "num_frames": frames, "max_sequence_length": length}

    @property
    def sequence_length(self) -> int:
        """Number of prompt tokens; the network also attends to padding, so it must be the same in every call."""
        return default_of(self.pipe, "max_sequence_length")

    def spatial_factor(self) -> int:
        return self.pipe.vae_scale_factor_spatial

    def size_multiple(self) -> int:
        _, side, _ = self.pipe.transformer.config.patch_size
        return math.lcm(SIDE, side * self.spatial_factor())

    def native_size(self) -> tuple[int, int]:
        return default_of(self.pipe, "height"), default_of(self.pipe, "width")

    @classmethod
    def tiny(cls, seed: int = 0, *, residual: bool = False) -> Wan:
        """Return a random miniature of Wan 2.1, or with the ``residual`` VAE of Wan 2.2 TI2V-5B."""
        from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

        from stepdistill.families.tiny import tiny_clip_vae, tiny_residual_clip_vae, tiny_umt5

        torch.manual_seed(seed)
        tokenizer, text_encoder = tiny_umt5(width=16)
        transformer = WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
            ffn_dim=16, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=64,
        )  # fmt: skip
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
        vae = tiny_residual_clip_vae() if residual else tiny_clip_vae()
        pipe = WanPipeline(tokenizer, text_encoder, vae, scheduler, transformer, expand_timesteps=residual)
        return cls(pipe, resolution=(16, 32), frames=5)

    def embed(self, prompts: Sequence[str], *, null: bool = False) -> Cond:
        del null  # the empty prompt
        text, _ = self.pipe.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=self.sequence_length,
            device=self.pipe.text_encoder.device,
        )
        return {"encoder_hidden_states": text.float()}

    def forward(self, network: nn.Module, x_t: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return network(
            hidden_states=x_t,
            timestep=timestep,
            encoder_hidden_states=cond["encoder_hidden_states"].to(x_t.dtype),
        ).sample
