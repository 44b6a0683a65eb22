"""The demo: distil the embedded teacher, measure it beside everything else, and draw a picture.

It writes ``report.png``, ``result.json`` and the student, ``pipeline/``, into the run's folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from stepdistill.benchmark.benchmark import SHOWN, Benchmark
from stepdistill.benchmark.config import BenchmarkConfig
from stepdistill.benchmark.pictures import labelled, pictures
from stepdistill.benchmark.tables import Row, cell, compared, text
from stepdistill.config import read_config
from stepdistill.files.reading import read_json
from stepdistill.files.schema import build
from stepdistill.files.words import visible
from stepdistill.files.writing import atomic_write
from stepdistill.inference.grids import make_grid
from stepdistill.training.config import resolve
from stepdistill.training.run import Run


def demo(path: str, overrides: Sequence[str] = ()) -> Path:
    """Run the demo of a configuration file, whose ``demo`` section tells what to measure.

    Returns:
        The file of the picture.
    """
    began = time.perf_counter()
    mapping = read_config(path, overrides)
    measured = mapping.pop("demo", {})
    run = Run(resolve(mapping))
    steps = run.config.method.steps
    print(f"distilling {run.config.teacher.path!r} to {steps} steps ...")
    final = run.train()
    trained = time.perf_counter() - began
    students = {
        "student, 4 steps": str(final.with_name("pipeline-4-steps")),
        f"student, {steps} steps": str(final),
    }
    output = run.folder / "result.json"
    output.unlink(missing_ok=True)
    config = {
        "teacher": mapping["teacher"],
        "output": str(output),
        "students": students,
    }
    bench = Benchmark(build(BenchmarkConfig, config | measured, "demo"))
    rows = compared(bench.run(), bench.metric)
    result = read_json(output)
    seconds = {"training": round(trained, 1), "all": round(time.perf_counter() - began, 1)}
    with atomic_write(output) as partial:
        partial.write_text(json.dumps(result | {"seconds": seconds}, indent=2) + "\n")
    picture = draw_report(bench, rows, run.folder / "report.png", seconds)
    print_table(rows, bench.metric)
    print(f"\n{seconds['all']:.0f} s, of which {seconds['training']:.0f} s training.  Look at {picture}")
    return picture


def draw_report(bench: Benchmark, rows: Sequence[Row], path: Path, seconds: Mapping[str, float]) -> Path:
    """Draw the picture: images above, the table below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = pictures(rows, bench.metric, bench.images)
    bench.write_samples(drawn)
    shown = labelled(drawn, rows, bench.metric)
    figure, axes = pyplot.subplots(
        len(shown) + 1, 1, figsize=(12, 0.75 * len(shown) + 0.26 * len(rows) + 1.2),
        height_ratios=[0.75] * len(shown) + [0.26 * len(rows) + 0.6],
    )  # fmt: skip
    for axis, (name, images) in zip(axes[:-1], shown.items(), strict=True):
        axis.imshow(make_grid(images, columns=SHOWN), cmap="gray", vmin=0, vmax=255)
        axis.text(-0.01, 0.5, name, transform=axis.transAxes, ha="right", va="center", fontsize=9)
        axis.set_axis_off()
    columns = ["calls", bench.metric, "recall", "guidance_scale", "seconds_per_image"]
    table = []
    for row in rows:
        table.append([row["name"], *[text(row, column, bench.metric) for column in columns]])
    drawn = axes[-1].table(
        table, colLabels=["", *columns], loc="center", cellLoc="center", colWidths=[0.25] + [0.15] * 5
    )
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(8)
    for (line, _), box in drawn.get_celld().items():
        box.set_linewidth(0.3)
        if line and rows[line - 1]["kind"] == "student":
            box.set_facecolor("#e4f3e4")
    axes[-1].set_axis_off()
    figure.subplots_adjust(top=0.95, bottom=0.02, hspace=0.12)
    figure.suptitle(
        f"Same seeds, same classes.  {bench.metric}: Fréchet distance on {bench.config.num_samples} images, lower is "
        f"better.  Training took {seconds['training']:.0f} s.",
        fontsize=10,
    )
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=130, bbox_inches="tight", facecolor="white")
    pyplot.close(figure)
    return path


def print_table(rows: Sequence[Row], metric: str) -> None:
    """Print the table."""
    print(f"\n{'':36s} {'calls':>6s} {metric:>8s} {'s/image':>9s}")
    for row in rows:
        seconds = cell(row.get("seconds_per_image"))
        print(f"{visible(row['name']):36s} {text(row, 'calls', metric):>6s} {cell(row[metric]):>8s} {seconds:>9s}")
