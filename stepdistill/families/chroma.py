"""Chroma: FLUX.1-schnell's transformer without pooled text, and with guidance; its prompt goes through T5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from stepdistill.batch import Cond
from stepdistill.diffusion.schedule import RectifiedFlow
from stepdistill.families.flux import Flux, image_ids, pack, shifted_by_size, unpack
from stepdistill.families.latent import PlainLatentFamily, TextToImageFamily
from stepdistill.families.prompts import default_of


class Chroma(PlainLatentFamily, TextToImageFamily):
    """An opened ``ChromaPipeline``."""

    component = "transformer"
    network_classes = ("ChromaTransformer2DModel",)
    pipeline_names = ("ChromaPipeline",)
    parts = ("vae", "text_encoder", "tokenizer")
    hands_generators_on = False
    latents_per_token = 4
    side_multiple = 2
    processes = (RectifiedFlow,)
    feature_blocks = ("transformer_blocks", "single_transformer_blocks")
    lora_targets = Flux.lora_targets
    loads_lora = True

    def __init__(self, pipe: Any, **options: Any) -> None:
        # diffusers' recomputation of single blocks forgets their mask, and so makes other gradients: it is refused
        pipe.transformer._supports_gradient_checkpointing = False
        super().__init__(pipe, **options)
        self.pipeline_kwargs = {**self.pipeline_kwargs, "max_sequence_length": self.sequence_length}
        _, height, width = self.sample_shape
        self.schedule = shifted_by_size(self.schedule, self.scheduler_config, height * width // 4)

    @property
    def sequence_length(self) -> int:
        """Number of prompt tokens that T5 reads."""
        return default_of(self.pipe, "max_sequence_length")

    @classmethod
    def tiny(cls, seed: int = 0) -> Chroma:
        from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

        from stepdistill.families.tiny import tiny_flux_vae, tiny_t5

        torch.manual_seed(seed)
        tokenizer, text_encoder = tiny_t5(width=32)
        transformer = ChromaTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=32, axes_dims_rope=(2, 2, 4), approximator_num_channels=16,
            approximator_hidden_dim=16, approximator_layers=1,
        )  # fmt: skip
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        return cls(ChromaPipeline(scheduler, tiny_flux_vae(), text_encoder, tokenizer, transformer), resolution=16)

    def embed(self, prompts: Sequence[str], *, null: bool = False) -> Cond:
        del null  # the empty prompt
        text, _, mask, *_ = self.pipe.encode_prompt(
            list(prompts),
            device=self.pipe.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.sequence_length,
        )
        return {"encoder_hidden_states": text.float(), "attention_mask": mask.float()}

    def pack(self, states: Tensor) -> Tensor:
        return pack(states)

    def unpack(self, packed: Tensor) -> Tensor:
        return unpack(packed, *self.sample_shape[1:])

    def image_tokens(self, feature: Tensor, x_t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        del cond
        _, _, height, width = x_t.shape
        return feature[..., -(height * width // 4) :]  # single blocks have the prompt first

    def forward(self, network: nn.Module, x_t: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        _, _, height, width = x_t.shape
        text, places = cond["encoder_hidden_states"].to(x_t.dtype), image_ids(x_t)
        tokens = network(
            hidden_states=pack(x_t),
            timestep=timestep.to(x_t.dtype) / 1000,  # rounded first, as the pipeline does
            encoder_hidden_states=text,
            img_ids=places,
            txt_ids=x_t.new_zeros(text.shape[1], 3),
            # a float mask is added to the logits, as in the pipeline: padding is attended, a little less
            attention_mask=pad(cond["attention_mask"].to(x_t.dtype), (0, len(places)), value=1.0),
        ).sample
        return unpack(tokens, height, width)
