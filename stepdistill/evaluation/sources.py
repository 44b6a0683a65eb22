"""Where the images come from that are measured: a pipeline, or files."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import inspect
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from stepdistill.assets import EMBEDDED
from stepdistill.config import fingerprint_json
from stepdistill.data.base import DataConfig
from stepdistill.data.columns import Texts
from stepdistill.data.decoding import read_pixels
from stepdistill.data.listing import list_samples
from stepdistill.data.prompts import prompt_rows
from stepdistill.data.remote import is_address, shown
from stepdistill.evaluation.cost import parameter_count, peak_memory
from stepdistill.evaluation.image_set import ImageSet
from stepdistill.evaluation.results import machine
from stepdistill.export.contract import contract_of
from stepdistill.files.words import visible
from stepdistill.inference.rows import network_of
from stepdistill.inference.sampling import ROWS, Images, check_captions, class_count, cycle_labels, sample_images
from stepdistill.networks.compilation import is_compiled
from stepdistill.networks.fingerprint import sha256_of_weights


class Source(abc.ABC):
    """A set of images of which any part can be taken, the same every time."""

    count: int
    critic: Mapping[str, str] = {}
    """Feature networks, by sha256, that trained what made the images."""
    labels: Tensor | None = None
    """Class that each image was asked for."""
    captions: Sequence[str] | None = None
    """Prompt or text of each image."""

    @abc.abstractmethod
    def take(self, indices: range) -> Images:
        """Return the images at ``indices``."""

    @abc.abstractmethod
    def setting(self) -> dict[str, Any]:
        """Return what results must share to be compared, as JSON values."""

    @abc.abstractmethod
    def subject(self) -> dict[str, Any]:
        """Return what is measured, as JSON values."""

    @abc.abstractmethod
    def timing(self) -> dict[str, Any]:
        """Return the machine that times are measured on, as JSON values."""

    def cost(self, rows: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the cost of an image, from the rows of all chunks; nothing where it is unknown."""
        del rows
        return {}


@dataclasses.dataclass(kw_only=True)
class PipelineSource(Source):
    """Images that a pipeline generates.

    Attributes:
        pipeline: see :func:`stepdistill.inference.sampling.sample_images`. A safety checker is removed from it, since
            it would blacken some of the images.
        count: number of images.
        seed: of the set.
        batch_size: images per call of the pipeline; changes the speed only.
        precision: ``"bf16"`` runs the network under autocast.
        call: further arguments of the pipeline's call.
        captions: prompts, one an image.
        size: images are resized (short side) and cropped to a square of this side.
        rows: rows that the network sees at a time: what the memory must hold, and what the last digits depend on.
        name: shown beside the progress.
    """

    pipeline: Any
    count: int = 5000
    seed: int = 0
    batch_size: int = 100
    precision: str = "fp32"
    call: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    captions: Sequence[str] | None = None
    size: int | None = None
    rows: int = ROWS
    name: str = "pipeline"

    def __post_init__(self) -> None:
        check_captions(self.pipeline, self.captions)
        self.critic = contract_of(self.pipeline).origin.critic
        self.num_classes = class_count(self.pipeline)
        if self.num_classes is not None:
            self.labels = cycle_labels(self.count, range(self.num_classes))
        if getattr(self.pipeline, "safety_checker", None) is not None:
            self.pipeline.safety_checker = None

    def take(self, indices: range) -> Images:
        images = sample_images(
            self.pipeline, len(indices), first=indices.start, num_classes=self.num_classes, seed=self.seed,
            batch_size=self.batch_size, captions=self.captions, precision=self.precision, call=self.call,
            rows=self.rows, description=self.name,
        )  # fmt: skip
        return resized(images, self.size)

    def setting(self) -> dict[str, Any]:
        return {
            "num_samples": self.count, "seed": self.seed, "precision": self.precision, "size": self.size,
            "rows": self.rows, "captions": hashed(self.captions),
        }  # fmt: skip

    def subject(self) -> dict[str, Any]:
        return describe_pipeline(self.pipeline, self.call)

    def timing(self) -> dict[str, Any]:
        processes = PartialState().num_processes
        compiled = is_compiled(network_of(self.pipeline))
        here = machine(self.pipeline.device)
        return {**here, "batch_size": self.batch_size, "processes": processes, "compiled": compiled}

    def cost(self, rows: Mapping[str, Tensor]) -> dict[str, Any]:
        calls = (rows["calls"] * rows["images"]).sum() / rows["images"].sum()
        return {
            "calls": calls.item(),
            "seconds_per_image": statistics.median(rows["seconds"].tolist()),
            "parameters": parameter_count(self.pipeline),
            **peak_memory(self.pipeline.device),
        }


