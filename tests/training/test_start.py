"""What stops a run before its first step: nothing is written, and one sentence says why."""

import hashlib
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from contracts.cases import make_run, sections, teacher_for, train_until
from PIL import Image
from safetensors.torch import load_file, save_file

from stepdistill.data.base import DataConfig
from stepdistill.data.datasets import open_data
from stepdistill.data.loader import loader
from stepdistill.families.pixel import Pixel
from stepdistill.files.schema import ConfigError
from stepdistill.training import checkpoint
from stepdistill.training.config import resolve
from stepdistill.training.run import Run

# --------------------------------------------------------------------------------------- configurations


def configured(**changes):
    mapping = {
        "teacher": {"path": "no such folder"}, "method": {"name": "dmd2"}, "data": {"name": "noise"},
        "train": {"steps": 4, "output_dir": "unused"},
    }  # fmt: skip
    for name, keys in changes.items():
        mapping[name] = {**mapping.get(name, {}), **keys}
    return mapping


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"fake_update": "alternate", "student_update_interval": 1}}, "with fake_update 'alternate'"),
        ({"method": {"name": "scm", "path": "data", "guidance_scale": 2.0}}, "expected 1 with path 'data'"),
        ({"method": {"name": "tcd", "two_time": True, "order": 2}}, "expected 1 with two_time"),
        ({"method": {"name": "add", "negative_prompt": "blurry"}}, "only with weighting 'nfsd'"),
        ({"method": {"name": "cd", "steps": 3}}, "expected a multiple of steps"),
        ({"method": {"name": "dmd", "regression_weight": 0}}, "leave out pairs"),
        ({"data": {"path": "images"}}, "'noise' reads no data"),
        ({"data": {"revision": "0" * 40}}, "reads no dataset"),
        ({"data": {"flip": True}}, "flip: expected False with 'noise', which reads no image files, got True"),
        ({"data": {"name": "prompts", "path": "x", "fit": "pad"}}, "fit: expected 'crop' with 'prompts', which"),
        ({"data": {"name": "pairs", "path": "x", "label_column": "y"}}, "label_column: expected None with 'pairs'"),
        ({"eval": {"num_samples": 1}}, "eval.num_samples: expected at least 2"),
        ({"train": {"keep": 0}}, "train.keep: expected at least 1"),
        ({"optim": {"fake": 5}}, "optim.fake: expected a section of keys, got 5"),
        ({"optim": {"critics": {}}}, "optim.critics: the method has no such turn; known: fake, head, student"),
    ],
)
def test_options_that_contradict_each_other_are_refused_before_anything_is_opened(changes, message):
    """RELIABILITY row 25: the teacher's folder is not even there."""
    with pytest.raises(ConfigError, match=message):
        resolve(configured(**changes))


def test_all_problems_of_a_configuration_are_said_at_once():
    """RELIABILITY row 24, with the words of accelerate for a precision."""
    with pytest.raises(ConfigError) as error:
        resolve(
            configured(
                train={"stepz": 1, "steps": -4, "precision": "bf61", "mixed_precision": "no"},
                method={"gan_weight": float("nan")}, optim={"student": {"lr": 0}}, data={"flip": "no"},
            )
        )  # fmt: skip
    text = "\n".join(error.value.problems)
    for problem in (
        "train.stepz: unknown key; did you mean 'steps'?",
        "train.steps: expected at least 1, got -4",
        "train.precision: expected 'fp32' or 'bf16' or 'fp16', got 'bf61'; did you mean 'bf16'?",
        "train.mixed_precision: unknown key; did you mean 'precision'?",
        "method.gan_weight: expected number, got nan",
        "optim.student.lr: expected above 0, got 0",
        "data.flip: expected true/false, got 'no'",
    ):
        assert problem in text


@pytest.mark.parametrize("word", ["no", False])
def test_accelerates_word_for_single_precision_is_understood(word):
    """RELIABILITY row 24: ``no``, and what YAML 1.1 makes of it."""
    assert resolve(configured(train={"precision": word})).train.precision == "fp32"


