"""What a run logs of its learning: its start, its cost so far, its metrics; and that measuring changes no bit of it."""

import json
import warnings

import numpy as np
import pytest
import torch
import yaml
from contracts.cases import checkpoint_bytes, make_run, sections, teacher_for

from stepdistill.benchmark.students import run_to
from stepdistill.data.ode_pairs import Pairs, PairsConfig, make_pairs
from stepdistill.diffusion.samplers import DDIM
from stepdistill.export.contract import read_contract
from stepdistill.export.pipeline import load_pipeline
from stepdistill.families.pixel import Pixel
from stepdistill.training import evaluation
from stepdistill.training.config import resolve
from stepdistill.training.cost import FORWARDS
from stepdistill.training.run import Run


def measured(folder, method, every=1, **options):
    """A run that is measured, on a few random images."""
    folder.mkdir(exist_ok=True)
    reference = folder / "measured.npz"
    np.savez(reference, images=np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), np.uint8))
    mapping = sections(folder, teacher_for(method), method, save_every=1, keep=9)
    mapping["eval"] = {"every": every, "num_samples": 5, "reference": str(reference)}
    mapping["method"] |= options
    return Run(resolve(mapping))


def rows_of(run):
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["progressive", "dmd2"])
def test_measuring_changes_no_bit_of_the_training(tmp_path, method):
    runs = measured(tmp_path / "with", method), measured(tmp_path / "without", method, every=0)
    for run in runs:
        run.train()
    steps = runs[0].config.train.steps
    assert "eval/fd" in rows_of(runs[0])[0] and not any("eval/fd" in row for row in rows_of(runs[1]))
    for step in range(1, steps + 1):
        assert checkpoint_bytes(runs[0].folder, step) == checkpoint_bytes(runs[1].folder, step)


def test_a_run_logs_what_it_starts_from_and_what_every_row_has_cost(tmp_path):
    run = measured(tmp_path, "progressive")
    run.train()
    rows = rows_of(run)
    assert [row["step"] for row in rows if "eval/fd" in row] == [0, 1, 2, 3, 4]
    assert all(row[FORWARDS] == 5 * 4 * row["step"] for row in rows)  # two forwards of the mentor, one step, 4 images
    assert read_contract(run.folder / "pipeline").origin.training["teacher_forwards"] == rows[-1][FORWARDS]


def test_a_run_that_begins_again_has_one_start(tmp_path):
    for _ in range(2):
        run = measured(tmp_path, "progressive")
        trainer = run.trainer()
        run.folder.mkdir(exist_ok=True)
        stages = trainer.run(trainer.restore())
        trainer._save = lambda position: None
        next(stages)
        stages.close()
    assert [row["step"] for row in rows_of(run) if "eval/fd" in row].count(0) == 1


def test_a_start_made_for_another_sampler_is_named(tmp_path):
    student = make_run(tmp_path, "progressive").train().rename(tmp_path / "student")
    assert read_contract(student).sampler == "DDIM"
    mapping = sections(tmp_path, teacher_for("lcm"), "lcm")
    mapping["bank"]["init_from"] = str(student)
    with pytest.warns(UserWarning, match=r"init_from: .*this method's sampler, Renoise, got one made for DDIM"):
        Run(resolve(mapping))
    again = sections(tmp_path, teacher_for("progressive"), "progressive")
    again["bank"]["init_from"] = str(student)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        Run(resolve(again))


@pytest.mark.parametrize("steps", [1, 2])
def test_a_start_is_the_teachers_weights_under_the_methods_sampler(tmp_path, steps):
    run = measured(tmp_path, "lcm", steps=steps)
    folder = run.export_start(tmp_path / "start")
    contract, pipeline = read_contract(folder), load_pipeline(folder)
    assert (contract.sampler, contract.steps) == ("Renoise", steps) and not contract.origin.training
    for name, tensor in run.family.network.state_dict().items():
        assert torch.equal(pipeline.unet.state_dict()[name], tensor), name


def test_the_start_of_a_finished_run_of_stages_is_that_of_its_last(tmp_path):
    run = measured(tmp_path, "progressive")
    assert run.method.make_sampler(run.config.method, run.family).name == DDIM.name
    assert read_contract(run.export_start(tmp_path / "start")).steps == run.config.method.steps == 2


def test_the_start_of_a_stage_has_its_sampler(tmp_path):
    """Of lightning's stages, some of which have fewer steps than the students on their way (``via``)."""
    run = measured(tmp_path, "lightning")
    *via, last = run.config.method.ladder[1:]
    for steps in (*via, last):
        assert read_contract(run.export_start(tmp_path / str(steps), steps)).steps == steps > 0
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(run.config.as_sections()))
    for steps in (*via, last):
        assert run_to(config, steps).config.method.ladder[1:] == (*via, last)


@pytest.mark.parametrize(("solver", "scale"), [("heun", 1.0), ("euler", 1.0), ("heun", 2.0)])
def test_pairs_cost_what_their_maker_called(tmp_path, solver, scale):
    family, images = Pixel.tiny(), 0

    def count(network, args, kwargs):
        nonlocal images
        images += len(next(value for value in (*args, *kwargs.values()) if torch.is_tensor(value)))

    family.network.register_forward_pre_hook(count, with_kwargs=True)
    options = {"solver": solver, "guidance_scale": scale, "steps": 3, "count": 5, "batch_size": 2}
    made = make_pairs(family, PairsConfig(output_dir=str(tmp_path / "pairs"), **options))
    assert Pairs(made).forwards == images
    mapping = sections(tmp_path, family, "dmd", steps=1)
    assert Run(resolve(mapping)).trainer().cost.teacher_forwards == 0
    mapping["method"]["pairs"] = str(made)
    assert Run(resolve(mapping)).trainer().cost.teacher_forwards == images


def test_features_are_computed_on_the_device_of_the_process(tmp_path, monkeypatch):
    """On a GPU, Inception on the CPU would take longer than the training between two measurements."""
    asked = {}

    def opened(*names, **options):
        asked.update(options)
        raise ValueError("opened")

    monkeypatch.setattr(evaluation, "own_device", lambda: torch.device("cuda", 1))
    monkeypatch.setattr(evaluation.MetricSuite, "open", opened)
    with pytest.raises(ValueError, match="opened"):
        measured(tmp_path / "run", "progressive")
    assert asked["device"] == torch.device("cuda", 1)
