"""A suite of metrics: feature networks and a reference, opened once, that score any number of image sets.

Each image passes each network once, whatever the number of metrics.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stepdistill.evaluation.image_set import format_shape
from stepdistill.evaluation.metrics.diversity import check_classes
from stepdistill.evaluation.metrics.scores import Sample
from stepdistill.evaluation.metrics.table import METRICS, Metric
from stepdistill.evaluation.metrics.words import prompt_keys
from stepdistill.evaluation.networks import Networks
from stepdistill.evaluation.protocol import Protocol
from stepdistill.evaluation.reference import Reference, ReferenceStatistics
from stepdistill.evaluation.results import versions
from stepdistill.features.base import FeatureExtractor
from stepdistill.features.clip import Clip
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
        self.networks = Networks(features.eval(), clip, None if attributes is None else attributes.eval())
        self.features, self.reader = self.networks.features, self.networks.reader
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
        networks = Networks.open(features, resize=resize, clip=clip, attributes=attributes, device=device)
        opened = Reference.open(networks.features, reference, max_images=max_images, size=size)
        return cls(networks.features, opened, clip=networks.clip, attributes=networks.attributes)

    @classmethod
    def of_protocol(cls, protocol: Protocol, networks: Networks) -> MetricSuite:
        """Open the reference that a protocol names, on the networks that it names.

        Raises:
            ValueError: if one of its metrics cannot be computed.
        """
        spec, clip = protocol.reference, networks.clip
        assert spec is not None, "read_protocol refuses this"
        open_on = functools.partial(Reference.open, spec=spec, max_images=protocol.reference_images, size=protocol.size)
        reference = open_on(networks.features)
        clip_reference = None if clip is None or "cmmd" not in protocol.metrics else open_on(clip.images)
        suite = cls(
            networks.features, reference, clip=clip, attributes=networks.attributes, clip_reference=clip_reference
        )
        suite.check(protocol.metrics)
        return suite

    def check(self, names: Sequence[str]) -> None:
        """Raise ``ValueError`` for a metric that is unknown or lacks something it needs; name both."""
        self.networks.check(names)
        for name in names:
            needs, reference = METRICS[name].needs, self._reference(METRICS[name])
            if "reference_images" in needs and reference.rows is None:
                raise ValueError(f"metrics: {name!r} needs the reference's images; the reference holds statistics only")
            if "reference_labels" in needs and reference.labels is None:
                raise ValueError(f"metrics: {name!r} needs class labels; the reference has none")

    def check_conditions(self, names: Sequence[str], labels: Tensor | None, captions: Sequence[str] | None) -> None:
        """Raise ``ValueError`` as :meth:`Networks.check_conditions` does, or for classes with too few images."""
        self.networks.check_conditions(names, labels, captions)
        if "spread" in names and labels is not None and self.reference.labels is not None:
            check_classes(self.reference.labels, labels)

    def refuse_critic(self, critic: Mapping[str, str]) -> None:
        """Raise ``ValueError`` as :meth:`Networks.refuse_critic` does."""
        self.networks.refuse_critic(critic)

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
            ValueError: if the images differ in shape from the reference's.
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
        found["clip"] = found["features"].clone() if self._one_network else self.clip.images.extract(images.pixels)
        if images.captions is not None:
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
