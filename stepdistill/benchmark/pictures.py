"""Rows of images: real ones, the teacher's, every student's and the best solver's at as many calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from stepdistill.benchmark.tables import Row, best_solver, cell, of_kind


def pictures(rows: Sequence[Row], metric: str, images: Callable[[Row], Tensor]) -> dict[str, Tensor]:
    """Return the images (N, C, H, W) in [0, 1] of the rows to show, by the names of the rows."""
    return {row["name"]: images(row) for row in shown_rows(rows, metric)}


def labelled(pictures: Mapping[str, Tensor], rows: Sequence[Row], metric: str) -> dict[str, Tensor]:
    """Return images under the names of their rows and the metric, as a grid shows them."""
    values = {row["name"]: cell(row[metric]) for row in rows}
    return {f"{name}\n{metric} {values[name]}": images for name, images in pictures.items()}


def shown_rows(rows: Sequence[Row], metric: str) -> list[Row]:
    """Return the rows to show: a student, by calls, follows the best solver at as many calls."""
    shown = of_kind(rows, "floor", "teacher")
    for student in sorted(of_kind(rows, "student"), key=lambda row: row["calls"]):
        solver = best_solver(rows, student["calls"], metric)
        if solver is not None and solver not in shown:
            shown.append(solver)
        shown.append(student)
    return shown
