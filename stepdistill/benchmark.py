"""Students beside the teacher, beside the training-free solvers at the same number of calls, and beside real images.

A table is only as honest as its baselines: each solver is given its best guidance scale from a stated grid (a guided
call counts as two), the teacher its many steps, and a row of as many real images shows the floor of the metric at this
number of samples. Rows are kept in a JSON file as they are made, so that a benchmark can be stopped and gone on with.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stepdistill.config import to_dict
from stepdistill.evaluate import ASSETS, Images, Judge, describe_setting, evaluate_pipeline, read_images, write_result
from stepdistill.export import load_pipeline
from stepdistill.families import load_teacher
from stepdistill.families.base import TeacherConfig
from stepdistill.pipelines.class_conditional import ClassConditionalPipeline
from stepdistill.solvers import make_solver

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """What is compared, and how it is measured."""

    teacher: TeacherConfig
    output: str
    """Result file; a table and plots are written beside it."""
    students: dict[str, str] = dataclasses.field(default_factory=dict)
    """Exported pipelines by the name their rows shall have."""
    solvers: tuple[str, ...] = ("DDIM", "DPM-Solver++ 2M", "UniPC", "Euler", "Heun")
    steps: tuple[int, ...] = (1, 2, 4, 8)
    """Steps of the solvers' rows; a guided step takes two network calls, a step of Heun two but for the last."""
    guidance_scales: tuple[float, ...] = (1.0, 1.5, 2.0)
    """The grid from which every solver gets its best, at the students' number of steps, not of calls."""
    teacher_steps: int = 50
    teacher_guidance_scales: tuple[float, ...] = (1.0, 1.5, 2.0)
    """The grid from which the teacher at many steps gets its best."""
    metrics: tuple[str, ...] = ("fd", "precision_recall", "spread", "accuracy")
    features: str = "embedded"
    reference: str = "embedded"
    num_samples: int = 5000
    batch_size: int = 100
    precision: str = "fp32"
    seed: int = 0


class Benchmark:
    """Makes rows, once each."""

    def __init__(self, config: BenchmarkConfig) -> None:
        self.config = config
        self.family = load_teacher(config.teacher)
        self.judge = Judge.open(config.features, config.reference)
        self.metric = self.judge._named("fd")
        self.path = Path(config.output)
        self.rows: list[Row] = self._finished_rows()

    def run(self) -> list[Row]:
        """All rows of the configuration, in the order of a table."""
        config = self.config
        self.add("real images", self.floor)
        teacher = functools.partial(
            self.solver, solver="DDIM", steps=config.teacher_steps, scales=config.teacher_guidance_scales
        )
        self.add(f"teacher, {config.teacher_steps} steps", teacher)
        for name, folder in config.students.items():
            self.add(name, functools.partial(self.student, folder=folder))
        for steps in config.steps:
            for solver in config.solvers:
                make = functools.partial(self.solver, solver=solver, steps=steps, scales=config.guidance_scales)
                self.add(solver_row_name(solver, steps), make)
        return self.rows

    def add(self, name: str, make: Callable[[str], Row]) -> Row:
        """The row of this name, made now unless the result file has it."""
        for row in self.rows:
            if row["name"] == name:
                return row
        row = make(name)
        self.rows.append(row)
        setting = describe_setting(self.judge, **to_dict(self.config))
        write_result(self.path, {"metric": self.metric, "setting": setting, "rows": self.rows})
        return row

    def floor(self, name: str) -> Row:
        """As many real images, in the place of samples: what the metric says of a perfect generator."""
        path = ASSETS / "train_subset.npz" if self.config.reference == "embedded" else Path(self.config.reference)
        real: Images = read_images(path, self.config.num_samples)
        return {"name": name, "calls": 0, "seconds_per_image": 0.0, **self.judge.score(real, ("fd",))}

    def solver(self, name: str, solver: str, steps: int, scales: Sequence[float]) -> Row:
        """A training-free solver of the teacher at its best guidance scale."""
        pipeline = self.solver_pipeline(solver)
        scales = scales if self.family.num_classes else (1.0,)
        rows = [self._measure(name, pipeline, {"num_inference_steps": steps, "guidance_scale": g}) for g in scales]
        best = min(rows, key=lambda row: row[self.metric])
        return best | {"tried": {str(row["guidance_scale"]): row[self.metric] for row in rows}}

    def solver_pipeline(self, solver: str) -> ClassConditionalPipeline:
        """The teacher under a solver's scheduler."""
        scheduler = make_solver(solver, self.family.scheduler_config)
        null_class = getattr(self.family, "null_class", None)
        return ClassConditionalPipeline(self.family.network, scheduler, null_class=null_class)

    def student(self, name: str, folder: str) -> Row:
        """An exported student, called as its contract says."""
        return self._measure(name, load_pipeline(folder), {}) | {"pipeline": str(folder)}

    def _measure(self, name: str, pipeline: Any, call: Mapping[str, Any]) -> Row:
        config = self.config
        row = evaluate_pipeline(
            pipeline, self.judge, wanted=config.metrics, count=config.num_samples, seed=config.seed,
            batch_size=config.batch_size, precision=config.precision, call=call, name=name,
        )  # fmt: skip
        row.pop("setting")
        return row | ({"guidance_scale": call["guidance_scale"]} if "guidance_scale" in call else {})

    def _finished_rows(self) -> list[Row]:
        if not self.path.is_file():
            return []
        result = json.loads(self.path.read_text(encoding="utf-8"))
        now = json.loads(json.dumps(describe_setting(self.judge, **to_dict(self.config))))
        same = [key for key in now if key not in ("students", "steps", "solvers", "output", "batch_size")]
        changed = [key for key in same if result["setting"].get(key) != now[key]]
        if changed:
            raise ValueError(f"{self.path} was measured with another {changed[0]}; move it away or restore the setting")
        return list(result["rows"])


