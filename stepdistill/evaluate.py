"""How good is this pipeline? Numbers that can be compared, and what they cost.

Images are sampled from a diffusers pipeline with one seed an image, derived from the image's index: the set does not
depend on the batch size or on how many processes share the work. They are quantised to bytes, as a file would be,
before any metric sees them, and pass through the feature network once, whatever number of metrics is asked for.

A result says everything that gives its numbers a meaning: number of samples, seed, call arguments, scheduler, feature
network with the hash of its weights, reference, versions. A Fréchet distance is called FID on Inception's features
only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import inspect
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from stepdistill import metrics
from stepdistill.config import nearest
from stepdistill.features import FeatureExtractor, load_features
from stepdistill.frechet import Moments, ReferenceStatistics
from stepdistill.pictures import to_uint8
from stepdistill.randomness import derive_seed
from stepdistill.sampling import bind, sample

if TYPE_CHECKING:
    from stepdistill.methods.base import Distiller

METRICS = ("fd", "kd", "precision_recall", "density_coverage", "spread", "accuracy", "cmmd")
ASSETS = Path(__file__).parent / "assets" / "fashion"


@dataclasses.dataclass(frozen=True)
class Images:
    """A set of images as bytes (N, C, H, W), the labels (N,) that were asked for, and what making them cost."""

    pixels: Tensor
    labels: Tensor | None = None
    calls: float = 0.0
    """Network calls an image; a guided call counts as two."""
    seconds: float = 0.0
    """Median over batches of the wall-clock seconds an image takes, the first batch left out."""

    def __len__(self) -> int:
        return len(self.pixels)


def sample_images(
    pipeline: Any,
    count: int,
    *,
    seed: int = 0,
    batch_size: int = 100,
    num_classes: int | None = None,
    labels: Sequence[int] | None = None,
    precision: str = "fp32",
    call: Mapping[str, Any] | None = None,
    description: str = "sampling",
) -> Images:
    """Sample ``count`` images from a diffusers pipeline, labels in turn.

    Args:
        pipeline: takes ``generator`` (a list) and ``output_type="np"``; ``class_labels`` where it is conditional.
        count: how many images.
        seed: of the whole set; image i depends on (seed, i) alone.
        batch_size: images at a time; changes nothing but the speed.
        num_classes: image i gets label i modulo this; None for an unconditional pipeline.
        labels: image i gets label ``labels[i modulo their number]`` instead.
        precision: ``"bf16"`` runs the network under autocast.
        call: further arguments of the call, for example ``num_inference_steps``.
        description: what the progress bar says.
    """
    pipeline.set_progress_bar_config(disable=True)
    device = pipeline.device
    pixels, seconds = [], []
    asked = None if num_classes is None else asked_labels(count, range(num_classes) if labels is None else labels)
    with counted_rows(network_of(pipeline)) as rows, autocast(device, precision):
        for start in tqdm(range(0, count, batch_size), desc=description, leave=False, dynamic_ncols=True):
            indices = range(start, min(start + batch_size, count))
            generators = [torch.Generator("cpu").manual_seed(derive_seed(seed, index)) for index in indices]
            chosen = {"batch_size": len(indices)} if asked is None else {"class_labels": asked[indices]}
            began = time.perf_counter()
            output = pipeline(**chosen, generator=generators, output_type="np", **(call or {})).images
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append((time.perf_counter() - began) / len(indices))
            pixels.append(to_uint8(torch.from_numpy(np.asarray(output)).permute(0, 3, 1, 2)))
    return Images(torch.cat(pixels), asked, rows[0] / count, statistics.median(seconds[1:] or seconds))


@torch.no_grad()
def student_images(
    distiller: Distiller, count: int, *, seed: int = 0, batch_size: int = 100, device: torch.device | str = "cpu"
) -> Images:
    """What the student of a running distillation samples: the images its export will give for the same seeds."""
    family, sampler = distiller.family, distiller.sampler()
    distiller.bank.eval()
    began, pixels, labels = time.perf_counter(), [], []
    for start in range(0, count, batch_size):
        indices = range(start, min(start + batch_size, count))
        generators = [torch.Generator().manual_seed(derive_seed(seed, index)) for index in indices]
        cond = {name: value.to(device) for name, value in family.example_cond(indices).items()}

        def fresh(x: Tensor, generators: list[torch.Generator] = generators) -> Tensor:
            return torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators]).to(x.device, x.dtype)

        noise = fresh(torch.empty(len(indices), *family.sample_shape, device=device))
        x0 = sample(bind(distiller.result, cond), sampler, distiller.schedule.initial_noise(noise), fresh)
        pixels.append(to_uint8(family.decode(x0.float())).cpu())
        labels.append(cond.get("class_labels", torch.zeros(0)).cpu())
    asked = torch.cat(labels) if family.num_classes else None
    return Images(torch.cat(pixels), asked, sampler.steps, (time.perf_counter() - began) / count)


def asked_labels(count: int, labels: Sequence[int]) -> Tensor:
    """Labels in turn, (count,)."""
    return torch.tensor(list(labels))[torch.arange(count) % len(labels)]


def network_of(pipeline: Any) -> Any:
    """The denoising network of a pipeline."""
    return getattr(pipeline, "unet", None) or pipeline.transformer


@contextlib.contextmanager
def counted_rows(network: torch.nn.Module) -> Iterator[list[int]]:
    """Counts the images that pass through a network, in a list of one number."""
    rows = [0]

    def count(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        del module
        first = args[0] if args else kwargs["sample" if "sample" in kwargs else "hidden_states"]
        rows[0] += len(first)

    handle = network.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


def autocast(device: torch.device, precision: str) -> Any:
    """Autocast to bfloat16, or nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


