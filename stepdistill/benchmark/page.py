"""The elements of the report page: its frame and style, tables, pictures, and what is folded away.

The page is one file that loads nothing. It is made for a phone first (360 pixels wide), and follows the reader's light
or dark setting.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from stepdistill.files.words import visible

LOSSLESS = 96
"""Longest side in pixels of an image that is shown bit by bit."""
NARROW = "(max-width: 640px)"
DARK = "(prefers-color-scheme: dark)"

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #ffffff; --faint: #59606c; --line: #d7dae0; --mark: #e9f5e9 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --paper: #16181c; --faint: #a6adba; --line: #363b45; --mark: #1c3323 }
}
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 70rem;
       margin: 0 auto; padding: 1rem; overflow-wrap: anywhere }
h1, h2, h3 { line-height: 1.25 }
h1 { font-size: 1.6rem }
h2 { font-size: 1.35rem; margin-top: 2.5rem }
h3 { font-size: 1.1rem; margin: 2rem 0 .5rem }
p, li { max-width: 46rem }
ul { padding-left: 1.2rem }
small, figcaption, .note, summary { color: var(--faint) }
small { font-size: .8125rem }
figure { margin: 1rem 0 }
figure img { width: 100%; height: auto }
details { margin: .75rem 0 }
summary { cursor: pointer; padding: .25rem 0 }
.wide { overflow-x: auto; margin: .75rem 0 }
table { border-collapse: separate; border-spacing: 0; font-size: .875rem; font-variant-numeric: tabular-nums;
        overflow-wrap: normal }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top }
td small { display: block; white-space: nowrap }
thead th { vertical-align: bottom; font-weight: 600 }
thead th small { display: block; font-weight: 400; white-space: nowrap }
th:first-child, td:first-child, .setting td { text-align: left }
.wide th:first-child { position: sticky; left: 0; background: var(--paper); font-weight: 400; min-width: 13rem }
td.words { min-width: 11rem; text-align: left }
tr.student td, .wide tr.student th:first-child { background: var(--mark) }
tr.student th:first-child { font-weight: 600 }
.setting td { font-size: .8125rem; overflow-wrap: anywhere; padding: .2rem .6rem .2rem 0 }
.samples { --columns: 8; max-width: 60rem }
.samples h4 { font-size: .8125rem; font-weight: 600; color: var(--faint); margin: 1.25rem 0 .25rem }
.samples .name { font-size: .875rem; margin: .6rem 0 .2rem; max-width: none }
.tiles { display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); gap: 4px }
.tiles img { display: block; width: 100%; height: auto; border-radius: 3px }
.tiles img.pixels { image-rendering: pixelated }
.conditions { position: sticky; bottom: 0; background: var(--paper); border-top: 1px solid var(--line);
              padding: .35rem 0; margin-top: .5rem }
.conditions p { margin: 0; font-size: .75rem; line-height: 1.3; overflow-wrap: break-word; hyphens: auto }
@media (max-width: 640px) {
  .samples { --columns: 4 }
  .tiles > :nth-child(n + 5) { display: none }
  .wide th:first-child { min-width: 7.5rem }
  th, td { padding: .3rem .4rem }
}
"""


def page(title: str, body: str) -> str:
    """Return the whole page."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{text(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n<h1>{text(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def text(words: object) -> str:
    """Return text from outside as HTML that says only that."""
    return escape(visible(str(words)))


def table(head: Sequence[str], body: Sequence[Sequence[str]], kinds: Sequence[str] = ()) -> str:
    """Return a table, which scrolls beside its first column if it is wider than the page.

    Args:
        head: HTML of the head's cells.
        body: HTML of the cells of every row.
        kinds: a class for every row.
    """
    columns = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    rows = []
    for (first, *rest), kind in zip(body, kinds or [""] * len(body), strict=True):
        cells = "".join(f'<td class="words">{cell}</td>' if is_words(cell) else f"<td>{cell}</td>" for cell in rest)
        rows.append(f'<tr class="{text(kind)}"><th scope="row">{first}</th>{cells}</tr>')
    lines = "\n".join(rows)
    return f'<div class="wide"><table>\n<thead><tr>{columns}</tr></thead>\n<tbody>\n{lines}\n</tbody>\n</table></div>'


def is_words(cell: str) -> bool:
    """Return whether a cell holds words, which may be broken, and not a number."""
    return len(cell) > 12 and "<" not in cell and " " in cell


def value(shown: str, interval: str = "") -> str:
    """Return a number's cell, with its interval beside it."""
    return f"{text(shown)} <small>{text(interval)}</small>" if interval else text(shown)


def folded(summary: str, content: str) -> str:
    """Return what only those see who open it."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def settings(values: Mapping[str, object]) -> str:
    """Return keys and values, each in a line of its own."""
    lines = "".join(f"<tr><td>{text(key)}</td><td>{text(value)}</td></tr>\n" for key, value in values.items())
    return f'<table class="setting"><tbody>\n{lines}</tbody></table>'


def figure(images: Mapping[str, Path], words: str) -> str:
    """Return a figure with its caption.

    Args:
        images: SVG or PNG files by the media query that each is for, the most special first; one is for ``""``.
        words: what it shows.
    """
    sources = "".join(
        f'<source media="{escape(media)}" srcset="{file_data(path)}">' for media, path in images.items() if media
    )
    image = f'<img alt="{text(words)}" src="{file_data(images[""])}">'
    return f"<figure><picture>{sources}{image}</picture><figcaption>{text(words)}</figcaption></figure>"


def file_data(path: Path) -> str:
    """Return the address of an image that is part of the page."""
    kind = "svg+xml" if path.suffix == ".svg" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def tile(image: Image.Image, words: str) -> str:
    """Return one sample; a small one keeps its pixels when it is enlarged."""
    small = max(image.size) <= LOSSLESS
    buffer, kind = io.BytesIO(), "png" if small else "jpeg"
    image.save(buffer, format=kind, **({"optimize": True} if small else {"quality": 90}))
    data = base64.b64encode(buffer.getvalue()).decode()
    pixels = ' class="pixels"' if small else ""
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img{pixels} alt="{text(words)}" {size} src="data:image/{kind};base64,{data}">'
