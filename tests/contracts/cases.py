"""What the contract tests run over.

Families and methods are discovered, so a new file in ``stepdistill/families`` or ``stepdistill/methods`` is tested the
moment it exists. A table below needs a line only where the default does not do.
"""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from stepdistill.data.ode_pairs import PairsConfig, make_pairs
from stepdistill.diffusion.samplers import DDIM, sample
from stepdistill.export.pipeline import save_pipeline
from stepdistill.families.base import Family
from stepdistill.families.latent import LatentFamily
from stepdistill.families.observed import Observed
from stepdistill.families.pixel import Pixel
from stepdistill.files.schema import build
from stepdistill.methods import find_method
from stepdistill.training.config import resolve
from stepdistill.training.run import Run
from stepdistill.training.trainer import Trainer

BANKS = ("copy", "adapter")
STEPS = 4
"""Training steps of a small run."""
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Case:
    """How a method is made small."""

    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Its ``method`` section; with two stages, if the method has stages."""
    overfits: str | None = None
    """The turn whose loss must fall on one batch (not every loss is a distance); by default the first."""
    falls: str | None = None
    """The number of that turn that must fall; by default the loss, the sum of the turn's terms."""
    overfit_lr: float = 1e-2
    """The learning rate at which it must."""
    resumed_at: tuple[int, ...] = (2,)
    """The steps of a small run that it is resumed after: one inside a stage, and where all but the first begin."""


CASES = {
    "guided": Case({"steps": 2, "start": 4}, resumed_at=(1, 2)),
    "progressive": Case({"steps": 2, "start": 8}, resumed_at=(1, 2)),
    "tract": Case({"steps": 1, "start": 8, "via": [2]}),
    "lightning": Case({"steps": 1, "start": 8, "via": [4], "critic_warmup": 0}, resumed_at=(1, 2, 3)),
    "ect": Case({"num_stages": 2}),
    "scm": Case(falls="tangent"),  # the loss is of a normalised tangent, which has the same length at the optimum
    "flowmap": Case(falls="error"),  # the loss is divided by its error
    "pi_flow": Case({"steps": 2, "points": 3, "substeps": 6}),
    "dmd": Case(overfits="fake"),
    "dmd2": Case({"steps": 2, "student_update_interval": 2}, overfits="fake"),
    "cdm": Case({"steps": 2, "most_steps": 3}, overfits="fake"),
    "sid": Case({"steps": 2}, overfits="fake"),
    "tdm": Case({"steps": 2}),
    "rcm": Case({"steps": 2, "student_update_interval": 2}, overfits="fake"),
    "sana_sprint": Case({"student_update_interval": 2}, overfits="critic", overfit_lr=2e-2),
    "add": Case({"steps": 2, "critic_warmup": 0}, overfits="critic", overfit_lr=2e-2),
    "ladd": Case({"warmup": 2, "critic_warmup": 1, "student_update_interval": 1}, overfits="critic", overfit_lr=2e-2),
    "imagine_flash": Case({"steps": 2, "teacher_steps": 2, "critic_warmup": 0}, overfits="critic", overfit_lr=2e-2),
    "judged_tcd": Case({"adversarial_weight": 0.1}, falls="loss"),
}

VARIANTS = {"judged_tcd": "tcd"}
"""Cases that an option makes another algorithm, and their methods. The name of every other case is its method's."""


def method_of(case: str) -> str:
    return VARIANTS.get(case, case)


def case(method: str) -> Case:
    """The case of a method, or of one of the :data:`VARIANTS`."""
    return CASES.get(method, Case())


def scheduler_config(scheduler: Any) -> dict[str, Any]:
    """The config as it lies in a file, which also names the class."""
    return json.loads(scheduler.to_json_string())


ZERO_SNR = DDIMScheduler(
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
    rescale_betas_zero_snr=True,
)  # fmt: skip
FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0)

