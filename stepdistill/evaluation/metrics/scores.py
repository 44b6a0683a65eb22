"""What each metric of the table computes from the features of a sample and of its reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from stepdistill.evaluation.metrics.bootstrap import Interval, deviation_interval, mean_interval
from stepdistill.evaluation.metrics.classifier import inception_score
from stepdistill.evaluation.metrics.diversity import authentic, nearest_distance, within_class_deviations
from stepdistill.evaluation.metrics.frechet import Moments, bootstrap_interval, frechet_distance
from stepdistill.evaluation.metrics.kernel import cmmd, cmmd_influence, kernel_distance, kernel_influence
from stepdistill.evaluation.metrics.manifold import ball_counts, manifold_hits
from stepdistill.evaluation.metrics.words import adherence_values, check_unseen, within_prompt_deviations
from stepdistill.features.clip import clip_scores


@dataclass(frozen=True)
class Score:
    """A number, with its 95 % interval or its standard deviation over parts, where there is one."""

    value: float
    interval: Interval | None = None
    std: float | None = None

    def flat(self, name: str) -> dict[str, float]:
        """Return the entries of a result: ``name``, and ``name_low``, ``name_high``, ``name_std`` where known."""
        found = {name: self.value}
        if self.interval is not None:
            found |= {f"{name}_low": self.interval.low, f"{name}_high": self.interval.high}
        if self.std is not None:
            found[f"{name}_std"] = self.std
        return found


@dataclass(frozen=True)
class Sample:
    """The features of a set of generated images beside those of its reference, on the CPU.

    Attributes:
        features: (N, d).
        labels: (N,) int, the classes that were asked for; None without classes.
        moments: of the whole reference; None where no reference is needed.
        real: (M, d) features of reference images; None where only moments are known.
        real_labels: (M,) int, their classes.
        logits: maps features (N, d) to class scores (N, classes).
        captions: (N, d) embeddings of the captions, for the CLIP score.
        cut: (N,) bool, captions that were too long and lost their end.
        prompts: (N,) int, equal for equal captions.
        asked: (N, attributes) int, what captions ask for.
        shown: (N, attributes) int, what was read from images.
        is_unseen: maps ``asked`` to (N,) bool, combinations that were held out of the teacher's training.
    """

    features: Tensor
    labels: Tensor | None
    moments: Moments | None
    real: Tensor | None
    real_labels: Tensor | None
    logits: Callable[[Tensor], Tensor]
    captions: Tensor | None = None
    cut: Tensor | None = None
    prompts: Tensor | None = None
    asked: Tensor | None = None
    shown: Tensor | None = None
    is_unseen: Callable[[Tensor], Tensor] | None = None

    @property
    def reference(self) -> Tensor:
        """The features of reference images, which a suite has checked to exist."""
        assert self.real is not None
        return self.real

    def equal_sizes(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return as many reference features as sample features, and the labels: manifolds compare at one size."""
        size = min(len(self.features), len(self.reference))
        return self.reference[:size], self.features[:size], None if self.labels is None else self.labels[:size]


def mean_score(values: Tensor, labels: Tensor | None = None) -> Score:
    """Return the mean of one value per image, with its interval."""
    values = values.double()
    return Score(values.mean().item(), mean_interval(values, labels=labels))


def frechet(sample: Sample) -> dict[str, Score]:
    """Compute the Fréchet distance."""
    assert sample.moments is not None
    interval = bootstrap_interval(sample.features, sample.moments, labels=sample.labels)
    return {"fd": Score(frechet_distance(sample.moments, Moments.of(sample.features)), interval)}


def kernel(sample: Sample) -> dict[str, Score]:
    """Compute the kernel distance on subsets of at most 1000 images."""
    real, fake = sample.reference, sample.features
    estimate = kernel_distance(real, fake, subset_size=min(1000, len(fake), len(real)))
    influence = kernel_influence(real, fake)
    interval = mean_interval(influence - influence.mean() + estimate.mean, labels=sample.labels)
    return {"kd": Score(estimate.mean, interval, estimate.std)}


