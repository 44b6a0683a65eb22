"""Train a small pixel-space teacher from scratch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor, nn

from stepdistill.files.precision import Precision
from stepdistill.files.ranges import Share
from stepdistill.networks.launcher import PRECISION, open_accelerator
from stepdistill.pretraining.classifier import read_labelled_images
from stepdistill.pretraining.fit import FitConfig, denoising_loss, fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(FitConfig):
    """Options of a teacher's training; ``model`` and ``scheduler`` are passed to the diffusers classes."""

    scheduler: dict[str, Any]
    data: str
    output_dir: str
    label_dropout: Share = 0.1
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        if not Path(self.data).is_file():
            raise ValueError(f"data: expected an .npz with 'images' and 'labels', got {self.data!r}, which is no file")


def train_teacher(config: PretrainConfig) -> Path:
    """Train a teacher, save ``unet/`` and ``scheduler/`` under ``config.output_dir``, and return that folder.

    Raises:
        ValueError: if the data is damaged, or a label is not one of the network's classes.
    """
    accelerator = open_accelerator({"fp32": "no", "bf16": "bf16"}[config.precision], {PRECISION: config.precision})
    torch.manual_seed(config.seed)
    images, labels = read_labelled_images(config.data)
    null_class = config.model.get("num_class_embeds", 0) - 1
    if null_class > 0 and not 0 <= int(labels.min()) <= int(labels.max()) < null_class:
        found = f"{int(labels.min())} to {int(labels.max())}"
        raise ValueError(f"{config.data}: labels: expected 0 to {null_class - 1}, the network's classes, got {found}")
    scheduler = DDIMScheduler(**config.scheduler)
    folder = Path(config.output_dir)

    def loss(network: nn.Module, index: Tensor, generator: torch.Generator) -> Tensor:
        x0 = images[index].float().div(127.5).sub(1).to(accelerator.device)
        dropped = torch.rand(len(index), generator=generator) < config.label_dropout
        label = labels[index].masked_fill(dropped, null_class).to(accelerator.device) if null_class > 0 else None
        return denoising_loss(network, scheduler, x0, class_labels=label)

    fit(
        UNet2DModel(**config.model), loss, count=len(images), config=config, accelerator=accelerator,
        log=folder / "metrics.jsonl", save=lambda average: average.save_pretrained(folder / "unet"),
    )  # fmt: skip
    if accelerator.is_main_process:
        scheduler.save_pretrained(folder / "scheduler")
    return folder