PIXELS: dict[str, Callable[[], Pixel]] = {
    "pixel": Pixel.tiny,
    "pixel-epsilon": lambda: Pixel.tiny(prediction_type="epsilon"),
    "pixel-sample": lambda: Pixel.tiny(prediction_type="sample"),
    "pixel-zero-snr": lambda: Pixel.tiny(scheduler=scheduler_config(ZERO_SNR)),
    "pixel-flow": lambda: Pixel.tiny(scheduler=scheduler_config(FLOW)),
    "pixel-edm": lambda: Pixel.tiny(scheduler=scheduler_config(EDMEulerScheduler(sigma_max=20.0))),
    "pixel-unconditional": lambda: Pixel.tiny(num_classes=None),
}
"""Pixel teachers of every kind. A method is tested on the first that it accepts."""


def refusal(method: str, family: Family) -> str | None:
    """Why a method refuses a teacher, None if it takes it."""
    distiller = find_method(method_of(method))
    try:
        distiller.check(build(distiller.Config, case(method).options, "method"), family)
    except ValueError as reason:
        return str(reason)
    return None


def teacher_for(method: str) -> Family:
    reasons = {}
    for name, make in PIXELS.items():
        reasons[name] = refusal(method, family := make())
        if reasons[name] is None:
            return family
    raise AssertionError(f"{method} refuses every tiny teacher: {reasons}")


# ------------------------------------------------------------------------------------------------- files


def save_teacher(family: Family, folder: Path) -> Path:
    """The teacher as a diffusers directory, its own scheduler config in it."""
    one_step = DDIM(family.schedule, family.schedule.grid(1))
    save_pipeline(family.pipeline(family.network, one_step, 1.0), folder)
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(dict(family.scheduler_config)))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", family.scheduler_config.get("_class_name", "DDIMScheduler")]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def teacher_section(family: Family, folder: Path) -> dict[str, Any]:
    """The ``teacher`` section that opens what :func:`save_teacher` wrote at the size of the miniature."""
    size = family.image_shape[-2:]
    observed = {"family": "observed"} if isinstance(family, Observed) else {}
    if not isinstance(family, LatentFamily) or (not observed and size == family.native_size()):
        return {"path": str(folder)}
    frames = {"frames": family.image_shape[1]} if family.makes_clips else {}
    return {"path": str(folder), "resolution": size[0] if size[0] == size[1] else list(size), **frames, **observed}


def save_images(family: Family, path: Path, count: int = 16) -> Path:
    """Smooth random images of the teacher's size, each class equally often."""
    channels, *size = family.image_shape
    random = np.random.default_rng(0)
    flat = (count, *[1] * len(size), channels)
    images = random.integers(0, 256, flat) + random.integers(-40, 40, (count, *size, 1))
    labels = {"labels": np.arange(count) % family.num_classes} if family.num_classes else {}
    if family.takes_text:
        labels = {"captions": np.array([f"picture {i}" for i in range(count)])}
    np.savez(path, images=images.clip(0, 255).astype(np.uint8), **labels)
    return path


def save_data(family: Family, folder: Path) -> None:
    """Images, or for a teacher that encodes none prompts and samples of its own."""
    if family.encodes_images:
        save_images(family, folder / "images.npz")
        return
    (folder / "prompts.txt").write_text("\n".join(f"picture {i}" for i in range(16)))
    config = PairsConfig(
        output_dir=str(folder / "pairs"), count=16, solver="euler", steps=2, prompts=str(folder / "prompts.txt")
    )
    make_pairs(family, config)


def data_of(family: Family, method: str, folder: Path) -> dict[str, str]:
    """The source in ``folder`` that a method needs."""
    if family.encodes_images:
        return {"name": "images", "path": str(folder / "images.npz")}
    if find_method(method_of(method)).needs_images:
        return {"name": "pairs", "path": str(folder / "pairs")}
    return {"name": "prompts", "path": str(folder / "prompts.txt")}


def sections(folder: Path, family: Family, method: str, bank: str = "copy", **train: Any) -> dict[str, Any]:
    """A whole configuration around a tiny teacher; teacher and data lie in ``folder``, the run in ``folder/run``."""
    if not (folder / "teacher").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        save_teacher(family, folder / "teacher")
        save_data(family, folder)
    # an eps above the rounding of gradients: Adam would make steps of it where the true gradient is zero
    optim = {turn: {"lr": 5e-3, "eps": 1e-4} for turn in find_method(method_of(method)).turn_names}
    return {
        "teacher": teacher_section(family, folder / "teacher"),
        "method": {"name": method_of(method), **case(method).options},
        "bank": {"name": bank, "rank": 4},
        "data": {**data_of(family, method, folder), "batch_size": 4},
        "optim": optim,
        "train": {"steps": STEPS, "output_dir": str(folder / "run"), "log_every": 1, **train},
    }


