"""The report of ``make gpu``: its checks hold on this machine's device, and all of it runs small on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stepdistill.benchmark.gpu_checks import CHECKS, FailedCheckError, NotHere, expect
from stepdistill.benchmark.gpu_report import PARTS, Report, brief
from stepdistill.benchmark.gpu_steps import CASES, Case, measure_case, measure_reference, speeds
from stepdistill.benchmark.reference_step import REFERENCES

ROOT = Path(__file__).parents[2]
DEVICE = torch.accelerator.current_accelerator() or torch.device("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_on_this_device(name, tmp_path):
    try:
        assert CHECKS[name](DEVICE, tmp_path)
    except NotHere:
        pytest.skip("needs a GPU")


def test_a_failed_check_is_a_row_and_a_failed_part(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "stepdistill.benchmark.gpu_checks.CHECKS", {"one": lambda *_: "fine", "two": lambda *_: expect(False, "bad")}
    )
    report = Report(folder=tmp_path, tiny=True)
    assert not report.run("checks")
    rows = json.loads((tmp_path / "checks.json").read_text())["rows"]
    assert rows["one"] == {"passed": True, "seen": "fine"} and "bad" in rows["two"]["seen"]
    assert "| one | passed True, seen fine |" in report.write().read_text()
    with pytest.raises(FailedCheckError, match="bad"):
        expect(False, "bad")


@pytest.mark.parametrize("floor", ["lcm, guided", "dmd2, guided"])
def test_a_step_and_its_plain_reference_are_measured(floor):
    case = Case("sd", floor, "copy", 1)
    ours = measure_case(case, tiny=True, repeats=1, compiled=False)
    plain = measure_reference(case, tiny=True, repeats=1)
    assert min(ours["seconds"], plain["seconds"], ours["forward_seconds"]) > 0
    row = speeds(ours, ours, peak=2.0)
    assert row["share_of_matrix_speed"] == pytest.approx(row["tflops"] / 2)
    assert {case.floor.split(",")[0] for case in CASES if case.bank == "copy"} >= set(REFERENCES)


def test_a_row_in_words():
    assert brief({"a": 1.23456, "b": {"c": "d"}}) == "a 1.235, b c d"


@pytest.mark.product
def test_the_whole_report_runs_small_on_a_cpu(tmp_path):
    """Every step also compiled; a step that could not be is not in its row, and does not end the report."""
    command = [sys.executable, "scripts/gpu_report.py", "--tiny", "--output_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {f"{part}.json" for part in PARTS} | {"report.md"} <= {path.name for path in tmp_path.iterdir()}
    rows = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert rows and all(row["eager"]["seconds"] and row["compiled"]["seconds"] for row in rows.values())