class FileSource(Source):
    """Images that were generated elsewhere.

    Args:
        images: the set.
        size: what they were resized to, for the result.
    """

    def __init__(self, images: ImageSet, size: int | None = None) -> None:
        self.images, self.size, self.count = images, size, len(images)
        self.labels, self.captions = images.labels, images.captions

    def take(self, indices: range) -> Images:
        return self.images.read(indices)

    def setting(self) -> dict[str, Any]:
        unknown = dict.fromkeys(("seed", "precision", "rows"))
        captions = hashed(self.images.captions_in_order())
        return {"num_samples": self.count, "size": self.size, **unknown, "captions": captions}

    def subject(self) -> dict[str, Any]:
        return {"kind": "images", "path": self.images.path, "files": self.images.fingerprint()}

    def timing(self) -> dict[str, Any]:
        return machine(torch.device("cpu"))


def hashed(captions: Sequence[str] | None) -> str | None:
    """Return the SHA-256 of captions, in their order; None where there are none."""
    return None if captions is None else hashlib.sha256("\n".join(captions).encode()).hexdigest()


def resized(images: Images, size: int | None) -> Images:
    """Return images with the short side at ``size`` (bicubic, antialiased, as files are), cropped at the centre."""
    if size is None or images.pixels.shape[-2:] == (size, size):
        return images
    arrays = images.pixels.permute(0, 2, 3, 1).numpy()
    pixels = np.stack([read_pixels(array, array.shape[2], (size, size)) for array in arrays])
    return dataclasses.replace(images, pixels=torch.from_numpy(pixels))


def describe_pipeline(pipeline: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a pipeline's images depend on, as JSON values: weights, scheduler, configuration, call."""
    network, others = network_of(pipeline), {}
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module) and part is not network:
            others[name] = sha256_of_weights(part)
    config = {key: value for key, value in public(pipeline.config).items() if _is_plain(value)}
    return {
        "kind": "pipeline",
        "pipeline": type(pipeline).__name__,
        "weights_sha256": sha256_of_weights(network),
        "other_weights_sha256": others,
        "scheduler": type(pipeline.scheduler).__name__,
        "scheduler_config": fingerprint_json(public(pipeline.scheduler.config)),
        "config": config,
        "call": {**contract_of(pipeline).call, **call},
    }


def check_guidance(pipeline: Any, call: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if a call asks for guidance by an argument that the pipeline does not read."""
    scale, accepted = call.get("guidance_scale", 1.0), inspect.signature(type(pipeline).__call__).parameters
    if scale > 1 and "true_cfg_scale" in accepted and not network_of(pipeline).config.get("guidance_embeds"):
        raise ValueError(
            f"guidance_scale: expected none, since {type(pipeline).__name__} reads true_cfg_scale instead, got "
            f"{scale:g}; a teacher is guided by it if it is given as --teacher"
        )


def public(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a diffusers configuration that do not start with an underscore."""
    return {key: value for key, value in dict(config).items() if not key.startswith("_")}


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def read_captions(path: str, count: int) -> Sequence[str]:
    """Return the first ``count`` captions of a file of prompts, or of images as ``data.path`` takes them.

    Of several captions an image has the first is taken.

    Raises:
        ValueError: if there is no such file, a caption is missing or blank, or there are fewer than ``count``.
    """
    file = EMBEDDED.get(path, Path(path))
    if is_address(path):
        found = _image_captions(path)
    elif file.is_dir() or file.suffix in (".npz", ".tar", ".parquet"):
        found = _image_captions(str(file))
    elif file.is_file():
        found = prompt_rows(file)
    else:
        raise ValueError(f"captions: no file or folder {path!r}")
    captions = []
    for where, texts in found.items():
        if not texts or not texts[0].strip():
            raise ValueError(f"captions: {visible(where)} {'is empty' if texts else 'has no caption'}")
        captions.append(texts[0])
    if len(captions) < count:
        raise ValueError(f"captions: {path}: expected {count}, one an image, got {len(captions)}")
    return captions[:count]


def _image_captions(path: str) -> dict[str, Texts]:
    """Return the captions of images by the images' names."""
    listing = list_samples(DataConfig(name="images", path=path, bad_files="error"))
    named = shown(path) if is_address(path) else path
    if listing.captions is None:
        reason = listing.no_captions or "expected a metadata.jsonl with 'text', got images without texts"
        raise ValueError(f"captions: {named}: {reason}")
    captions = {}
    for row, texts in enumerate(listing.captions):
        captions[f"{named}[{row}]"] = texts
    return captions