class Judge:
    """A feature network, a reference, and the metrics between the reference and any set of images.

    Args:
        features: what embeds the images.
        reference: moments of the reference set.
        real: reference images themselves with their labels, for metrics that moments are not enough for.
    """

    def __init__(self, features: FeatureExtractor, reference: Moments, real: Images | None = None) -> None:
        self.features = features.eval()
        self.reference = reference
        self.real = real
        self.real_features = None if real is None else self.embed(real.pixels)

    @classmethod
    def open(cls, features: str, reference: str, max_images: int = 10_000) -> Judge:
        """From what a user names.

        Args:
            features: see :func:`stepdistill.features.load_features`.
            reference: ``"embedded"``, a ``.npz`` of statistics (ours, ADM's, clean-fid's), or images as the ``data``
                section takes them.
            max_images: how many reference images metrics beyond the Fréchet distance use.
        """
        network = load_features(features)
        if reference == "embedded":
            moments = ReferenceStatistics.read(ASSETS / "reference.npz").check(network)
            return cls(network, moments, read_images(ASSETS / "train_subset.npz", max_images))
        path = Path(reference)
        if not path.exists():
            siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
            raise ValueError(f"reference: no file or folder {reference!r}{nearest(path.name, siblings)}")
        if path.suffix == ".npz" and "mu" in np.load(path).files:
            return cls(network, ReferenceStatistics.read(path).check(network))
        real = read_images(path, None)
        judge = cls(network, Moments.of(torch.zeros(1, network.num_features)), real)
        assert judge.real_features is not None
        judge.reference = Moments.of(judge.real_features)
        return judge

    @torch.no_grad()
    def embed(self, pixels: Tensor, batch_size: int = 500) -> Tensor:
        """Features (N, d) of bytes (N, C, H, W)."""
        return torch.cat([self.features(batch) for batch in pixels.split(batch_size)])

    def score(self, images: Images, wanted: Sequence[str] = ("fd",)) -> dict[str, float]:
        """The wanted metrics of a set of images, by their published names.

        Raises:
            ValueError: for an unknown metric, or one that needs reference images where there are only statistics.
        """
        unknown = [name for name in wanted if name not in METRICS]
        if unknown:
            raise ValueError(f"metrics: {unknown[0]!r} is unknown{nearest(unknown[0], METRICS)}")
        fake = self.embed(images.pixels)
        scores: dict[str, float] = {}
        for name in wanted:
            scores |= getattr(self, f"_{name}")(fake, images)
        return scores

    def _named(self, metric: str) -> str:
        return metrics.reported_name(metric, self.features.name)

    def _fd(self, fake: Tensor, images: Images) -> dict[str, float]:
        interval = metrics.bootstrap_interval(fake, self.reference, labels=images.labels)
        name = self._named("fd")
        distance = metrics.frechet_distance(self.reference, Moments.of(fake))
        return {name: distance, f"{name}_low": interval.low, f"{name}_high": interval.high}

    def _kd(self, fake: Tensor, images: Images) -> dict[str, float]:
        del images
        size = min(1000, len(fake), len(self._real()))
        estimate = metrics.kernel_distance(self._real(), fake, subset_size=size)
        return {self._named("kd"): estimate.mean, f"{self._named('kd')}_std": estimate.std}

    def _precision_recall(self, fake: Tensor, images: Images) -> dict[str, float]:
        del images
        return metrics.precision_recall(self._real()[: len(fake)], fake)._asdict()

    def _density_coverage(self, fake: Tensor, images: Images) -> dict[str, float]:
        del images
        return metrics.density_coverage(self._real()[: len(fake)], fake)._asdict()

    def _cmmd(self, fake: Tensor, images: Images) -> dict[str, float]:
        del images
        return {"cmmd": metrics.cmmd(self._real(), fake)}

    def _spread(self, fake: Tensor, images: Images) -> dict[str, float]:
        real = self._real()
        if images.labels is None or self.real is None or self.real.labels is None:
            raise ValueError("metrics: 'spread' needs class labels on both sides")
        return {"spread": metrics.within_class_spread(real, self.real.labels, fake, images.labels)}

    def _accuracy(self, fake: Tensor, images: Images) -> dict[str, float]:
        if images.labels is None:
            raise ValueError("metrics: 'accuracy' needs the class labels that were asked for")
        return {"accuracy": metrics.class_accuracy(self.features.logits(fake), images.labels)}

    def _real(self) -> Tensor:
        if self.real_features is None:
            raise ValueError("metrics: the reference is statistics only; this metric needs the reference's images")
        return self.real_features


