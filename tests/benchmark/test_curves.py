"""Learning curves: a power law is found again, an extrapolation is called one, and starts stand in the table."""

import json
import math

import numpy as np
import pytest
import torch
from contracts.cases import save_teacher, sections
from PIL import Image

from stepdistill.benchmark.config import BenchmarkConfig
from stepdistill.benchmark.curve_plots import plot_curves, plot_multiples
from stepdistill.benchmark.curves import ON_SEARCH, Curve, curve_table, ending, extrapolation, fit, read_curves
from stepdistill.benchmark.publish import benchmark
from stepdistill.benchmark.students import seed_lines, seed_students
from stepdistill.benchmark.tables import compared, markdown
from stepdistill.config import to_yaml
from stepdistill.evaluation.suite import MetricSuite
from stepdistill.families.pixel import Pixel
from stepdistill.files.schema import build
from stepdistill.training.config import resolve
from stepdistill.training.run import Run

COSTS = [0, 1e5, 2e5, 3e5, 4e5, 5e5, 6e5, 7e5, 8e5]


def curve(power, level=None, noise=0.0, scale=1000.0):
    generator = torch.Generator().manual_seed(0)
    points = [(0.0, 9.0)]
    for cost in COSTS[1:]:
        points.append((cost, scale * cost**power * math.exp(noise * torch.randn((), generator=generator).item())))
    return Curve("ours", tuple(points), level)


@pytest.mark.parametrize("power", [-0.5, -1.0, 0.2])
def test_a_power_law_is_found_again_from_the_second_half(power):
    slope = curve(power).slope()
    assert slope.points == 4 and slope.power == pytest.approx(power) and slope.scale == pytest.approx(1000)
    assert slope.error == pytest.approx(0, abs=1e-6) and slope.falls is (power < 0)


def test_the_error_of_a_slope_is_that_of_a_regression():
    x, y = np.log([1.0, 2, 4, 8, 16]), np.log([1.0, 0.7, 0.9, 0.4, 0.5])
    expected, covariance = np.polyfit(x, y, 1, cov="unscaled")
    residual = y - np.polyval(expected, x)
    slope = fit(list(zip(np.exp(x), np.exp(y), strict=True)))
    assert slope.power == pytest.approx(expected[0]) and math.log(slope.scale) == pytest.approx(expected[1])
    assert slope.error == pytest.approx(math.sqrt(covariance[0, 0] * residual @ residual / 3))


def test_what_is_needed_is_where_the_power_law_meets_the_level():
    falling = curve(-0.5, level=1000 * (8e5 * 4) ** -0.5)
    assert falling.needed() == pytest.approx(4)
    assert extrapolation(falling) == "4.0 times (extrapolation)" and ending(falling).startswith("still falls")
    assert extrapolation(curve(-0.5, level=1e-9)) == "more than 100 times (extrapolation)"
    assert extrapolation(curve(-0.5, level=2.0)) == "none, reached"
    assert extrapolation(curve(0.0, level=1.0, scale=2.0)) == "unknown: the curve does not fall"
    assert curve(-0.5).needed() is None and extrapolation(curve(-0.5)) == ""


def test_noise_without_a_trend_is_flat_and_few_points_say_nothing():
    assert ending(curve(0.0, noise=0.3)).startswith("flat: power")
    few = Curve("few", ((0.0, 2.0), (1.0, 1.0), (2.0, 0.5)), 0.1)
    assert ending(few) == "too few points" and few.needed() is None


