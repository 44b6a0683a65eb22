"""A table of students, their teacher, training-free solvers at the same number of network calls, and real images.

Solvers are compared at equal network calls (a guided step is two), each without guidance and at its best guidance
scale. The scale is chosen from a stated grid on few samples of other seeds, and only the best one is measured on all
samples. The teacher takes its many steps, and a row of as many real images shows the floor of the metric. Rows are
written to a JSON file as they are made, so that a stopped benchmark can be resumed. Seconds compare only if one run
took them: :meth:`Benchmark.time` takes those of all rows again.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.benchmark.config import FREE_KEYS, BenchmarkConfig
from stepdistill.benchmark.pictures import pictures
from stepdistill.benchmark.plots import plot_calls, plot_pareto
from stepdistill.benchmark.results import read_benchmark_result
from stepdistill.benchmark.solvers import SolverRow, solver_rows
from stepdistill.benchmark.students import StudentRow, check_students, export_missing, student_rows, train_missing
from stepdistill.benchmark.tables import Row, caption, compared, insert, markdown
from stepdistill.config import flatten, to_dict
from stepdistill.evaluation.evaluate import evaluate
from stepdistill.evaluation.results import write_result
from stepdistill.evaluation.sources import PipelineSource, read_captions
from stepdistill.evaluation.suite import MetricSuite
from stepdistill.export.contract import read_contract
from stepdistill.export.pipeline import load_pipeline
from stepdistill.families.loading import load_teacher
from stepdistill.files.words import shown
from stepdistill.files.writing import atomic_write
from stepdistill.inference.grids import save_comparison
from stepdistill.inference.sampling import Images, sample_images
from stepdistill.inference.solvers import make_solver, teacher_pipeline
from stepdistill.networks.fingerprint import fingerprint_pipeline, fingerprint_weights
from stepdistill.pipelines.class_conditional import ClassConditionalPipeline

SHOWN = 20
"""Images per row of the picture."""


TIMED = 4
"""Batches whose median is a row's seconds; the first is left out."""