def test_a_run_too_short_for_its_stages_is_refused(tmp_path):
    mapping = sections(tmp_path, teacher_for("progressive"), "progressive", steps=2)
    mapping["method"] |= {"start": 16, "steps": 2}
    message = r"train.steps: .* each of the 3 stages \(8-steps, 4-steps, 2-steps\), got 2, which leaves none for '"
    with pytest.raises(ValueError, match=message):
        Run(resolve(mapping))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "options", "steps", "stage"),
    [
        ("add", {"critic_warmup": 4}, 4, "train"),
        ("dmd2", {"student_update_interval": 5}, 4, "train"),
        ("sana_sprint", {}, 1, "train"),
        ("lightning", {"start": 4, "via": [2], "steps": 1, "critic_warmup": 4}, 12, "1-steps-conditional"),
    ],
)
def test_a_run_in_which_a_student_would_stay_as_it_is_is_refused(tmp_path, method, options, steps, stage):
    mapping = sections(tmp_path, teacher_for(method), method, steps=steps)
    mapping["method"] |= options
    message = rf"train\.steps: expected enough to update the student in every stage, got {steps}, .*'{stage}' has \d"
    with pytest.raises(ValueError, match=message):
        Run(resolve(mapping))
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------- data


def opened(path, **options):
    config = DataConfig(name=options.pop("name", "images"), path=str(path), **options)
    return open_data(config, channels=3, size=(8, 8), num_classes=None, takes_text=config.name == "prompts")


@pytest.mark.parametrize("kind", ["folder", "other files", "zero bytes", "npz", "prompts", "metadata", "tar"])
def test_data_without_a_sample_is_refused_by_name(tmp_path, kind):
    """RELIABILITY row 21: empty, or nothing left of it."""
    path, options, message = tmp_path / "data", {}, "no images"
    path.mkdir()
    if kind == "other files":
        (path / "a.doc").write_text("x")
    elif kind == "zero bytes":
        for name in "abc":
            (path / f"{name}.png").touch()
        message = "3 images in a row are unreadable; the last is .*c.png"
    elif kind == "npz":
        path = tmp_path / "data.npz"
        np.savez(path, images=np.zeros((0, 8, 8, 3), np.uint8))
    elif kind == "prompts":
        path, options, message = tmp_path / "data.txt", {"name": "prompts"}, "no prompts"
        path.write_text("\n\n")
    elif kind == "metadata":
        (path / "metadata.jsonl").touch()
    elif kind == "tar":
        tarfile.open(path / "a.tar", "w").close()
    with pytest.raises(ValueError, match=f"(?s){path.name}.*{message}|{message}"):
        opened(path, **options)


@pytest.mark.parametrize("world", [1, 2])
def test_fewer_samples_than_a_batch_are_seen_equally_often(tmp_path, world):
    """RELIABILITY row 21: epochs run on through a batch, so that none is dropped."""
    path = tmp_path / "three.npz"
    np.savez(path, images=np.zeros((3, 8, 8, 3), np.uint8))
    seen = Counter()
    for rank in range(world):
        batches = loader(opened(path), batch_size=9, seed=0, rank=rank, world=world)
        for _ in range(2):
            seen.update(next(batches).indices)
    assert seen == {index: 6 * world for index in range(3)}


# ------------------------------------------------------------------------------------------ what it resumes


def rewritten(folder, name, change):
    """Change the tensors of one group of a checkpoint (or drop it: None), and the manifest with them."""
    file, manifest = folder / f"{name}.safetensors", json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    tensors = change(load_file(file))
    file.unlink()
    del manifest["files"][file.name]
    if tensors is not None:
        save_file(tensors, file)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        manifest["files"][file.name] = {"size": file.stat().st_size, "sha256": digest}
    text = json.dumps(manifest | {"sha256": checkpoint._digest(manifest)})
    (folder / "manifest.json").write_text(text)


def test_a_run_says_from_which_step_it_resumes(tmp_path, capsys):
    train_until(make_run(tmp_path, "progressive", save_every=1), 3)
    assert "resuming" not in capsys.readouterr().out
    make_run(tmp_path, "progressive", save_every=1).train()
    assert "resuming after step 3 of 4\n" in capsys.readouterr().out


def other_shape(tensors):
    return tensors | {"student/conv_in.weight": tensors["student/conv_in.weight"][:1]}


