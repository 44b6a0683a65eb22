"""Tables of results: ratios to the teacher, the papers' ratios, and the best solver at as many calls."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stepdistill.assets import ASSETS
from stepdistill.benchmark.judge import judge_of, with_ranks
from stepdistill.benchmark.results import Row
from stepdistill.files.reading import parse_yaml
from stepdistill.files.words import visible
from stepdistill.files.writing import atomic_write

NO_DIFFERENCE = "not distinguishable"
"""Comparison of two rows whose confidence intervals overlap."""


def compared(rows: Sequence[Row], metric: str) -> list[Row]:
    """Return the rows in the order of a table, completed by comparisons.

    Real images and the teacher come first, then rows by calls and, at equal calls, by the metric. ``ratio`` is to the
    unguided teacher and ``ratio_guided`` to the guided one, ``paper`` is the ratio in the method's paper,
    ``against_start`` compares with what the student started from, ``against_solver`` with the best solver that takes no
    more calls.
    """
    completed = [row | comparisons(row, rows, metric) for row in with_ranks(rows, metric)]
    order = {"floor": 0, "teacher": 1}
    return sorted(completed, key=lambda row: (order.get(row.get("kind", ""), 2), row["calls"], row[metric]))


def of_kind(rows: Sequence[Row], *kinds: str) -> list[Row]:
    """Return the rows of these kinds."""
    return [row for row in rows if row.get("kind") in kinds]


def comparisons(row: Row, rows: Sequence[Row], metric: str) -> Row:
    """Return what a row's kind and the other rows tell about it."""
    added: Row = {}
    if row.get("kind") in ("student", "start", "solver", "teacher"):
        for key, guided in (("ratio", False), ("ratio_guided", True)):
            teacher = best_teacher(rows, metric, guided=guided)
            if teacher is not None:
                added[key] = ratio(row[metric], teacher[metric])
    if row.get("kind") == "student":
        added |= _of_student(row, rows, metric)
    for key in ("teacher_forwards", "cpu_minutes"):
        added[key] = row.get("training", {}).get(key) or None
    return added


def _of_student(row: Row, rows: Sequence[Row], metric: str) -> Row:
    """Return how a student compares with its paper, its start, the best solver and its other training seeds."""
    paper, teacher = paper_ratio(row.get("method", ""), row.get("steps", 0)), own_teacher(row, rows, metric)
    reached = None if teacher is None else ratio(row[metric], teacher[metric])
    added: Row = {"paper": paper, "against_solver": verdict(row, best_solver(rows, row["calls"], metric), metric)}
    if paper is not None and reached is not None:
        added["reaches_paper"] = "yes" if reached <= paper else "no"
    start = next((other for other in rows if other["name"] == row.get("start")), None)
    if start is not None:
        added["against_start"] = against_start(row, start, metric)
    group = [other[metric] for other in rows if other.get("seeds_of") == row.get("seeds_of", "")]
    if len(group) > 1:
        added["between_seeds"] = f"{min(group):.3f} - {max(group):.3f} of {len(group)}"
    return added


def best_teacher(rows: Sequence[Row], metric: str, *, guided: bool) -> Row | None:
    """Return the teacher's best row with guidance, or without it."""
    teachers = [row for row in of_kind(rows, "teacher") if (row.get("guidance_scale", 1) not in (None, 1)) is guided]
    return min(teachers, key=lambda row: row[metric], default=None)


def own_teacher(row: Row, rows: Sequence[Row], metric: str) -> Row | None:
    """Return the teacher's row by which a student is judged: guided if its recipe is, where there is such a row."""
    guided = row.get("teacher_guidance") not in (None, 1)
    return best_teacher(rows, metric, guided=guided) or best_teacher(rows, metric, guided=not guided)


def against_start(row: Row, start: Row, metric: str) -> str:
    """Return whether a student is below what it started from, with intervals that do not overlap."""
    if row[f"{metric}_high"] < start[f"{metric}_low"]:
        share = ratio(row[metric], start[metric])
        return "below" if share is None else f"below, {share:.2f}"
    return "worse" if row[f"{metric}_low"] > start[f"{metric}_high"] else NO_DIFFERENCE


def best_solver(rows: Sequence[Row], calls: float, metric: str) -> Row | None:
    """Return the best row of a training-free solver within a number of calls."""
    solvers = [row for row in of_kind(rows, "solver") if row["calls"] <= calls]
    return min(solvers, key=lambda row: row[metric], default=None)


def verdict(row: Row, other: Row | None, metric: str) -> str:
    """Return ``"0.42 of UniPC, 4 calls"``, or that the intervals overlap."""
    if other is None:
        return ""
    apart = row[f"{metric}_high"] < other[f"{metric}_low"] or other[f"{metric}_high"] < row[f"{metric}_low"]
    if not apart:
        return f"{NO_DIFFERENCE}: {other['name']}"
    share = ratio(row[metric], other[metric])
    return f"worse than {other['name']}" if share is None else f"{share:.2f} of {other['name']}"


def ratio(value: float, other: float) -> float | None:
    """Return ``value / other``; None where ``other`` is not positive, and a ratio means nothing."""
    return value / other if other > 0 else None


@functools.cache
def _papers() -> dict[str, Any]:
    return parse_yaml((ASSETS / "papers.yaml").read_text(encoding="utf-8"))