def read_images(path: Path, limit: int | None) -> Images:
    """Reference images from an ``.npz`` (mixed by a fixed permutation) or a folder of image files, as bytes."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            pixels = torch.from_numpy(archive["images"])
            labels = torch.from_numpy(archive["labels"]).long() if "labels" in archive.files else None
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))[:limit]
        return Images(pixels[order].contiguous(), None if labels is None else labels[order])
    from PIL import Image

    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if len(files) < 2:
        raise ValueError(f"{path}: found {len(files)} images, wanted at least 2")
    arrays = [np.atleast_3d(np.asarray(Image.open(file))) for file in files[:limit]]
    shapes = {array.shape: file for array, file in zip(arrays, files, strict=False)}
    if len(shapes) > 1:
        named = ", ".join(f"{file.name} {shape}" for shape, file in list(shapes.items())[:2])
        raise ValueError(f"{path}: images differ in size or mode: {named}")
    return Images(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous())


def describe_setting(judge: Judge, **settings: Any) -> dict[str, Any]:
    """What makes a result comparable: settings, feature network, reference, versions."""
    packages = ("torch", "diffusers", "torchmetrics", "numpy")
    return {
        **settings,
        "features": judge.features.describe(),
        "reference_images": judge.reference.n,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def evaluate_pipeline(
    pipeline: Any,
    judge: Judge,
    *,
    wanted: Sequence[str] = ("fd",),
    count: int = 5000,
    seed: int = 0,
    batch_size: int = 100,
    precision: str = "fp32",
    call: Mapping[str, Any] | None = None,
    name: str = "pipeline",
) -> dict[str, Any]:
    """Sample a pipeline and score it: one row of a table, and under ``setting`` what it takes to repeat it."""
    num_classes = class_count(pipeline)
    images = sample_images(
        pipeline, count, seed=seed, batch_size=batch_size, num_classes=num_classes, precision=precision,
        call=call, description=name,
    )  # fmt: skip
    row = {"name": name, "calls": images.calls, "seconds_per_image": images.seconds, **judge.score(images, wanted)}
    setting = describe_setting(
        judge, num_samples=count, seed=seed, precision=precision, call=dict(call or {}),
        scheduler=type(pipeline.scheduler).__name__,
    )  # fmt: skip
    return row | {"setting": setting}


def class_count(pipeline: Any) -> int | None:
    """How many classes may be asked of a pipeline; None where it takes no labels."""
    if "class_labels" not in inspect.signature(type(pipeline).__call__).parameters:
        return None
    embedded = network_of(pipeline).config.num_class_embeds
    null_class = pipeline.config.get("null_class")
    return embedded if null_class is None or embedded is None else embedded - 1


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
