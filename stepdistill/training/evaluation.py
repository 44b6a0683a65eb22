"""Measuring the student of a run while it trains: what, on which samples, and when."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stepdistill.evaluation.image_set import format_shape
from stepdistill.evaluation.metrics.table import METRICS
from stepdistill.evaluation.suite import MetricSuite
from stepdistill.families.base import Family
from stepdistill.features.identity import refuse_same_weights
from stepdistill.inference.student import student_images
from stepdistill.methods.base import Distiller
from stepdistill.networks.launcher import own_device
from stepdistill.training.config import EvalConfig
from stepdistill.training.selection import DISTANCES, BestStudent


class Evaluation:
    """The measurements of a run, and its best student by them.

    Args:
        config: the ``eval`` section.
        suite: feature network, reference and metrics; None where nothing is measured.
        folder: the run's, which keeps the best student.
    """

    def __init__(self, config: EvalConfig, suite: MetricSuite | None, folder: Path) -> None:
        self.config = config
        self.suite = suite
        self.best = BestStudent(folder, self.measured_on())

    @classmethod
    def open(cls, config: EvalConfig, folder: Path, family: Family) -> Evaluation:
        """Open the feature network and the reference, if anything is to be measured.

        Reference images are resized and cropped to the family's size where that is a square. Features are computed
        on this process's device.

        Raises:
            ValueError: if either is missing or does not suit the family's images, or a metric cannot be had from them.
        """
        if not config.every:
            return cls(config, None, folder)
        channels, *size = family.image_shape
        square = size[0] if len(set(size)) == 1 else None
        suite = MetricSuite.open(config.features, config.reference, size=square, device=own_device())
        suite.check(config.metrics)
        suite.features.check_shape(family.image_shape)
        expected = suite.reference.about.get("shape", [channels, *size])
        if [channels, *size] != list(expected):
            raise ValueError(
                f"eval.reference: expected {format_shape([channels, *size])} images, as the teacher makes, "
                f"got {format_shape(expected)}"
            )
        labels = torch.arange(config.num_samples) % family.num_classes if family.num_classes else None
        suite.check_conditions(config.metrics, labels, None)
        return cls(config, suite, folder)

    def check_independent(self, networks: Mapping[str, nn.Module]) -> None:
        """Raise ``ValueError`` if one of a method's feature networks is the one that measures."""
        if self.suite is not None:
            refuse_same_weights(networks, self.suite.features)

    def is_due(self, step: int, *, finished: bool) -> bool:
        """Whether to measure after ``step``: every ``config.every`` steps, and at the end of the run."""
        return self.suite is not None and (finished or step % self.config.every == 0)

    @property
    def distances(self) -> list[str]:
        """Return the distances by which it selects, as they are called on its features; none where none is measured."""
        if self.suite is None:
            return []
        names: list[str] = []
        for metric in self.config.metrics:
            names += [value.name_on(self.suite.features.kind) for value in METRICS[metric].values]
        return [name for name in names if name in DISTANCES]

    def measure(self, distiller: Distiller) -> dict[str, float]:
        """Return the metrics of the student as it is now, from fixed seeds; none where nothing is measured."""
        if self.suite is None:
            return {}
        device = next(distiller.parameters()).device
        images = student_images(distiller, self.config.num_samples, seed=self.config.seed, device=device)
        return self.suite.score(images, self.config.metrics)

    def results(self, distiller: Distiller) -> dict[str, Any]:
        """Return the metrics of the student as it is now for the contract of its export."""
        if self.suite is None:
            return {}
        return {**self.measure(distiller), "num_samples": self.config.num_samples}

    def measured_on(self) -> dict[str, Any]:
        """Return what :meth:`measure` depends on besides the student, as JSON values."""
        if self.suite is None:
            return {}
        return {
            "features": self.suite.features.name,
            "features_sha256": self.suite.features.sha256,
            "reference": self.suite.reference.describe(),
            "num_samples": self.config.num_samples,
            "seed": self.config.seed,
        }