def test_pictures_are_drawn_with_and_without_levels(tmp_path):
    curves = [curve(-0.5, level=0.9), curve(-0.5), curve(0.1, level=0.1), curve(-1.0), curve(-1.0, level=1e-6)]
    for draw in (plot_curves, plot_multiples):
        draw(curves, "fd", tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as picture:
            assert np.asarray(picture.convert("L")).std() > 5
    plot_multiples([], "fd", tmp_path / "a.png")
    assert len({line.count("|") for line in curve_table(curves, "fd").splitlines()}) == 1
    assert curve_table([], "fd") == ""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A benchmark of a measured run, its seeds and their starts."""
    folder = tmp_path_factory.mktemp("curves")
    family = Pixel.tiny(size=28, num_classes=10)
    mapping = sections(folder, family, "lcm", steps=2)
    mapping["method"]["steps"] = 2
    mapping["eval"] = {"every": 1, "num_samples": 6}
    (folder / "lcm.yaml").write_text(to_yaml(mapping))
    student = Run(resolve(mapping)).train()
    config = {
        "teacher": {"path": str(save_teacher(family, folder / "again"))}, "output": str(folder / "bench.json"),
        "students": {"lcm, 2 steps": str(student), "lcm, 1 step": str(student.with_name("pipeline-1-step"))},
        "seeds": {str(folder / "lcm.yaml"): [0, 5]}, "search_samples": 6, "num_samples": 20, "teacher_steps": 2,
        "metrics": ["fd"], "judge": "embedded", "judge_samples": 10,
    }  # fmt: skip
    config = build(BenchmarkConfig, config)
    benchmark(config)
    return folder, config


def rows_of(folder):
    return {row["name"]: row for row in json.loads((folder / "bench.json").read_text())["rows"]}


def test_starts_stand_in_the_table_once_each(finished):
    rows = rows_of(finished[0])
    assert {name for name, row in rows.items() if row["kind"] == "start"} == {
        "start of lcm, 2 steps", "start of lcm, 1 step",
    }  # fmt: skip
    assert rows["lcm, 2 steps"]["start"] == rows["lcm, seed 5"]["start"] == "start of lcm, 2 steps"
    assert rows["start of lcm, 1 step"]["calls"] == 1 and rows["start of lcm, 2 steps"]["calls"] == 2
    completed = {row["name"]: row for row in compared(list(rows.values()), "fd")}
    assert completed["lcm, 2 steps"]["against_start"] in ("worse", "not distinguishable") or completed["lcm, 2 steps"][
        "against_start"
    ].startswith("below, ")


def test_the_second_judges_reference_is_kept_by_what_it_was_made_of(finished):
    folder, config = finished
    reference = MetricSuite.open(config.features, config.reference).reference.about["sha256"]
    (kept,) = folder.glob("bench-embedded-*.npz")
    assert kept.stem == f"bench-embedded-{reference[:8]}"


def test_seeds_are_trained_beside_and_their_spread_is_shown(finished):
    folder, config = finished
    (lines,) = seed_lines(config.seeds).values()
    assert lines[0] == f"{folder}/lcm.yaml" and lines[1].endswith(f" train.seed=5 train.output_dir={folder}/run-seed-5")
    assert list(*seed_students(config.seeds).values()) == ["lcm, seed 0", "lcm, seed 5"]
    rows = rows_of(folder)
    assert rows["lcm, seed 0"]["fd"] == rows["lcm, 2 steps"]["fd"] != rows["lcm, seed 5"]["fd"]
    low, high = sorted((rows["lcm, seed 0"]["fd"], rows["lcm, seed 5"]["fd"]))
    assert f"| {low:.3f} - {high:.3f} of 2 |" in (folder / "bench.md").read_text()


def test_a_curve_is_read_from_the_run_and_its_level_from_the_teacher(finished):
    folder, config = finished
    rows = list(rows_of(folder).values())
    teacher = next(row for row in rows if row["kind"] == "teacher")
    assert ON_SEARCH in teacher
    curves = {curve.name: curve for curve in read_curves(compared(rows, "fd"), "fd", config)}
    assert set(curves) == {"lcm, 2 steps", "lcm, seed 0", "lcm, seed 5"}
    ours = curves["lcm, 2 steps"]
    assert [cost for cost, _ in ours.points] == [0, ours.points[2][0] / 2, ours.points[2][0]]
    assert ours.level == pytest.approx(2.7 * teacher["fd"] + teacher[ON_SEARCH] - teacher["fd"])
    text = (folder / "bench.md").read_text()
    assert "| learning curve |" in text and "FD on embedded" in text
    assert (folder / "bench-curves.png").is_file() and (folder / "bench-curves-each.png").is_file()


def test_nothing_is_made_twice(finished, monkeypatch):
    folder, config = finished
    before = (folder / "bench.json").read_text()
    for name in ("train", "export"):
        monkeypatch.setattr(Run, name, lambda *args, **options: pytest.fail("made again"))
    monkeypatch.setattr("stepdistill.benchmark.benchmark.evaluate", lambda *args, **options: pytest.fail("measured"))
    benchmark(config)
    assert (folder / "bench.json").read_text() == before


TEACHERS = [
    {"name": "t", "kind": "teacher", "calls": 50, "fd": 0.1, "guidance_scale": 1.0},
    {"name": "g", "kind": "teacher", "calls": 100, "fd": 0.05, "guidance_scale": 1.15},
]


def pupil(name, fd, **more):
    return {"name": name, "kind": "student", "calls": 1, "fd": fd, "fd_low": fd - 0.01, "fd_high": fd + 0.01,
            "method": "progressive", "steps": 1, **more}  # fmt: skip


def test_both_ratios_are_printed_and_guided_recipes_are_judged_against_the_guided_teacher():
    rows = [*TEACHERS, pupil("plain", 0.3, teacher_guidance=1.0), pupil("guided", 0.2, teacher_guidance=1.15)]
    found = {row["name"]: row for row in compared(rows, "fd")}
    assert found["plain"]["ratio"] == pytest.approx(3) and found["plain"]["ratio_guided"] == pytest.approx(6)
    assert (found["plain"]["paper"], found["plain"]["reaches_paper"], found["guided"]["reaches_paper"]) == (
        3.6, "yes", "no",
    )  # fmt: skip
    table = markdown(compared(rows, "fd"), "fd")
    assert "| ratio, unguided teacher | ratio, guided teacher |" in table


@pytest.mark.parametrize(("start", "said"), [(1.0, "below, 0.30"), (0.31, "not distinguishable"), (0.2, "worse")])
def test_a_student_is_below_its_start_only_where_intervals_are_apart(start, said):
    begun = {"name": "s", "kind": "start", "calls": 1, "fd": start, "fd_low": start - 0.01, "fd_high": start + 0.01}
    found = {row["name"]: row for row in compared([*TEACHERS, begun, pupil("p", 0.3, start="s")], "fd")}
    assert found["p"]["against_start"] == said and found["s"]["ratio"] == pytest.approx(start / 0.1)