def train_student(
    folder: Path, family: Family, method: str, bank: str, *, options: Mapping[str, Any] = NOTHING,
    data: Mapping[str, Any] = NOTHING,
) -> Run:  # fmt: skip
    """A finished run of a few steps, with other ``options`` of the method, or other ``data``."""
    staged = {"start", "num_stages", "warmup"} & case(method).options.keys()
    wanted = sections(folder, family, method, bank, steps=STEPS if staged else 2)
    wanted["method"] |= options
    wanted["data"] |= data
    run = Run(resolve(wanted))
    run.train()
    return run


def make_run(folder: Path, method: str, bank: str = "copy", **train: Any) -> Run:
    return Run(resolve(sections(folder, teacher_for(method), method, bank, **train)))


def make_trainer(run: Run) -> Trainer:
    trainer = run.trainer()
    run.distiller.stage = run.distiller.stages(run.config.train.steps)[0]
    trainer._begin_stage()
    return trainer


# ---------------------------------------------------------------------------------------------- training


@contextmanager
def stopping_after(step: int) -> Iterator[None]:
    """Runs get a request to stop in the middle of ``step``, as SIGTERM would make it."""
    original = Trainer._step

    def ask(self: Trainer, *args: Any) -> dict[str, Tensor]:
        self.stop.received |= signal.SIGTERM * (self.step + 1 == step)
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", ask)
        yield


def train_until(run: Run, step: int) -> None:
    with stopping_after(step), pytest.raises(SystemExit) as leaving:
        run.train()
    assert leaving.value.code == 143


def checkpoint_bytes(folder: Path, step: int) -> dict[str, bytes]:
    """Weights and optimisers of a checkpoint, to the bit."""
    return {path.name: path.read_bytes() for path in (folder / f"checkpoint-{step}").glob("*.safetensors")}


def weights(run: Run) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in run.distiller.state_dict().items()}


def generators(count: int, seed: int) -> list[torch.Generator]:
    """One generator an image."""
    return [torch.Generator().manual_seed(seed + index) for index in range(count)]


@torch.no_grad()
def reference_images(run: Run, count: int, seed: int, *, handed: bool = True) -> Tensor:
    """What the trainer's sampler makes of the result, from the noise that a pipeline draws with these generators.

    Not every stock pipeline hands them to its scheduler: without, later noise is the global generator's.
    """
    own = generators(count, seed)

    def noise(x: Tensor) -> Tensor:
        return torch.stack([torch.randn(x.shape[1:], generator=one) for one in own])

    def later(x: Tensor) -> Tensor:
        seen = family.pack(x)
        return family.unpack(noise(seen) if handed else torch.randn(seen.shape))

    family, distiller = run.distiller.family, run.distiller
    start = family.schedule.initial_noise(noise(torch.empty(count, *family.sample_shape)))
    torch.manual_seed(seed + 1)
    return family.decode(
        sample(
            distiller.result.conditioned(family.example_cond(range(count))),
            distiller.sampler(),
            start,
            later,
        )
    )


def pipeline_images(pipeline: Any, family: Family, count: int, seed: int, **options: Any) -> Tensor:
    """Images (B, C, H, W) of a pipeline for the family's example conditions; nothing else is seeded."""
    pipeline.set_progress_bar_config(disable=True)
    asked = asked_of(family, count)
    (images,) = pipeline(**asked, generator=generators(count, seed), output_type="np", return_dict=False, **options)[:1]
    return torch.from_numpy(np.asarray(images)).movedim(-1, 1)


def asked_of(family: Family, count: int) -> dict[str, Any]:
    """The arguments of a pipeline's call that ask for the family's example conditions."""
    match family.conditioning:
        case "prompt":
            return {"prompt": family.example_prompts(range(count))}
        case "class_labels":
            return {"class_labels": family.example_cond(range(count))["class_labels"].tolist()}
        case _:
            return {"batch_size": count}
