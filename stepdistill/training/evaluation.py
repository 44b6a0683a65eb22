"""Measuring the student of a run while it trains: what, on which samples, and when."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from stepdistill.evaluation.suite import MetricSuite
from stepdistill.features.identity import refuse_same_weights
from stepdistill.inference.student import student_images
from stepdistill.methods.base import Distiller
from stepdistill.training.config import EvalConfig
from stepdistill.training.selection import BestStudent


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
    def open(cls, config: EvalConfig, folder: Path) -> Evaluation:
        """Open the feature network and the reference, if anything is to be measured.

        Raises:
            ValueError: if either is missing, or a metric cannot be had from them.
        """
        if not config.every:
            return cls(config, None, folder)
        suite = MetricSuite.open(config.features, config.reference)
        suite.check(config.metrics)
        return cls(config, suite, folder)

    def check_independent(self, networks: Mapping[str, nn.Module]) -> None:
        """Raise ``ValueError`` if one of a method's feature networks is the one that measures."""
        if self.suite is not None:
            refuse_same_weights(networks, self.suite.features)

    def is_due(self, step: int, *, finished: bool) -> bool:
        """Whether to measure after ``step``: every ``config.every`` steps, and at the end of the run."""
        return self.suite is not None and (finished or step % self.config.every == 0)

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
