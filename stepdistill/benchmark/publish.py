"""A whole benchmark: students trained where they are missing, rows measured, and table, plots and pictures written."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

from stepdistill.benchmark.benchmark import Benchmark
from stepdistill.benchmark.config import BenchmarkConfig
from stepdistill.benchmark.curve_plots import plot_curves, plot_multiples
from stepdistill.benchmark.curves import curve_table, read_curves
from stepdistill.benchmark.judge import disagreements
from stepdistill.benchmark.pictures import labelled, pictures
from stepdistill.benchmark.plots import plot_calls, plot_pareto
from stepdistill.benchmark.shapes import at_shapes
from stepdistill.benchmark.students import check_awaited, export_missing, missing_runs, seed_lines, train_runs
from stepdistill.benchmark.tables import caption, compared, insert, markdown, split_at
from stepdistill.files.writing import atomic_write, check_new_file
from stepdistill.inference.grids import save_comparison
from stepdistill.networks.launcher import check_alone


def benchmark(config: BenchmarkConfig, *, time: bool = False) -> Path:
    """Run a benchmark; write its table (``.md``) and its pictures beside ``<output>.json``.

    The pictures are ``-calls.png``, ``-pareto.png``, ``-grid.png`` and, if runs were measured while they trained,
    ``-curves.png`` and ``-curves-each.png``. Every other shape has a result of its own, ``-<height>x<width>.json``.

    Args:
        config: what is compared.
        time: whether to take the seconds of all rows again, in this run.

    Returns:
        The file of the table.
    """
    check_alone("benchmark")
    lines = [*config.runs, *itertools.chain.from_iterable(seed_lines(config.seed_runs).values())]
    check_places(config)
    check_awaited(config.students, lines)
    missing = missing_runs(lines)
    if missing:
        Benchmark(dataclasses.replace(config, students={}))  # refuses what would fail after the trainings
    train_runs(missing)
    export_missing(config.students)
    bench = Benchmark(config)
    bench.run()
    bench.judge_training()
    if time:
        bench.time()
    rows = compared(bench.rows, bench.metric)
    plot_calls(rows, bench.metric, beside(bench.path, "calls"))
    plot_pareto(rows, bench.metric, beside(bench.path, "pareto"))
    images = pictures(bench.rows, bench.metric, bench.images)
    save_comparison(
        labelled(images, bench.rows, bench.metric), beside(bench.path, "grid"), title="Same seeds, same conditions"
    )
    bench.write_samples(images)
    curves = read_curves(rows, bench.metric, bench.config)
    if curves:
        plot_curves(curves, bench.metric, beside(bench.path, "curves"))
        plot_multiples(curves, bench.metric, beside(bench.path, "curves-each"))
    said = filter(None, [disagreements(rows, bench.metric), curve_table(curves, bench.metric), *shape_tables(config)])
    shown = "\n\n".join([caption(bench.setting), markdown(rows, bench.metric), *said]) + "\n"
    table = bench.path.with_suffix(".md")
    with atomic_write(table) as partial:
        partial.write_text(shown, encoding="utf-8")
    if config.document is not None:
        insert(shown, Path(config.document), config.mark)
    return table


def check_places(config: BenchmarkConfig) -> None:
    """Raise ``ValueError`` if the result cannot be written, or the document has no place for the table."""
    check_new_file(Path(config.output), ".json")
    if config.document is not None:
        split_at(Path(config.document), config.mark)


def shape_tables(config: BenchmarkConfig) -> list[str]:
    """Return a Markdown table for every other shape of a benchmark; rows that are missing are measured."""
    tables = []
    for other in at_shapes(config):
        bench = Benchmark(other)
        rows = compared(bench.run(), bench.metric)
        height, width = bench.size.values()
        tables.append(f"{height} by {width} pixels, cropped:\n\n{markdown(rows, bench.metric)}")
    return tables


def beside(path: Path, what: str) -> Path:
    """Return the path of a result's picture: ``fashion.json`` -> ``fashion-grid.png``."""
    return path.with_name(f"{path.stem}-{what}.png")
