"""Two plots of a benchmark: quality against network calls, and quality against seconds."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stepdistill.benchmark.tables import Row, of_kind
from stepdistill.files.writing import atomic_write

Line = list[tuple[float, float]]
"""Points of a plot."""


def plot_calls(rows: Sequence[Row], metric: str, path: Path) -> None:
    """Plot solvers as thin lines, each at its best guidance, methods as stars, teacher and real images as levels."""
    figure, axis = new_axis()
    styles = itertools.cycle(["--", "-.", (0, (1, 3))])
    for row in of_kind(rows, "floor", "teacher"):
        style = ":" if row["kind"] == "floor" else next(styles)
        axis.axhline(row[metric], linestyle=style, color="0.3", linewidth=1, label=row["name"])
    for index, (name, points) in enumerate(lines_of(rows, "solver", metric).items()):
        marker = "os^vDP"[index % 6]
        axis.plot(*zip(*points, strict=True), f"{marker}-", markersize=4, linewidth=1, color="0.6", label=name)
    methods = lines_of(rows, "method", metric)
    for colour, (name, points) in zip(itertools.cycle(twenty_colours()), methods.items(), strict=False):
        axis.plot(*zip(*points, strict=True), "*-", markersize=12, linewidth=1.2, color=colour, label=name)
    axis.set(xscale="log", yscale="log", xlabel="network calls per image", ylabel=label_of(metric))
    ticks = sorted({round(row["calls"]) for row in rows if row["calls"] and row.get("kind") != "teacher"})
    axis.set_xticks(ticks, list(map(str, ticks)))
    axis.set_xticks([], minor=True)
    save(figure, axis, path)


def plot_pareto(rows: Sequence[Row], metric: str, path: Path) -> None:
    """Plot every row at its seconds per image; join and name those that no other row beats in both."""
    figure, axis = new_axis()
    groups = {"student": ("*", 12, "C0"), "solver": ("o", 4, "0.6"), "teacher": ("s", 7, "0.2")}
    for kind, (marker, size, color) in groups.items():
        points = seconds_of(of_kind(rows, kind), metric)
        if points:
            axis.plot(*zip(*points, strict=True), marker, markersize=size, color=color, label=f"{kind}s", linestyle="")
    front = pareto_front(of_kind(rows, *groups), metric)
    if front:
        axis.step(*zip(*seconds_of(front, metric), strict=True), where="post", linewidth=1, color="C3",
                  label="nothing is faster and better")  # fmt: skip
    for row, point in zip(front, seconds_of(front, metric), strict=True):
        axis.annotate(row["name"], point, xytext=(5, 5), textcoords="offset points", fontsize=7)
    axis.set(xscale="log", yscale="log", xlabel="seconds per image", ylabel=label_of(metric))
    save(figure, axis, path)


def seconds_of(rows: Sequence[Row], metric: str) -> Line:
    """Return (seconds per image, metric) of every row."""
    return [(row["seconds_per_image"], row[metric]) for row in rows]


def pareto_front(rows: Sequence[Row], metric: str) -> list[Row]:
    """Return the rows to which none is both faster and better, the fastest first."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["seconds_per_image"], row[metric])):
        if not front or row[metric] < front[-1][metric]:
            front.append(row)
    return front


def lines_of(rows: Sequence[Row], key: str, metric: str) -> Mapping[str, Line]:
    """Return, by solver or by method, the best value at every number of calls, in order."""
    lines: dict[str, dict[float, float]] = {}
    for row in rows:
        if key in row and row.get("kind") != "teacher":
            points = lines.setdefault(row[key], {})
            points[row["calls"]] = min(points.get(row["calls"], row[metric]), row[metric])
    return {name: sorted(points.items()) for name, points in lines.items()}


def label_of(metric: str) -> str:
    """Return the label of a metric's axis."""
    return f"{metric.replace('_', ' ').upper()} (lower is better)"


def new_axis() -> tuple[Any, Any]:
    """Return an empty figure on white."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(8, 5), facecolor="white")


def twenty_colours() -> Sequence[Any]:
    """Return twenty colours, the strong ones first, because Matplotlib's cycle has fewer than there are methods."""
    from matplotlib import colormaps

    colours: Any = colormaps["tab20"]
    colours = colours.colors
    return [*colours[::2], *colours[1::2]]


def save(figure: Any, axis: Any, path: Path) -> None:
    """Write the figure, with its legend beside the axis."""
    from matplotlib import pyplot

    axis.grid(True, which="major", linewidth=0.3)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=130, bbox_inches="tight")
    pyplot.close(figure)
