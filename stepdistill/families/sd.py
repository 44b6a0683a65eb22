"""Stable Diffusion 1.x and 2.x: a ``UNet2DConditionModel`` on latents, told a prompt through one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.denoiser import Cond
from stepdistill.families.base import Inputs
from stepdistill.families.latent import Text

UNET_LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj", "conv_in", "conv_out", "cond_proj",
)  # fmt: skip
"""LCM-LoRA's layers (Luo et al. 2023, arXiv 2311.05556), both ends, and the guidance input where there is one."""

W_FEATURES = 256


class SD(Text):
    """An opened ``StableDiffusionPipeline``."""

    component = "unet"
    network_classes = ("UNet2DConditionModel",)
    pipeline_names = ("StableDiffusionPipeline",)
    feature_blocks = ("down_blocks", "mid_block")
    lora_targets = UNET_LORA_TARGETS
    loads_lora = True

    def __init__(self, pipe: Any, **options: Any) -> None:
        check_unet(pipe.unet)
        super().__init__(pipe, **options)

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
        assert s is None, "this network takes no second time"
        dtype = next(network.parameters()).dtype
        return network(
            x_t.to(dtype),
            self.schedule.timestep(t).float(),
            encoder_hidden_states=cond["encoder_hidden_states"].to(dtype),
            timestep_cond=guidance_features(self.pipe, w, dtype),
        ).sample

    def extend(self, inputs: Inputs) -> None:
        extend_unet(self.network, inputs)
        self.inputs = inputs


def check_unet(unet: Any) -> None:
    """Refuse networks that are no text-to-image teacher's."""
    if unet.config.time_cond_proj_dim is not None:
        raise ValueError(
            "unet/config.json: time_cond_proj_dim is set: this is a student that takes its guidance as an input, and "
            "cannot be distilled again; wanted its teacher"
        )
    if unet.config.in_channels != unet.config.out_channels:
        raise ValueError(
            f"unet/config.json: {unet.config.in_channels} channels in, {unet.config.out_channels} out: an inpainting "
            "or image-conditioned network; wanted text-to-image"
        )


def extend_unet(unet: Any, inputs: Inputs) -> None:
    """Give the network diffusers' guidance input (``time_cond_proj_dim``), zero at first.

    Raises:
        ValueError: if a second time is asked for, which no stock pipeline would pass on.
    """
    if inputs.s:
        raise ValueError("teacher.family: UNet2DConditionModel takes no second time; choose one-time students")
    if inputs.w is None:
        return
    embedding = unet.time_embedding
    embedding.cond_proj = nn.Linear(W_FEATURES, embedding.linear_1.in_features, bias=False)
    nn.init.zeros_(embedding.cond_proj.weight)
    nn.Module.to(embedding, unet.device, unet.dtype)
    unet.register_to_config(time_cond_proj_dim=W_FEATURES)


def guidance_features(pipe: Any, w: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The pipeline's own Fourier features (B, 256) of guidance weights (B,)."""
    if w is None:
        return None
    with torch.device(w.device):
        return pipe.get_guidance_scale_embedding(w.float(), embedding_dim=W_FEATURES).to(dtype)


# ---------------------------------------------------------------------------------------------- miniatures


def tiny_unet(**options: Any) -> Any:
    """A random ``UNet2DConditionModel`` on latents of 8 x 8."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **options,
    )  # fmt: skip


def tiny_vae(**options: Any) -> Any:
    """A random ``AutoencoderKL`` that halves the size of images."""
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, sample_size=16, **blocks, **options)


def tiny_clip(*, projection: bool = False, width: int = 16) -> tuple[Any, Any]:
    """A tokenizer of bytes, made in memory, and a random CLIP text encoder for it."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer({word: i for i, word in enumerate(words)}, [], model_max_length=77)
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=77, projection_dim=width,
        bos_token_id=len(words) - 2, eos_token_id=len(words) - 1, pad_token_id=len(words) - 1,
    )  # fmt: skip
    return tokenizer, (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)
