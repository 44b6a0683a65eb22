"""The configuration of a benchmark."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from stepdistill.evaluation.metrics.table import check_sample
from stepdistill.families.config import TeacherConfig
from stepdistill.files.places import Place
from stepdistill.files.precision import Precision
from stepdistill.files.ranges import NonNegativeFloat, PositiveInt, Range, Seed

FREE_KEYS = (
    "students", "student_calls", "train", "train_with", "seeds", "solvers", "teacher_guidance_scales", "output",
    "document", "mark", "batch_size", "shapes",
)  # fmt: skip
"""Keys that decide which rows there are, and not what is in them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """A benchmark: what is compared, and how it is measured."""

    teacher: TeacherConfig
    output: Place
    """Result file (.json); tables and plots are written beside it."""
    document: Place | None = None
    """A markdown file that gets the table between ``<!-- mark -->`` and ``<!-- /mark -->``."""
    mark: str = "benchmark"
    students: dict[str, Place] = dataclasses.field(default_factory=dict)
    """Exported pipelines, by the names of their rows."""
    student_calls: tuple[PositiveInt, ...] = ()
    """Numbers of network calls at which every student is measured, a row each; empty is that of its contract."""
    train: tuple[str, ...] = ()
    """Runs that are trained first, if they have not exported their student yet: the path of a configuration,
    followed by ``key=value`` for the keys that are changed."""
    train_with: tuple[str, ...] = ()
    """``key=value`` for every run, under what its own line changes: the same recipes on another teacher."""
    seeds: dict[str, tuple[Seed, ...]] = dataclasses.field(default_factory=dict)
    """Training seeds of some runs, by their line as in ``train``: a row for each, and the spread between them."""
    solvers: dict[str, tuple[PositiveInt, ...]] = dataclasses.field(default_factory=dict)
    """Numbers of network calls per image at which each solver is measured."""
    guidance_scales: tuple[NonNegativeFloat, ...] = (1.15, 1.5, 2.0)
    """The grid from which a guided solver's scale is chosen at each number of calls; empty measures none guided."""
    search_samples: Annotated[int, Range(at_least=2)] = 1000
    """Samples on which the scale is chosen; their seeds are not those of the table."""
    shapes: tuple[tuple[PositiveInt, ...], ...] = ()
    """Other sizes ``[height, width]`` at which a text teacher and its students are measured too, in tables below."""
    teacher_steps: PositiveInt = 50
    teacher_guidance_scales: tuple[NonNegativeFloat, ...] = (1.0,)
    """Guidance scales of the teacher at its many steps, a row each."""
    metrics: tuple[str, ...] = ("fd", "precision_recall", "spread", "accuracy")
    features: Place = "embedded"
    reference: Place = "embedded"
    held_out: Place | None = None
    """Real images that the reference lacks, for the row of real images; by default those are the reference's own."""
    judge: Place | None = None
    """Feature network of a second Fréchet distance, such as ``efficientnet``; None is none."""
    judge_samples: Annotated[int, Range(at_least=2)] | None = None
    """Samples of a row that the second judge sees; by default all."""
    captions: Place | None = None
    """Prompts for a teacher that takes text; see :class:`stepdistill.evaluation.protocol.Protocol`."""
    clip: Place | None = None
    """A CLIP for the metric ``clip``, on which nothing here was trained."""
    attributes: Place | None = None
    """A network that reads attributes, for the metric ``adherence``."""
    num_samples: Annotated[int, Range(at_least=2)] = 5000
    batch_size: PositiveInt = 100
    rows: PositiveInt | None = None
    """Rows that the network sees at a time, as in :class:`stepdistill.evaluation.protocol.Protocol`, and by default."""
    precision: Precision = "fp32"
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_sample(self.metrics, self.num_samples)
        for place, shape in enumerate(self.shapes):
            if len(shape) != 2:
                raise ValueError(f"shapes[{place}]: expected [height, width], got {list(shape)}")

    @property
    def runs(self) -> list[str]:
        """The lines of ``train`` with what ``train_with`` adds."""
        return list(map(self._completed, self.train))

    @property
    def seed_runs(self) -> dict[str, tuple[Seed, ...]]:
        """The seeds by such lines."""
        return {self._completed(line): seeds for line, seeds in self.seeds.items()}

    def _completed(self, line: str) -> str:
        path, *own = line.split()
        return " ".join([path, *self.train_with, *own])
