"""One self-contained HTML page from the result files of one or many runs."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from stepdistill.benchmark.plots import plot_calls, plot_pareto
from stepdistill.benchmark.results import read_report_result
from stepdistill.benchmark.tables import Row, caption, compared, paper_source, text, texts
from stepdistill.config import flatten
from stepdistill.files.words import visible
from stepdistill.files.writing import atomic_write

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #ffffff; --faint: #5c6370; --line: #d7dae0; --mark: #e4f3e4 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --paper: #16181c; --faint: #a0a7b4; --line: #363b45; --mark: #1f3a26 }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 90rem;
       margin: 2rem auto; padding: 0 1rem }
h1, h2 { line-height: 1.2 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
th { vertical-align: bottom }
tr.student td { background: var(--mark) }
p, figcaption, summary { color: var(--faint); max-width: 60rem }
figure { margin: 1.5rem 0 }
img { max-width: min(100%, 65rem); background: #ffffff; border-radius: 4px }
"""


def write_report(results: Sequence[Path], output: Path) -> Path:
    """Write the page.

    Args:
        results: result files of ``evaluate`` or ``benchmark``; grids beside them are shown.
        output: the ``.html`` file.

    Raises:
        ValueError: naming a file that is missing or is not a result.
    """
    sections, single = [], []
    for path in results:
        result = read_report_result(path)
        if "rows" in result:
            sections.append(section(path, result))
        else:
            single.append(result)
    if single:
        sections.append(evaluations(single))
    body = "\n".join(sections)
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>stepdistill report</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n<h1>Step distillation: results</h1>\n{body}\n</body>\n</html>\n"
    )
    with atomic_write(output) as partial:
        partial.write_text(page, encoding="utf-8")
    return output


def section(path: Path, result: Mapping[str, Any]) -> str:
    """Return the section of a benchmark: its table, plots, grid and setting."""
    metric = result["metric"]
    rows = compared(result["rows"], metric)
    with tempfile.TemporaryDirectory() as folder:
        calls, pareto = Path(folder, "calls.png"), Path(folder, "pareto.png")
        plot_calls(rows, metric, calls)
        plot_pareto(rows, metric, pareto)
        plots = figure(calls, "Quality against network calls.") + figure(pareto, "Quality against seconds per image.")
    grid = path.with_name(f"{path.stem}-grid.png")
    pictures = figure(grid, "Same seeds, same classes.") if grid.is_file() else ""
    return "\n".join(
        [f"<h2>{escape(visible(path.stem))}</h2>", table(rows, metric), f"<p>{escape(caption(result['setting']))}</p>",
         sources(rows), plots, pictures, setting(result["setting"])]
    )  # fmt: skip


def evaluations(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the section of single evaluations: a table of all their numbers, and their settings."""
    names: dict[str, None] = {}
    numbers = [{key: value for key, value in result.items() if type(value) in (int, float)} for result in results]
    for found in numbers:
        names |= dict.fromkeys(found)
    body, settings = [], []
    for result, found in zip(results, numbers, strict=True):
        body.append([result["name"], *[text(found, name, "") for name in names]])
        settings.append(setting(result["setting"], result["name"]))
    return f"<h2>Evaluations</h2>\n{html_table(['', *names], body)}\n{''.join(settings)}"


def table(rows: Sequence[Row], metric: str) -> str:
    """Return the table of :func:`~stepdistill.benchmark.tables.compared` rows, with students marked."""
    head, body = texts(rows, metric)
    return html_table(head, body, [row.get("kind", "") for row in rows])


def html_table(head: Sequence[str], body: Sequence[Sequence[str]], kinds: Sequence[str] = ()) -> str:
    """Return a table of texts, which scrolls if it is wider than the page."""
    lines = [f"<tr>{html_cells('th', head)}</tr>"]
    for cells, kind in zip(body, kinds or [""] * len(body), strict=True):
        lines.append(f'<tr class="{escape(kind)}">{html_cells("td", cells)}</tr>')
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def html_cells(tag: str, texts: Sequence[str]) -> str:
    """Return the cells of a line."""
    return "".join(f"<{tag}>{escape(visible(text))}</{tag}>" for text in texts)


def sources(rows: Sequence[Row]) -> str:
    """Return where the papers' ratios come from."""
    items: dict[str, None] = {}
    for row in rows:
        if row.get("paper") is not None:
            items.setdefault(f"<li>{escape(row['method'])}: {escape(paper_source(row['method']))}</li>")
    return f"<details><summary>The papers' ratios</summary><ul>{''.join(items)}</ul></details>" if items else ""


def figure(path: Path, words: str) -> str:
    """Return a figure with a PNG that is part of the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img alt="{escape(words)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{escape(words)}</figcaption></figure>"


def setting(values: Mapping[str, Any], name: str = "") -> str:
    """Return the settings that it takes to repeat a measurement, folded away."""
    body = [[key, str(value)] for key, value in flatten(values).items()]
    return f"<details><summary>Setting {escape(visible(name))}</summary>{html_table(['key', 'value'], body)}</details>"
