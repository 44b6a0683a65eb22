"""The report of ``make gpu``: its checks hold on this machine's device, and all of it runs small on a CPU."""

import dataclasses
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stepdistill.benchmark.gpu_checks import CHECKS, FailedCheckError, NotHere, expect
from stepdistill.benchmark.gpu_cifar import cifar_rows
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
    report = Report(folder=tmp_path, data=tmp_path, tiny=True)
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


def test_a_tar_of_images_becomes_an_npz(tmp_path):
    for name in ("train/cat/0.png", "train/ant/1.png", "test/ant/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (len(name), 0, 0)).save(tmp_path / name)
    with tarfile.open(tmp_path / "images.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "train", "train")
        archive.add(tmp_path / "test", "test")
    command = [sys.executable, "scripts/make_cifar10.py", "--tar", "images.tar.xz", "--output", "a.npz"]
    command[1] = str(ROOT / command[1])
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    with np.load(tmp_path / "a.npz") as found:
        assert found["images"].shape == (2, 4, 4, 3) and sorted(found["labels"]) == [0, 1]


def test_without_its_images_the_last_part_says_which_it_wants(tmp_path):
    with pytest.raises(ValueError, match=r"--data: expected an \.npz with 'images' and 'labels', got .*none\.npz"):
        next(cifar_rows(tmp_path, tmp_path / "none.npz", tiny=False))


def test_missing_images_are_said_before_the_first_part(tmp_path):
    report = Report(folder=tmp_path, data=tmp_path / "none.npz", tiny=False)
    with pytest.raises(ValueError, match="--data: expected"):
        report.check(PARTS)
    report.check(["checks", "steps"])
    dataclasses.replace(report, tiny=True).check(PARTS)
    (tmp_path / "none.npz").touch()
    report.check(PARTS)


@pytest.mark.product
@pytest.mark.filterwarnings("ignore:bank.init_from")  # in one step both samplers are the same
def test_a_teacher_and_its_students_are_trained_and_measured_small(tmp_path):
    rows = dict(cifar_rows(tmp_path, tmp_path / "none.npz", tiny=True))
    names = {"progressive", "progressive, 2 steps", "ect", "dmd2", "DDIM, 1 steps", "UniPC, 4 steps"}
    assert {f"fd, {name}" for name in names} <= rows.keys()
    assert rows["fd, progressive"]["calls"] == 1 and rows["fd, ect"]["calls"] == 2
    assert all(row["fd"] > 0 for name, row in rows.items() if name.startswith("fd"))


@pytest.mark.product
def test_the_whole_report_runs_small_on_a_cpu(tmp_path):
    """Every step also compiled; a step that could not be is not in its row, and does not end the report."""
    command = [sys.executable, "scripts/gpu_report.py", "--tiny", "--output_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {f"{part}.json" for part in PARTS} | {"report.md"} <= {path.name for path in tmp_path.iterdir()}
    rows = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert rows and all(row["eager"]["seconds"] and row["compiled"]["seconds"] for row in rows.values())
