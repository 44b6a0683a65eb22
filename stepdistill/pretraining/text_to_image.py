"""Train a small text-to-image teacher, a plain ``StableDiffusionPipeline``, from images and captions alone.

The parts are trained and saved in this order: an autoencoder; a CLIP, whose text half encodes the prompts; a second
CLIP of another seed, on which the teacher is not trained and which measures it; and the denoising network, on latents
that are computed once. Of several captions an image every visit draws one. The same command again resumes at the first
part that is missing.

    vae/  clip/  judge/     the parts; ``judge`` (half precision) is what ``evaluate.py --clip`` and ``--features`` take
    pipeline/               the teacher, its weights in half precision
    *.jsonl                 the losses
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from stepdistill.data.base import DataConfig, locate_data
from stepdistill.data.columns import Texts
from stepdistill.data.datasets import open_data
from stepdistill.families.prompts import warn_too_long
from stepdistill.features.loading import load_reader
from stepdistill.features.vocabulary import Vocabulary
from stepdistill.files.ranges import NonNegativeInt, PositiveInt, Range, Share
from stepdistill.networks.launcher import open_accelerator
from stepdistill.pretraining.clip import CaptionTokens, image_processor, train_clip, train_tokenizer
from stepdistill.pretraining.fit import FitConfig, denoising_loss, fit
from stepdistill.pretraining.readable import named_values
from stepdistill.pretraining.vae import encode, train_vae


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTeacherConfig:
    """Options of a text-to-image teacher's training: the data, and a section for every part."""

    data: DataConfig
    output_dir: str
    vae: FitConfig
    clip: FitConfig
    """``model`` has the sections ``text_config`` and ``vision_config`` of a ``CLIPConfig``."""
    judge: FitConfig
    """The CLIP that measures, likewise."""
    unet: FitConfig
    scheduler: dict[str, Any]
    """Arguments of ``DDIMScheduler``."""
    vocabulary: PositiveInt = 1750
    """Number of tokens that the tokenizer learns from the captions."""
    max_tokens: Annotated[int, Range(at_least=3)] = 24
    """Number of tokens in the longest prompt."""
    caption_dropout: Share = 0.1
    shift: NonNegativeInt = 0
    """Largest number of pixels by which the images of both CLIPs are moved."""
    attributes: str | None = None
    """An attribute reader, of which only the words are used: what captions say by them, the latents have to tell."""

    def __post_init__(self) -> None:
        if self.judge.seed == self.clip.seed:
            raise ValueError(f"judge.seed: expected another seed than clip.seed, got {self.judge.seed}")


def train_text_teacher(config: TextTeacherConfig) -> Path:
    """Train the parts that are missing, and return the pipeline's folder.

    Captions of more than ``max_tokens`` tokens are cut, and counted before anything is trained.
    """
    accelerator, folder = open_accelerator("no"), Path(config.output_dir)
    images, captions = read_all(config.data, config.vae.model["sample_size"])

    texts = list(itertools.chain.from_iterable(captions))
    tokenizer = train_tokenizer(texts, config.vocabulary, config.max_tokens)
    warn_too_long(tokenizer, texts, limit=config.max_tokens)
    tokens = CaptionTokens(tokenizer, captions)
    values, sizes = named_values(_words(config.attributes), captions)

    def part(name: str, train: Callable[[Path], Any]) -> Path:
        if not (folder / name / "config.json").is_file():
            made = train(folder / f"{name}.jsonl")
            if accelerator.is_main_process:  # a folder is complete or absent
                made.save_pretrained(folder / f"{name}.partial")
                (folder / f"{name}.partial").replace(folder / name)
            accelerator.wait_for_everyone()
        return folder / name

    def clip(fitting: FitConfig, log: Path) -> CLIPModel:
        return train_clip(images, tokens, fitting, config.shift, accelerator, log)

    vae = part("vae", functools.partial(train_vae, images, values, sizes, config.vae, accelerator))
    part("clip", functools.partial(clip, config.clip))
    part("judge", lambda log: clip(config.judge, log).half())
    for name in ("clip", "judge"):
        tokenizer.save_pretrained(folder / name)
        image_processor(images.shape[-1]).save_pretrained(folder / name)
    text_encoder = CLIPTextModel.from_pretrained(folder / "clip", use_safetensors=True)
    pipe = assemble(config, AutoencoderKL.from_pretrained(vae, use_safetensors=True), text_encoder, tokenizer)
    train_unet(pipe, images, tokens, config, accelerator, folder)
    return folder / "pipeline"


def _words(reader: str | None) -> Vocabulary:
    vocabulary = Vocabulary(attributes={}) if reader is None else load_reader(reader).vocabulary
    assert vocabulary is not None, "load_reader checks it"
    return vocabulary


def read_all(data: DataConfig, size: int) -> tuple[Tensor, Sequence[Texts]]:
    """Return every image (N, 3, size, size) in [-1, 1], and its captions."""
    dataset = open_data(locate_data(data), channels=3, size=(size, size), num_classes=None, takes_text=True)
    batch = dataset.load(range(len(dataset)))
    assert batch.images is not None and batch.captions is not None, "open_data checks both"
    if dataset.choices is None:
        return batch.images, [(text,) for text in batch.captions]
    return batch.images, [dataset.choices[index] for index in batch.indices]


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
    captions: CaptionTokens,
    config: TextTeacherConfig,
    accelerator: Accelerator,
    folder: Path,
) -> None:
    """Train the network of ``pipe`` on encoded images and drawn captions, and save the pipeline from time to time.

    The text encoder stays as its CLIP left it. One that is trained along drops what helps little in the first thousand
    steps, such as smiles, and does not find it again.
    """
    latents = encode(pipe.to(accelerator.device).vae, images, accelerator.device)
    null = captions.encode([""])

    def loss(network: nn.Module, index: Tensor, generator: torch.Generator) -> Tensor:
        dropped = torch.rand(len(index), 1, generator=generator) < config.caption_dropout
        ids = torch.where(dropped, null, captions.draw(index, generator)).to(accelerator.device)
        with torch.no_grad():  # at every visit, because the embeddings of many captions an image fill the memory
            text = pipe.text_encoder(ids)[0]
        return denoising_loss(
            network, pipe.scheduler, latents[index].to(accelerator.device), encoder_hidden_states=text
        )

    def save(average: UNet2DConditionModel) -> None:
        parts = {**pipe.components, "unet": average}
        for name in ("vae", "unet"):
            parts[name] = copy.deepcopy(parts[name]).half()
        StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(folder / "pipeline")
        halve(folder / "pipeline" / "text_encoder" / "model.safetensors")

    fit(
        pipe.unet.requires_grad_(True), loss, count=len(images), config=config.unet, accelerator=accelerator,
        log=folder / "unet.jsonl", save=save,
    )  # fmt: skip


def halve(file: Path) -> None:
    """Convert the weights in a file to half precision.

    A text encoder that is saved as ``.half()`` says so in its ``config.json``, and transformers then computes in it.
    """
    weights = load_file(file)
    save_file({name: value.half() for name, value in weights.items()}, file, metadata={"format": "pt"})
