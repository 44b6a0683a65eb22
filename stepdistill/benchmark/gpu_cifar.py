"""The real thing in minutes: a teacher, students of 1, 2 and 4 steps, and their Frechet distances beside solvers'.

A classifier of the same images gives the features, so distances are FD of that classifier and no FID. With ``--tiny``
the package's own images take the place of CIFAR-10, and everything is a few steps long: it shows that it runs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from stepdistill.assets import ASSETS
from stepdistill.evaluation.evaluate import evaluate
from stepdistill.evaluation.sources import PipelineSource
from stepdistill.evaluation.suite import MetricSuite
from stepdistill.export.pipeline import load_pipeline
from stepdistill.families.config import TeacherConfig
from stepdistill.families.loading import load_teacher
from stepdistill.features.classifier import SmallConvNet
from stepdistill.inference.solvers import make_solver
from stepdistill.pipelines.class_conditional import ClassConditionalPipeline
from stepdistill.pretraining.classifier import read_labelled_images, train_classifier
from stepdistill.pretraining.pixel import PretrainConfig, train_teacher
from stepdistill.training.config import resolve
from stepdistill.training.run import Run

SCHEDULER = {
    "num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction",
    "timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False,
}  # fmt: skip
CIFAR: dict[str, Any] = {"channels": (128, 256, 256), "layers": 2, "batch": 256, "teacher": 4000, "student": 700,
                         "images": 50_000, "samples": 5000}  # fmt: skip
TINY: dict[str, Any] = {
    "channels": (8, 16),
    "layers": 1,
    "batch": 4,
    "teacher": 2,
    "student": 4,
    "images": 64,
    "samples": 8,
}
"""Sizes of the network and lengths of the trainings: meant for three minutes of each on a card of H100's class."""
SOLVERS = (("DDIM", 1), ("DDIM", 2), ("DDIM", 4), ("UniPC", 2), ("UniPC", 4))
"""Training-free solvers and their steps."""


def check_data(data: Path) -> None:
    """Raise ``ValueError`` if there is no such file."""
    if not data.is_file():
        raise ValueError(f"--data: expected an .npz with 'images' and 'labels', got {data}, which is no file")


def cifar_rows(folder: Path, data: Path, *, tiny: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield seconds of the trainings, then a row per student, solver and teacher.

    Args:
        folder: where everything is written.
        data: an ``.npz`` with ``images`` and ``labels``; with ``tiny`` not read.
        tiny: whether to take the package's images and a few steps.

    Raises:
        ValueError: if there is no such file.
    """
    sizes, data = (TINY, ASSETS / "fashion/train_subset.npz") if tiny else (CIFAR, data)
    check_data(data)
    for name, train, made in (
        ("features", train_features, "model.safetensors"), ("teacher", train_small_teacher, "pipeline"),
    ):  # fmt: skip
        if (folder / name / made).exists():  # a stopped report has made it
            continue
        start = time.perf_counter()
        train(folder / name, data, sizes)
        yield f"training, {name}", {"minutes": (time.perf_counter() - start) / 60}
    students: dict[str, str] = {}
    for name, section in methods(folder, sizes).items():
        start = time.perf_counter()
        shared = student_sections(folder / name, folder / "teacher", data, sizes)
        optim = shared["optim"] | section.get("optim", {})
        pipeline = Run(resolve(section | shared | {"optim": optim})).train()
        yield f"training, {name}", {"minutes": (time.perf_counter() - start) / 60}
        students |= exports(name, pipeline)
    yield from measured(folder, data, students, tiny)


def train_features(folder: Path, data: Path, sizes: dict[str, Any]) -> None:
    """Train the classifier whose features measure."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    images, labels = read_labelled_images(data)
    images, labels = images[: sizes["images"]].to(device), labels[: sizes["images"]].to(device)
    network = SmallConvNet(images.shape[1], int(labels.max()) + 1, 24).to(device)
    train_classifier(network, images, labels, epochs=6, batch_size=sizes["batch"], lr=5e-3, seed=0)
    network.cpu().save_pretrained(folder)


def train_small_teacher(folder: Path, data: Path, sizes: dict[str, Any]) -> None:
    """Train a class-conditional teacher with a null class."""
    images, labels = read_labelled_images(data)
    channels, classes = sizes["channels"], int(labels.max()) + 1
    down = ["DownBlock2D", "AttnDownBlock2D", *["DownBlock2D"] * (len(channels) - 2)]
    model = {
        "sample_size": images.shape[-1], "in_channels": images.shape[1], "out_channels": images.shape[1],
        "block_out_channels": list(channels), "layers_per_block": sizes["layers"], "down_block_types": down,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)], "attention_head_dim": 8,
        "norm_num_groups": 8, "num_class_embeds": classes + 1,
    }  # fmt: skip
    on_gpu = torch.accelerator.is_available()
    train_teacher(
        PretrainConfig(
            model=model, scheduler=SCHEDULER, data=str(data), output_dir=str(folder), steps=sizes["teacher"],
            batch_size=sizes["batch"], lr=4e-4, ema=0.999, precision="bf16" if on_gpu else "fp32",
        )
    )  # fmt: skip


