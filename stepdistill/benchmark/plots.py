"""Two plots of a benchmark: quality against network calls, and quality against seconds."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stepdistill.benchmark.tables import Row, of_kind
from stepdistill.files.words import visible
from stepdistill.files.writing import atomic_write


@dataclasses.dataclass(frozen=True)
class Look:
    """How a plot is drawn.

    Attributes:
        size: width and height in inches, the height without a legend below; a phone is about four inches wide.
        font_size: in points.
        dark: light on transparent ground, rather than dark on white.
        legend_below: the legend is below the axis, rather than beside it.
    """

    size: tuple[float, float] = (9.5, 5.0)
    font_size: float = 10.0
    dark: bool = False
    legend_below: bool = False


DOCUMENT = Look()
PHONE = Look(size=(3.6, 3.8), font_size=10.5, legend_below=True)

Plot = Callable[[Sequence[Row], str, Path, Look], None]
"""Draws rows by a metric into a file."""


def plot_calls(rows: Sequence[Row], metric: str, path: Path, look: Look = DOCUMENT) -> None:
    """Plot solvers in grey, each at its best guidance, methods as stars, teacher and real images as levels."""
    with drawing(path, look) as axis:
        styles = itertools.cycle(["--", "-.", (0, (1, 3))])
        for row in of_kind(rows, "floor", "teacher"):
            style = ":" if row["kind"] == "floor" else next(styles)
            axis.axhline(row[metric], linestyle=style, linewidth=1, color=ink(), label=plain(row["name"]))
        for index, (name, line) in enumerate(lines_of(rows, "solver", metric).items()):
            draw(axis, line, metric, f"{'os^vDP'[index % 6]}-", markersize=4, linewidth=1, color="0.55", label=name)
        methods = lines_of(rows, "method", metric)
        looks = itertools.cycle(itertools.product("*P", twenty_colours(look)))
        for (marker, colour), (name, line) in zip(looks, methods.items(), strict=False):
            draw(axis, line, metric, f"{marker}-", markersize=11, linewidth=1.2, color=colour, label=name)
        axis.set(xlabel="network calls per image", ylabel=label_of(metric))
        ticks = apart(sorted({round(row["calls"]) for row in rows if row["calls"] and row.get("kind") != "teacher"}))
        log_scale(axis.xaxis, ticks)
        log_scale(axis.yaxis)


def plot_pareto(rows: Sequence[Row], metric: str, path: Path, look: Look = DOCUMENT) -> None:
    """Plot every row at its seconds per image; join and number those that no other row beats in both."""
    groups = {"student": ("*", 11, "C0"), "solver": ("o", 4, "0.55"), "teacher": ("s", 7, "C2")}
    with drawing(path, look) as axis:
        for kind, (marker, size, colour) in groups.items():
            points = seconds_of(of_kind(rows, kind), metric)
            if points:
                axis.plot(*zip(*points, strict=True), marker, markersize=size, color=colour, label=f"{kind}s")
        front = pareto_front(of_kind(rows, *groups), metric)
        if front:
            axis.step(*zip(*seconds_of(front, metric), strict=True), where="post", linewidth=1, color="C3",
                      label="nothing is faster and better:")  # fmt: skip
        for number, (row, point) in enumerate(zip(front, seconds_of(front, metric), strict=True), 1):
            axis.annotate(str(number), point, xytext=(3, 5), textcoords="offset points", zorder=5)
            axis.plot([], [], marker=f"${number}$", linestyle="", color=ink(), label=plain(row["name"]))
        axis.set(xlabel="seconds per image", ylabel=label_of(metric))
        log_scale(axis.xaxis)
        log_scale(axis.yaxis)


def seconds_of(rows: Sequence[Row], metric: str) -> list[tuple[float, float]]:
    """Return (seconds per image, metric) of every row."""
    return [(row["seconds_per_image"], row[metric]) for row in rows]


def pareto_front(rows: Sequence[Row], metric: str) -> list[Row]:
    """Return the rows to which none is both faster and better, the fastest first."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["seconds_per_image"], row[metric])):
        if not front or row[metric] < front[-1][metric]:
            front.append(row)
    return front


def lines_of(rows: Sequence[Row], key: str, metric: str) -> Mapping[str, list[Row]]:
    """Return, by solver or by method, the best row at every number of calls, in order."""
    lines: dict[str, dict[float, Row]] = {}
    for row in rows:
        if key in row and row.get("kind") != "teacher":
            points = lines.setdefault(row[key], {})
            points[row["calls"]] = min(points.get(row["calls"], row), row, key=lambda point: point[metric])
    return {name: [points[calls] for calls in sorted(points)] for name, points in lines.items()}


