"""Train a small text-to-image teacher, a plain ``StableDiffusionPipeline``, from images and captions alone.

The parts are trained and saved in this order: a tokenizer; an autoencoder; a CLIP, whose text half encodes the
prompts; a second CLIP of another seed, on which the teacher is not trained and which measures it; the denoising
network, on latents that are computed once; and at last network and text encoder together. Trained together from the
beginning, the text encoder drops what helps little in the first thousand steps, such as smiles, and does not find it
again; never trained, it leaves rare words such as beards to chance. Of several captions an image every visit draws one.
The same command again resumes at the first part that is missing; with other values for a part that is there it is
refused (:mod:`stepdistill.pretraining.parts`).

    tokenizer/  vae/  clip/
    judge/                  the second CLIP, in half precision: what ``evaluate.py --clip`` and ``--features`` take
    unet/                   the network before the last training
    pipeline/               the teacher, its weights in half precision
    *.partial/              what is being made
    *.jsonl                 the losses
    config.json             what the parts were made with
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
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from stepdistill.data.base import DataConfig, locate_data
from stepdistill.data.columns import Texts
from stepdistill.data.datasets import open_data
from stepdistill.families.prompts import warn_too_long
from stepdistill.features.loading import load_reader
from stepdistill.features.vocabulary import Vocabulary
from stepdistill.files.places import Place
from stepdistill.files.ranges import NonNegativeInt, PositiveInt, Range, Share
from stepdistill.networks.launcher import open_accelerator
from stepdistill.pretraining.clip import CaptionTokens, image_processor, train_clip, train_tokenizer
from stepdistill.pretraining.fit import FitConfig, denoising_loss, fit
from stepdistill.pretraining.parts import finish_part, make_part, open_parts
from stepdistill.pretraining.readable import named_values
from stepdistill.pretraining.vae import encode, train_vae


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTeacherConfig:
    """Options of a text-to-image teacher's training: the data, and a section for every part."""

    data: DataConfig
    output_dir: Place
    vae: FitConfig
    clip: FitConfig
    """``model`` has the sections ``text_config`` and ``vision_config`` of a ``CLIPConfig``."""
    judge: FitConfig
    """The CLIP that measures, likewise."""
    unet: FitConfig
    together: FitConfig
    """Of network and text encoder; ``model`` is not used."""
    scheduler: dict[str, Any]
    """Arguments of ``DDIMScheduler``."""
    vocabulary: PositiveInt = 1750
    """Number of tokens that the tokenizer learns from the captions."""
    max_tokens: Annotated[int, Range(at_least=3)] = 24
    """Number of tokens in the longest prompt."""
    caption_dropout: Share = 0.1
    shift: NonNegativeInt = 0
    """Largest number of pixels by which the images of both CLIPs are moved."""
    attributes: Place | None = None
    """An attribute reader, of which only the words are used: what captions say by them, the latents have to tell."""

    def __post_init__(self) -> None:
        if self.judge.seed == self.clip.seed:
            raise ValueError(f"judge.seed: expected another seed than clip.seed, got {self.judge.seed}")


