"""Two pictures of learning curves: all in one, and one small picture each with the paper's ratio."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stepdistill.benchmark.curves import MOST, Curve
from stepdistill.benchmark.plots import DOCUMENT, drawing, label_of, twenty_colours
from stepdistill.files.writing import atomic_write

COST = "training, teacher forwards"
COLUMNS = 4
"""Small pictures in a row."""


def plot_curves(curves: Sequence[Curve], metric: str, path: Path) -> None:
    """Draw all curves on one pair of axes."""
    looks = itertools.cycle(itertools.product([".-", "x--"], twenty_colours(DOCUMENT)))
    with drawing(path, DOCUMENT) as axis:
        for (style, colour), curve in zip(looks, curves, strict=False):
            draw(axis, curve, style, colour)
        axis.set(xscale="log", yscale="log", xlabel=COST, ylabel=label_of(metric))


def plot_multiples(curves: Sequence[Curve], metric: str, path: Path) -> None:
    """Draw every curve by itself, on equal axes, with the paper's ratio as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = max(1, math.ceil(len(curves) / COLUMNS))
    figure, axes = pyplot.subplots(
        lines, COLUMNS, figsize=(3 * COLUMNS, 2.3 * lines), sharex=True, sharey=True, squeeze=False, facecolor="white",
        layout="constrained",
    )  # fmt: skip
    for axis in axes.flat[len(curves) :]:
        axis.set_axis_off()
    for axis, curve in zip(axes.flat, curves, strict=False):
        draw(axis, curve, ".-", "C0")
        draw_level(axis, curve)
        axis.set_title(curve.name, fontsize=8)
        axis.set(xscale="log", yscale="log")
        axis.grid(True, which="major", linewidth=0.3)
        axis.legend(fontsize=6)
    figure.supxlabel(COST, fontsize=9)
    figure.supylabel(label_of(metric), fontsize=9)
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=130, bbox_inches="tight")
    pyplot.close(figure)


def draw(axis: Any, curve: Curve, style: str, colour: Any) -> None:
    """Draw a curve on logarithmic axes; its start, which cost nothing, is a ring left of the first point."""
    trained = [point for point in curve.points if point[0] > 0]
    axis.plot(*zip(*trained, strict=True), style, color=colour, linewidth=1.2, label=curve.name)
    if len(trained) < len(curve.points):
        axis.plot(trained[0][0] / 2, curve.points[0][1], "o", color=colour, markerfacecolor="none")


def draw_level(axis: Any, curve: Curve) -> None:
    """Draw the paper's ratio as a line, and the way there as dots if the curve still falls."""
    if curve.level is not None:
        axis.axhline(curve.level, color="0.4", linestyle="--", linewidth=1, label="paper's ratio")
    slope, factor = curve.slope(), curve.needed()
    if slope is not None and factor is not None and factor <= MOST:
        begin = curve.points[-1][0]
        costs = np.geomspace(begin, max(begin * factor, begin * 1.01), 20)
        axis.plot(costs, slope.scale * costs**slope.power, ":", color="C3", label="extrapolation")
