"""A suite of metrics: feature networks and a reference, opened once, that score any number of image sets.

Each image passes each network once, whatever the number of metrics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stepdistill.evaluation.image_set import format_shape
from stepdistill.evaluation.metrics.diversity import check_classes
from stepdistill.evaluation.metrics.scores import Sample
from stepdistill.evaluation.metrics.table import METRICS, Metric, check_metrics
from stepdistill.evaluation.metrics.words import check_shared, prompt_keys
from stepdistill.evaluation.protocol import Protocol
from stepdistill.evaluation.reference import Reference, ReferenceStatistics
from stepdistill.evaluation.results import versions
from stepdistill.features.base import FeatureExtractor
from stepdistill.features.clip import Clip
from stepdistill.features.loading import load_features, load_reader
from stepdistill.inference.sampling import Images


class MetricSuite:
    """A feature network, a reference and, for captions, a CLIP.

    Args:
        features: embeds the images for all metrics but the CLIP's.
        reference: what samples are compared with, on these features.
        clip: for the CLIP score.
        attributes: reads attributes, for adherence; by default the ``features``, where they can.
        clip_reference: the reference on the CLIP's features, for CMMD; without it CMMD uses ``features``.
    """

    def __init__(
        self,
        features: FeatureExtractor,
        reference: Reference,
        *,
        clip: Clip | None = None,
        attributes: FeatureExtractor | None = None,
        clip_reference: Reference | None = None,
    ) -> None:
        self.features = features.eval()
        self.reader = self.features if attributes is None else attributes.eval()
        self.reference = reference
        self.clip, self.clip_reference = clip, clip_reference
        self._one_network = clip is not None and clip.images.sha256 == self.features.sha256

    @classmethod
    def open(
        cls,
        features: str,
        reference: str,
        *,
        max_images: int = 10_000,
        resize: str | None = None,
        size: int | None = None,
        device: torch.device | str = "cpu",
        clip: str | None = None,
        attributes: str | None = None,
    ) -> MetricSuite:
        """Open what a user names.

        Args:
            features: see :func:`stepdistill.features.loading.load_features`.
            reference: see :meth:`stepdistill.evaluation.reference.Reference.open`.
            max_images: reference images that metrics beyond the Fréchet distance use, at most.
            resize: Inception only, how images become 299 x 299.
            size: reference images are resized and cropped to a square of this side.
            device: where features are computed.
            clip: folder or hub id of a CLIP.
            attributes: see :func:`stepdistill.features.loading.load_reader`.
        """
        network = load_features(features, resize).to(device)
        opened = Reference.open(network, reference, max_images=max_images, size=size)
        return cls(
            network, opened, clip=Clip.open(clip, device) if clip else None,
            attributes=load_reader(attributes).to(device) if attributes else None,
        )  # fmt: skip

    @classmethod
    def of_protocol(cls, protocol: Protocol, device: torch.device | str = "cpu") -> MetricSuite:
        """Open what a protocol names.

        Raises:
            ValueError: if one of its metrics cannot be computed.
        """
        assert protocol.reference is not None, "read_protocol refuses this"
        suite = cls.open(
            protocol.features, protocol.reference, max_images=protocol.reference_images, resize=protocol.resize,
            size=protocol.size, device=device, clip=protocol.clip, attributes=protocol.attributes,
        )  # fmt: skip
        if suite.clip is not None and "cmmd" in protocol.metrics:
            suite.clip_reference = Reference.open(
                suite.clip.images, protocol.reference, max_images=protocol.reference_images, size=protocol.size
            )
        suite.check(protocol.metrics)
        return suite

    def check(self, names: Sequence[str]) -> None:
        """Raise ``ValueError`` for a metric that is unknown or lacks something it needs; name both."""
        check_metrics(names)
        for name in names:
            missing = self._missing(METRICS[name])
            if missing is not None:
                raise ValueError(f"metrics: {missing}")

    def _missing(self, metric: Metric) -> str | None:
        """Say what ``metric`` needs and this suite lacks."""
        reference = self._reference(metric)
        if "clip" in metric.needs and self.clip is None:
            return f"{metric.name!r} needs a CLIP: give --clip, a folder or hub id"
        if "inception" in metric.needs and self.features.kind != "inception":
            return (
                f"{metric.name!r} is {metric.plain!r} on Inception's features; these are {self.features.name!r}. "
                f"Give --features inception, or ask for {metric.plain!r}"
            )
        if "classifier" in metric.needs and self.features.num_classes is None:
            return f"{metric.name!r} needs a classifier; features {self.features.name!r} have no classes"
        if "attributes" in metric.needs and self.reader.vocabulary is None:
            return (
                f"{metric.name!r} needs a network that reads attributes: give --attributes, such as 'faces'; "
                f"{self.reader.name!r} reads none"
            )
        if "reference_images" in metric.needs and reference.rows is None:
            return f"{metric.name!r} needs the reference's images; the reference holds statistics only"
        if "reference_labels" in metric.needs and reference.labels is None:
            return f"{metric.name!r} needs class labels; the reference has none"
        return None

    def check_conditions(self, names: Sequence[str], labels: Tensor | None, captions: Sequence[str] | None) -> None:
        """Raise ``ValueError`` for a metric that lacks something of the images, before they are made.

        Args:
            names: of metrics.
            labels: class that each image is asked for; None if there are no classes.
            captions: likewise its prompt.
        """
        for name in names:
            if "labels" in METRICS[name].needs and labels is None:
                raise ValueError(f"metrics: {name!r} needs the class labels that were asked for; the images have none")
            if "captions" in METRICS[name].needs and captions is None:
                raise ValueError(f"metrics: {name!r} needs captions: give --captions, or images with captions")
        if "spread" in names and labels is not None and self.reference.labels is not None:
            check_classes(self.reference.labels, labels)
        if "prompt_spread" in names and captions is not None:
            check_shared(prompt_keys(captions))

    def refuse_critic(self, critic: Mapping[str, str]) -> None:
        """Raise ``ValueError`` if a network of this suite is among those, by sha256, that trained what is measured."""
        networks = [self.features, self.reader] if self.clip is None else [self.features, self.reader, self.clip.images]
        for network in networks:
            if network.sha256 in critic.values():
                raise ValueError(
                    f"features: {network.name!r} is the feature network of the critic that trained this student, which "
                    "has learnt to please it; expected another network"
                )

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raise ``ValueError`` if images (C, H, W) differ from the reference's: a distance would measure that."""
        expected = self.reference.about.get("shape")
        if expected is not None and list(shape) != list(expected):
            raise ValueError(
                f"images are {format_shape(shape)}, the reference's are {format_shape(expected)}: give --size to make "
                "both alike (grey and colour cannot be compared), or another reference"
            )

    def embed(self, images: Images) -> dict[str, Tensor]:
        """Return all that metrics need of some images, rows (N, ...) by name, on the CPU.

        Raises:
            ValueError: if the images differ in shape from the reference's, or a CLIP finds no captions.
        """
        self.check_shape(images.pixels.shape[1:])
        return self._embed(images)

    def _embed(self, images: Images) -> dict[str, Tensor]:
        found = {"features": self.features.extract(images.pixels)}
        if images.labels is not None:
            found["labels"] = images.labels
        if images.captions is not None:
            found |= self._embed_words(images, found["features"])
        if self.clip is None:
            return found
        if images.captions is None:
            raise ValueError("metrics: 'clip' needs captions: give --captions, or images with a metadata.jsonl")
        found["clip"] = found["features"].clone() if self._one_network else self.clip.images.extract(images.pixels)
        found["captions"], found["cut"] = self.clip.embed_captions(images.captions)
        return found

    def _embed_words(self, images: Images, features: Tensor) -> dict[str, Tensor]:
        assert images.captions is not None
        found = {"prompts": prompt_keys(images.captions)}
        if self.reader.vocabulary is None:
            return found
        seen = features if self.reader is self.features else self.reader.extract(images.pixels)
        return found | {"asked": self.reader.vocabulary.asked(images.captions), "shown": self._read(seen)}

    def score(self, images: Images, names: Sequence[str] = ("fd",)) -> dict[str, float]:
        """Return the metrics ``names`` of some images, of whatever shape, by the names they are reported under."""
        self.check(names)
        return self.score_rows(self._embed(images), names)

    def score_rows(self, rows: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, float]:
        """Return the metrics ``names`` of what :meth:`embed` found of all images."""
        scores: dict[str, float] = {}
        for name in names:
            metric = METRICS[name]
            found = metric.compute(self._sample(metric, rows))
            for value in metric.values:
                scores |= found[value.name].flat(value.name_on(self._network(metric).kind))
        return scores

    def _sample(self, metric: Metric, rows: Mapping[str, Tensor]) -> Sample:
        reference, features = self._reference(metric), rows["clip" if self._on_clip(metric) else "features"]
        return Sample(
            features, rows.get("labels"), reference.moments, reference.rows, reference.labels, self.logits,
            rows.get("captions"), rows.get("cut"), rows.get("prompts"), rows.get("asked"), rows.get("shown"),
            None if self.reader.vocabulary is None else self.reader.vocabulary.is_unseen,
        )  # fmt: skip

    def _on_clip(self, metric: Metric) -> bool:
        return metric.on_clip and ("clip" in metric.needs or self.clip_reference is not None)

    def _network(self, metric: Metric) -> FeatureExtractor:
        return self.clip.images if self.clip is not None and self._on_clip(metric) else self.features

    def _reference(self, metric: Metric) -> Reference:
        return self.clip_reference if self.clip_reference is not None and metric.on_clip else self.reference

    @torch.no_grad()
    def logits(self, rows: Tensor) -> Tensor:
        """Return class scores (N, classes), on the CPU, of features (N, d)."""
        return self.features.logits(rows.to(next(self.features.parameters()).device)).cpu()

    @torch.no_grad()
    def _read(self, rows: Tensor) -> Tensor:
        """Return attributes (N, attributes) int64, on the CPU, that the reader's features (N, d) show."""
        return self.reader.read(rows.to(next(self.reader.parameters()).device)).cpu()

    @property
    def distance(self) -> str:
        """Name under which the Fréchet distance is reported: ``fd`` or ``fid``."""
        return METRICS["fd"].values[0].name_on(self.features.kind)

    def statistics(self) -> ReferenceStatistics:
        """Return the reference as a file holds it, so that its images need not be embedded again."""
        return self.reference.statistics(self.features)

    def describe(self) -> dict[str, Any]:
        """Return networks and reference as JSON values."""
        clip = None if self.clip is None else self.clip.images.describe()
        attributes = None if self.reader.vocabulary is None else self.reader.describe()
        return {
            "features": self.features.describe(), "clip": clip, "attributes": attributes,
            "reference": self.reference.describe(),
        }  # fmt: skip

    def describe_setting(self, **settings: Any) -> dict[str, Any]:
        """Return ``settings`` with the feature network, the reference and all versions, as JSON values."""
        described = {"features": self.features.describe(), "reference": self.reference.describe()}
        return {**settings, **described, "versions": versions()}
