"""The page: valid, whole, loading nothing, saying names as text; and the samples that it shows."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from browser import SEEN, needs_browser, said_by
from PIL import Image

from stepdistill.benchmark.plots import DOCUMENT, PHONE, plot_calls, plot_pareto
from stepdistill.benchmark.report import LOOKS, write_report
from stepdistill.benchmark.samples import COLUMNS, SIDE, Samples, conditions_of
from stepdistill.benchmark.tables import cell, compared

VOID = ("meta", "img", "source")
NASTY = '</style><script>alert(1)</script> a & b "c" $x$ _y \x1b[2J'


def row(name, kind, calls, fd, **more):
    interval = {"fd_low": 0.9 * fd, "fd_high": 1.1 * fd, "recall": 0.5, "recall_low": 0.4, "recall_high": 0.6}
    return {"name": name, "kind": kind, "calls": calls, "fd": fd, "seconds_per_image": 0.01, **interval, **more}


ROWS = [
    row("real images", "floor", 0, 0.1),
    row("teacher, 50 steps", "teacher", 50, 0.2, solver="DDIM"),
    row("UniPC, 2 calls", "solver", 2, 2.0, solver="UniPC"),
    row("ours, 1 step", "student", 1, 0.5, method="dmd2", steps=1),
    row("ours, 2 steps", "student", 2, 0.3, method="dmd2", steps=2),
]
SETTING = {"num_samples": 1000, "search_samples": 10, "seed": 0, "precision": "fp32", "guidance_scales": [1.5]}
PROMPTS = ["a red apple", "", NASTY]


def benchmark(folder, rows=ROWS, prompts=PROMPTS, size=8):
    """A result with samples beside it."""
    path = folder / "bench.json"
    path.write_text(json.dumps({"metric": "fd", "setting": SETTING, "rows": rows}))
    images = torch.rand(len(prompts) or 3, 3, size, size)
    Samples.of({entry["name"]: images for entry in rows}, prompts).write(folder / "bench-samples.npz")
    return path


class Page(HTMLParser):
    """What a page loads and shows; every element must be closed, and every attribute have one value."""

    def __init__(self, html):
        super().__init__()
        self.loaded, self.open, self.words, self.cells, self.alternatives = [], [], [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        assert len(named) == len(attributes)
        self.loaded += [named[name] for name in ("src", "srcset", "href") if name in named]
        if tag == "img":
            self.alternatives.append(named["alt"])
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append(0)
        self.cells[-1:] = [count + (tag in ("td", "th")) for count in self.cells[-1:]]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    single = {"name": NASTY, "calls": 4.0, "fd": 0.5, "setting": {"seed": 0, "versions": {"torch": "2"}}}
    (folder / "single.json").write_text(json.dumps(single))
    output = write_report([benchmark(folder), folder / "single.json"], folder / "page.html")
    return output.read_text()


def test_the_page_is_whole_and_loads_nothing(html):
    page = Page(html)
    assert html.startswith("<!doctype html>\n") and 'lang="en"' in html and "width=device-width" in html
    assert all(re.match(r"data:image/(png|svg\+xml|jpeg);base64,", source) for source in page.loaded)
    assert not re.search(r"url\(|@import|<script|<link|https?:", html)


def test_names_and_prompts_say_only_what_they_say(html):
    page = Page(html)
    shown = NASTY.replace("\x1b", r"\x1b")
    assert shown in page.words and f"ours, 1 step: {shown}" in page.alternatives
    assert html.count("</style>") == 1 and not re.search("[\x00-\x08\x0e-\x1f\x7f-\x9f]", html)


@pytest.mark.product
@needs_browser
def test_a_browser_shows_every_picture_and_runs_nothing(html, tmp_path):
    (tmp_path / "report.html").write_text(html)
    seen = said_by(SEEN, tmp_path / "report.html")
    assert not seen["errors"] and not seen["broken"] and seen["images"] == len(Page(html).alternatives)
    assert "ours, 2 steps" in seen["words"] and "<script>alert(1)</script>" in seen["words"]  # as text
    assert seen["wide"] <= 1200  # tables scroll beside their first column, and the page does not


def test_every_row_is_shown_on_the_same_conditions_which_stand_below(html):
    page = Page(html)
    words = page.words
    for entry in ROWS:
        pictures = [alt for alt in page.alternatives if alt.startswith(f"{entry['name']}: ")]
        assert len(pictures) == len(PROMPTS) and f"FD {cell(entry['fd'])}" in words
    assert words.index("a red apple") < words.index("(empty prompt)") and "2 network calls" in words


def test_intervals_stand_beside_values_and_tables_are_rectangular(html):
    assert "0.500 <small>0.450 - 0.550</small>" in html and "0.500 <small>0.400 - 0.600</small>" in html
    assert "FD <small>lower is better</small>" in html and "recall <small>higher is better</small>" in html
    table = html[html.index("<h3>Numbers") : html.index("<h3>Quality against network")]
    assert len(set(Page(table).cells)) == 1


def test_the_setting_is_folded_away(html):
    folded = "".join(re.findall(r"<details><summary>.*?</details>", html, re.DOTALL))
    assert "num_samples" in folded and "versions.torch" in folded
    assert "num_samples" not in html.replace(folded, "").split("<h2>")[0]


def test_plots_fit_the_readers_screen_and_light(html):
    for media in filter(None, LOOKS):
        assert html.count(f'<source media="{media}"') == 2
    assert "prefers-color-scheme: dark" in html


@pytest.mark.parametrize("draw", [plot_calls, plot_pareto])
def test_a_plot_takes_any_name_and_keeps_its_room_under_a_long_legend(tmp_path, draw):
    many = [row(f"{NASTY} {index}", "student", 2, 0.3 + index, method=f"_m{index}$", steps=2) for index in range(40)]
    heights = []
    for rows in (ROWS, [*ROWS, *many]):
        draw(compared(rows, "fd"), "fd", tmp_path / "plot.png", PHONE)
        heights.append(Image.open(tmp_path / "plot.png").height)
    assert draw is plot_pareto or heights[1] > heights[0] + 300  # a line in the legend for each of the methods
    draw(compared(ROWS[:1], "fd"), "fd", tmp_path / "plot.svg", DOCUMENT)
    first = (tmp_path / "plot.svg").read_bytes()
    draw(compared(ROWS[:1], "fd"), "fd", tmp_path / "plot.svg", DOCUMENT)
    assert first == (tmp_path / "plot.svg").read_bytes()


# ---------------------------------------------------------------------------------------------- samples


@pytest.fixture
def no_plots(monkeypatch):
    """Drawing takes seconds."""
    monkeypatch.setattr("stepdistill.benchmark.report.plot", lambda *args: "")


def test_samples_are_read_as_they_were_written_and_small_ones_keep_their_bits(tmp_path):
    images = torch.randint(256, (2, 20, 1, 6, 4), dtype=torch.uint8)
    written = Samples.of({"a": images[0] / 255, "b": images[1] / 255}, conditions_of(20, None, 3))
    written.write(tmp_path / "x.npz")
    read = Samples.read(tmp_path / "x.npz")
    assert read.rows == ["a", "b"] and read.conditions == [f"class {index % 3}" for index in range(COLUMNS)]
    assert np.array_equal(read.images, images[:, :COLUMNS].permute(0, 1, 3, 4, 2).numpy())
    assert np.array_equal(np.asarray(read.picture(1, 2)), images[1, 2, 0].numpy())


def test_large_samples_are_made_smaller_and_a_teacher_may_have_no_conditions(tmp_path, no_plots):
    samples = Samples.of({"a": torch.rand(2, 4, 2 * SIDE, SIDE)}, conditions_of(2, None, None))
    assert samples.images.shape == (1, 2, SIDE, SIDE // 2, 1) and samples.conditions == []
    html = write_report([benchmark(tmp_path, prompts=[], size=300)], tmp_path / "page.html").read_text()
    sources = re.findall(r'<img alt="ours, 1 step"[^>]*jpeg;base64,([^"]*)"', html)
    assert len(sources) == 3 and Image.open(io.BytesIO(base64.b64decode(sources[0]))).size == (SIDE, SIDE)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": np.zeros((2, 3, 4, 4, 2), np.uint8)}, "images: expected bytes"),
        ({"images": np.zeros((5, 3, 4, 4, 3))}, "images: expected bytes"),
        ({"rows": np.array(["a"])}, "rows: expected 5 names"),
        ({"rows": np.arange(5)}, "rows: expected 5 names"),
        ({"conditions": np.array(["a"])}, "conditions: expected 3 texts or none"),
    ],
)
def test_a_damaged_file_of_samples_is_named(tmp_path, no_plots, changed, message):
    path = benchmark(tmp_path)
    with np.load(tmp_path / "bench-samples.npz") as archive:
        np.savez(tmp_path / "bench-samples.npz", **{**archive, **changed})
    with pytest.raises(ValueError, match=rf"bench-samples\.npz: {message}"):
        write_report([path], tmp_path / "page.html")


def test_a_result_without_samples_shows_the_grid_beside_it(tmp_path, no_plots):
    path = benchmark(tmp_path)
    (tmp_path / "bench-samples.npz").unlink()
    Image.new("RGB", (4, 4)).save(tmp_path / "bench-grid.png")
    grid = base64.b64encode((tmp_path / "bench-grid.png").read_bytes()).decode()
    assert grid in write_report([path], tmp_path / "page.html").read_text()
