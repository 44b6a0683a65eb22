"""Learning curves: a student's distance against what its training has cost, and what more would be needed.

A run with ``eval.every`` logs the distance of its student and the teacher forwards so far, on samples of its own seed.
Fewer samples make every distance larger by about the same, so the paper's ratio becomes a level of a curve by adding to
the table's target what fewer samples add to its teacher's distance. Where the second half of a curve still falls, a
power law fitted to it says how much more training the level would need: an extrapolation, and called one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stepdistill.benchmark.config import BenchmarkConfig
from stepdistill.benchmark.results import Row
from stepdistill.benchmark.tables import markdown_table, of_kind, own_teacher
from stepdistill.config import read_config
from stepdistill.export.contract import read_contract
from stepdistill.training.config import resolve
from stepdistill.training.cost import FORWARDS
from stepdistill.training.metrics_log import MetricsLog

ON_SEARCH = "on_search_samples"
"""Key of a teacher's row: its distance on the few samples of the search, whose seed is that of learning curves."""

FEWEST = 4
"""Points that a slope is fitted to, at least."""

MOST = 100.0
"""Factor of further training beyond which an extrapolation says nothing but that it is large."""


@dataclasses.dataclass(frozen=True)
class Slope:
    """A power law: distance = ``scale`` * cost^``power``, fitted by least squares to logarithms."""

    scale: float
    power: float
    error: float
    """Standard error of ``power``."""
    points: int
    """Number of points that it is fitted to, the last ones of a curve."""

    @property
    def falls(self) -> bool:
        """Whether the power is below zero by more than twice its error."""
        return self.power + 2 * self.error < 0


@dataclasses.dataclass(frozen=True)
class Curve:
    """A student's learning curve.

    Attributes:
        name: of its row in the table.
        points: (teacher forwards, distance), of every measurement of the stage that trained it.
        level: the distance at which the paper's ratio would be reached, on as many samples; None where it is unknown.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    level: float | None

    @property
    def end(self) -> float:
        """The lower of the last two distances, a little less noisy than the last."""
        return min(distance for _, distance in self.points[-2:])

    def slope(self) -> Slope | None:
        """Return the power law of the second half of the curve; None for too few points."""
        trained = [(cost, distance) for cost, distance in self.points if cost > 0 and distance > 0]
        last = trained[-max(FEWEST, math.ceil(len(trained) / 2)) :]
        return fit(last) if len(last) >= FEWEST else None

    def needed(self) -> float | None:
        """Return by what factor training would have to grow to reach the level, if the curve went on as it ends.

        None where the level is unknown or reached, and where the curve does not fall any more.
        """
        slope = self.slope()
        if self.level is None or self.level <= 0 or self.end <= self.level or slope is None or not slope.falls:
            return None
        cost = self.points[-1][0]
        log_factor = math.log(self.level / slope.scale) / slope.power - math.log(cost)
        return math.exp(min(max(log_factor, 0.0), 50.0))


def fit(points: Sequence[tuple[float, float]]) -> Slope:
    """Return the power law of points (cost, distance), both above 0, by least squares in logarithms.

    >>> slope = fit([(1, 8), (2, 4), (4, 2), (8, 1)])
    >>> round(slope.power, 6), round(slope.scale, 6), slope.falls
    (-1.0, 8.0, True)
    """
    x, y = np.log(np.array(points, dtype=float)).T
    centred = x - x.mean()
    spread = float(centred @ centred)
    if spread == 0:
        return Slope(math.exp(y.mean()), 0.0, math.inf, len(points))
    power = float(centred @ y) / spread
    rest = y - y.mean() - power * centred
    error = math.sqrt(float(rest @ rest) / max(len(points) - 2, 1) / spread)
    return Slope(math.exp(y.mean() - power * x.mean()), power, error, len(points))


# ------------------------------------------------------------------------------------------------- reading


def read_curves(rows: Sequence[Row], metric: str, config: BenchmarkConfig) -> list[Curve]:
    """Return the curves of students whose runs, beside their folders, were measured on the search's samples."""
    curves = []
    for row in of_kind(rows, "student"):
        points = read_points(Path(row["pipeline"]), metric, config)
        if len(points) > 1:
            curves.append(Curve(row["name"], points, level_of(row, rows, metric)))
    return curves


def read_points(folder: Path, metric: str, config: BenchmarkConfig) -> tuple[tuple[float, float], ...]:
    """Return (teacher forwards, distance) of a student's training, with those of the student that it started from.

    None are returned for a student of another number of steps than its run measured, and for a run that was measured
    on other samples than the teacher.
    """
    log, run_file = MetricsLog(folder.parent), folder.parent / "config.yaml"
    if not log.path.is_file() or not run_file.is_file():
        return ()
    run, contract = resolve(read_config(run_file)), read_contract(folder)
    measured = (run.eval.num_samples, run.eval.seed, run.eval.features, run.eval.reference)
    if measured != (config.search_samples, config.seed + 1, config.features, config.reference):
        return ()
    stages = {f"{contract.steps}-steps"} | ({"train"} if run.method.steps == contract.steps else set())
    before = contract.origin.start.get("training", {}).get("teacher_forwards", 0)
    points = []
    for row in log.rows():
        if row.get("stage") in stages and f"eval/{metric}" in row and FORWARDS in row:
            points.append((float(row[FORWARDS] + before), float(row[f"eval/{metric}"])))
    return tuple(points)


def level_of(row: Row, rows: Sequence[Row], metric: str) -> float | None:
    """Return the distance at which a student's curve reaches its paper's ratio; None where that is unknown."""
    teacher = own_teacher(row, rows, metric)
    if teacher is None or ON_SEARCH not in teacher or row.get("paper") is None:
        return None
    target: float = row["paper"] * teacher[metric] + (teacher[ON_SEARCH] - teacher[metric])
    return target


# ------------------------------------------------------------------------------------------------- telling


def curve_table(curves: Sequence[Curve], metric: str) -> str:
    """Return a Markdown table of what every curve does at its end; nothing for no curves."""
    if not curves:
        return ""
    name = metric.upper()
    lines = [
        ["learning curve", "M forwards", f"{name} at the end", "paper's ratio", "at the end", "more training needed"]
    ]
    lines.append(["---"] * len(lines[0]))
    for curve in curves:
        level = "" if curve.level is None else f"{curve.level:.3f}"
        cost = f"{curve.points[-1][0] / 1e6:.2f}"
        lines.append([curve.name, cost, f"{curve.end:.3f}", level, ending(curve), extrapolation(curve)])
    return markdown_table(lines)


def ending(curve: Curve) -> str:
    """Return what a curve does at its end, and what that is fitted on."""
    slope = curve.slope()
    if slope is None:
        return "too few points"
    fitted = f"power {slope.power:.2f} +- {2 * slope.error:.2f}, last {slope.points} of {len(curve.points)} points"
    return f"still falls: {fitted}" if slope.falls else f"flat: {fitted}"


def extrapolation(curve: Curve) -> str:
    """Return how much more training the paper's ratio would take."""
    if curve.level is None:
        return ""
    if curve.end <= curve.level:
        return "none, reached"
    factor = curve.needed()
    if factor is None:
        return "unknown: the curve does not fall"
    return f"more than {MOST:g} times (extrapolation)" if factor > MOST else f"{factor:.1f} times (extrapolation)"
