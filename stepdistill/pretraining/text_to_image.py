"""Train a small text-to-image teacher, a plain ``StableDiffusionPipeline``, from images and captions alone.

The parts are trained and saved in this order: an autoencoder; a CLIP, whose text half encodes the prompts; a second
CLIP of another seed, on which the teacher is not trained and which measures it; and the denoising network, on latents
and text embeddings that are computed once. The same command again resumes at the first part that is missing.

    vae/  clip/  judge/     the parts; ``judge`` is what ``evaluate.py --clip`` and ``--features`` take
    pipeline/               the teacher, its network and autoencoder in half precision
    *.jsonl                 the losses
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from stepdistill.data.base import DataConfig, locate_data
from stepdistill.data.datasets import open_data
from stepdistill.families.prompts import warn_too_long
from stepdistill.families.sd import SD
from stepdistill.files.ranges import PositiveInt, Range, Seed, Share
from stepdistill.networks.launcher import open_accelerator
from stepdistill.pretraining.clip import image_processor, train_clip, train_tokenizer
from stepdistill.pretraining.fit import FitConfig, denoising_loss, fit
from stepdistill.pretraining.vae import train_vae


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTeacherConfig:
    """Options of a text-to-image teacher's training: the data, and a section for every part."""

    data: DataConfig
    output_dir: str
    vae: FitConfig
    clip: FitConfig
    """``model`` has the sections ``text_config`` and ``vision_config`` of a ``CLIPConfig``."""
    unet: FitConfig
    scheduler: dict[str, Any]
    """Arguments of ``DDIMScheduler``."""
    judge_seed: Seed = 1
    """Seed of the CLIP that measures; its other options are those of ``clip``."""
    vocabulary: PositiveInt = 1750
    """Number of tokens that the tokenizer learns from the captions."""
    max_tokens: Annotated[int, Range(at_least=3)] = 24
    """Number of tokens in the longest prompt."""
    caption_dropout: Share = 0.1

    def __post_init__(self) -> None:
        if self.judge_seed == self.clip.seed:
            raise ValueError(f"judge_seed: expected another seed than clip.seed, got {self.judge_seed}")


def train_text_teacher(config: TextTeacherConfig) -> Path:
    """Train the parts that are missing, and return the pipeline's folder.

    Captions of more than ``max_tokens`` tokens are cut, and counted before anything is trained. Of several captions an
    image has the first is used.
    """
    accelerator, folder = open_accelerator("no"), Path(config.output_dir)
    images, captions = read_all(config.data, config.vae.model["sample_size"])

    tokenizer = train_tokenizer(captions, config.vocabulary, config.max_tokens)
    warn_too_long(tokenizer, captions, limit=config.max_tokens)

    def part(name: str, cls: Any, train: Callable[[Path], Any]) -> Any:
        if not (folder / name / "config.json").is_file():
            made = train(folder / f"{name}.jsonl")
            if accelerator.is_main_process:  # a folder is complete or absent
                made.save_pretrained(folder / f"{name}.partial")
                (folder / f"{name}.partial").replace(folder / name)
            accelerator.wait_for_everyone()
        return cls.from_pretrained(folder / name, use_safetensors=True)

    vae = part("vae", AutoencoderKL, functools.partial(train_vae, images, config.vae, accelerator))
    for name, seed in [("clip", config.clip.seed), ("judge", config.judge_seed)]:
        fitting = dataclasses.replace(config.clip, seed=seed)
        part(name, CLIPModel, functools.partial(train_clip, images, captions, tokenizer, fitting, accelerator))
        tokenizer.save_pretrained(folder / name)
        image_processor(images.shape[-1]).save_pretrained(folder / name)
    pipe = assemble(config, vae, CLIPTextModel.from_pretrained(folder / "clip", use_safetensors=True), tokenizer)
    train_unet(pipe, images, captions, config, accelerator, folder)
    return folder / "pipeline"


def read_all(data: DataConfig, size: int) -> tuple[Tensor, list[str]]:
    """Return every image (N, 3, size, size) in [-1, 1], and its caption."""
    dataset = open_data(locate_data(data), channels=3, size=(size, size), num_classes=None, takes_text=True)
    batch = dataset.load(range(len(dataset)))
    assert batch.images is not None and batch.captions is not None, "open_data checks both"
    return batch.images, list(batch.captions)


def assemble(
    config: TextTeacherConfig, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """Return a pipeline of the parts, around a random network that fits them."""
    torch.manual_seed(config.unet.seed)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    channels = vae.config.latent_channels
    unet = UNet2DConditionModel(
        **config.unet.model, sample_size=vae.config.sample_size // factor, in_channels=channels, out_channels=channels,
        cross_attention_dim=text_encoder.config.hidden_size,
    )  # fmt: skip
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False, **config.scheduler)
    return StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def train_unet(
    pipe: StableDiffusionPipeline,
    images: Tensor,
    captions: list[str],
    config: TextTeacherConfig,
    accelerator: Accelerator,
    folder: Path,
) -> None:
    """Train the network of ``pipe`` on encoded images and captions, and save the pipeline from time to time."""
    family = SD(pipe.to(accelerator.device))
    with torch.no_grad():
        latents = torch.cat([family.to_latents(batch).cpu() for batch in images.split(100)])
        prompts = family.embed(captions)["encoder_hidden_states"].cpu()
    null = family.null["encoder_hidden_states"].cpu()

    def loss(network: nn.Module, index: Tensor, generator: torch.Generator) -> Tensor:
        dropped = torch.rand(len(index), 1, 1, generator=generator) < config.caption_dropout
        text = torch.where(dropped, null, prompts[index]).to(accelerator.device)
        return denoising_loss(
            network, pipe.scheduler, latents[index].to(accelerator.device), encoder_hidden_states=text
        )

    def save(average: UNet2DConditionModel) -> None:
        parts = {**pipe.components, "unet": average}
        for name in ("vae", "unet"):  # not the text encoder, because transformers would open it in half precision
            parts[name] = copy.deepcopy(parts[name]).half()
        StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(folder / "pipeline")

    fit(
        pipe.unet.requires_grad_(True), loss, count=len(images), config=config.unet, accelerator=accelerator,
        log=folder / "unet.jsonl", save=save,
    )  # fmt: skip
