"""Result files of a benchmark, of whatever content: read, or one sentence with the file's name (FAULTS 9)."""

import json

import pytest

from stepdistill.benchmark.report import write_report
from stepdistill.benchmark.results import read_benchmark_result
from stepdistill.benchmark.tables import compared, markdown

ROW = {"fd": 0.9, "fd_low": 0.8, "fd_high": 1.0, "seconds_per_image": 0.1, "calls": 4}
ROWS = [
    {"name": "real images", "kind": "floor", "calls": 0, "fd": 0.1},
    {**ROW, "name": "teacher", "kind": "teacher", "calls": 50, "solver": "DDIM", "guidance_scale": 1.0},
    {**ROW, "name": "ours", "kind": "student", "method": "progressive", "steps": 4, "training": {"cpu_minutes": 1}},
    {**ROW, "name": "UniPC", "kind": "solver", "solver": "UniPC", "steps": 4, "guidance_scale": None},
]
SETTING = {
    "guidance_scales": [1.5, 2],
    "search_samples": 10,
    "num_samples": 10,
    "seed": 0,
    "precision": "fp32",
    "new": 1,
}


def write(path, metric="fd", setting=SETTING, rows=ROWS):
    path.write_text(json.dumps({"metric": metric, "setting": setting, "rows": rows}))
    return path


def test_a_whole_result_is_read_as_it_is(tmp_path):
    assert read_benchmark_result(write(tmp_path / "a.json"))["rows"] == ROWS


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"name": 3}, r"rows\[2\].name: expected text, got 3"),
        ({"calls": "4"}, r"rows\[2\].calls: expected whole number or number, got '4'"),
        ({"fd": None}, "row 'ours': fd: expected whole number or number, got None"),
        ({"fd": float("nan")}, "row 'ours': fd: expected"),
        ({"fd_low": "x"}, "row 'ours': fd_low: expected"),
        ({"recall": []}, r"recall: expected number, got \[\]"),
        ({"training": 3}, r"rows\[2\].training: expected a section of keys, got 3"),
        ({"training": {"cpu_minutes": "x"}}, r"rows\[2\].training.cpu_minutes: expected"),
        ({"method": ["x"]}, r"rows\[2\].method: expected text"),
        ({"seconds_per_image": True}, r"rows\[2\].seconds_per_image: expected"),
    ],
)  # fmt: skip
def test_a_damaged_row_is_named(tmp_path, row, message):
    rows = [*ROWS[:2], ROWS[2] | row, *ROWS[3:]]
    with pytest.raises(ValueError, match=rf"a\.json: .*{message}"):
        read_benchmark_result(write(tmp_path / "a.json", rows=rows))
    for missing in ("fd", "fd_high", "seconds_per_image", "name", "calls"):
        rows[2] = {key: value for key, value in ROWS[2].items() if key != missing}
        with pytest.raises(ValueError, match=rf"a\.json: .*{missing}: missing"):
            read_benchmark_result(write(tmp_path / "a.json", rows=rows))


@pytest.mark.parametrize(
    "changed",
    [{"metric": 3}, {"metric": "recall"}, {"setting": {}}, {"setting": SETTING | {"guidance_scales": [None]}},
     {"rows": {}}, {"rows": [1]}, {"setting": SETTING | {"num_samples": "x"}}],
)  # fmt: skip
def test_a_damaged_result_is_named(tmp_path, changed):
    with pytest.raises(ValueError, match=r"a\.json: "):
        write_report([write(tmp_path / "a.json", **changed)], tmp_path / "page.html")


def test_a_teacher_at_zero_makes_no_ratio():
    rows = [row | {"fd": 0.0} if row["name"] in ("teacher", "UniPC") else row for row in ROWS]
    completed = {row["name"]: row for row in compared(rows, "fd")}
    assert completed["ours"]["ratio"] is None
    apart = [row | {"fd_low": 0.0, "fd_high": 0.0} if row["name"] == "UniPC" else row for row in rows]
    assert {row["name"]: row for row in compared(apart, "fd")}["ours"]["against_solver"] == "worse than UniPC"


def test_a_name_with_lines_and_bars_stays_in_its_cell():
    """RELIABILITY row 30: tables."""
    rows = [row | {"name": "a | b\n| c\x1b[2J"} if row["name"] == "ours" else row for row in ROWS]
    lines = markdown(compared(rows, "fd"), "fd").splitlines()
    assert len(lines) == len(ROWS) + 2 and len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert all(line.isprintable() for line in lines)
