"""Rows of results made comparable: ratios to the teacher, what the papers report, the best solver at as many calls."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from stepdistill.assets import ASSETS
from stepdistill.config import parse_yaml

Row = dict[str, Any]


NO_DIFFERENCE = "not distinguishable"
"""What is said of two rows whose confidence intervals overlap."""


def compared(rows: Sequence[Row], metric: str) -> list[Row]:
    """The rows in the order of a table, with what follows from the others.

    Real images and the teacher first, then by calls, at equal calls the best first. ``ratio`` is to the teacher's best
    row, ``paper`` the ratio that the method's paper reports, ``against_solver`` the comparison with the best solver
    that takes no more calls.
    """
    teacher = min((row[metric] for row in rows if row.get("kind") == "teacher"), default=None)
    completed = []
    for row in rows:
        more: Row = {}
        if teacher is not None and row.get("kind") in ("student", "solver", "teacher"):
            more["ratio"] = row[metric] / teacher
        if row.get("kind") == "student":
            more["paper"] = paper_ratio(row.get("method", ""), row.get("steps", 0))
            more["against_solver"] = verdict(row, best_solver(rows, row["calls"], metric), metric)
        training = row.get("training", {})
        more |= {key: training.get(key) or None for key in ("teacher_forwards", "cpu_minutes")}
        completed.append(row | more)
    order = {"floor": 0, "teacher": 1}
    return sorted(completed, key=lambda row: (order.get(row.get("kind", ""), 2), row["calls"], row[metric]))


def best_solver(rows: Sequence[Row], calls: float, metric: str) -> Row | None:
    """The best training-free row within a number of calls."""
    solvers = [row for row in rows if row.get("kind") == "solver" and row["calls"] <= calls]
    return min(solvers, key=lambda row: row[metric], default=None)


def verdict(row: Row, other: Row | None, metric: str) -> str:
    """``"0.42 of UniPC, 4 calls"``, or that the intervals overlap."""
    if other is None:
        return ""
    apart = row[f"{metric}_high"] < other[f"{metric}_low"] or other[f"{metric}_high"] < row[f"{metric}_low"]
    return f"{row[metric] / other[metric]:.2f} of {other['name']}" if apart else f"{NO_DIFFERENCE}: {other['name']}"


@functools.cache
def _papers() -> dict[str, Any]:
    return parse_yaml((ASSETS / "papers.yaml").read_text(encoding="utf-8"))


def paper_ratio(method: str, steps: int) -> float | None:
    """The student's FID over its teacher's in the method's paper, at this number of steps; None where it has none."""
    return _papers().get(method, {}).get("ratio", {}).get(steps)


def paper_source(method: str) -> str:
    """Where :func:`paper_ratio` was measured."""
    return _papers().get(method, {}).get("source", "")


Column = tuple[str, str]


def columns(rows: Sequence[Row], metric: str) -> list[Column]:
    """(key, heading) of what there is to say about these rows."""
    known = [
        ("calls", "calls"),
        (metric, metric.replace("_", " ").upper()),
        ("interval", "95 %"),
        ("ratio", "ratio"),
        ("paper", "paper"),
        ("against_solver", "best solver at these calls"),
        ("clip_score", "CLIP score"),
        ("recall", "recall"),
        ("spread", "spread"),
        ("accuracy", "accuracy"),
        ("guidance_scale", "guidance"),
        ("teacher_forwards", "training, M forwards"),
        ("cpu_minutes", "training, CPU min"),
        ("seconds_per_image", "s / image"),
    ]
    return [(key, heading) for key, heading in known if any(text(row, key, metric) for row in rows)]


def text(row: Row, key: str, metric: str) -> str:
    """One value of a row, as it is shown."""
    match key:
        case "interval" if f"{metric}_low" in row:
            return f"{row[f'{metric}_low']:.3f} - {row[f'{metric}_high']:.3f}"
        case "teacher_forwards" if row.get(key) is not None:
            return f"{row[key] / 1e6:.2f}"
        case "ratio" | "paper" if row.get(key) is not None:
            return f"{row[key]:.2f}"
        case "cpu_minutes" if row.get(key) is not None:
            return f"{row[key]:.0f}"
        case "guidance_scale" if row.get(key) is not None:
            return f"{row[key]:g}"
        case "calls" if not row["calls"]:
            return ""
    return cell(row.get(key))


def cell(value: Any) -> str:
    """One value: whole numbers where they are, else three digits.

    >>> cell(4.0), cell(0.12345), cell(0.00123), cell(None), cell("UniPC")
    ('4', '0.123', '0.0012', '', 'UniPC')
    """
    if value is None or isinstance(value, str):
        return value or ""
    if float(value).is_integer():
        return str(int(value))
    return f"{value:.2g}" if abs(value) < 0.01 else f"{value:.3f}"


def markdown(rows: Sequence[Row], metric: str) -> str:
    """The table of :func:`compared` rows; students in bold."""
    shown = columns(rows, metric)
    lines = ["| | " + " | ".join(heading for _, heading in shown) + " |", "|" + "---|" * (len(shown) + 1)]
    for row in rows:
        name = f"**{row['name']}**" if row.get("kind") == "student" else row["name"]
        lines.append("| " + " | ".join([name, *(text(row, key, metric) for key, _ in shown)]) + " |")
    return "\n".join(lines)


def caption(setting: Mapping[str, Any]) -> str:
    """How the numbers of a benchmark were made, in a sentence or two."""
    scales = ", ".join(f"{scale:g}" for scale in setting["guidance_scales"])
    return (
        f"{setting['num_samples']:,} samples a row, seed {setting['seed']}, {setting['precision']}. A solver named "
        f"after n calls takes as many steps as fit; guided ones have the best scale of {scales}, chosen on "
        f"{setting['search_samples']:,} samples of another seed. Ratios are to the teacher's best row; 'paper' is the "
        "ratio of FIDs in the method's paper, on other data. Training is counted in million images through a network, "
        "3 for one with its backward."
    )
