"""The picture of the demo: a column for every prompt, a row for every sampler, and their numbers below.

Images are enlarged by whole pixels. Everything is placed in pixels, so that none is resampled.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepdistill.benchmark.benchmark import Benchmark
from stepdistill.benchmark.tables import Row, best_solver, of_kind, text
from stepdistill.evaluation.sources import resized
from stepdistill.files.ranges import Seed
from stepdistill.files.writing import atomic_write
from stepdistill.inference.sampling import sample_images

DPI = 100
SIDE = 112
"""Pixels across which an image is shown, at least."""
GAP, MARGIN, LABEL = 10, 16, 190
LINE, TITLE = 24, 40
"""Heights in pixels of a line of the table and of the title."""
CAPTION_LINES = 4
CHARACTERS = 17
"""Of a caption's line, at :data:`SIDE`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    """A column of the picture."""

    prompt: str
    seed: Seed = 0
    """``stepdistill generate --prompt ... --num_images 1 --seed ...`` draws the same image."""


def poster_rows(rows: Sequence[Row], metric: str) -> list[Row]:
    """Return the rows to draw: the teacher's, the best solvers at as many calls as the students, the students."""
    students = sorted(of_kind(rows, "student"), key=lambda row: row["calls"])
    solvers: list[Row] = []
    for student in students:
        solver = best_solver(rows, student["calls"], metric)
        if solver is not None and solver not in solvers:
            solvers.append(solver)
    return [*of_kind(rows, "teacher"), *solvers, *students]


def draw_poster(bench: Benchmark, images: Mapping[str, Tensor], shown: Sequence[Shown], path: Path) -> Path:
    """Draw the picture: the ``images`` (N, C, H, W), bytes, of rows by their names, and the table of these rows."""
    rows = {row["name"]: row for row in bench.rows}
    table = [*of_kind(bench.rows, "floor"), *(rows[name] for name in images)]
    captions = [caption(one.prompt) for one in shown]
    title = (
        f"The same prompts and seeds.  {bench.metric.upper()}: Fréchet distance, lower is better; "
        f"{bench.config.num_samples:,} images, features {bench.suite.features.name!r}"
    )
    figure = lay_out(images, captions, title, len(table) + 1)
    add_table(figure, table, bench.metric)
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=DPI, facecolor="white")
    return path


def images_of(bench: Benchmark, row: Row, shown: Sequence[Shown]) -> Tensor:
    """Return the images (N, C, H, W), bytes, that a row draws for the prompts, each from a seed of its own."""
    pipeline, call = bench.opened(row)
    images = []
    for one in shown:
        sampled = sample_images(
            pipeline, 1, seed=one.seed, captions=[one.prompt], precision=bench.config.precision, call=call,
            description=row["name"],
        )  # fmt: skip
        images.append(resized(sampled, bench.crop).pixels)
    return torch.cat(images)


def caption(prompt: str) -> str:
    """Return a prompt as the caption of a column, in lines.

    >>> print(caption("a face with long green hair"))
    a face with long
    green hair
    """
    if not prompt.strip():
        return "(empty prompt)"
    return textwrap.fill(prompt, CHARACTERS, max_lines=CAPTION_LINES, placeholder=" ...")


def enlarged(image: Tensor, scale: int) -> np.ndarray:
    """Return an image (C, H, W), bytes, as (scale H, scale W, 3), every pixel a square."""
    pixels = image.expand(3, -1, -1) if len(image) == 1 else image[:3]
    return pixels.repeat_interleave(scale, 1).repeat_interleave(scale, 2).permute(1, 2, 0).numpy()


def lay_out(images: Mapping[str, Tensor], captions: Sequence[str], title: str, lines: int) -> Any:
    """Return a figure of named rows of images (N, C, H, W) and words, with room for a table of ``lines`` below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    native = next(iter(images.values())).shape[-1]
    scale = max(1, -(-SIDE // native))
    side = scale * native
    top = TITLE + LINE * CAPTION_LINES
    width = LABEL + len(captions) * (side + GAP) + MARGIN
    height = top + len(images) * (side + GAP) + MARGIN + lines * LINE + MARGIN
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    FigureCanvasAgg(figure)
    figure.text(0.5, 1 - TITLE / 2 / height, title, ha="center", va="center", fontsize=10)
    for column, words in enumerate(captions):
        x = LABEL + column * (side + GAP) + side / 2
        figure.text(x / width, 1 - (top - 6) / height, words, ha="center", va="bottom", fontsize=9)
    for line, (name, row) in enumerate(images.items()):
        y = top + line * (side + GAP)
        figure.text(
            (LABEL - 12) / width, 1 - (y + side / 2) / height, name.replace(", ", "\n"), ha="right", va="center"
        )
        for column, image in enumerate(row):
            figure.figimage(enlarged(image, scale), LABEL + column * (side + GAP), height - y - side, origin="upper")
    figure.add_axes((0.0, MARGIN / height, 1.0, lines * LINE / height)).set_axis_off()
    return figure


HEADINGS: Mapping[str, str] = {
    "clip_score": "CLIP score", "adherence": "adherence",
    "adherence_unseen": "adherence, unseen", "prompt_spread": "spread",
}  # fmt: skip
"""Headings of the picture's table beside the metric."""


def add_table(figure: Any, rows: Sequence[Row], metric: str) -> None:
    """Draw the table into the figure's only axes, with students marked."""
    headings = {"calls": "network calls", metric: metric.upper(), **HEADINGS}
    cells = [[row["name"], *[text(row, key, metric) for key in headings]] for row in rows]
    widths = [0.28] + [0.72 / len(headings)] * len(headings)
    drawn = figure.axes[0].table(
        cells, colLabels=["", *headings.values()], cellLoc="center", colWidths=widths, bbox=[0.03, 0, 0.94, 1]
    )
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(9)
    for (line, _), box in drawn.get_celld().items():
        box.set_linewidth(0.3)
        if line and rows[line - 1]["kind"] == "student":
            box.set_facecolor("#e4f3e4")