def train_text_teacher(config: TextTeacherConfig) -> Path:
    """Train the parts that are missing, and return the pipeline's folder.

    Captions of more than ``max_tokens`` tokens are cut, and counted before anything is trained.

    Raises:
        ValueError: if a part that is there was made with other values, or from a part that is missing.
    """
    accelerator, folder = open_accelerator("no"), Path(config.output_dir)
    open_parts(folder, config, accelerator)
    images, captions = read_all(config.data, config.vae.model["sample_size"])
    values, sizes = named_values(_words(config.attributes), captions)

    part = functools.partial(make_part, folder, accelerator)
    texts = list(itertools.chain.from_iterable(captions))
    part("tokenizer", lambda log: train_tokenizer(texts, config.vocabulary, config.max_tokens))
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    warn_too_long(tokenizer, texts, limit=config.max_tokens)
    tokens = CaptionTokens(tokenizer, captions)

    def clip(fitting: FitConfig, log: Path) -> CLIPModel:
        return train_clip(images, tokens, fitting, config.shift, accelerator, log)

    vae = part("vae", functools.partial(train_vae, images, values, sizes, config.vae, accelerator))
    part("clip", functools.partial(clip, config.clip))
    part("judge", lambda log: clip(config.judge, log).half())
    if accelerator.is_main_process:
        for name in ("clip", "judge"):
            tokenizer.save_pretrained(folder / name)
            image_processor(images.shape[-1]).save_pretrained(folder / name)
    if (folder / "pipeline").is_dir():
        return folder / "pipeline"

    text_encoder = CLIPTextModel.from_pretrained(folder / "clip", use_safetensors=True)
    pipe = assemble(config, AutoencoderKL.from_pretrained(vae, use_safetensors=True), text_encoder, tokenizer)
    latents = encode(pipe.to(accelerator.device).vae, images, accelerator.device)
    train = functools.partial(train_denoiser, pipe, latents, tokens, config.caption_dropout, accelerator)

    pipe.text_encoder.requires_grad_(False)
    unet = part("unet", lambda log: train(config.unet, log).unet)
    pipe.unet.load_state_dict(UNet2DConditionModel.from_pretrained(unet, use_safetensors=True).state_dict())
    pipe.text_encoder.requires_grad_(True)
    save = functools.partial(save_halved, pipe, folder / "pipeline.partial")
    train(config.together, folder / "pipeline.jsonl", save)
    return finish_part(folder, "pipeline", accelerator)


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


class Denoiser(nn.Module):
    """A network and its text encoder."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, x_t: Tensor, timesteps: Tensor, ids: Tensor) -> UNet2DConditionOutput:
        """Return the prediction for ``x_t`` (B, c, h, w) and tokens ``ids`` (B, length)."""
        return self.unet(x_t, timesteps, encoder_hidden_states=self.text_encoder(ids)[0])


def train_denoiser(
    pipe: StableDiffusionPipeline,
    latents: Tensor,
    captions: CaptionTokens,
    dropout: float,
    accelerator: Accelerator,
    config: FitConfig,
    log: Path,
    save: Callable[[Denoiser], object] = lambda average: None,
) -> Denoiser:
    """Train what asks for gradients in the network and text encoder of ``pipe``, and return their average.

    Args:
        pipe: its parts are trained in place.
        latents: (N, c, h, w) of all images.
        captions: of all images; every visit draws one.
        dropout: share of captions that are replaced by the empty one.
        accelerator: device, precision and processes.
        config: of this training.
        log: file for the loss.
        save: called with the average from time to time.
    """
    null = captions.encode([""])

    def loss(network: nn.Module, index: Tensor, generator: torch.Generator) -> Tensor:
        dropped = torch.rand(len(index), 1, generator=generator) < dropout
        ids = torch.where(dropped, null, captions.draw(index, generator)).to(accelerator.device)
        return denoising_loss(network, pipe.scheduler, latents[index].to(accelerator.device), ids=ids)

    torch.manual_seed(config.seed)
    denoiser = Denoiser(pipe.unet.requires_grad_(True), pipe.text_encoder)
    return fit(denoiser, loss, count=len(latents), config=config, accelerator=accelerator, log=log, save=save)


def save_halved(pipe: StableDiffusionPipeline, folder: Path, average: Denoiser) -> None:
    """Save ``pipe`` with the averages of its network and text encoder, all weights in half precision."""
    parts = {**pipe.components, "unet": average.unet, "text_encoder": average.text_encoder}
    for name in ("vae", "unet"):
        parts[name] = copy.deepcopy(parts[name]).half()
    StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)
    halve(folder / "text_encoder" / "model.safetensors")


def halve(file: Path) -> None:
    """Convert the weights in a file to half precision.

    A text encoder that is saved as ``.half()`` says so in its ``config.json``, and transformers then computes in it.
    """
    weights = load_file(file)
    save_file({name: value.half() for name, value in weights.items()}, file, metadata={"format": "pt"})
