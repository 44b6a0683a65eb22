"""Train a small pixel-space teacher from scratch."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from torch import Tensor, nn

from stepdistill.families.config import TeacherConfig
from stepdistill.families.loading import load_teacher
from stepdistill.families.pixel import Pixel
from stepdistill.files.places import Place
from stepdistill.files.precision import Precision
from stepdistill.files.ranges import Share
from stepdistill.files.weights import naming
from stepdistill.files.words import nearest
from stepdistill.networks.launcher import PRECISION, open_accelerator
from stepdistill.pipelines.class_conditional import ClassConditionalPipeline
from stepdistill.pretraining.classifier import read_labelled_images
from stepdistill.pretraining.fit import FitConfig, denoising_loss, fit, flow_matching_loss

SCHEDULERS = {"DDIMScheduler": DDIMScheduler, "FlowMatchEulerDiscreteScheduler": FlowMatchEulerDiscreteScheduler}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(FitConfig):
    """Options of a teacher's training; ``model`` and ``scheduler`` are passed to the diffusers classes."""

    scheduler: dict[str, Any]
    scheduler_class: Literal["DDIMScheduler", "FlowMatchEulerDiscreteScheduler"] = "DDIMScheduler"
    """The second makes a teacher that predicts the velocity of a flow."""
    data: Place
    output_dir: Place
    init_from: Place | None = None
    """A teacher whose weights the network begins from, as ``teacher.path`` takes it; it may predict anything else."""
    label_dropout: Share = 0.1
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        if not Path(self.data).is_file():
            raise ValueError(f"data: expected an .npz with 'images' and 'labels', got {self.data!r}, which is no file")
        for key, cls in (("scheduler", SCHEDULERS[self.scheduler_class]), ("model", UNet2DModel)):
            known = inspect.signature(cls).parameters
            for name in getattr(self, key):
                if name not in known and not name.startswith("_"):
                    raise ValueError(f"{key}: {cls.__name__} takes no {name!r}{nearest(name, known)}")


def train_teacher(config: PretrainConfig) -> Path:
    """Train a teacher, save it under ``config.output_dir``, and return that folder.

    ``unet/`` and ``scheduler/`` are what was trained; ``pipeline/`` is both in half precision, and the null class.

    Raises:
        ValueError: if the data is damaged or of another shape than the network's, a label is not one of its classes,
            ``model`` and ``scheduler`` make no teacher, ``init_from`` is no such teacher, or ``output_dir`` is a
            pipeline or holds a finished teacher.
    """
    folder = Path(config.output_dir)
    if (folder / "pipeline").is_dir():
        raise ValueError(f"output_dir: {folder / 'pipeline'} is a finished teacher; move it, or choose another folder")
    if (folder / "model_index.json").is_file():
        raise ValueError(f"output_dir: expected a folder of its own, got the pipeline {config.output_dir!r}")
    accelerator = open_accelerator({"fp32": "no", "bf16": "bf16"}[config.precision], {PRECISION: config.precision})
    torch.manual_seed(config.seed)
    images, labels = read_labelled_images(config.data)
    network, scheduler, shape = open_parts(config)
    if images.shape[1:] != shape:
        given = tuple(images.shape[1:])
        raise ValueError(f"{config.data}: images: expected (C, H, W) {shape}, as 'model' says, got {given}")
    null_class = (network.config.num_class_embeds or 0) - 1
    if null_class > 0 and not 0 <= int(labels.min()) <= int(labels.max()) < null_class:
        found = f"{int(labels.min())} to {int(labels.max())}"
        raise ValueError(f"{config.data}: labels: expected 0 to {null_class - 1}, the network's classes, got {found}")
    is_flow = config.scheduler_class == "FlowMatchEulerDiscreteScheduler"
    denoising = flow_matching_loss if is_flow else denoising_loss

    def loss(network: nn.Module, index: Tensor, generator: torch.Generator) -> Tensor:
        x0 = images[index].float().div(127.5).sub(1).to(accelerator.device)
        dropped = torch.rand(len(index), generator=generator) < config.label_dropout
        label = labels[index].masked_fill(dropped, null_class).to(accelerator.device) if null_class > 0 else None
        return denoising(network, scheduler, x0, class_labels=label)

    average = fit(
        network, loss, count=len(images), config=config, accelerator=accelerator,
        log=folder / "metrics.jsonl", save=lambda average: average.save_pretrained(folder / "unet"),
    )  # fmt: skip
    if accelerator.is_main_process:
        scheduler.save_pretrained(folder / "scheduler")
        halved_pipeline(average.cpu(), scheduler.config).save_pretrained(folder / "pipeline")
    return folder


def halved_pipeline(network: UNet2DModel, scheduler: Mapping[str, Any]) -> ClassConditionalPipeline:
    """Return a pipeline of a network, converted to half precision in place; its last class is the null class."""
    labels = network.config.num_class_embeds
    family = Pixel(network.half(), scheduler, None if labels is None else labels - 1)
    is_flow = family.prediction_type == "flow"
    kind = FlowMatchEulerDiscreteScheduler if is_flow else DDIMScheduler
    return family.teacher_pipeline(kind.from_config(scheduler))


def open_parts(config: PretrainConfig) -> tuple[UNet2DModel, Any, tuple[int, ...]]:
    """Return the network, the scheduler, and the shape (C, H, W) of the images that they make.

    Raises:
        ValueError: if they make no teacher, or as :func:`open_network` does.
    """
    network = open_network(config)
    with naming(Path("scheduler"), f"with 'model' it makes no teacher ({config.scheduler_class})"):
        scheduler = SCHEDULERS[config.scheduler_class](**config.scheduler)
        if scheduler.config.num_train_timesteps < 1:
            given = scheduler.config.num_train_timesteps
            raise ValueError(f"scheduler.num_train_timesteps: expected at least 1, got {given}")
        family = Pixel(network, scheduler.config)
    return network, scheduler, family.image_shape


def open_network(config: PretrainConfig) -> UNet2DModel:
    """Return the network that training begins from: a random one, or one with the weights of ``init_from``.

    Raises:
        ValueError: if ``model`` makes no network, or ``init_from`` is no teacher, or has other weights than a network
            of ``model``.
    """
    with naming(Path("model"), "it makes no UNet2DModel"):
        network = UNet2DModel(**config.model)
    if config.init_from is None:
        return network
    try:
        weights = load_teacher(TeacherConfig(path=config.init_from)).network.state_dict()
    except ValueError as error:
        raise ValueError(f"init_from: {str(error).removeprefix('teacher.path: ')}") from error
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    if shapes != {name: value.shape for name, value in weights.items()}:
        raise ValueError(f"init_from: expected the weights of a network of 'model', got others in {config.init_from!r}")
    network.load_state_dict(weights)
    return network
