"""The networks that images are measured with, and what they tell to be impossible before any image has passed them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.evaluation.metrics.table import METRICS, Metric, check_metrics
from stepdistill.evaluation.metrics.words import check_asked, check_shared, check_unseen, prompt_keys
from stepdistill.evaluation.protocol import Protocol
from stepdistill.features.base import FeatureExtractor
from stepdistill.features.clip import Clip
from stepdistill.features.loading import load_features, load_reader


@dataclass(frozen=True)
class Networks:
    """What embeds images and captions, and reads attributes.

    Attributes:
        features: embeds the images for all metrics but the CLIP's.
        clip: for the CLIP score, and for CMMD.
        attributes: reads attributes, for adherence; by default the ``features``, where they can.
    """

    features: FeatureExtractor
    clip: Clip | None = None
    attributes: FeatureExtractor | None = None

    @classmethod
    def open(
        cls, features: str, *, resize: str | None = None, clip: str | None = None, attributes: str | None = None,
        device: torch.device | str = "cpu",
    ) -> Networks:  # fmt: skip
        """Open what a user names.

        Args:
            features: see :func:`stepdistill.features.loading.load_features`.
            resize: Inception only, how images become 299 x 299.
            clip: folder or hub id of a CLIP.
            attributes: see :func:`stepdistill.features.loading.load_reader`.
            device: where features are computed.
        """
        network = load_features(features, resize).to(device).eval()
        reader = load_reader(attributes).to(device).eval() if attributes else None
        return cls(network, Clip.open(clip, device) if clip else None, reader)

    @classmethod
    def of_protocol(cls, protocol: Protocol, device: torch.device | str = "cpu") -> Networks:
        """Open what a protocol names; raise ``ValueError`` if its metrics need another network."""
        networks = cls.open(
            protocol.features, resize=protocol.resize, clip=protocol.clip, attributes=protocol.attributes, device=device
        )
        networks.check(protocol.metrics)
        return networks

    @property
    def reader(self) -> FeatureExtractor:
        """The network that reads attributes, if its ``vocabulary`` is not None."""
        return self.features if self.attributes is None else self.attributes

    def check(self, names: Sequence[str]) -> None:
        """Raise ``ValueError`` for a metric that is unknown or needs another network; name both."""
        check_metrics(names)
        for name in names:
            missing = self._missing(METRICS[name])
            if missing is not None:
                raise ValueError(f"metrics: {missing}")

    def _missing(self, metric: Metric) -> str | None:
        """Say which network ``metric`` needs that is not here."""
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
        if captions is None:
            return
        if "prompt_spread" in names:
            check_shared(prompt_keys(captions))
        if {"adherence", "adherence_unseen"} & set(names) and self.reader.vocabulary is not None:
            asked = self.reader.vocabulary.asked(captions)
            if "adherence" in names:
                check_asked(asked)
            if "adherence_unseen" in names:
                check_unseen(self.reader.vocabulary.is_unseen(asked))

    def refuse_critic(self, critic: Mapping[str, str]) -> None:
        """Raise ``ValueError`` if one of these networks is among those, by sha256, that trained what is measured."""
        networks = [self.features, self.reader] if self.clip is None else [self.features, self.reader, self.clip.images]
        for network in networks:
            if network.sha256 in critic.values():
                raise ValueError(
                    f"features: {network.name!r} is the feature network of the critic that trained this student, which "
                    "has learnt to please it; expected another network"
                )
