"""The best student by the evaluation metric: kept when it is better, per stage, exported, and said in the contract."""

import json
import math

import numpy as np
import pytest
import torch
from contracts.cases import sections, teacher_for, train_until
from safetensors.torch import load_file

from stepdistill.features.loading import load_features
from stepdistill.training.config import resolve
from stepdistill.training.length import student_has_moved
from stepdistill.training.run import Run
from stepdistill.training.selection import FILE, BestStudent


def weights(value):
    return {"a": torch.full((2, 3), value), "b": torch.tensor(value)}


def test_only_a_better_measurement_replaces_what_is_kept(tmp_path):
    best = BestStudent(tmp_path, {"seed": 1})
    assert best.record("train") is None
    for step, distance in enumerate([3.0, 1.0, 2.0, 1.0, math.nan]):
        best.offer("train", step, {"fd": distance, "fd_low": 0.0}, weights(float(step)))
    assert best.record("train") == {"stage": "train", "step": 1, "metric": "fd", "value": 1.0, "seed": 1}
    into = weights(9.0)
    best.restore(into)
    assert all((tensor == 1).all() for tensor in into.values())
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_measurement_reads_no_weights_of_the_best_one(tmp_path, monkeypatch):
    best = BestStudent(tmp_path)
    best.offer("train", 1, {"fd": 2.0}, weights(1.0))
    with monkeypatch.context() as patch:
        patch.setattr("stepdistill.training.selection.load_file", None)
        best.offer("train", 2, {"fd": 3.0}, weights(2.0))
        best.offer("train", 3, {"fd": 1.0}, weights(3.0))
    assert best.record("train")["step"] == 3


def test_cmmd_on_other_features_than_a_clips_selects_too(tmp_path):
    best = BestStudent(tmp_path)
    best.offer("train", 1, {"mmd": 1.0, "mmd_low": 0.9}, weights(1.0))
    assert best.record("train")["metric"] == "mmd"


def test_a_later_stage_starts_anew_and_another_run_forgets(tmp_path):
    best = BestStudent(tmp_path)
    best.offer("8", 1, {"fd": 1.0}, weights(1.0))
    best.offer("4", 2, {"fd": 5.0}, weights(2.0))
    assert best.record("8") is None and best.record("4")["value"] == 5.0
    best.forget()
    assert best.record("4") is None


def test_what_was_measured_on_something_else_is_not_compared(tmp_path):
    BestStudent(tmp_path, {"features": "a"}).offer("train", 1, {"fd": 1.0}, weights(1.0))
    BestStudent(tmp_path, {"features": "a"}).offer("train", 2, {"fd": 2.0}, weights(2.0))
    assert BestStudent(tmp_path).record("train")["step"] == 1
    BestStudent(tmp_path, {"features": "b"}).offer("train", 3, {"fd": 3.0}, weights(3.0))
    assert BestStudent(tmp_path).record("train")["features"] == "b"
    BestStudent(tmp_path, {"features": "b"}).offer("train", 4, {"fid": 4.0}, weights(4.0))
    assert BestStudent(tmp_path).record("train")["metric"] == "fid"


def test_distances_of_other_samplers_are_not_compared(tmp_path):
    """A run may be resumed with other sampling steps."""
    best = BestStudent(tmp_path)
    best.offer("train", 1, {"fd": 1.0}, weights(1.0), {"sampler": "Renoise", "steps": 4})
    best.offer("train", 2, {"fd": 2.0}, weights(2.0), {"sampler": "Renoise", "steps": 4})
    assert best.record("train")["step"] == 1
    best.offer("train", 3, {"fd": 3.0}, weights(3.0), {"sampler": "Renoise", "steps": 1})
    assert (best.record("train")["step"], best.record("train")["steps"]) == (3, 1)


def test_without_a_distance_nothing_is_chosen(tmp_path):
    BestStudent(tmp_path).offer("train", 1, {"accuracy": 0.9}, weights(1.0))
    assert not list(tmp_path.iterdir())


def test_the_export_is_the_best_student_and_its_contract_says_on_what_it_was_chosen(tmp_path, monkeypatch):
    np.savez(tmp_path / "measured.npz", images=np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), np.uint8))
    mapping = sections(tmp_path, teacher_for("dmd2"), "dmd2")
    mapping["eval"] = {"every": 1, "num_samples": 5, "seed": 3, "reference": str(tmp_path / "measured.npz")}
    run = Run(resolve(mapping))
    trainer = run.trainer()
    distances = iter([0.5, 0.5, 1.0] + [3.0] * 100)  # the student first moves in the second step: two are the start's
    students = []

    def measure(distiller):
        del distiller
        students.append({name: tensor.clone() for name, tensor in trainer.result_weights().items()})
        return {"fd": next(distances)}

    trainer.evaluation.measure = measure
    monkeypatch.setattr(run, "trainer", lambda: trainer)
    folder = run.train()
    selected = json.loads((folder / "stepdistill.json").read_text())["selected"]
    assert (selected["metric"], selected["value"], selected["step"]) == ("fd", 1.0, 2)
    assert (selected["features"], selected["num_samples"], selected["seed"]) == ("embedded", 5, 3)
    assert selected["features_sha256"] == load_features("embedded").sha256
    assert selected["reference"]["sha256"] == run.evaluation.suite.reference.describe()["sha256"]
    exported = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert len(students) > 2 and set(exported) == set(students[2])
    assert all(torch.equal(exported[name], students[2][name]) for name in exported)
    assert not all(torch.equal(students[4][name], students[2][name]) for name in exported)


def test_a_student_that_rests_when_it_is_measured_is_measured_all_the_same(tmp_path):
    """Whether lightning's student has a turn depends on the stage, so a later one cannot be asked about the past."""
    mapping = sections(tmp_path, teacher_for("lightning"), "lightning", steps=21)
    mapping["method"]["student_update_interval"] = 3
    distiller = Run(resolve(mapping)).distiller
    distiller.stage, distiller.step_in_stage = distiller.stages(21)[-1], 3
    assert distiller.is_adversarial and not distiller.turns["student"].when(17)
    assert [student_has_moved(distiller, 21, done) for done in (0, 1, 18, 21)] == [False, True, True, True]
    assert (distiller.stage, distiller.step_in_stage) == (distiller.stages(21)[-1], 3)


@pytest.mark.parametrize("changes", [{"every": 0}, {"metrics": ["precision_recall"]}])
def test_a_run_that_no_longer_measures_distances_exports_its_last_student(tmp_path, changes):
    mapping = sections(tmp_path, teacher_for("lcm"), "lcm", steps=4)
    np.savez(tmp_path / "measured.npz", images=np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), np.uint8))
    mapping["eval"] = {"every": 1, "num_samples": 5, "reference": str(tmp_path / "measured.npz")}
    train_until(Run(resolve(mapping)), 2)
    run = Run(resolve(mapping | {"eval": mapping["eval"] | changes}))
    folder = run.train()
    assert run.selected is None and "selected" not in json.loads((folder / "stepdistill.json").read_text())
    last = load_file(run.folder / "checkpoint-4/weights.safetensors")
    student = run.distiller.bank.state("student")
    assert all(torch.equal(tensor, last[f"student/{name}"]) for name, tensor in student.items())
