"""Students beside the teacher, beside the training-free solvers at the same number of calls, and beside real images.

A table is only as honest as its baselines. Solvers are compared at equal network calls (a guided step is two), each
without guidance and at its best guidance scale; the scale is chosen from a stated grid on few samples of other seeds,
and only the winner is measured on all of them. The teacher has its many steps, and a row of as many real images shows
the floor of the metric. Rows are kept in a JSON file as they are made, so that a benchmark can be stopped and gone on
with. Seconds compare only where one run took them: :meth:`Benchmark.time` takes those of all rows again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.benchmark.plots import plot_calls, plot_pareto
from stepdistill.benchmark.tables import Row, best_solver, caption, cell, compared, markdown
from stepdistill.config import flatten, nearest, read_config, to_dict
from stepdistill.evaluation.evaluate import evaluate_pipeline
from stepdistill.evaluation.extraction import read_captions
from stepdistill.evaluation.panel import Panel
from stepdistill.evaluation.results import describe_setting, write_result
from stepdistill.evaluation.suite import Judge
from stepdistill.export.contract import read_contract
from stepdistill.export.pipeline import load_pipeline
from stepdistill.families.config import TeacherConfig
from stepdistill.families.loading import load_teacher
from stepdistill.features.clip import Clip
from stepdistill.inference.grids import save_comparison
from stepdistill.inference.sampling import Images, sample_images
from stepdistill.inference.solvers import make_solver, steps_within, teacher_pipeline
from stepdistill.networks.fingerprint import fingerprint_weights
from stepdistill.pipelines.class_conditional import ClassConditionalPipeline
from stepdistill.training.config import resolve
from stepdistill.training.run import Run

FREE_KEYS = ("students", "train", "solvers", "teacher_guidance_scales", "output", "document", "mark", "batch_size")
"""Settings that say which rows there are, and not what is in them."""


SHOWN = 20
"""Images a row of the picture."""


TIMED = 4
"""Batches of which a row's seconds are the median, the first left out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What is compared, and how it is measured."""

    teacher: TeacherConfig
    output: str
    """Result file; tables and plots are written beside it."""
    document: str | None = None
    """A markdown file that shows the table between ``<!-- mark -->`` and ``<!-- /mark -->``."""
    mark: str = "benchmark"
    students: dict[str, str] = dataclasses.field(default_factory=dict)
    """Exported pipelines by the name their rows shall have."""
    train: tuple[str, ...] = ()
    """Runs that are trained first, unless they have exported their student already: a configuration's path, followed
    by ``key=value`` where it is changed."""
    solvers: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    """By solver, at how many network calls an image it is measured."""
    guidance_scales: tuple[float, ...] = (1.15, 1.5, 2.0)
    """The grid from which a guided solver gets its best scale at each number of calls."""
    search_samples: int = 1000
    """Samples, of other seeds than the table's, on which the scale is chosen."""
    teacher_steps: int = 50
    teacher_guidance_scales: tuple[float, ...] = (1.0,)
    """One row of the teacher at its many steps for each."""
    metrics: tuple[str, ...] = ("fd", "precision_recall", "spread", "accuracy")
    features: str = "embedded"
    reference: str = "embedded"
    captions: str | None = None
    """Prompts for a teacher that takes text, see :class:`stepdistill.evaluation.protocol.Protocol`."""
    clip: str | None = None
    """A CLIP for the metric ``clip``: one that trained nothing here."""
    num_samples: int = 5000
    batch_size: int = 100
    precision: str = "fp32"
    seed: int = 0


