"""A table of students, their teacher, training-free solvers at the same number of network calls, and real images.

Solvers are compared at equal network calls (a guided step is two), each without guidance and at its best guidance
scale. The scale is chosen from a stated grid on few samples of other seeds, and only the best one is measured on all
samples. The teacher takes its many steps, and a row of real images shows the floor of the metric: held-out ones, where
there are some, or the reference's own, which are nearer to the reference than any others. Rows are
written to a JSON file as they are made, so that a stopped benchmark can be resumed. Seconds compare only if one run
took them: :meth:`Benchmark.time` takes those of all rows again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.assets import EMBEDDED
from stepdistill.benchmark.config import BenchmarkConfig
from stepdistill.benchmark.curves import ON_SEARCH
from stepdistill.benchmark.judge import Judge, plain_name
from stepdistill.benchmark.real_images import RealImages
from stepdistill.benchmark.samples import Samples, conditions_of
from stepdistill.benchmark.setting import contents_of, finished_rows
from stepdistill.benchmark.shapes import at_shapes, check_shapes, side_to_crop_to, size_arguments
from stepdistill.benchmark.solvers import SolverRow, check_solvers, solver_rows
from stepdistill.benchmark.students import (
    StudentRow,
    check_students,
    fingerprint_start,
    fingerprints,
    is_of,
    is_pipeline,
    seed_students,
    start_of,
    student_rows,
)
from stepdistill.benchmark.tables import Row, of_kind
from stepdistill.config import to_dict
from stepdistill.evaluation.evaluate import evaluate
from stepdistill.evaluation.image_set import ImageSet
from stepdistill.evaluation.results import write_result
from stepdistill.evaluation.sources import PipelineSource, read_captions, resized
from stepdistill.evaluation.suite import MetricSuite
from stepdistill.export.contract import read_contract
from stepdistill.export.pipeline import load_pipeline
from stepdistill.families.loading import load_teacher
from stepdistill.inference.processes import open_state
from stepdistill.inference.sampling import ROWS, Images, sample_images
from stepdistill.inference.solvers import solver_of, teacher_call, teacher_pipeline
from stepdistill.networks.fingerprint import fingerprint_weights

SHOWN = 20
"""Images per row of the picture."""

TIMED = 4
"""Batches whose median is a row's seconds; the first is left out."""


