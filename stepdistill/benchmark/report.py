"""One self-contained HTML page from the result files of one or many runs: it opens anywhere, without a network."""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from stepdistill.benchmark.plots import plot_calls, plot_pareto
from stepdistill.benchmark.tables import Row, caption, columns, compared, paper_source, text
from stepdistill.config import flatten

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
        results: result files of ``evaluate`` or ``benchmark``; grids that lie beside them are shown.
        output: the ``.html`` file.

    Raises:
        ValueError: naming a file that is missing or is no result.
    """
    opened = {path: read_result(path) for path in results}
    benchmarks = {path: result for path, result in opened.items() if "rows" in result}
    single = [result for result in opened.values() if "rows" not in result]
    sections = [section(path, result) for path, result in benchmarks.items()]
    if single:
        sections.append(evaluations(single))
    body = "\n".join(sections)
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>stepdistill report</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n<h1>Step distillation: results</h1>\n{body}\n</body>\n</html>\n"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")
    return output


def read_result(path: Path) -> dict[str, Any]:
    """A result file of ``evaluate`` or ``benchmark``."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; wanted a result of evaluate or benchmark (.json)")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(result, dict) or "setting" not in result:
        raise ValueError(f"{path}: no result of evaluate or benchmark: it has no 'setting'")
    return result


def section(path: Path, result: Mapping[str, Any]) -> str:
    """A benchmark: its table, plots, grid and setting."""
    metric = result["metric"]
    rows = compared(result["rows"], metric)
    with tempfile.TemporaryDirectory() as folder:
        calls, pareto = Path(folder, "calls.png"), Path(folder, "pareto.png")
        plot_calls(rows, metric, calls)
        plot_pareto(rows, metric, pareto)
        plots = figure(calls, "Quality against network calls.") + figure(pareto, "Quality against seconds an image.")
    grid = path.with_name(f"{path.stem}-grid.png")
    pictures = figure(grid, "Same seeds, same classes.") if grid.is_file() else ""
    return "\n".join(
        [f"<h2>{escape(path.stem)}</h2>", table(rows, metric), f"<p>{escape(caption(result['setting']))}</p>",
         sources(rows), plots, pictures, setting(result["setting"])]
    )  # fmt: skip


def evaluations(results: Sequence[Mapping[str, Any]]) -> str:
    """Single evaluations: a table of all their numbers, and their settings."""
    rows = [{key: value for key, value in result.items() if key != "setting"} for result in results]
    names = list(dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, (int, float))))
    body = [[str(row.get("name", "")), *(text(row, name, "") for name in names)] for row in rows]
    settings = "".join(setting(result["setting"], str(result.get("name", ""))) for result in results)
    return f"<h2>Evaluations</h2>\n{html_table(['', *names], body)}\n{settings}"


def table(rows: Sequence[Row], metric: str) -> str:
    """The table of :func:`~stepdistill.benchmark.tables.compared` rows, students marked."""
    shown = columns(rows, metric)
    body = [[row["name"], *(text(row, key, metric) for key, _ in shown)] for row in rows]
    return html_table(["", *(heading for _, heading in shown)], body, [row.get("kind", "") for row in rows])


def html_table(head: Sequence[str], body: Sequence[Sequence[str]], kinds: Sequence[str] = ()) -> str:
    """Rows of texts; wide ones scroll instead of breaking the page."""
    lines = ["<tr>" + "".join(f"<th>{escape(heading)}</th>" for heading in head) + "</tr>"]
    for cells, kind in zip(body, kinds or [""] * len(body), strict=True):
        lines.append(f'<tr class="{escape(kind)}">' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def sources(rows: Sequence[Row]) -> str:
    """Where the papers' ratios come from."""
    methods = dict.fromkeys(row["method"] for row in rows if row.get("paper") is not None)
    items = "".join(f"<li>{escape(method)}: {escape(paper_source(method))}</li>" for method in methods)
    return f"<details><summary>The papers' ratios</summary><ul>{items}</ul></details>" if items else ""


def figure(path: Path, words: str) -> str:
    """A PNG inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img alt="{escape(words)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{escape(words)}</figcaption></figure>"


def setting(values: Mapping[str, Any], name: str = "") -> str:
    """Everything that it takes to repeat a measurement, folded away."""
    body = [[key, str(value)] for key, value in flatten(values).items()]
    return f"<details><summary>Setting {escape(name)}</summary>{html_table(['key', 'value'], body)}</details>"
