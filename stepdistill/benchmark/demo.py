"""The demo: distil a text-to-image teacher, measure the student beside everything else, and draw a picture.

It writes ``report.png``, ``report.html``, ``result.json`` and the student, ``pipeline/``, into the run's folder. The
same command again goes on where the last one stopped. Pictures and numbers are the same every time; only seconds
differ, which is why the picture has none.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from stepdistill.benchmark.benchmark import Benchmark
from stepdistill.benchmark.config import BenchmarkConfig
from stepdistill.benchmark.poster import Shown, draw_poster, images_of, poster_rows
from stepdistill.benchmark.report import write_report
from stepdistill.benchmark.samples import Samples
from stepdistill.benchmark.students import is_pipeline
from stepdistill.benchmark.tables import Row, compared, of_kind, text
from stepdistill.config import read_config
from stepdistill.export.contract import read_contract
from stepdistill.files.reading import read_json
from stepdistill.files.schema import build, convert
from stepdistill.files.words import visible
from stepdistill.files.writing import atomic_write
from stepdistill.networks.launcher import check_alone
from stepdistill.training.config import RunConfig, resolve
from stepdistill.training.cost import TrainingCost
from stepdistill.training.run import Run


@dataclasses.dataclass(frozen=True)
class Demo:
    """The configuration of a demo: a training, what is measured of it, and the prompts of the picture."""

    run: RunConfig
    measured: BenchmarkConfig
    shown: tuple[Shown, ...]


def demo_of(sections: Mapping[str, Any]) -> Demo:
    """Read the sections of a training, and a section ``demo``: the keys of a benchmark, and ``shown``.

    Raises:
        ValueError: naming the key at fault.
    """
    mapping = dict(sections)
    measured = dict(convert(mapping.pop("demo", {}), dict[str, Any], "demo"))
    shown = convert(measured.pop("shown", []), tuple[Shown, ...], "demo.shown")
    if not shown:
        raise ValueError("demo.shown: expected prompts with their seeds, got none")
    run = resolve(mapping)
    folder = Path(run.train.output_dir)
    fixed = {
        "teacher": mapping["teacher"], "output": str(folder / "result.json"),
        "students": {"student": str(folder / "pipeline")},
    }  # fmt: skip
    return Demo(run, build(BenchmarkConfig, fixed | measured, "demo"), shown)


def demo(path: str, overrides: Sequence[str] = ()) -> Path:
    """Run the demo of a configuration file.

    Returns:
        The file of the picture.
    """
    check_alone("demo")
    began = time.perf_counter()
    config = demo_of(read_config(path, overrides))
    train(config)
    print(f"2 of 3: measuring on {config.measured.num_samples:,} samples a row ...", flush=True)
    bench = Benchmark(config.measured)
    rows = compared(bench.run(), bench.metric)
    output = add_seconds(bench.path, config.run, began)
    print("3 of 3: drawing ...", flush=True)
    images = {row["name"]: images_of(bench, row, config.shown) for row in poster_rows(rows, bench.metric)}
    picture = draw_poster(bench, images, config.shown, output.with_name("report.png"))
    by_calls = sorted(of_kind(rows, "solver", "student"), key=lambda row: row["calls"])
    names = [row["name"] for row in of_kind(rows, "teacher") + by_calls if row["name"] in images]
    write_samples(output, {name: images[name] for name in names}, config.shown)
    page = write_report([output], output.with_name("report.html"))
    print_table(rows, bench.metric)
    print(f"\n{time.perf_counter() - began:.0f} s.  Look at {visible(str(picture))} and {visible(str(page))}")
    return picture


def train(config: Demo) -> None:
    """Train the student, unless that is done; refuse before it what would fail after it."""
    run, teacher = Run(config.run), config.run.teacher.path
    if not run.family.takes_text:
        raise ValueError(f"teacher.path: expected a teacher that takes text, got {teacher}")
    if not is_pipeline(run.folder / "pipeline"):
        Benchmark(dataclasses.replace(config.measured, students={}))
    print(f"1 of 3: distilling {visible(teacher)!r} by {config.run.method_name} ...", flush=True)
    run.train()


def write_samples(output: Path, images: Mapping[str, Tensor], shown: Sequence[Shown]) -> None:
    """Write the images (N, C, H, W), bytes, of the picture beside the result, for the page."""
    pictures = {name: pixels / 255 for name, pixels in images.items()}
    Samples.of(pictures, [one.prompt for one in shown]).write(output.with_name(f"{output.stem}-samples.npz"))


def add_seconds(output: Path, config: RunConfig, began: float) -> Path:
    """Add the seconds of the training and of the whole demo to a result, unless it has those of an earlier call."""
    result = read_json(output)
    if "seconds" not in result:
        cost = TrainingCost(**read_contract(Path(config.train.output_dir) / "pipeline").origin.training)
        seconds = {"training": round(cost.wall_minutes * 60, 1), "all": round(time.perf_counter() - began, 1)}
        with atomic_write(output) as partial:
            partial.write_text(json.dumps(result | {"seconds": seconds}, indent=2) + "\n")
    return output


COLUMNS: Mapping[str, str] = {
    "clip_score": "CLIP score", "adherence": "adherence", "adherence_unseen": "unseen",
    "prompt_spread": "spread", "seconds_per_image": "s/image",
}  # fmt: skip
"""Headings of the printed table beside the metric."""


def print_table(rows: Sequence[Row], metric: str) -> None:
    """Print the table."""
    headings = {"calls": "calls", metric: metric.upper(), **COLUMNS}
    print(f"\n{'':28s}" + "".join(f"{heading:>12s}" for heading in headings.values()))
    for row in rows:
        cells = (f"{text(row, key, metric):>12s}" for key in headings)
        print(f"{visible(row['name']):28s}" + "".join(cells))