class Benchmark:
    """Makes rows, once each.

    Raises:
        ValueError: if a student's folder is missing, or the result file holds rows of another setting.
    """

    def __init__(self, config: BenchmarkConfig) -> None:
        self.config = config
        for name, folder in config.students.items():
            if not (Path(folder) / "model_index.json").is_file():
                siblings = [str(path) for path in Path(folder).parent.glob("pipeline*")]
                raise ValueError(f"students.{name}: no pipeline in {folder}{nearest(folder, siblings)}")
        self.family = load_teacher(config.teacher)
        self.judge = Judge.open(config.features, config.reference)
        self.panel = Panel(self.judge, Clip.open(config.clip) if config.clip else None)
        self.panel.check(config.metrics)
        self.captions = read_captions(config.captions, config.num_samples) if config.captions else None
        if self.family.takes_text and self.captions is None:
            raise ValueError(f"captions: missing; {config.teacher.path} takes text")
        self.metric = self.judge.distance
        self.path = Path(config.output)
        self.setting = describe_setting(
            self.judge, **to_dict(config), teacher_sha256=fingerprint_weights(self.family.network)
        )
        self.rows: list[Row] = self._finished_rows()

    def run(self) -> list[Row]:
        """All rows of the configuration; the cheap and the important ones first."""
        if self.judge.real is not None:
            self.add("real images", self.floor)
        for scale in self.config.teacher_guidance_scales:
            self.add(self.teacher_name(scale), functools.partial(self.teacher, scale=scale))
        for name, folder in self.config.students.items():
            same = {"sha256": fingerprint(folder)}
            self.add(name, functools.partial(self.student, folder=folder), same)
        for solver, calls, guided in solver_rows(self.config.solvers, guided=self.can_be_guided):
            make = functools.partial(self.solver, solver=solver, calls=calls, guided=guided)
            self.add(solver_name(solver, calls, guided), make)
        return self.rows

    def add(self, name: str, make: Callable[[str], Row], same: Mapping[str, Any] | None = None) -> Row:
        """The row of this name, made now unless the result file has it, with the values that must be the ``same``."""
        for row in self.rows:
            if row["name"] == name and all(row[key] == value for key, value in (same or {}).items()):
                return row
        self.rows = [row for row in self.rows if row["name"] != name]
        row = make(name)
        self.rows.append(row)
        self._write()
        return row

    def time(self) -> None:
        """The seconds an image of every row, taken again one after another on a machine that does nothing else."""
        for row in self.rows:
            if row["kind"] != "floor":
                row["seconds_per_image"] = self._sample(row, TIMED * self.config.batch_size).seconds
        self._write()

    def _write(self) -> None:
        write_result(self.path, {"metric": self.metric, "setting": self.setting, "rows": self.rows})

    # ------------------------------------------------------------------------------------------------- rows

    def floor(self, name: str) -> Row:
        """As many real images, in the place of samples: what the metric says of a perfect generator."""
        real = self.judge.real
        assert real is not None
        first = slice(self.config.num_samples)
        images = Images(
            real.pixels[first],
            None if real.labels is None else real.labels[first],
            captions=None if real.captions is None else real.captions[first],
        )
        wanted = ("fd",) if self.panel.clip is None else ("fd", "clip")
        return {"name": name, "kind": "floor", "calls": 0, **self.panel.score(self.panel.embed(images), wanted)}

    def teacher_name(self, scale: float = 1.0) -> str:
        """The name of a teacher's row."""
        guidance = "" if scale == 1 else f", guidance {scale:g}"
        return f"teacher, {self.config.teacher_steps} steps{guidance}"

    def teacher(self, name: str, scale: float) -> Row:
        """The teacher at its own number of steps, by DDIM."""
        call = {"num_inference_steps": self.config.teacher_steps, "guidance_scale": scale}
        return self._measure(name, self.solver_pipeline("DDIM"), call) | {"kind": "teacher", "solver": "DDIM"}

    def student(self, name: str, folder: str) -> Row:
        """An exported student, called as its contract says."""
        facts = read_contract(Path(folder)).to_json()
        about = {key: facts[key] for key in ("method", "steps", "guidance_scale", "training") if key in facts}
        source = {"kind": "student", "pipeline": str(folder), "sha256": fingerprint(folder)}
        return self._measure(name, self.open_student(folder), {}) | source | about

    def open_student(self, folder: str) -> Any:
        """An exported student; code that its teacher brought is trusted as the teacher's is."""
        return load_pipeline(folder, trust_remote_code=self.config.teacher.trust_remote_code)

    def solver(self, name: str, solver: str, calls: int, guided: bool) -> Row:
        """A training-free solver of the teacher within a number of calls, at its best guidance scale if guided."""
        pipeline, steps = self.solver_pipeline(solver), steps_within(solver, calls, guided=guided)
        tried = self._search(name, pipeline, steps, self.config.guidance_scales if guided else (1.0,))
        call = {"num_inference_steps": steps, "guidance_scale": min(tried, key=tried.__getitem__)}
        about = {"kind": "solver", "solver": solver, "tried": {f"{scale:g}": value for scale, value in tried.items()}}
        return self._measure(name, pipeline, call) | about

    def _search(self, name: str, pipeline: Any, steps: int, scales: Sequence[float]) -> dict[float, float]:
        """The metric of every scale on other seeds; nothing is measured where there is no choice."""
        if len(scales) == 1:
            return {scales[0]: 0.0}
        calls = [{"num_inference_steps": steps, "guidance_scale": scale} for scale in scales]
        other = {"wanted": ("fd",), "count": self.config.search_samples, "seed": self.config.seed + 1}
        rows = [self._measure(name, pipeline, call, **other) for call in calls]
        return {row["guidance_scale"]: row[self.metric] for row in rows}

    @property
    def can_be_guided(self) -> bool:
        """Whether the teacher knows what "no class", or no prompt, is."""
        return self.family.takes_text or getattr(self.family, "null_class", None) is not None

    def solver_pipeline(self, solver: str) -> Any:
        """The teacher under a solver's scheduler."""
        if self.family.takes_text:
            return teacher_pipeline(self.config.teacher, solver)
        scheduler = make_solver(solver, self.family.scheduler_config)
        null_class = getattr(self.family, "null_class", None)
        return ClassConditionalPipeline(self.family.network, scheduler, null_class=null_class)

    def _measure(self, name: str, pipeline: Any, call: Mapping[str, Any], **other: Any) -> Row:
        """A pipeline's row; ``other`` replaces what the configuration says of the measurement."""
        config = self.config
        measurement: dict[str, Any] = {
            "wanted": config.metrics,
            "count": config.num_samples,
            "seed": config.seed,
            "captions": self.captions,
        } | other
        row = evaluate_pipeline(
            pipeline, self.panel, batch_size=config.batch_size, precision=config.precision, call=call, name=name,
            **measurement,
        )  # fmt: skip
        row.pop("setting")
        return row | {"steps" if key == "num_inference_steps" else key: value for key, value in call.items()}

    def _finished_rows(self) -> list[Row]:
        if not self.path.is_file():
            return []
        result = json.loads(self.path.read_text(encoding="utf-8"))
        # a key that a version added, and that says nothing yet, was not there before
        before, now = flatten(result["setting"]), flatten(json.loads(json.dumps(self.setting)))
        changed = [key for key in now if key.partition(".")[0] not in FREE_KEYS and before.get(key) != now[key]]
        if changed:
            key = changed[0]
            raise ValueError(
                f"{self.path} was measured with another {key}: {before.get(key)!r}, now {now[key]!r}; "
                "move it away, choose another output, or restore the setting"
            )
        return list(result["rows"])

    # ---------------------------------------------------------------------------------------------- pictures

    def images(self, row: Row, count: int = SHOWN) -> Tensor:
        """Images (N, C, H, W) in [0, 1] of a row: the same seeds and classes whatever the row."""
        if row["kind"] == "floor":
            return self._real_images(count)
        return self._sample(row, count).pixels / 255

    def _sample(self, row: Row, count: int) -> Images:
        """The first images of a row that somebody samples."""
        if row["kind"] == "student":
            pipeline, call = self.open_student(row["pipeline"]), {}
        else:
            pipeline = self.solver_pipeline(row["solver"])
            call = {"num_inference_steps": row["steps"], "guidance_scale": row["guidance_scale"]}
        return sample_images(
            pipeline, count, seed=self.config.seed, batch_size=self.config.batch_size,
            num_classes=self.family.num_classes, captions=self.captions, precision=self.config.precision, call=call,
            description=row["name"],
        )  # fmt: skip

    def _real_images(self, count: int) -> Tensor:
        """Real images, of the same classes as everybody's where classes are known."""
        real, number = self.judge.real, self.family.num_classes
        assert real is not None
        if self.captions is not None and real.captions is not None:
            places = {caption: row for row, caption in enumerate(real.captions)}
            return real.pixels[[places.get(caption, 0) for caption in self.captions[:count]]] / 255
        if real.labels is None or number is None:
            return real.pixels[:count] / 255
        indices = [int((real.labels == i % number).nonzero()[i // number]) for i in range(count)]
        return real.pixels[torch.tensor(indices)] / 255

    def picture(self, path: Path) -> None:
        """A grid: real images, the teacher, every student and the best solver at its calls, a row each."""
        shown = [row for row in self.rows if row["kind"] in ("floor", "teacher")]
        for student in sorted((row for row in self.rows if row["kind"] == "student"), key=lambda row: row["calls"]):
            solver = best_solver(self.rows, student["calls"], self.metric)
            shown += [row for row in (solver, student) if row is not None and row not in shown]
        grids = {f"{row['name']}\n{self.metric} {cell(row[self.metric])}": self.images(row) for row in shown}
        save_comparison(grids, path, title="Same seeds, same classes")


def solver_rows(solvers: Mapping[str, Sequence[int]], *, guided: bool) -> list[tuple[str, int, bool]]:
    """(solver, calls, guided), by calls; a number of calls that allows no further step has no row of its own.

    >>> solver_rows({"Heun": [1, 2, 3]}, guided=True)
    [('Heun', 1, False), ('Heun', 2, True), ('Heun', 3, False)]
    """
    rows: dict[tuple[str, int, bool], tuple[str, int, bool]] = {}
    for solver, budgets in solvers.items():
        for calls in sorted(budgets):
            for guidance in (False, True) if guided else (False,):
                if steps := steps_within(solver, calls, guided=guidance):
                    rows.setdefault((solver, steps, guidance), (solver, calls, guidance))
    return sorted(rows.values(), key=lambda row: row[1])


def solver_name(solver: str, calls: int, guided: bool) -> str:
    """``"UniPC, 4 calls, guided"``."""
    return f"{solver}, {calls} call{'s' if calls > 1 else ''}{', guided' if guided else ''}"


def fingerprint(folder: str | Path) -> str:
    """Sixteen hex digits of an exported pipeline's weights: a student that was trained again is measured again."""
    digest = hashlib.sha256()
    for file in sorted(Path(folder).rglob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def train_missing(runs: Sequence[str]) -> None:
    """Train every run that has not exported its student yet: a configuration's path, then ``key=value`` if need be."""
    for path, *overrides in map(str.split, runs):
        config = resolve(read_config(path, overrides))
        if not (Path(config.train.output_dir) / "pipeline" / "model_index.json").is_file():
            print(" ".join(["training", path, *overrides]), flush=True)
            Run(config).train()


def export_missing(students: Mapping[str, str]) -> None:
    """Export a run's student for as many calls as a folder that is missing beside it says: ``pipeline-2-steps``."""
    for folder in map(Path, students.values()):
        calls, run = re.fullmatch(r"pipeline-(\d+)-steps?", folder.name), folder.parent / "config.yaml"
        if calls and run.is_file() and not (folder / "model_index.json").is_file():
            Run(resolve(read_config(run, [f"method.steps={calls[1]}"]))).export_checkpoint(folder)


def benchmark(config: BenchmarkConfig, *, time: bool = False) -> Path:
    """Run a benchmark; beside ``<output>.json`` it writes ``.md``, ``-calls.png``, ``-pareto.png`` and ``-grid.png``.

    Args:
        config: what is compared.
        time: take the seconds of all rows again, in this run.

    Returns:
        The table.
    """
    train_missing(config.train)
    export_missing(config.students)
    bench = Benchmark(config)
    bench.run()
    if time:
        bench.time()
    rows = compared(bench.rows, bench.metric)
    plot_calls(rows, bench.metric, beside(bench.path, "calls"))
    plot_pareto(rows, bench.metric, beside(bench.path, "pareto"))
    bench.picture(beside(bench.path, "grid"))
    shown = f"{caption(bench.setting)}\n\n{markdown(rows, bench.metric)}\n"
    table = bench.path.with_suffix(".md")
    table.write_text(shown, encoding="utf-8")
    if config.document is not None:
        insert(shown, Path(config.document), config.mark)
    return table


def insert(table: str, document: Path, mark: str = "benchmark") -> None:
    """Put a table between ``<!-- mark -->`` and ``<!-- /mark -->`` of a document.

    Raises:
        ValueError: if the document has no such marks.
    """
    text = document.read_text(encoding="utf-8") if document.is_file() else ""
    before, begin, rest = text.partition(f"<!-- {mark} -->")
    _, end, after = rest.partition(f"<!-- /{mark} -->")
    if not end:
        raise ValueError(f"document: {document} has no lines '<!-- {mark} -->' and '<!-- /{mark} -->'")
    document.write_text(f"{before}{begin}\n{table}{end}{after}", encoding="utf-8")


def beside(path: Path, what: str) -> Path:
    """The picture of a result: ``fashion.json`` -> ``fashion-grid.png``."""
    return path.with_name(f"{path.stem}-{what}.png")