def methods(folder: Path, sizes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the ``method`` and ``bank`` sections of the students, in the order of their training."""
    progressive = {"name": "progressive", "steps": 1, "start": 4 if sizes is TINY else 16}
    dmd2 = {"name": "dmd2", "steps": 1, "student_update_interval": 2, "gan_weight": 0.0}
    return {
        "progressive": {"method": progressive},
        "ect": {"method": {"name": "ect", "steps": 2}},
        "dmd2": {
            "method": dmd2,
            "bank": {"init_from": str(folder / "progressive/pipeline")},
            "optim": {"fake": {"lr": 1e-4}},
        },
    }


def student_sections(folder: Path, teacher: Path, data: Path, sizes: dict[str, Any]) -> dict[str, Any]:
    """Return what the configurations of all students share."""
    images, labels = read_labelled_images(data)
    del images
    steps = sizes["student"]
    return {
        "teacher": {"path": str(teacher), "null_class": int(labels.max()) + 1},
        "data": {"name": "images", "path": str(data), "batch_size": sizes["batch"]},
        "optim": {"student": {"lr": 2e-4, "schedule": "linear"}},
        "train": {
            "steps": steps, "output_dir": str(folder), "ema": 0.99, "save_every": steps, "sample_every": steps,
            "precision": "bf16" if torch.accelerator.is_available() else "fp32",
        },
    }  # fmt: skip


def exports(name: str, pipeline: Path) -> dict[str, str]:
    """Return the exports of a run by the names of their rows: the last, and those of at most four steps before it."""
    found = {name: str(pipeline)}
    for steps in (2, 4):
        stage = pipeline.with_name(f"pipeline-{steps}-steps")
        if stage.is_dir():
            found[f"{name}, {steps} steps"] = str(stage)
    return found


def measured(folder: Path, data: Path, students: dict[str, str], tiny: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the Frechet distance of every student, of solvers at as many calls, and of the teacher at 50."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    count = (TINY if tiny else CIFAR)["samples"]
    suite = MetricSuite.open(str(folder / "features"), str(data), device=device, max_images=100 if tiny else 10_000)
    teacher = load_teacher(TeacherConfig(path=str(folder / "teacher")))

    def row(pipeline: Any, call: dict[str, Any]) -> dict[str, Any]:
        source = PipelineSource(
            pipeline=pipeline.to(device), count=count, batch_size=min(count, 1000), rows=min(count, 500), call=call,
            precision="fp32" if device.type == "cpu" else "bf16",
        )  # fmt: skip
        found = evaluate(source, suite, name="row")
        return {name: found[name] for name in (suite.distance, "calls", "seconds_per_image")}

    for name, path in students.items():
        yield f"{suite.distance}, {name}", row(load_pipeline(path), {})
    for solver, steps in (*SOLVERS, ("DDIM", 2 if tiny else 50)):
        pipeline = ClassConditionalPipeline(teacher.network, make_solver(solver, teacher.scheduler_config))
        yield f"{suite.distance}, {solver}, {steps} steps", row(pipeline, {"num_inference_steps": steps})