def solver_row_name(solver: str, steps: int) -> str:
    """``"UniPC, 4 steps"``."""
    return f"{solver}, {steps} step{'s' if steps > 1 else ''}"


def table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """A markdown table; calls as whole numbers where they are, distances with three digits."""
    lines = ["| " + " | ".join(["name", *columns]) + " |", "|" + "---|" * (len(columns) + 1)]
    lines += ["| " + " | ".join([row["name"], *(cell(row.get(column)) for column in columns)]) + " |" for row in rows]
    return "\n".join(lines)


def cell(value: Any) -> str:
    """One value of a table.

    >>> cell(4.0), cell(0.12345), cell(0.00123), cell(None)
    ('4', '0.123', '0.0012', '')
    """
    if value is None:
        return ""
    if isinstance(value, (int, float)) and float(value).is_integer():
        return str(int(value))
    return f"{value:.2g}" if abs(value) < 0.01 else f"{value:.3f}"


def plot(rows: Sequence[Mapping[str, Any]], metric: str, path: Path) -> None:
    """Quality against calls: solvers as lines, students as stars, the teacher and the floor as levels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5))
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        family, _, _ = row["name"].partition(", ")
        if row["calls"] == 0 or family == "teacher":
            axis.axhline(row[metric], linestyle="--" if row["calls"] else ":", color="black", linewidth=1)
            axis.annotate(row["name"], (0.99, row[metric]), xycoords=("axes fraction", "data"), fontsize=8, ha="right")
        elif "guidance_scale" in row:
            lines.setdefault(family, []).append((row["calls"], row[metric]))
        else:
            axis.plot(row["calls"], row[metric], "*", markersize=13, label=row["name"])
    for family, points in lines.items():
        axis.plot(*zip(*sorted(points), strict=True), "o-", markersize=4, linewidth=1, label=family)
    axis.set(xscale="log", yscale="log", xlabel="network calls an image", ylabel=f"{metric} (lower is better)")
    axis.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)


def benchmark(config: BenchmarkConfig) -> Path:
    """Run a benchmark; writes ``<output>.json``, ``.md`` and ``.png``, and returns the table's path."""
    bench = Benchmark(config)
    rows = bench.run()
    plot(rows, bench.metric, bench.path.with_suffix(".png"))
    metric = bench.metric
    columns = ["calls", metric, f"{metric}_low", f"{metric}_high", "precision", "recall", "spread", "accuracy",
               "guidance_scale", "seconds_per_image"]  # fmt: skip
    text = table(rows, [column for column in columns if any(column in row for row in rows)])
    bench.path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    return bench.path.with_suffix(".md")
