"""The demo: distil the embedded teacher, measure it beside everything else, and draw the picture.

Writes ``report.png`` (to look at), ``result.json`` (to read) and ``pipeline/`` (to use) into the run's folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.benchmark import Benchmark, BenchmarkConfig, Row, cell, solver_row_name
from stepdistill.config import build, read_config
from stepdistill.evaluate import ASSETS, read_images, sample_images
from stepdistill.export import load_pipeline
from stepdistill.pictures import make_grid
from stepdistill.run import Run, resolve

SHOWN = 20


def demo(path: str, overrides: Sequence[str] = ()) -> Path:
    """Run the demo of a configuration file, whose ``demo`` section says what to measure.

    Returns:
        The picture.
    """
    began = time.perf_counter()
    mapping = read_config(path, overrides)
    measured = mapping.pop("demo")
    run = Run(resolve(mapping))
    print(f"distilling {mapping['teacher']['path']!r} to {mapping['method']['steps']} steps ...")
    final = run.train()
    trained = time.perf_counter() - began
    students = {
        "student, 4 steps": final.with_name("pipeline-4-steps"),
        f"student, {mapping['method']['steps']} steps": final,
    }
    output = run.folder / "result.json"
    output.unlink(missing_ok=True)
    config = {
        "teacher": mapping["teacher"],
        "output": str(output),
        "students": {k: str(v) for k, v in students.items()},
    }
    bench = Benchmark(build(BenchmarkConfig, config | measured, "demo"))
    rows = bench.run()
    result = json.loads(output.read_text())
    seconds = {"training": round(trained, 1), "all": round(time.perf_counter() - began, 1)}
    output.write_text(json.dumps(result | {"seconds": seconds}, indent=2) + "\n")
    picture = draw_report(bench, rows, students, run.folder / "report.png", seconds)
    print_table(rows, bench.metric)
    print(f"\n{seconds['all']:.0f} s, of which {seconds['training']:.0f} s training.  Look at {picture}")
    return picture


def best_solver(rows: Sequence[Row], solvers: Sequence[str], steps: int, metric: str) -> Row:
    """The best training-free row of a number of steps."""
    names = [solver_row_name(solver, steps) for solver in solvers]
    return min((row for row in rows if row["name"] in names), key=lambda row: row[metric])


def pictures(bench: Benchmark, rows: Sequence[Row], students: Mapping[str, Path]) -> dict[str, Tensor]:
    """Rows of images (N, C, H, W) in [0, 1]: the same seeds and classes above each other."""
    by_name = {row["name"]: row for row in rows}

    def drawn(row: Row, pipeline: Any, call: Mapping[str, Any]) -> tuple[str, Tensor]:
        images = sample_images(
            pipeline, SHOWN, seed=bench.config.seed, num_classes=bench.family.num_classes,
            precision=bench.config.precision, call=call,
        )  # fmt: skip
        return f"{row['name']}\n{bench.metric} {cell(row[bench.metric])}", images.pixels / 255

    real = read_images(ASSETS / "train_subset.npz", 2000)
    assert real.labels is not None
    chosen = [int((real.labels == i % 10).nonzero()[i // 10]) for i in range(SHOWN)]
    shown = {"real images": real.pixels[torch.tensor(chosen)] / 255}
    teacher = by_name[f"teacher, {bench.config.teacher_steps} steps"]
    lines: list[tuple[Row, str | Path, int]] = [(teacher, "DDIM", bench.config.teacher_steps)]
    for name, folder in students.items():
        calls = int(by_name[name]["calls"])
        row = best_solver(rows, bench.config.solvers, calls, bench.metric)
        lines.append((row, row["name"].rpartition(", ")[0], calls))
        lines.append((by_name[name], folder, calls))
    for row, source, steps in lines:
        if isinstance(source, Path):
            shown |= [drawn(row, load_pipeline(source), {})]
            continue
        call = {"num_inference_steps": steps, "guidance_scale": row["guidance_scale"]}
        shown |= [drawn(row, bench.solver_pipeline(source), call)]
    return shown


def draw_report(
    bench: Benchmark, rows: Sequence[Row], students: Mapping[str, Path], path: Path, seconds: Mapping[str, float]
) -> Path:
    """The picture: images above, the table below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = pictures(bench, rows, students)
    figure, axes = pyplot.subplots(
        len(shown) + 1, 1, figsize=(12, 0.75 * len(shown) + 0.26 * len(rows) + 1.2),
        height_ratios=[0.75] * len(shown) + [0.26 * len(rows) + 0.6],
    )  # fmt: skip
    for axis, (name, images) in zip(axes[:-1], shown.items(), strict=True):
        axis.imshow(make_grid(images, columns=SHOWN, scale=2), cmap="gray", vmin=0, vmax=255)
        axis.text(-0.01, 0.5, name, transform=axis.transAxes, ha="right", va="center", fontsize=9)
        axis.set_axis_off()
    columns = ["calls", bench.metric, "recall", "guidance_scale", "seconds_per_image"]
    text = [[row["name"], *(cell(row.get(column)) for column in columns)] for row in rows]
    drawn = axes[-1].table(text, colLabels=["", *columns], loc="center", cellLoc="center")
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(8)
    for (line, _), box in drawn.get_celld().items():
        box.set_linewidth(0.3)
        if line and "student" in rows[line - 1]["name"]:
            box.set_facecolor("#e4f3e4")
    axes[-1].set_axis_off()
    figure.subplots_adjust(top=0.95, bottom=0.02, hspace=0.12)
    figure.suptitle(
        f"Same seeds, same classes.  {bench.metric}: Fréchet distance on {bench.config.num_samples} images, lower is "
        f"better.  Training took {seconds['training']:.0f} s.",
        fontsize=10,
    )
    figure.savefig(path, dpi=130, bbox_inches="tight", facecolor="white")
    pyplot.close(figure)
    return path


def print_table(rows: Sequence[Row], metric: str) -> None:
    """The table, for a terminal."""
    print(f"\n{'':28s} {'calls':>6s} {metric:>8s} {'s/image':>9s}")
    for row in rows:
        print(f"{row['name']:28s} {cell(row['calls']):>6s} {cell(row[metric]):>8s} {row['seconds_per_image']:9.4f}")