class Benchmark:
    """Makes rows, once each.

    Raises:
        ValueError: if a student's folder is missing, or the result file holds rows of another setting.
    """

    def __init__(self, config: BenchmarkConfig) -> None:
        self.config = config
        check_students(config.students)
        self.family = load_teacher(config.teacher)
        self.suite = MetricSuite.open(config.features, config.reference, clip=config.clip, attributes=config.attributes)
        self.suite.check(config.metrics)
        self.captions = read_captions(config.captions, config.num_samples) if config.captions else None
        if self.family.takes_text and self.captions is None:
            raise ValueError(f"captions: missing; {config.teacher.path} takes text")
        self.metric = self.suite.distance
        self.path = Path(config.output)
        self.setting = self.suite.describe_setting(
            **to_dict(config), teacher_sha256=fingerprint_weights(self.family.network)
        )
        self.rows: list[Row] = self._finished_rows()

    def run(self) -> list[Row]:
        """Make the missing rows of the configuration, and return all of them."""
        if self.suite.reference.images is not None:
            self.add("real images", self.floor)
        for scale in self.config.teacher_guidance_scales:
            self.add(self.teacher_name(scale), functools.partial(self.teacher, scale=scale))
        for student in student_rows(self.config.students, self.config.student_calls):
            same = {"sha256": fingerprint_pipeline(student.folder)}
            self.add(student.name, functools.partial(self.student, row=student), same)
        for row in solver_rows(self.config.solvers, guided=self.can_be_guided):
            self.add(row.name, functools.partial(self.solver, row=row))
        return self.rows

    def add(self, name: str, make: Callable[[str], Row], same: Mapping[str, Any] | None = None) -> Row:
        """Return the row of this name, and make it unless there is one with the values that must be the ``same``."""
        existing = next((row for row in self.rows if row["name"] == name), None)
        if existing is not None:
            if existing == {**existing, **(same or {})}:
                return existing
            self.rows.remove(existing)
        row = make(name)
        self.rows.append(row)
        self._write()
        return row

    def time(self) -> None:
        """Take the seconds per image of every row again, one after another, on an otherwise idle machine."""
        for row in self.rows:
            if row["kind"] != "floor":
                row["seconds_per_image"] = self.sample(row, TIMED * self.config.batch_size).seconds
        self._write()

    def _write(self) -> None:
        write_result(self.path, {"metric": self.metric, "setting": self.setting, "rows": self.rows})

    # ------------------------------------------------------------------------------------------------- rows

    def floor(self, name: str) -> Row:
        """Return the row of as many real images: the metric of a perfect generator."""
        real = self.suite.reference.images
        assert real is not None
        first = slice(self.config.num_samples)
        images = Images(
            real.pixels[first],
            None if real.labels is None else real.labels[first],
            captions=None if real.captions is None else real.captions[first],
        )
        self.suite.check_shape(images.pixels.shape[1:])
        metrics = ("fd",) if self.suite.clip is None else ("fd", "clip")
        return {"name": name, "kind": "floor", "calls": 0, **self.suite.score(images, metrics)}

    def teacher_name(self, scale: float = 1.0) -> str:
        """Return the name of a teacher's row."""
        guidance = "" if scale == 1 else f", guidance {scale:g}"
        return f"teacher, {self.config.teacher_steps} steps{guidance}"

    def teacher(self, name: str, scale: float) -> Row:
        """Return the row of the teacher at its own number of steps, by DDIM."""
        call = {"num_inference_steps": self.config.teacher_steps, "guidance_scale": scale}
        return self._measure(name, self.solver_pipeline("DDIM"), call) | {"kind": "teacher", "solver": "DDIM"}

    def student(self, name: str, row: StudentRow) -> Row:
        """Return the row of an exported student, called as its contract says or with the row's number of steps."""
        facts = read_contract(Path(row.folder)).to_json()
        about = {key: facts[key] for key in ("method", "steps", "guidance_scale", "training") if key in facts}
        source = {"kind": "student", "pipeline": row.folder, "sha256": fingerprint_pipeline(row.folder)}
        call = {} if row.calls is None else {"num_inference_steps": row.calls}
        return about | self._measure(name, self.open_student(row.folder), call) | source

    def open_student(self, folder: str) -> Any:
        """Return an exported student's pipeline; its code is trusted as far as the teacher's is."""
        return load_pipeline(folder, trust_remote_code=self.config.teacher.trust_remote_code)

    def solver(self, name: str, row: SolverRow) -> Row:
        """Return the row of a training-free solver of the teacher, at its best guidance scale if guided."""
        pipeline, scales = self.solver_pipeline(row.solver), self.config.guidance_scales if row.guided else (1.0,)
        tried = self._search(name, pipeline, row.steps, scales)
        call = {"num_inference_steps": row.steps, "guidance_scale": min(tried, key=tried.__getitem__)}
        about = {"kind": "solver", "solver": row.solver, "tried": {f"{scale:g}": tried[scale] for scale in tried}}
        return self._measure(name, pipeline, call) | about

    def _search(self, name: str, pipeline: Any, steps: int, scales: Sequence[float]) -> dict[float, float]:
        """Return the metric of every scale, on other seeds; a single scale is not measured."""
        if len(scales) == 1:
            return {scales[0]: 0.0}
        other = {"count": self.config.search_samples, "seed": self.config.seed + 1}
        tried = {}
        for scale in scales:
            call = {"num_inference_steps": steps, "guidance_scale": scale}
            tried[scale] = self._measure(name, pipeline, call, metrics=("fd",), **other)[self.metric]
        return tried

    @property
    def can_be_guided(self) -> bool:
        """Whether the teacher was trained with a null class, or takes prompts."""
        return self.family.takes_text or getattr(self.family, "null_class", None) is not None

    def solver_pipeline(self, solver: str) -> Any:
        """Return the teacher's pipeline with a solver's scheduler."""
        if self.family.takes_text:
            return teacher_pipeline(self.config.teacher, solver)
        scheduler = make_solver(solver, self.family.scheduler_config)
        null_class = getattr(self.family, "null_class", None)
        return ClassConditionalPipeline(self.family.network, scheduler, null_class=null_class)

    def _measure(
        self, name: str, pipeline: Any, call: Mapping[str, Any], *, metrics: Sequence[str] | None = None, **other: Any
    ) -> Row:
        """Return a pipeline's row; ``other`` replaces the configuration's settings of the sampling."""
        config = self.config
        sampling: dict[str, Any] = {"count": config.num_samples, "seed": config.seed} | other
        source = PipelineSource(
            pipeline=pipeline, batch_size=config.batch_size, precision=config.precision, call=call,
            captions=self.captions, name=name, **sampling,
        )  # fmt: skip
        row = evaluate(source, self.suite, metrics=metrics or config.metrics, name=name)
        row.pop("setting")
        return row | _renamed(call)

    def _finished_rows(self) -> list[Row]:
        if not self.path.is_file():
            return []
        result = read_benchmark_result(self.path)
        before, now = flatten(result["setting"]), flatten(json.loads(json.dumps(self.setting)))
        for key, value in now.items():
            # a file of an older version lacks keys that are None by default
            if key.partition(".")[0] not in FREE_KEYS and before.get(key) != value:
                raise ValueError(
                    f"{self.path} was measured with another {key}: {shown(before.get(key))}, now {shown(value)}; "
                    "move it away, choose another output, or restore the setting"
                )
        return list(result["rows"])

    # ---------------------------------------------------------------------------------------------- pictures

    def images(self, row: Row, count: int = SHOWN) -> Tensor:
        """Return images (N, C, H, W) in [0, 1] of a row; seeds and classes are the same for all rows."""
        return self.real_images(count) if row["kind"] == "floor" else self.sample(row, count).pixels / 255

    def opened(self, row: Row) -> tuple[Any, dict[str, Any]]:
        """Return the pipeline of a student's, a solver's or the teacher's row, and the arguments of its call."""
        if row["kind"] == "student":
            call = {"num_inference_steps": row["steps"]} if self.config.student_calls else {}
            return self.open_student(row["pipeline"]), call
        call = {"num_inference_steps": row["steps"], "guidance_scale": row["guidance_scale"]}
        return self.solver_pipeline(row["solver"]), call

    def sample(self, row: Row, count: int) -> Images:
        """Sample the first images of a student's, a solver's or the teacher's row; seeds and classes are the same."""
        pipeline, call = self.opened(row)
        return sample_images(
            pipeline, count, seed=self.config.seed, batch_size=self.config.batch_size,
            num_classes=self.family.num_classes, captions=self.captions, precision=self.config.precision, call=call,
            rows=min(count, self.config.batch_size), description=row["name"],
        )  # fmt: skip

    def real_images(self, count: int) -> Tensor:
        """Return real images (N, C, H, W) in [0, 1], of the same classes or captions as the samples if known."""
        real, number = self.suite.reference.images, self.family.num_classes
        assert real is not None
        if self.captions is not None and real.captions is not None:
            chosen = _first_places(real.captions, self.captions[:count])
        elif real.labels is not None and number is not None:
            chosen = _places_by_class(real.labels, number, count)
        else:
            chosen = list(range(min(count, len(real.pixels))))
        return real.pixels[torch.tensor(chosen)] / 255


