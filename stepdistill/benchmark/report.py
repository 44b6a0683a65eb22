"""One self-contained HTML page from the result files of one or many runs."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stepdistill.benchmark.page import DARK, NARROW, figure, folded, page, settings, table, text, tile, value
from stepdistill.benchmark.plots import DOCUMENT, PHONE, Plot, plot_calls, plot_pareto
from stepdistill.benchmark.results import read_report_result
from stepdistill.benchmark.samples import Samples
from stepdistill.benchmark.tables import Row, caption, columns, compared, of_kind, paper_source
from stepdistill.benchmark.tables import text as shown
from stepdistill.config import flatten
from stepdistill.evaluation.metrics.table import directions
from stepdistill.evaluation.summary import Line, lines
from stepdistill.files.writing import atomic_write, check_new_file

LOOKS = {
    f"{NARROW} and {DARK}": dataclasses.replace(PHONE, dark=True),
    NARROW: PHONE,
    DARK: dataclasses.replace(DOCUMENT, dark=True),
    "": DOCUMENT,
}
"""How a plot is drawn, by the media query of its reader, the most special first."""

FIRST = ("calls", "seconds_per_image", "against_solver")
"""Columns that come, after the metric, where a phone shows them."""

EMPTY = "(empty prompt)"


def write_report(results: Sequence[Path], output: Path) -> Path:
    """Write the page.

    Args:
        results: result files of ``evaluate`` or ``benchmark``; samples beside them are shown.
        output: the ``.html`` file.

    Raises:
        ValueError: naming a file that is missing, or is not what its name says, or an ``output`` of another kind.
    """
    check_new_file(output, ".html")
    sections, single = [], []
    for path in results:
        result = read_report_result(path)
        if "rows" in result:
            sections.append(section(path, result))
        else:
            single.append(result)
    if single:
        sections.append(evaluations(single))
    with atomic_write(output) as partial:
        partial.write_text(page("Step distillation: results", "\n".join(sections)), encoding="utf-8")
    return output


# -------------------------------------------------------------------------------------------- a benchmark


def section(path: Path, result: Mapping[str, Any]) -> str:
    """Return the section of a benchmark: the best students, samples, the table, plots, and its setting."""
    metric, setting = result["metric"], result["setting"]
    rows = compared(result["rows"], metric)
    parts = [
        f"<h2>{text(title(path))}</h2>", best_students(rows, metric), samples(path, rows, metric),
        "<h3>Numbers</h3>", benchmark_table(rows, metric),
        '<p class="note"><small>Below a value is its 95 % interval.</small></p>',
        "<h3>Quality against network calls</h3>",
        plot(plot_calls, rows, metric, "Stars are students, grey are solvers of the teacher, lines across are the "
             "teacher and real images. Bars are 95 % intervals."),
        "<h3>Quality against time</h3>",
        plot(plot_pareto, rows, metric, "Seconds per image of every row. Numbered ones are those to which none is both "
             "faster and better."),
        folded("How the numbers were made", f"<p>{text(caption(setting))}</p>"), sources(rows),
        folded("Setting", settings(flatten(setting))),
    ]  # fmt: skip
    return "\n".join(filter(None, parts))


def title(path: Path) -> str:
    """Return the name of a benchmark: that of its file, or of the run's folder, whose file is ``result.json``."""
    return path.absolute().parent.name if path.stem == "result" else path.stem


def best_students(rows: Sequence[Row], metric: str) -> str:
    """Return the best student at every number of calls, beside the teacher and the best solver, as a list."""
    name, items = metric.replace("_", " ").upper(), []
    for calls in sorted({row["calls"] for row in of_kind(rows, "student")}):
        best = next(row for row in of_kind(rows, "student") if row["calls"] == calls)  # rows are sorted by the metric
        unit = "call" if calls == 1 else "calls"
        words = f"{best['name']}, {name} {shown(best, metric, metric)} ({shown(best, 'interval', metric)})"
        items.append(f"<li><b>{calls:g} {unit}</b>: {text(words)}; {text(best['against_solver'] or 'no solver')}</li>")
    for row in of_kind(rows, "teacher"):
        items.append(
            f"<li><b>{row['calls']:g} calls</b>: {text(row['name'])}, {name} {shown(row, metric, metric)}</li>"
        )
    return f"<ul>{''.join(items)}</ul>" if items else ""