def draw(axis: Any, line: Sequence[Row], metric: str, style: str, *, label: str, **look: Any) -> None:
    """Draw the rows of a line at their network calls, with the intervals of the metric."""
    errors: tuple[list[float], list[float]] = ([], [])
    for row in line:
        errors[0].append(max(0.0, row[metric] - row.get(f"{metric}_low", row[metric])))
        errors[1].append(max(0.0, row.get(f"{metric}_high", row[metric]) - row[metric]))
    calls, values = zip(*((row["calls"], row[metric]) for row in line), strict=True)
    axis.errorbar(calls, values, errors, fmt=style, elinewidth=0.8, label=plain(label), **look)


def label_of(metric: str) -> str:
    """Return the label of a metric's axis."""
    return f"{metric.replace('_', ' ').upper()} (lower is better)"


def plain(text: str) -> str:
    """Return a name for a legend, in which a dollar is no formula and a leading underscore hides nothing."""
    return f"\u200b{visible(text)}".replace("$", r"\$")


# ------------------------------------------------------------------------------------------------- the paper


@contextmanager
def drawing(path: Path, look: Look) -> Iterator[Any]:
    """Yield an empty axis; write the figure, with its legend, as a PNG or an SVG by the name of ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    own = {"font.size": look.font_size, "axes.grid": True, "grid.linewidth": 0.3, "axes.linewidth": 0.6,
           "axes.axisbelow": True, "grid.color": "0.5", "svg.hashsalt": path.name}  # fmt: skip
    with pyplot.style.context(["dark_background"] if look.dark else []), pyplot.rc_context(own):
        figure, axis = pyplot.subplots(figsize=look.size, layout="constrained")
        yield axis
        place_legend(figure, axis, look)
        kind = path.suffix.removeprefix(".")
        metadata = {"Date": None} if kind == "svg" else {}
        with atomic_write(path) as partial:
            figure.savefig(partial, format=kind, dpi=130, transparent=look.dark, metadata=metadata)
        pyplot.close(figure)


def place_legend(figure: Any, axis: Any, look: Look) -> None:
    """Put the legend beside the axis or below it, in a figure that is high enough for both."""
    handles, labels = axis.get_legend_handles_labels()
    half = math.ceil(len(labels) / 2)
    widths = [max(map(len, part), default=0) for part in (labels[:half], labels[half:])]
    columns = 2 if look.legend_below and sum(widths) <= 38 else 1
    legend_height = 1.35 * look.font_size / 72 * (math.ceil(len(labels) / columns) + 1)
    height = look.size[1] + legend_height if look.legend_below else max(look.size[1], legend_height)
    figure.set_figheight(height)
    place = "outside lower center" if look.legend_below else "outside right upper"
    figure.legend(handles, labels, loc=place, ncols=columns, fontsize=0.9 * look.font_size, frameon=False,
                  columnspacing=1.0, handlelength=1.6)  # fmt: skip


def ink() -> Any:
    """Return the colour of the text."""
    from matplotlib import rcParams

    return rcParams["text.color"]


def twenty_colours(look: Look) -> Sequence[Any]:
    """Return twenty colours, first those that show best, because Matplotlib's cycle has fewer than methods are."""
    from matplotlib import colormaps

    colours: Any = colormaps["tab20"]
    strong, faint = colours.colors[::2], colours.colors[1::2]
    return [*faint, *strong] if look.dark else [*strong, *faint]


def log_scale(axis: Any, ticks: Sequence[int] | None = None) -> None:
    """Make an axis logarithmic, with plain numbers at ``ticks``, or at as many round ones as have room."""
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    decades = math.log10(high / low) if 0 < low < high else 1.0
    round_ones = (1, 2, 5) if decades < 1.5 else (1, 3) if decades < 2.5 else (1,)
    axis.set_major_locator(LogLocator(subs=round_ones) if ticks is None else FixedLocator(list(ticks)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def apart(ticks: Sequence[int]) -> list[int]:
    """Return those of some numbers that a logarithmic axis can label without overlap, first of all powers of two.

    >>> apart([1, 2, 3, 4, 6, 7, 8, 14, 15, 16])
    [1, 2, 3, 4, 6, 8, 16]
    """
    kept: list[int] = []
    for tick in sorted(ticks, key=lambda tick: (tick.bit_count(), tick)):
        if all(max(tick, other) >= 1.3 * min(tick, other) for other in kept):
            kept.append(tick)
    return sorted(kept)