def _renamed(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a pipeline's call as a row names them."""
    row = dict(call)
    if "num_inference_steps" in row:
        row["steps"] = row.pop("num_inference_steps")
    return row


def _first_places(captions: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Return the place of each wanted caption; 0 if there is no such caption."""
    places = dict(zip(captions, range(len(captions)), strict=True))
    return [places.get(caption, 0) for caption in wanted]


def _places_by_class(labels: Tensor, number: int, count: int) -> list[int]:
    """Return places whose classes are 0, 1, ..., number - 1, 0, 1, ..."""
    places = []
    for index in range(count):
        of_class = (labels == index % number).nonzero()
        places.append(int(of_class[index // number]))
    return places


def benchmark(config: BenchmarkConfig, *, time: bool = False) -> Path:
    """Run a benchmark; write ``.md``, ``-calls.png``, ``-pareto.png`` and ``-grid.png`` beside ``<output>.json``.

    Args:
        config: what is compared.
        time: whether to take the seconds of all rows again, in this run.

    Returns:
        The file of the table.
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
    save_comparison(
        pictures(bench.rows, bench.metric, bench.images), beside(bench.path, "grid"), title="Same seeds, same classes"
    )
    shown = f"{caption(bench.setting)}\n\n{markdown(rows, bench.metric)}\n"
    table = bench.path.with_suffix(".md")
    with atomic_write(table) as partial:
        partial.write_text(shown, encoding="utf-8")
    if config.document is not None:
        insert(shown, Path(config.document), config.mark)
    return table


def beside(path: Path, what: str) -> Path:
    """Return the path of a result's picture: ``fashion.json`` -> ``fashion-grid.png``."""
    return path.with_name(f"{path.stem}-{what}.png")