def samples(path: Path, rows: Sequence[Row], metric: str) -> str:
    """Return the samples beside a result; empty if there are none."""
    file, grid = path.with_name(f"{path.stem}-samples.npz"), path.with_name(f"{path.stem}-grid.png")
    if not file.is_file():  # older results have a picture only
        return figure({"": grid}, "Same seeds, same conditions.") if grid.is_file() else ""
    found = Samples.read(file)
    below = "".join(f"<p>{text(condition.strip() or EMPTY)}</p>" for condition in found.conditions)
    conditions = f'<div class="tiles conditions">{below}</div>' if below else ""
    return (
        '<h3>Samples</h3>\n<p class="note"><small>A column has one seed and one condition. Real images are of the same '
        f'condition where the reference has one.</small></p>\n<div class="samples">\n'
        f"{''.join(sample_rows(found, rows, metric))}{conditions}</div>"
    )


def sample_rows(found: Samples, rows: Sequence[Row], metric: str) -> Iterator[str]:
    """Yield the rows of samples, with a heading wherever the number of calls changes."""
    known, before = {row["name"]: row for row in rows}, 0.0
    for index, name in enumerate(found.rows):
        row = known.get(name, {})
        calls = row.get("calls", 0) if row.get("kind") in ("student", "solver") else 0
        if calls > before:
            yield f"<h4>{calls:g} network call{'' if calls == 1 else 's'}</h4>\n"
            before = calls
        measured = f"{metric.upper()} {shown(row, metric, metric)}" if metric in row else ""
        yield f'<p class="name">{value(name, measured)}</p>\n<div class="tiles">'
        for column in range(found.images.shape[1]):
            condition = f": {found.conditions[column]}" if found.conditions else ""
            yield tile(found.picture(index, column), f"{name}{condition}")
        yield "</div>\n"


def benchmark_table(rows: Sequence[Row], metric: str) -> str:
    """Return the table of :func:`~stepdistill.benchmark.tables.compared` rows, with students marked."""
    shown_columns = [column for column in columns(rows, metric) if column[0] != "interval"]
    first = [metric, *FIRST]
    shown_columns.sort(key=lambda column: first.index(column[0]) if column[0] in first else len(first))
    body = [[text(row["name"]), *(cell(row, key, metric) for key, _ in shown_columns)] for row in rows]
    head = ["", *(heading(words, key) for key, words in shown_columns)]
    return table(head, body, [row.get("kind", "") for row in rows])


def cell(row: Row, key: str, metric: str) -> str:
    """Return one value of a row, with its interval if it has one."""
    return value(shown(row, key, metric), shown(row, "interval", key))


def heading(words: str, metric: str) -> str:
    """Return the head of a column, with the direction in which its numbers are better."""
    higher = directions().get(metric)
    return value(words, "" if higher is None else "higher is better" if higher else "lower is better")


def plot(draw: Plot, rows: Sequence[Row], metric: str, words: str) -> str:
    """Return a plot in all its looks."""
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for number, (media, look) in enumerate(LOOKS.items()):
            files[media] = Path(folder, f"{number}.svg")
            draw(rows, metric, files[media], look)
        return figure(files, words)


def sources(rows: Sequence[Row]) -> str:
    """Return where the papers' ratios come from."""
    methods = dict.fromkeys(row["method"] for row in rows if row.get("paper") is not None)
    items = "".join(f"<li>{text(method)}: {text(paper_source(method))}</li>" for method in methods)
    return folded("The papers' ratios", f"<ul>{items}</ul>") if items else ""


# -------------------------------------------------------------------------------------- single evaluations


def evaluations(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the section of single evaluations: a table of all their numbers, and their settings."""
    numbers: list[dict[str, Line]] = [{line.metric: line for line in lines(result)} for result in results]
    names = list(dict.fromkeys(name for found in numbers for name in found))
    body, further = [], []
    for result, found in zip(results, numbers, strict=True):
        cells = (value(found[name].value, found[name].interval) if name in found else "" for name in names)
        body.append([text(result["name"]), *cells])
        further.append(folded(f"Setting {result['name']}", settings(flatten(result["setting"]))))
    head = ["", *(heading(name, name) for name in names)]
    return f"<h2>Evaluations</h2>\n{table(head, body)}\n{''.join(further)}"
