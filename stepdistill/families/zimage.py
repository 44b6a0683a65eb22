"""Z-Image: a flow transformer whose sequence is image and prompt together, the prompt through a chat of Qwen 3.

The pipeline adds its guidance on top of the conditional prediction, so its ``guidance_scale`` is ours less one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.batch import Cond
from stepdistill.diffusion.schedule import RectifiedFlow
from stepdistill.families.flux import shifted_by_size
from stepdistill.families.latent import PlainLatentFamily, TextToImageFamily
from stepdistill.families.prompts import default_of, padded


class ZImage(PlainLatentFamily, TextToImageFamily):
    """An opened ``ZImagePipeline``."""

    component = "transformer"
    network_classes = ("ZImageTransformer2DModel",)
    pipeline_names = ("ZImagePipeline",)
    parts = ("vae", "text_encoder", "tokenizer")
    hands_generators_on = False
    side_multiple = 2
    processes = (RectifiedFlow,)
    feature_blocks = ("layers",)
    lora_targets = (
        "attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0", "feed_forward.w1",
        "feed_forward.w2", "feed_forward.w3",
    )  # fmt: skip
    loads_lora = True
    can_rescale = "global"
    guidance_convention = "Z-Image: conditional + guidance_scale * (conditional - unconditional); 0 is none"

    def __init__(self, pipe: Any, **options: Any) -> None:
        # made here: a first call inside torch.func would leave functorch's wrappers in the network's table
        rope = pipe.transformer.rope_embedder
        rope.freqs_cis = rope.precompute_freqs_cis(rope.axes_dims, rope.axes_lens, theta=rope.theta)
        super().__init__(pipe, **options)
        self.pipeline_kwargs = {**self.pipeline_kwargs, "max_sequence_length": self.sequence_length}
        _, height, width = self.sample_shape
        self.schedule = shifted_by_size(self.schedule, self.scheduler_config, height * width // 4)

    @property
    def sequence_length(self) -> int:
        """Number of prompt tokens that the text encoder reads."""
        return default_of(self.pipe, "max_sequence_length")

    def native_size(self) -> tuple[int, int]:
        return 1024, 1024  # what the pipeline's call takes for none

    @classmethod
    def tiny(cls, seed: int = 0) -> ZImage:
        from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
        from transformers import Qwen3Model

        from stepdistill.families.tiny import tiny_flux_vae, tiny_qwen, tiny_qwen3

        torch.manual_seed(seed)
        tokenizer = tiny_qwen()
        text_encoder = tiny_qwen3(Qwen3Model, tokenizer, width=16, layers=2)
        transformer = ZImageTransformer2DModel(
            in_channels=4, dim=16, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
            axes_dims=[4, 2, 2], axes_lens=[1024, 64, 64],
        )  # fmt: skip
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        return cls(ZImagePipeline(scheduler, tiny_flux_vae(), text_encoder, tokenizer, transformer), resolution=16)

    def guidance_arguments(self, scale: float) -> dict[str, Any]:
        return {"guidance_scale": scale - 1}

    def embed(self, prompts: Sequence[str], *, null: bool = False) -> Cond:
        del null  # the empty prompt in the chat's template
        rows, _ = self.pipe.encode_prompt(
            list(prompts),  # a copy: the pipeline writes its chat into the list
            device=self.pipe.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.sequence_length,
        )
        return padded(rows, self.sequence_length)

    def image_tokens(self, feature: Tensor, x_t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        del cond
        _, _, height, width = x_t.shape
        return feature[..., : height * width // 4]

    def forward(self, network: nn.Module, x_t: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        # the prompt's length is part of the image's places: padding must not be seen
        lengths = cond["encoder_attention_mask"].sum(1).tolist()
        texts = cond["encoder_hidden_states"].to(x_t.dtype)
        prompts = [text[:length] for text, length in zip(texts, lengths, strict=True)]
        images = network(list(x_t.unsqueeze(2).unbind()), 1 - timestep / 1000, prompts).sample
        return -torch.stack(images).squeeze(2)
