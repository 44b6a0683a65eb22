"""The best student by the evaluation metric: kept when it is better, per stage, exported, and said in the contract."""

import json
import math

import torch
from contracts.cases import make_run
from safetensors.torch import load_file

from stepdistill.selection import FILE, BestStudent


def weights(value):
    return {"a": torch.full((2, 3), value), "b": torch.tensor(value)}


def test_only_a_better_measurement_replaces_what_is_kept(tmp_path):
    best = BestStudent(tmp_path)
    assert best.record("train") is None
    for step, distance in enumerate([3.0, 1.0, 2.0, 1.0, math.nan]):
        best.offer("train", step, {"fd": distance, "fd_low": 0.0}, weights(float(step)))
    assert best.record("train") == {"stage": "train", "step": 1, "metric": "fd", "value": 1.0}
    into = weights(9.0)
    best.restore(into)
    assert all((tensor == 1).all() for tensor in into.values())
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_later_stage_starts_anew_and_another_run_forgets(tmp_path):
    best = BestStudent(tmp_path)
    best.offer("8", 1, {"fd": 1.0}, weights(1.0))
    best.offer("4", 2, {"fd": 5.0}, weights(2.0))
    assert best.record("8") is None and best.record("4")["value"] == 5.0
    best.forget()
    assert best.record("4") is None


def test_without_a_distance_nothing_is_chosen(tmp_path):
    BestStudent(tmp_path).offer("train", 1, {"accuracy": 0.9}, weights(1.0))
    assert not list(tmp_path.iterdir())


def test_the_export_is_the_best_student_and_its_contract_says_on_what_it_was_chosen(tmp_path, monkeypatch):
    run = make_run(tmp_path, "dmd2", "copy")
    trainer = run.trainer()
    trainer.measure_every = 1
    distances = iter([2.0, 1.0] + [3.0] * 100)
    students = []

    def measure():
        students.append({name: tensor.clone() for name, tensor in trainer.result_weights().items()})
        return {"fd": next(distances)}

    trainer.measure = measure
    monkeypatch.setattr(run, "trainer", lambda: trainer)
    folder = run.train()
    selected = json.loads((folder / "stepdistill.json").read_text())["selected"]
    assert (selected["metric"], selected["value"], selected["step"]) == ("fd", 1.0, 2)
    exported = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert len(students) > 2 and set(exported) == set(students[1])
    assert all(torch.equal(exported[name], students[1][name]) for name in exported)
    assert not all(torch.equal(students[-1][name], students[1][name]) for name in exported)