@pytest.mark.parametrize(
    ("group", "change", "message"),
    [
        ("weights", other_shape, r"student/conv_in.weight: expected \(\d+, .*\), got \(1, "),
        ("weights", lambda tensors: dict(list(tensors.items())[1:]), "its tensors are not this run's; the first"),
        ("optimizer-student", lambda tensors: None, "optimizer-student.safetensors: no such group"),
        ("optimizer-student", lambda tensors: dict(list(tensors.items())[:-1]), "optimizer entry .* is missing"),
    ],
)
def test_a_checkpoint_of_another_architecture_or_with_a_part_missing_is_refused(tmp_path, group, change, message):
    """RELIABILITY rows 10 and 13: RELIABILITY row 10 and RELIABILITY row 13. Nothing is started afresh.

    There are no files of random states or loaders that could be missing: both follow from the step.
    """
    train_until(make_run(tmp_path, "progressive", save_every=1), 1)
    rewritten(tmp_path / "run/checkpoint-1", group, change)
    run = make_run(tmp_path, "progressive", save_every=1)
    before = listing(run.folder)
    trainer = run.trainer()
    weights = {name: tensor.clone() for name, tensor in trainer.result_weights().items()}
    with pytest.raises(ValueError, match=message):
        run.train()
    assert listing(run.folder) == before | {".lock": listing(run.folder).get(".lock")}
    assert group != "weights" or all(torch.equal(weights[n], t) for n, t in trainer.result_weights().items())


def listing(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.parametrize("start", ["none", "a file"])
def test_a_student_to_start_from_that_is_not_there(tmp_path, start):
    """RELIABILITY row 10."""
    (tmp_path / "a file").touch()
    mapping = sections(tmp_path, teacher_for("progressive"), "progressive")
    mapping["bank"]["init_from"] = str(tmp_path / start)
    with pytest.raises(ValueError, match="bank.init_from"):
        Run(resolve(mapping))
    assert not (tmp_path / "run").exists()


def test_a_run_whose_folder_is_a_file_is_refused_before_the_teacher_is_opened(tmp_path):
    """RELIABILITY row 10."""
    (tmp_path / "run").touch()
    with pytest.raises(ValueError, match="train.output_dir: expected a folder, got the file"):
        Run(resolve(configured(train={"output_dir": str(tmp_path / "run")})))


# ----------------------------------------------------------------------------------------- measurements


def measured(folder, family, shapes, **options):
    """A run of ``family`` that is measured beside random images of these shapes."""
    mapping = sections(folder, family, "progressive")
    (folder / "real").mkdir()
    random = np.random.default_rng(0)
    for index, shape in enumerate(shapes):
        Image.fromarray(random.integers(0, 256, shape, np.uint8)).save(folder / f"real/{index}.png")
    mapping["eval"] = {"every": 2, "num_samples": 4, "reference": str(folder / "real"), **options}
    return Run(resolve(mapping))


def test_reference_images_are_made_as_large_as_the_teachers(tmp_path):
    run = measured(tmp_path, Pixel.tiny(), [(20, 30), (40, 9), (64, 64)])
    assert run.evaluation.suite.reference.about["shape"] == [1, 8, 8]


@pytest.mark.parametrize(
    ("family", "shapes", "options", "message"),
    [
        ({"channels": 3}, [(8, 8, 3)] * 4, {}, "'embedded': expected grey .* got colour .*'faces', .* read colour"),
        ({}, [(8, 8, 3)] * 4, {"features": "faces"}, "eval.reference: expected 8x8 grey images, .* got 8x8 colour"),
        ({}, [], {"reference": "embedded"}, "eval.reference: expected 8x8 grey images, .* got 28x28 grey"),
        ({"num_classes": None}, [(8, 8)] * 4, {"metrics": ["accuracy"]}, "'accuracy' needs the class labels"),
    ],
)
def test_a_student_that_could_not_be_measured_is_not_trained(tmp_path, family, shapes, options, message):
    with pytest.raises(ValueError, match=message):
        measured(tmp_path, Pixel.tiny(**family), shapes, **options)
    assert not (tmp_path / "run").exists()