def paper_ratio(method: str, steps: int) -> float | None:
    """Return the student's FID over its teacher's in the method's paper at this number of steps, or None."""
    return _papers().get(method, {}).get("ratio", {}).get(str(steps))


def paper_source(method: str) -> str:
    """Return where :func:`paper_ratio` was measured."""
    return _papers().get(method, {}).get("source", "")


Column = tuple[str, str]


def columns(rows: Sequence[Row], metric: str) -> list[Column]:
    """Return (key, heading) of the columns in which these rows have values."""
    judge = judge_of(rows)
    judged = [] if judge is None else [(judge, f"{judge.replace('_', ' ').replace('fd', 'FD')}")]
    known = [
        ("calls", "calls"),
        (metric, metric.replace("_", " ").upper()),
        ("interval", "95 %"),
        *judged,
        ("ranks", "ranks by both"),
        ("ratio", "ratio, unguided teacher"),
        ("ratio_guided", "ratio, guided teacher"),
        ("paper", "paper"),
        ("reaches_paper", "reaches it"),
        ("against_start", "start"),
        ("against_solver", "best solver at these calls"),
        ("between_seeds", "between seeds"),
        ("clip_score", "CLIP score"),
        ("adherence", "adherence"),
        ("adherence_unseen", "unseen"),
        ("prompt_spread", "spread"),
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
    """Return one value of a row, as it is shown."""
    value: Any = row.get(key)
    if key == "interval" and f"{metric}_low" in row:
        return f"{row[f'{metric}_low']:.3f} - {row[f'{metric}_high']:.3f}"
    if type(value) not in (int, float) or (key == "calls" and not value):
        return cell(value or None)
    match key:
        case "teacher_forwards":
            return f"{value / 1e6:.2f}"
        case "ratio" | "ratio_guided" | "paper":
            return f"{value:.2f}"
        case "cpu_minutes":
            return f"{value:.0f}"
        case "guidance_scale":
            return f"{value:g}"
    return cell(value)


def cell(value: Any) -> str:
    """Return one value as text: whole numbers as such, others with three digits.

    >>> cell(4.0), cell(0.12345), cell(0.00123), cell(None), cell("UniPC")
    ('4', '0.123', '0.0012', '', 'UniPC')
    """
    if type(value) not in (int, float):
        return "" if value is None else visible(str(value))
    if float(value).is_integer():
        return str(int(value))
    return f"{value:.2g}" if abs(value) < 0.01 else f"{value:.3f}"


def markdown(rows: Sequence[Row], metric: str) -> str:
    """Return a Markdown table of :func:`compared` rows, with students in bold."""
    head, body = texts(rows, metric)
    lines = [head, ["---"] * len(head)]
    for row, cells in zip(rows, body, strict=True):
        name = f"**{row['name']}**" if row.get("kind") == "student" else row["name"]
        lines.append([name, *cells[1:]])
    return markdown_table(lines)


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Return lines of cells as the lines of a Markdown table, one line and one column each whatever they hold."""
    kept = [[visible(cell).replace("|", "\\|") for cell in cells] for cells in lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in kept)


def texts(rows: Sequence[Row], metric: str) -> tuple[list[str], list[list[str]]]:
    """Return the head and the body of the table of :func:`compared` rows; a row's name is its first cell."""
    head, body = [""], [[row["name"]] for row in rows]
    for key, heading in columns(rows, metric):
        head.append(heading)
        for row, cells in zip(rows, body, strict=True):
            cells.append(text(row, key, metric))
    return head, body


def caption(setting: Mapping[str, Any]) -> str:
    """Return how the numbers of a benchmark were made, in a few sentences."""
    scales = ", ".join(f"{scale:g}" for scale in setting["guidance_scales"])
    search = f"chosen on {setting['search_samples']:,} samples of another seed"
    guided = f"; guided ones have the best scale of {scales}, {search}" if scales else ""
    return (
        f"{setting['num_samples']:,} samples per row, seed {setting['seed']}, {setting['precision']}. A solver at "
        f"n calls takes as many steps as fit{guided}. 'paper' is the ratio of FIDs in the method's paper, "
        "on other data; students of a guided teacher reach it or not by their ratio to the guided one. 'start' is a "
        "student's row at step 0, under its own sampler. Training is counted in million images through a network, 3 "
        "for one with its backward."
    )


def insert(table: str, document: Path, mark: str = "benchmark") -> None:
    """Write a table between ``<!-- mark -->`` and ``<!-- /mark -->`` of a document.

    Raises:
        ValueError: if the document has no such lines.
    """
    before, after = split_at(document, mark)
    with atomic_write(document) as partial:
        partial.write_text(f"{before}\n{table}{after}", encoding="utf-8")


def split_at(document: Path, mark: str) -> tuple[str, str]:
    """Return a document up to the end of ``<!-- mark -->``, and from ``<!-- /mark -->`` on.

    Raises:
        ValueError: if it has no such lines.
    """
    text = document.read_text(encoding="utf-8") if document.is_file() else ""
    before, begin, rest = text.partition(f"<!-- {mark} -->")
    _, end, after = rest.partition(f"<!-- /{mark} -->")
    if not end:
        raise ValueError(f"document: {document} has no lines '<!-- {mark} -->' and '<!-- /{mark} -->'")
    return before + begin, end + after
