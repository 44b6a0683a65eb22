"""A feature network, a reference, and every metric between the reference and a set of images, by name."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepdistill.assets import EMBEDDED
from stepdistill.assets import FASHION as ASSETS
from stepdistill.config import nearest
from stepdistill.evaluation.image_set import Fingerprint, ImageFiles, format_shape
from stepdistill.evaluation.metrics.bootstrap import Interval, mean_interval
from stepdistill.evaluation.metrics.classifier import inception_score
from stepdistill.evaluation.metrics.diversity import authentic, nearest_distance, within_class_deviations
from stepdistill.evaluation.metrics.frechet import Moments, bootstrap_interval, frechet_distance
from stepdistill.evaluation.metrics.kernel import cmmd, cmmd_influence, kernel_distance, kernel_influence
from stepdistill.evaluation.metrics.manifold import ball_counts, manifold_hits
from stepdistill.evaluation.metrics.names import METRICS, PUBLISHED, reported_name
from stepdistill.evaluation.reference import ReferenceStatistics
from stepdistill.features.base import FeatureExtractor
from stepdistill.features.loading import load_features
from stepdistill.inference.sampling import Images

EMBED = 50
"""Images that a feature network sees at a time: fixed, since the last bits of a feature depend on it."""


class Judge:
    """A feature network, a reference, and the metrics between the reference and any set of images.

    Args:
        features: what embeds the images.
        reference: moments of the reference set.
        real: reference images themselves with their labels, for metrics that moments are not enough for.
        rows: (N, d) the features of such images, where they are known already.
        labels: (N,) the classes of ``rows``.
        files: where the images of ``rows`` are, as many from the first, for those who want to see them.
        about: what is known of the reference, as JSON values: for result files.
    """

    def __init__(
        self,
        features: FeatureExtractor,
        reference: Moments,
        real: Images | None = None,
        *,
        rows: Tensor | None = None,
        labels: Tensor | None = None,
        files: ImageFiles | None = None,
        about: dict[str, Any] | None = None,
    ) -> None:
        self.features = features.eval()
        self.reference = reference
        self.about = about or {}
        self.real_features = rows if real is None else self.embed(real.pixels)
        self.real_labels = labels if real is None else real.labels
        self._real_images, self._files = real, files

    @classmethod
    def open(
        cls,
        features: str,
        reference: str,
        max_images: int = 10_000,
        *,
        resize: str | None = None,
        size: int | None = None,
        device: torch.device | str = "cpu",
    ) -> Judge:
        """From what a user names.

        Args:
            features: see :func:`stepdistill.features.loading.load_features`.
            reference: ``"embedded"``, a ``.npz`` of statistics (ours, ADM's, clean-fid's), or images as the ``data``
                section takes them (``"emoji"``, too).
            max_images: how many reference images metrics beyond the Fréchet distance use.
            resize: how Inception's input is made.
            size: reference images are resized and cropped to a square of this side.
            device: where features are computed.
        """
        network = load_features(features, resize).to(device)
        if reference == "embedded":
            return cls._of_statistics(network, ASSETS / "reference.npz", ASSETS / "train_subset.npz", max_images)
        path = EMBEDDED.get(reference, Path(reference))
        if not path.exists():
            siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
            raise ValueError(f"reference: no file or folder {reference!r}{nearest(path.name, siblings)}")
        if path.suffix == ".npz" and holds_statistics(path):
            return cls._of_statistics(network, path, None, max_images)
        return cls._of_images(network, ImageFiles(path, size=size), max_images)

    @classmethod
    def _of_statistics(cls, network: FeatureExtractor, path: Path, images: Path | None, limit: int) -> Judge:
        statistics = ReferenceStatistics.read(path)
        moments = statistics.check(network)
        known = statistics.images or {}
        about: dict[str, Any] = {"kind": "statistics", "sha256": sha256_of(path), "images": moments.n, **known}
        if images is not None:
            files = ImageFiles(images, limit=limit)
            return cls(network, moments, files.read(range(len(files))), about=about | {"shape": list(files.shape)})
        if statistics.pixels is not None:
            return cls(network, moments, Images(statistics.pixels[:limit]), about=about)
        return cls(network, moments, rows=statistics.rows, labels=statistics.labels, about=about)

    @classmethod
    def _of_images(cls, network: FeatureExtractor, files: ImageFiles, limit: int) -> Judge:
        """Moments of all images, which pass in parts, and the features of the first ``limit`` (they are mixed)."""
        judge = cls(network, Moments.of(torch.zeros(1, network.num_features)))
        fingerprint, parts, labels = Fingerprint(), [], []
        for start in range(0, len(files), 500):
            images = files.read(range(start, min(start + 500, len(files))))
            fingerprint.update(images)
            parts.append(judge.embed(images.pixels))
            labels.append(images.labels)
        rows = torch.cat(parts)
        about = {"kind": "images", "sha256": fingerprint.hexdigest(), "images": len(files), "shape": list(files.shape)}
        known = torch.cat([part for part in labels if part is not None])[:limit] if labels[0] is not None else None
        return cls(network, Moments.of(rows), rows=rows[:limit], labels=known, files=files, about=about)

    @property
    def real(self) -> Images | None:
        """The images of ``real_features`` themselves, read when they are first asked for; None if there are none."""
        if self._real_images is None and self._files is not None and self.real_features is not None:
            self._real_images = self._files.read(range(len(self.real_features)))
        return self._real_images

    def statistics(self) -> ReferenceStatistics:
        """The reference as a file can hold it, so that its images need not be embedded again."""
        known = {key: self.about[key] for key in ("sha256", "shape") if key in self.about}
        return ReferenceStatistics.of(
            self.reference, self.features, rows=self.real_features, labels=self.real_labels, images=known
        )

    def embed(self, pixels: Tensor) -> Tensor:
        """Features (N, d) of bytes (N, C, H, W), on the CPU."""
        return embed_pixels(self.features, pixels)

    def describe_reference(self) -> dict[str, Any]:
        """What is known of the reference, as JSON values."""
        return {"images": self.reference.n, **self.about}

    def check_shape(self, shape: Sequence[int]) -> None:
        """Refuse images (C, H, W) that differ from the reference's, as far as that is known.

        Raises:
            ValueError: another size, or grey against colour; the distance would measure that.
        """
        wanted = self.about.get("shape")
        if wanted is not None and list(shape) != list(wanted):
            raise ValueError(
                f"images are {format_shape(shape)}, the reference's are {format_shape(wanted)}: give --size to make "
                "both alike (grey and colour cannot be compared), or another reference"
            )

    def score(self, images: Images, wanted: Sequence[str] = ("fd",)) -> dict[str, float]:
        """The wanted metrics of a set of images, by their published names.

        Raises:
            ValueError: for an unknown metric, or one that needs reference images where there are only statistics.
        """
        self.check(wanted)
        return self.score_features(self.embed(images.pixels), images.labels, wanted)

    def check(self, wanted: Sequence[str]) -> None:
        """Refuse metrics that are unknown or cannot be had from this reference and these features, before any work."""
        for name in wanted:
            if name not in METRICS and name not in PUBLISHED:
                raise ValueError(f"metrics: {name!r} is unknown{nearest(name, [*METRICS, *PUBLISHED, 'clip'])}")
            if name in PUBLISHED and self.features.kind != "inception":
                raise ValueError(
                    f"metrics: {name!r} is {PUBLISHED[name]!r} on Inception's features; these are "
                    f"{self.features.name!r}. Give --features inception, or ask for {PUBLISHED[name]!r}"
                )
            if name in ("accuracy", "inception_score") and self.features.num_classes is None:
                raise ValueError(
                    f"metrics: {name!r} needs a classifier; features {self.features.name!r} have no classes"
                )
            if name not in ("fd", "fid", "accuracy", "inception_score"):
                self._real()

    def score_features(self, fake: Tensor, labels: Tensor | None, wanted: Sequence[str]) -> dict[str, float]:
        """The wanted metrics of images by their features (N, d) and the labels (N,) that were asked for."""
        scores: dict[str, float] = {}
        for name in wanted:
            scores |= getattr(self, f"_{PUBLISHED.get(name, name)}")(fake, labels)
        return scores

    @property
    def distance(self) -> str:
        """What the Fréchet distance is called here: ``fd`` or ``fid``."""
        return self._named("fd")

    def _named(self, metric: str) -> str:
        return reported_name(metric, self.features.kind)

    def _fd(self, fake: Tensor, labels: Tensor | None) -> dict[str, float]:
        interval = bootstrap_interval(fake, self.reference, labels=labels)
        return spread_out(self.distance, frechet_distance(self.reference, Moments.of(fake)), interval)

    def _kd(self, fake: Tensor, labels: Tensor | None) -> dict[str, float]:
        real, name = self._real(), self._named("kd")
        estimate = kernel_distance(real, fake, subset_size=min(1000, len(fake), len(real)))
        pull = kernel_influence(real, fake)
        interval = mean_interval(pull - pull.mean() + estimate.mean, labels=labels)
        return spread_out(name, estimate.mean, interval) | {f"{name}_std": estimate.std}

    def _precision_recall(self, fake: Tensor, labels: Tensor | None) -> dict[str, float]:
        real, fake, labels = self._alike(fake, labels)
        inside, covered = manifold_hits(real, fake)
        return of_mean("precision", inside, labels) | of_mean("recall", covered)

    def _density_coverage(self, fake: Tensor, labels: Tensor | None) -> dict[str, float]:
        real, fake, labels = self._alike(fake, labels)
        counts, covered = ball_counts(real, fake, k=5)
        return of_mean("density", counts / 5, labels) | of_mean("coverage", covered)

    def _cmmd(self, fake: Tensor, labels: Tensor | None) -> dict[str, float]:
        real, pull = self._real(), cmmd_influence(self._real(), fake)
        value = cmmd(real, fake)
        return spread_out(self._named("cmmd"), value, mean_interval(pull - pull.mean() + value, labels=labels))

    def _spread(self, fake: Tensor, labels: Tensor | None) -> dict[str, float]:
        real = self._real()
        if labels is None or self.real_labels is None:
            raise ValueError("metrics: 'spread' needs class labels on both sides")
        return of_mean("spread", within_class_deviations(real, self.real_labels, fake, labels), labels)

    def _accuracy(self, fake: Tensor, labels: Tensor | None) -> dict[str, float]:
        if labels is None:
            raise ValueError("metrics: 'accuracy' needs the class labels that were asked for")
        return of_mean("accuracy", self._logits(fake).argmax(1) == labels, labels)

    def _inception_score(self, fake: Tensor, labels: Tensor | None) -> dict[str, float]:
        del labels
        estimate, name = inception_score(self._logits(fake)), self._named("classifier_score")
        return {name: estimate.mean, f"{name}_std": estimate.std}

    def _copying(self, fake: Tensor, labels: Tensor | None) -> dict[str, float]:
        """Distances to the nearest reference image, which are training images where copying is the question."""
        real = self._real()
        nearest_real = nearest_distance(fake, real)
        distances = {"nearest_median": nearest_real.distance.median(), "nearest_min": nearest_real.distance.min()}
        scores = of_mean("authenticity", authentic(nearest_real, real), labels)
        return scores | {name: value.item() for name, value in distances.items()}

    @torch.no_grad()
    def _logits(self, fake: Tensor) -> Tensor:
        return self.features.logits(fake.to(next(self.features.parameters()).device)).cpu()

    def _alike(self, fake: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """As many of either side: manifolds of sets of unlike size do not compare."""
        size = min(len(fake), len(self._real()))
        return self._real()[:size], fake[:size], None if labels is None else labels[:size]

    def _real(self) -> Tensor:
        if self.real_features is None:
            raise ValueError("metrics: the reference is statistics only; this metric needs the reference's images")
        return self.real_features


@torch.no_grad()
def embed_pixels(features: FeatureExtractor, pixels: Tensor) -> Tensor:
    """Features (N, d) of bytes (N, C, H, W), on the CPU, made :data:`EMBED` images at a time."""
    device = next(features.parameters()).device
    return torch.cat([features(batch.to(device)).cpu() for batch in pixels.split(EMBED)])


def spread_out(name: str, value: float, interval: Interval) -> dict[str, float]:
    """A value with its interval, flat."""
    return {name: value, f"{name}_low": interval.low, f"{name}_high": interval.high}


def of_mean(name: str, values: Tensor, labels: Tensor | None = None) -> dict[str, float]:
    """The mean of one value an image with its interval, flat."""
    values = values.double()
    return spread_out(name, values.mean().item(), mean_interval(values, labels=labels))


def holds_statistics(path: Path) -> bool:
    """Whether an ``.npz`` holds statistics rather than images; a file that is no ``.npz`` is left to who reads it."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return "images" not in archive.files or "mu" in archive.files
    except (OSError, ValueError, AttributeError):
        return True


def sha256_of(path: Path) -> str:
    """Hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
