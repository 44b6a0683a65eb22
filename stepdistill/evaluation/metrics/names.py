"""Names of metrics."""

from __future__ import annotations

METRICS = (
    "fd", "kd", "precision_recall", "density_coverage", "spread", "accuracy", "inception_score", "cmmd", "copying",
)  # fmt: skip


PUBLISHED = {"fid": "fd", "kid": "kd"}
"""Names that ask for a metric on Inception's features."""


LOWER_IS_BETTER = ("fd", "fid", "kd", "kid", "mmd", "cmmd")


HIGHER_IS_BETTER = (
    "precision", "recall", "density", "coverage", "accuracy", "classifier_score", "inception_score", "authenticity",
    "clip_score",
)  # fmt: skip


def reported_name(metric: str, kind: str) -> str:
    """What a result may be called: the published name on its own ``kind`` of features, else a plain one.

    >>> reported_name("fd", "other"), reported_name("fd", "inception"), reported_name("cmmd", "other")
    ('fd', 'fid', 'mmd')
    """
    published = {"fd": "fid", "kd": "kid", "classifier_score": "inception_score"}
    if metric == "cmmd":
        return "cmmd" if kind == "clip" else "mmd"
    return published.get(metric, metric) if kind == "inception" else metric