def precision_and_recall(sample: Sample) -> dict[str, Score]:
    """Compute precision and recall on sets of equal size."""
    real, fake, labels = sample.equal_sizes()
    inside, covered = manifold_hits(real, fake)
    return {"precision": mean_score(inside, labels), "recall": mean_score(covered)}


def density_and_coverage(sample: Sample) -> dict[str, Score]:
    """Compute density and coverage on sets of equal size."""
    real, fake, labels = sample.equal_sizes()
    counts, covered = ball_counts(real, fake, k=5)
    return {"density": mean_score(counts / 5, labels), "coverage": mean_score(covered)}


def gaussian_mmd(sample: Sample) -> dict[str, Score]:
    """Compute the maximum mean discrepancy with a Gaussian kernel."""
    value, influence = cmmd(sample.reference, sample.features), cmmd_influence(sample.reference, sample.features)
    return {"mmd": Score(value, mean_interval(influence - influence.mean() + value, labels=sample.labels))}


def spread(sample: Sample) -> dict[str, Score]:
    """Compute the spread within classes, relative to the reference's."""
    if sample.labels is None or sample.real_labels is None:
        raise ValueError("metrics: 'spread' needs class labels of the samples and of the reference")
    values = within_class_deviations(sample.reference, sample.real_labels, sample.features, sample.labels)
    return {"spread": Score(values.mean().item(), deviation_interval(values, sample.labels))}


def accuracy(sample: Sample) -> dict[str, Score]:
    """Compute the share of images that show the class that was asked for."""
    if sample.labels is None:
        raise ValueError("metrics: 'accuracy' needs the class labels that were asked for")
    return {"accuracy": mean_score(sample.logits(sample.features).argmax(1) == sample.labels, sample.labels)}


def classifier_score(sample: Sample) -> dict[str, Score]:
    """Compute the Inception score, by any classifier."""
    estimate = inception_score(sample.logits(sample.features))
    return {"classifier_score": Score(estimate.mean, std=estimate.std)}


def copying(sample: Sample) -> dict[str, Score]:
    """Compute distances to the nearest reference image, which should be a training image to find copies."""
    real = sample.reference
    nearest = nearest_distance(sample.features, real)
    return {
        "authenticity": mean_score(authentic(nearest, real), sample.labels),
        "nearest_median": Score(nearest.distance.median().item()),
        "nearest_min": Score(nearest.distance.min().item()),
    }


def clip(sample: Sample) -> dict[str, Score]:
    """Compute the CLIP score of images and their captions."""
    if sample.captions is None or sample.cut is None:
        raise ValueError("metrics: 'clip' needs captions: give --captions, or images with captions")
    return {
        "clip_score": mean_score(clip_scores(sample.features, sample.captions)),
        "captions_cut": Score(int(sample.cut.sum())),
    }


def adherence(sample: Sample) -> dict[str, Score]:
    """Compute the share of asked attributes that are there."""
    shown, asked = _shown_and_asked(sample)
    return {"adherence": mean_score(adherence_values(shown, asked))}


def adherence_unseen(sample: Sample) -> dict[str, Score]:
    """Compute :func:`adherence` of the prompts that ask for a combination that was held out of the training."""
    shown, asked = _shown_and_asked(sample)
    assert sample.is_unseen is not None
    unseen = sample.is_unseen(asked)
    check_unseen(unseen)
    return {"adherence_unseen": mean_score(adherence_values(shown[unseen], asked[unseen]))}


def _shown_and_asked(sample: Sample) -> tuple[Tensor, Tensor]:
    if sample.asked is None or sample.shown is None:
        raise ValueError("metrics: 'adherence' needs captions: give --captions, or images with captions")
    return sample.shown, sample.asked


def prompt_spread(sample: Sample) -> dict[str, Score]:
    """Compute the spread of the images of one prompt, relative to the spread of the whole reference."""
    assert sample.moments is not None
    if sample.prompts is None:
        raise ValueError("metrics: 'prompt_spread' needs captions: give --captions, or images with captions")
    values, prompts = within_prompt_deviations(sample.features, sample.prompts, sample.moments)
    return {"prompt_spread": Score(values.mean().item(), deviation_interval(values, prompts))}
