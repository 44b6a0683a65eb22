"""A second judge: the Fréchet distance on the features of a network that nobody here trained.

It has no interval: a hundred resamples of a thousand features take minutes a row. Where the two judges order students
differently, the table says so, and a person should look.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from stepdistill.assets import EMBEDDED
from stepdistill.benchmark.results import Row
from stepdistill.config import fingerprint_json
from stepdistill.evaluation.metrics.frechet import Moments, frechet_distance
from stepdistill.evaluation.sources import Source
from stepdistill.evaluation.suite import MetricSuite
from stepdistill.inference.sampling import Images

PART = 500
"""Images that are in memory at a time."""


class Judge:
    """A feature network and its reference.

    Args:
        features: see :func:`stepdistill.features.loading.load_features`.
        reference: images; the embedded ones have statistics on the embedded features only, so theirs are made.
        samples: images of a row that are judged.
        kept: file that keeps the reference's statistics, which are made once.
        device: where features are computed.
    """

    def __init__(
        self, features: str, reference: str, samples: int, kept: Path, device: torch.device | str = "cpu"
    ) -> None:
        images = str(EMBEDDED["embedded"]) if reference == "embedded" else reference
        self.suite = MetricSuite.open(features, str(kept) if kept.is_file() else images, device=device)
        if not kept.is_file():
            kept.parent.mkdir(parents=True, exist_ok=True)
            self.suite.statistics().write(kept)
        self.samples = samples
        self.key = f"{JUDGED}{self.suite.features.name}"

    def judge(self, source: Source) -> Row:
        """Return the distance of a source's first images, by its key in a row."""
        self.suite.refuse_critic(source.critic)
        count, features = min(self.samples, source.count), []
        for first in range(0, count, PART):
            features.append(self._features(source.take(range(first, min(first + PART, count)))))
        return self._distance(features)

    def judge_images(self, images: Images) -> Row:
        """Return the distance of the first of some images, by its key in a row."""
        return self._distance([self.suite.features.extract(images.pixels[: self.samples])])

    def _features(self, images: Images) -> torch.Tensor:
        self.suite.check_shape(images.pixels.shape[1:])
        return self.suite.features.extract(images.pixels)

    def _distance(self, features: Sequence[torch.Tensor]) -> Row:
        return {self.key: frechet_distance(self.suite.reference.moments, Moments.of(torch.cat(list(features))))}


def plain_name(place: str) -> str:
    """Return the name of a feature network as a part of a file's name: of a path its end, and digits of the whole.

    >>> plain_name("efficientnet"), plain_name("facebook/dinov2-base")
    ('efficientnet', 'dinov2-base-e742f3c1')
    """
    name = Path(place).name
    return name if name == place else f"{name}-{fingerprint_json(place)[:8]}"


JUDGED = "fd_on_"
"""Begins the key of a second judge's distance; the name of its features follows."""


def judge_of(rows: Sequence[Row]) -> str | None:
    """Return the key of the second judge's distance; None where there was none."""
    return next((key for row in rows for key in row if key.startswith(JUDGED)), None)


def with_ranks(rows: Sequence[Row], metric: str) -> list[Row]:
    """Return the rows, students with ``ranks`` by both judges among all students: ``"3 / 5"``."""
    key = judge_of(rows)
    judged = [row for row in rows if row.get("kind") == "student" and key in row]
    if key is None or not judged:
        return list(rows)
    ranks: dict[str, list[str]] = {}
    for judge in (metric, key):
        for place, row in enumerate(sorted(judged, key=lambda row: row[judge]), start=1):
            ranks.setdefault(row["name"], []).append(str(place))
    return [row | {"ranks": " / ".join(ranks[row["name"]])} if row["name"] in ranks else row for row in rows]


def disagreements(rows: Sequence[Row], metric: str) -> str:
    """Return a sentence on the pairs of students at equal calls that the second judge orders the other way.

    Only pairs that the first judge tells apart count: those whose intervals do not overlap.
    """
    key = judge_of(rows)
    if key is None:
        return ""
    students = [row for row in rows if row.get("kind") == "student" and key in row]
    pairs, apart = [], 0
    for better in students:
        for worse in students:
            if better["calls"] != worse["calls"] or better[f"{metric}_high"] >= worse[f"{metric}_low"]:
                continue
            apart += 1
            if better[key] > worse[key]:
                pairs.append(f"{better['name']} before {worse['name']}")
    about = f"Of {apart} pairs of students at equal calls that {metric.upper()} tells apart"
    name = key.removeprefix(JUDGED)
    if not pairs:
        return f"{about}, the features of {name} order all alike."
    return f"{about}, the features of {name} order {len(pairs)} the other way: {'; '.join(pairs)}."