class Benchmark:
    """Makes rows, once each.

    Raises:
        ValueError: if a student's folder is missing, the teacher has no such solver or shape, or the result file holds
            rows of another setting.
    """

    def __init__(self, config: BenchmarkConfig) -> None:
        self.config = config
        check_students(config.students)
        self.family = load_teacher(config.teacher)
        self.device = open_state().device
        self.suite = MetricSuite.open(
            config.features, config.reference, device=self.device, clip=config.clip, attributes=config.attributes
        )
        self.suite.check(config.metrics)
        if "fd" not in config.metrics:
            raise ValueError(f"metrics: expected 'fd', which the table is sorted by, among {list(config.metrics)}")
        self.captions = read_captions(config.captions, config.num_samples) if config.captions else None
        held_out = ImageSet(EMBEDDED.get(config.held_out, config.held_out)) if config.held_out else None
        self.real = RealImages(held_out, self.suite.reference, config.num_samples)
        if self.family.takes_text and self.captions is None:
            raise ValueError(f"captions: missing; {config.teacher.path} takes text")
        labels = torch.arange(config.num_samples) % self.family.num_classes if self.family.num_classes else None
        self.suite.check_conditions(config.metrics, labels, self.captions)
        check_shapes(config, self.family)
        check_solvers(config, self.family)
        self.size = size_arguments(config, self.family)
        self.crop = side_to_crop_to(self.size, self.suite.reference.about)
        self.metric = self.suite.distance
        self.path = Path(config.output)
        self.judge = self._open_judge()
        self.fingerprints = {
            "teacher_sha256": fingerprint_weights(self.family.network),
            "contents": contents_of(self.suite, self.captions, self.real.measured() if held_out else None),
        }
        self.setting = self.setting_of(config)
        self.rows = finished_rows(self.path, self.setting)
        for other in at_shapes(config):  # or their files would be refused after everything else was measured
            finished_rows(Path(other.output), self.setting_of(other))
        self.further: list[Row] = []
        """Rows of the file that the configuration does not ask for (any more); they stay there."""

    def setting_of(self, config: BenchmarkConfig) -> dict[str, Any]:
        """Return what all rows of a result file share, of this benchmark or of it at another shape."""
        return self.suite.describe_setting(**to_dict(config), **self.fingerprints)

    def run(self) -> list[Row]:
        """Make the missing rows of the configuration, and return all of them."""
        self.rows, self.further = [], [*self.rows, *self.further]
        if self.real.name is not None:
            self.add(self.real.name, self.floor)
        for scale in self.config.teacher_guidance_scales:
            self.add(self.teacher_name(scale), functools.partial(self.teacher, scale=scale))
        for student in student_rows(self.config.students, self.config.student_calls):
            self.add_student(student)
        for command, group in seed_students(self.config.seed_runs).items():
            for name, folder in group.items():
                self.add_student(StudentRow(name, folder, None), seeds_of=command)
        guided = self.can_be_guided and bool(self.config.guidance_scales)
        for row in solver_rows(self.config.solvers, guided=guided):
            self.add(row.name, functools.partial(self.solver, row=row))
        return self.rows

    def add(self, name: str, make: Callable[[str], Row], is_same: Callable[[Row], bool] = lambda row: True) -> Row:
        """Return the row of this name, and make it unless there is one that ``is_same``."""
        existing = self._finished(lambda row: row["name"] == name)
        if existing is not None:
            if is_same(existing):
                return existing
            self.rows.remove(existing)
        row = make(name)
        self.rows.append(row)
        self._write()
        return row

    def add_student(self, row: StudentRow, **about: str) -> Row:
        """Return the row of an exported student, made again if the student was trained or exported otherwise."""
        student = self.add(
            row.name, lambda name: self.student(name, row) | about,
            lambda found: is_of(found, row.folder) and about.items() <= found.items(),
        )  # fmt: skip
        self._update(student, pipeline=row.folder)  # it may have been moved
        self._finished(lambda row: row["name"] == student.get("start"))
        return student

    def judge_training(self) -> None:
        """Add what the students started from, and the teacher's metric on the samples of learning curves."""
        for row in of_kind(self.rows, "student"):
            self.add_start(row)
        for row in of_kind(self.rows, "teacher"):
            if ON_SEARCH not in row:
                call = {"num_inference_steps": row["steps"], "guidance_scale": row["guidance_scale"]}
                row[ON_SEARCH] = self._searched(row["name"], self.solver_pipeline(row["solver"]), call)
                self._write()

    def add_start(self, student: Row) -> None:
        """Add the row of what a student started from, unless an equal start has one; note its name in the student's."""
        folder = Path(student["pipeline"])
        start = start_of(folder) if student["steps"] == read_contract(folder).steps else None
        if start is None:
            return
        sha256 = fingerprint_start(start)

        def is_same(row: Row) -> bool:
            return row.get("start_sha256") == sha256

        row = self._finished(is_same)
        if row is None:
            row = self.add(f"start of {student['name']}", functools.partial(self.start, folder=start), is_same)
        if not is_pipeline(Path(row["pipeline"])):
            self._update(row, pipeline=str(start))
        self._update(student, start=row["name"])

    def time(self) -> None:
        """Take the seconds per image of every row again, one after another, on an otherwise idle machine."""
        for row in self.rows:
            if row["kind"] != "floor":
                row["seconds_per_image"] = self.sample(row, TIMED * self.config.batch_size).seconds
        self._write()

    def _update(self, row: Row, **values: str) -> None:
        if not values.items() <= row.items():
            row.update(values)
            self._write()

    def _write(self) -> None:
        write_result(self.path, {"metric": self.metric, "setting": self.setting, "rows": [*self.rows, *self.further]})

    def _finished(self, is_wanted: Callable[[Row], bool]) -> Row | None:
        """Return the finished row that is wanted, which from now on is one of the configuration's."""
        for row in self.further:
            if is_wanted(row):
                self.further.remove(row)
                self.rows.append(row)
                return row
        return next(filter(is_wanted, self.rows), None)

    # ------------------------------------------------------------------------------------------------- rows

    def floor(self, name: str) -> Row:
        """Return the row of as many real images: the metric of a perfect generator."""
        images = self.real.measured()
        self.suite.check_shape(images.pixels.shape[1:])
        metrics = ("fd",) if self.suite.clip is None else ("fd", "clip")
        judged = {} if self.judge is None else self.judge.judge_images(images)
        return {"name": name, "kind": "floor", "calls": 0, **self.suite.score(images, metrics), **judged}

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
        contract = read_contract(Path(row.folder))
        facts = contract.to_json()
        about = {"teacher_guidance": contract.reproduced_guidance}
        about |= {key: facts[key] for key in ("method", "steps", "guidance_scale", "training") if key in facts}
        source = {"kind": "student", "pipeline": row.folder, **fingerprints(row.folder)}
        call = {} if row.calls is None else {"num_inference_steps": row.calls}
        return about | self._measure(name, self.open_student(row.folder), call) | source

    def start(self, name: str, folder: Path) -> Row:
        """Return the row of what students start from, called as the method's own sampler is."""
        about = {"steps": read_contract(folder).steps, "start_sha256": fingerprint_start(folder)}
        return (
            self._measure(name, self.open_student(str(folder)), {}) | about | {"kind": "start", "pipeline": str(folder)}
        )

    def open_student(self, folder: str) -> Any:
        """Return an exported student's pipeline; its code is trusted as far as the teacher's is."""
        return load_pipeline(folder, trust_remote_code=self.config.teacher.trust_remote_code).to(self.device)

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
        tried = {}
        for scale in scales:
            tried[scale] = self._searched(name, pipeline, {"num_inference_steps": steps, "guidance_scale": scale})
        return tried

    def _searched(self, name: str, pipeline: Any, call: Mapping[str, Any]) -> float:
        """Return the metric on the search's few samples of other seeds, which are those of learning curves."""
        other = {"count": self.config.search_samples, "seed": self.config.seed + 1}
        return float(self._row(self._source(name, pipeline, call, **other), ("fd",))[self.metric])

    @property
    def can_be_guided(self) -> bool:
        """Whether the teacher was trained with a null class, or takes prompts."""
        return self.family.takes_text or getattr(self.family, "null_class", None) is not None

    def solver_pipeline(self, solver: str) -> Any:
        """Return the teacher's pipeline with a solver's scheduler."""
        if self.family.takes_text:
            return teacher_pipeline(self.config.teacher, solver).to(self.device)
        return self.family.teacher_pipeline(solver_of(self.family, solver)).to(self.device)

    def _measure(self, name: str, pipeline: Any, call: Mapping[str, Any]) -> Row:
        """Return a pipeline's row, by both judges."""
        source = self._source(name, pipeline, call, count=self.config.num_samples, seed=self.config.seed)
        judged = {} if self.judge is None else self.judge.judge(source)
        return self._row(source, self.config.metrics) | _renamed(call) | judged

    def _source(self, name: str, pipeline: Any, call: Mapping[str, Any], **sampling: int) -> PipelineSource:
        return PipelineSource(
            pipeline=pipeline, batch_size=self.config.batch_size, precision=self.config.precision,
            call={**self.size, **teacher_call(self.family, call)}, captions=self.captions, name=name,
            size=self.crop, rows=self.config.rows or ROWS, **sampling,
        )  # fmt: skip

    def _row(self, source: PipelineSource, metrics: Sequence[str]) -> Row:
        row = evaluate(source, self.suite, metrics=metrics, name=source.name)
        row.pop("setting")
        return row

    def _open_judge(self) -> Judge | None:
        config = self.config
        if config.judge is None:
            return None
        reference = str(self.suite.reference.about.get("sha256", ""))[:8]
        kept = self.path.with_name(f"{self.path.stem}-{plain_name(config.judge)}-{reference}.npz")
        samples = config.judge_samples or config.num_samples
        return Judge(config.judge, config.reference, samples, kept, self.device)

    # ---------------------------------------------------------------------------------------------- pictures

    def images(self, row: Row, count: int = SHOWN) -> Tensor:
        """Return images (N, C, H, W) in [0, 1] of a row; seeds and classes are the same for all rows."""
        if row["kind"] == "floor":
            return self.real.like(count, self.captions, self.family.num_classes)
        return self.sample(row, count).pixels / 255

    def write_samples(self, images: Mapping[str, Tensor]) -> None:
        """Write the images of :func:`~stepdistill.benchmark.pictures.pictures` for the page, beside the result."""
        conditions = conditions_of(SHOWN, self.captions, self.family.num_classes)
        Samples.of(images, conditions).write(self.path.with_name(f"{self.path.stem}-samples.npz"))

    def opened(self, row: Row) -> tuple[Any, dict[str, Any]]:
        """Return the pipeline of a student's, a start's, a solver's or the teacher's row, and its call's arguments."""
        if "pipeline" in row:
            call = {"num_inference_steps": row["steps"]} if self.config.student_calls else {}
            return self.open_student(row["pipeline"]), {**self.size, **call}
        call = {"num_inference_steps": row["steps"], "guidance_scale": row["guidance_scale"]}
        return self.solver_pipeline(row["solver"]), {**self.size, **teacher_call(self.family, call)}

    def sample(self, row: Row, count: int) -> Images:
        """Sample the first images of a student's, a solver's or the teacher's row, as large as they are measured.

        Seeds and classes are the same for all rows.
        """
        pipeline, call = self.opened(row)
        images = sample_images(
            pipeline, count, seed=self.config.seed, batch_size=self.config.batch_size,
            num_classes=self.family.num_classes, captions=self.captions, precision=self.config.precision, call=call,
            rows=min(count, self.config.batch_size), description=row["name"],
        )  # fmt: skip
        return resized(images, self.crop)


def _renamed(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a pipeline's call as a row names them."""
    row = dict(call)
    if "num_inference_steps" in row:
        row["steps"] = row.pop("num_inference_steps")
    return row
