"""All metrics in one table: what they are called, what they report and what they need.

The table imports no torch, so that the console's help can list it. A metric computes with a function of
:mod:`stepdistill.evaluation.metrics.scores`, which is imported when the first metric is computed.

Names follow the features. FID, KID, CMMD and Inception score are the published names on the features that they were
published with; on any others the same numbers are called ``fd``, ``kd``, ``mmd`` and ``classifier_score``.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from stepdistill.files.words import nearest

if TYPE_CHECKING:
    from stepdistill.evaluation.metrics.scores import Sample, Score

Need = Literal[
    "inception", "classifier", "reference_images", "reference_labels", "labels", "clip", "captions", "attributes"
]
"""What a metric needs beside features and the moments of the reference: Inception's features, a feature network with
classes, features and labels of single reference images, the labels that samples were asked for, a CLIP, captions, a
network that reads attributes."""


@dataclass(frozen=True)
class Value:
    """A number that a metric reports.

    Attributes:
        name: its key in a result.
        higher_is_better: None where neither direction is better.
        published: the name it has instead on features of a kind (:attr:`FeatureExtractor.kind`).
    """

    name: str
    higher_is_better: bool | None
    published: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def name_on(self, kind: str) -> str:
        """Return the key of this number in a result on features of ``kind``."""
        return self.published.get(kind, self.name)


@dataclass(frozen=True)
class Metric:
    """A metric that a user can ask for.

    Attributes:
        name: what the user asks for.
        function: computes it, by its name in :mod:`stepdistill.evaluation.metrics.scores`.
        values: the numbers it reports; each may come with ``_low`` and ``_high`` (95 %) or ``_std``.
        needs: what it cannot be computed without.
        on_clip: computed on the features of the suite's CLIP, where it has one.
        plain: the metric that this is another name of, on Inception's features.
        least: fewest images of a sample.
    """

    name: str
    function: str
    values: tuple[Value, ...]
    needs: tuple[Need, ...] = ()
    on_clip: bool = False
    plain: str | None = None
    least: int = 2

    def compute(self, sample: Sample) -> dict[str, Score]:
        """Return a score for each of :attr:`values`, by its name."""
        scores = importlib.import_module("stepdistill.evaluation.metrics.scores")
        found: dict[str, Score] = getattr(scores, self.function)(sample)
        return found


_FRECHET = Metric("fd", "frechet", (Value("fd", False, {"inception": "fid"}),))
_KERNEL = Metric("kd", "kernel", (Value("kd", False, {"inception": "kid"}),), ("reference_images",))

_ALL = (
    _FRECHET,
    _KERNEL,
    Metric("precision_recall", "precision_and_recall", (Value("precision", True), Value("recall", True)),
           ("reference_images",), least=4),
    Metric("density_coverage", "density_and_coverage", (Value("density", True), Value("coverage", True)),
           ("reference_images",), least=6),
    Metric("spread", "spread", (Value("spread", None),), ("reference_images", "reference_labels", "labels")),
    Metric("accuracy", "accuracy", (Value("accuracy", True),), ("classifier", "labels")),
    Metric("inception_score", "classifier_score",
           (Value("classifier_score", True, {"inception": "inception_score"}),), ("classifier",), least=20),
    Metric("cmmd", "gaussian_mmd", (Value("mmd", False, {"clip": "cmmd"}),), ("reference_images",), on_clip=True),
    Metric("copying", "copying", (Value("authenticity", True), Value("nearest_median", None),
                                  Value("nearest_min", None)), ("reference_images",)),
    Metric("clip", "clip", (Value("clip_score", True), Value("captions_cut", None)), ("clip", "captions"),
           on_clip=True),
    Metric("adherence", "adherence", (Value("adherence", True),), ("attributes", "captions")),
    Metric("adherence_unseen", "adherence_unseen", (Value("adherence_unseen", True),), ("attributes", "captions")),
    Metric("prompt_spread", "prompt_spread", (Value("prompt_spread", None),), ("captions",)),
    dataclasses.replace(_FRECHET, name="fid", needs=("inception",), plain="fd"),
    dataclasses.replace(_KERNEL, name="kid", needs=("inception", "reference_images"), plain="kd"),
)  # fmt: skip

METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}


def check_metrics(names: Sequence[str]) -> None:
    """Raise ``ValueError`` if there are no names of metrics, or one is unknown."""
    if not names:
        raise ValueError(f"metrics: expected at least one of {', '.join(METRICS)}, got none")
    for name in names:
        if name not in METRICS:
            raise ValueError(f"metrics: {name!r} is unknown{nearest(name, METRICS)}")


def check_sample(names: Sequence[str], num_samples: int) -> None:
    """Raise ``ValueError`` for names that :func:`check_metrics` refuses, or a sample too small for one of them."""
    check_metrics(names)
    for name in names:
        if num_samples < METRICS[name].least:
            raise ValueError(f"num_samples: expected at least {METRICS[name].least} for {name!r}, got {num_samples}")


def directions() -> dict[str, bool]:
    """Return whether higher is better, by each name that a value may have in a result; others have no direction."""
    found: dict[str, bool] = {}
    for metric in METRICS.values():
        for value in metric.values:
            if value.higher_is_better is not None:
                found |= dict.fromkeys((value.name, *value.published.values()), value.higher_is_better)
    return found
