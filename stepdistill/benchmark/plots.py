"""Two pictures of a benchmark: quality against network calls, and quality against seconds."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stepdistill.benchmark.tables import Row

Line = list[tuple[float, float]]


def plot_calls(rows: Sequence[Row], metric: str, path: Path) -> None:
    """Solvers as thin lines, each at its best guidance; methods as stars; teacher and real images as levels."""
    figure, axis = new_axis()
    styles = itertools.cycle(["--", "-.", (0, (1, 3))])
    for row in (row for row in rows if row.get("kind") in ("floor", "teacher")):
        style = ":" if row["kind"] == "floor" else next(styles)
        axis.axhline(row[metric], linestyle=style, color="0.3", linewidth=1, label=row["name"])
    for index, (name, points) in enumerate(lines_of(rows, "solver", metric).items()):
        marker = "os^vDP"[index % 6]
        axis.plot(*zip(*points, strict=True), f"{marker}-", markersize=4, linewidth=1, color="0.6", label=name)
    methods = lines_of(rows, "method", metric)
    for colour, (name, points) in zip(itertools.cycle(twenty_colours()), methods.items(), strict=False):
        axis.plot(*zip(*points, strict=True), "*-", markersize=12, linewidth=1.2, color=colour, label=name)
    axis.set(xscale="log", yscale="log", xlabel="network calls an image", ylabel=label_of(metric))
    ticks = sorted({round(row["calls"]) for row in rows if row["calls"] and row.get("kind") != "teacher"})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_xticks([], minor=True)
    save(figure, axis, path)


def plot_pareto(rows: Sequence[Row], metric: str, path: Path) -> None:
    """Every row at its seconds an image; those that nothing beats in both are joined and named."""
    figure, axis = new_axis()
    groups = {"student": ("*", 12, "C0"), "solver": ("o", 4, "0.6"), "teacher": ("s", 7, "0.2")}
    for kind, (marker, size, color) in groups.items():
        points = [(row["seconds_per_image"], row[metric]) for row in rows if row.get("kind") == kind]
        if points:
            axis.plot(*zip(*points, strict=True), marker, markersize=size, color=color, label=f"{kind}s", linestyle="")
    front = pareto_front([row for row in rows if row.get("kind") in groups], metric)
    if front:
        axis.step(*zip(*((row["seconds_per_image"], row[metric]) for row in front), strict=True), where="post",
                  linewidth=1, color="C3", label="nothing is faster and better")  # fmt: skip
    for row in front:
        axis.annotate(
            row["name"], (row["seconds_per_image"], row[metric]), xytext=(5, 5), textcoords="offset points", fontsize=7
        )
    axis.set(xscale="log", yscale="log", xlabel="seconds an image", ylabel=label_of(metric))
    save(figure, axis, path)


def pareto_front(rows: Sequence[Row], metric: str) -> list[Row]:
    """The rows to which none is both faster and better, the fastest first."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["seconds_per_image"], row[metric])):
        if not front or row[metric] < front[-1][metric]:
            front.append(row)
    return front


def lines_of(rows: Sequence[Row], key: str, metric: str) -> Mapping[str, Line]:
    """By solver or by method, the best value at every number of calls, in order."""
    lines: dict[str, dict[float, float]] = {}
    for row in rows:
        if key in row and row.get("kind") != "teacher":
            points = lines.setdefault(row[key], {})
            points[row["calls"]] = min(points.get(row["calls"], row[metric]), row[metric])
    return {name: sorted(points.items()) for name, points in lines.items()}


def label_of(metric: str) -> str:
    """The axis of a metric."""
    return f"{metric.replace('_', ' ').upper()} (lower is better)"


def new_axis() -> tuple[Any, Any]:
    """An empty figure, on white whatever the page it is put on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(8, 5), facecolor="white")


def twenty_colours() -> Sequence[Any]:
    """The strong ones first: there are more methods than Matplotlib's cycle has colours."""
    from matplotlib import colormaps

    colours: Any = colormaps["tab20"]
    colours = colours.colors
    return [*colours[::2], *colours[1::2]]


def save(figure: Any, axis: Any, path: Path) -> None:
    """Write the figure, its legend beside the axis."""
    from matplotlib import pyplot

    axis.grid(True, which="major", linewidth=0.3)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)
