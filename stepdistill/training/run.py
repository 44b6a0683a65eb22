"""From a configuration to a finished student: the one path that scripts, console and Python callers take."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill import config as configuration
from stepdistill.data.base import Dataset, locate_data
from stepdistill.data.datasets import open_data
from stepdistill.data.latent_cache import CacheData
from stepdistill.evaluation.suite import Judge
from stepdistill.export.contract import Origin, read_contract
from stepdistill.export.links import check_links, frozen_folders
from stepdistill.export.pipeline import export_pipeline
from stepdistill.families.base import Family, Inputs
from stepdistill.families.config import TeacherConfig
from stepdistill.families.loading import load_teacher, locate
from stepdistill.features.identity import refuse_judge
from stepdistill.inference.student import student_images
from stepdistill.methods import find_method
from stepdistill.methods.base import Stage
from stepdistill.networks.adapter_bank import AdapterBank
from stepdistill.networks.bank import NetworkBank
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.networks.fingerprint import fingerprint_weights
from stepdistill.networks.sharding import gathered, is_main
from stepdistill.training.config import FREE_KEYS, BankConfig, RunConfig, resolve
from stepdistill.training.cost import TrainingCost
from stepdistill.training.memory import memory_plan
from stepdistill.training.run_lock import RunLock
from stepdistill.training.trainer import Trainer


class Run:
    """Everything that is built before the first training step.

    Raises:
        ValueError: for any input that could only fail later.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.folder = Path(config.train.output_dir)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"train.output_dir: {self.folder} is a file, wanted a folder")
        torch.manual_seed(config.train.seed)
        self.family = load_teacher(config.teacher)
        copied = config.export.frozen == "copy"
        self.links = {} if copied else frozen_folders(locate(config.teacher), self.family)
        self.method = find_method(config.method_name)
        self.method.check(config.method, self.family)
        channels, height, width = self.family.image_shape
        if self.method.needs_images and config.data.name not in ("images", "cache"):
            raise ValueError(
                f"data.name: {config.method_name!r} trains on images; found {config.data.name!r}, wanted 'images'"
            )
        if config.data.name == "cache":
            self.dataset: Dataset = CacheData(config.data, self.family, needs_images=self.method.needs_images)
        else:
            self.dataset = open_data(
                locate_data(config.data), channels=channels, size=(height, width), num_classes=self.family.num_classes,
                takes_text=self.family.takes_text,
            )  # fmt: skip
        if self.dataset.captions is not None:
            self.family.use_captions(self.dataset.captions)
        self.judge = Judge.open(config.eval.features, config.eval.reference) if config.eval.every else None
        self.teacher_fingerprint = fingerprint_weights(self.family.network)
        self.family.add_inputs(self.method.extra_inputs(config.method))
        bank = make_bank(self.family, config.bank)
        start = (
            None if config.bank.init_from is None else read_student(config.bank.init_from, config.teacher, self.family)
        )
        self.distiller = self.method(self.family, bank, config.method, ema=config.train.ema > 0, start=start)
        self.selected: dict[str, Any] | None = None
        """Of which step, and by which measurement, the exported student is; None is the last."""
        if self.judge is not None:
            refuse_judge(self.distiller.feature_networks(), self.judge.features)

    @property
    def identity(self) -> dict[str, Any]:
        """What must agree for a run to be resumed."""
        flat = configuration.flatten(self.config.as_sections())
        free = {*FREE_KEYS, *(f"method.{name}" for name in self.method.sampling_options)}
        found = {"teacher (weights)": self.teacher_fingerprint}
        if self.dataset.version is not None:
            found["data (version)"] = self.dataset.version
        return {key: value for key, value in flat.items() if key not in free} | found

    @property
    def defaults(self) -> dict[str, Any]:
        """What a key of the identity is where a configuration does not name it."""
        sections = {name: getattr(self.config, name) for name in ("teacher", "method", "bank", "data", "train")}
        sections |= {f"optim.{turn}": config for turn, config in self.config.optim.items()}
        flat = configuration.flatten(
            {f"{name}.{field.name}": field.default for name, config in sections.items()
             for field in dataclasses.fields(config) if field.default is not dataclasses.MISSING}
        )  # fmt: skip
        identity = self.identity
        return {key: value for key, value in flat.items() if key in identity}

    def plan(self) -> str:
        """The resolved configuration and what will be held in memory, for ``--dry_run``."""
        return (
            configuration.to_yaml(self.config.as_sections())
            + "\n"
            + memory_plan(self.distiller, encoded=isinstance(self.dataset, CacheData))
        )

    def trainer(self) -> Trainer:
        """The loop over this run."""
        return Trainer(
            self.distiller,
            self.dataset,
            batch_size=self.config.data.batch_size,
            config=self.config.train,
            optim=self.config.optim,
            identity=self.identity,
            defaults=self.defaults,
            num_workers=self.config.data.num_workers,
            on_stage_end=self.export_stage,
            measure=self.measure,
            measure_every=self.config.eval.every,
            measured_on=self.measured_on(),
        )

    def train(self) -> Path:
        """Train, export, and return the pipeline directory."""
        self.folder.mkdir(parents=True, exist_ok=True)
        trainer = self.trainer()
        lock = RunLock(self.folder) if trainer.accelerator.is_main_process else _NoLock()
        with lock:
            first, done = trainer.restore()  # or refuse, before anything is written
            if trainer.accelerator.is_main_process:
                if self.links:
                    check_links(self.folder)
                (self.folder / "config.yaml").write_text(configuration.to_yaml(self.config.as_sections()))
            cost = trainer.run(first, done)
            if trainer.participates:
                self.choose(trainer)
                self.export(self.folder / "pipeline", cost)
            trainer.accelerator.wait_for_everyone()
        return self.folder / "pipeline"

    def measured_on(self) -> dict[str, Any]:
        """What the numbers of :meth:`measure` depend on, beside the student."""
        if self.judge is None:
            return {}
        judges = {"features": self.judge.features.name, "features_sha256": self.judge.features.sha256}
        samples = {"num_samples": self.config.eval.num_samples, "seed": self.config.eval.seed}
        return {**judges, "reference": self.judge.describe_reference(), **samples}

    def measure(self) -> dict[str, float]:
        """The metrics of the ``eval`` section, of the student as it is now."""
        assert self.judge is not None
        config = self.config.eval
        device = next(self.distiller.parameters()).device
        images = student_images(self.distiller, config.num_samples, seed=config.seed, device=device)
        return self.judge.score(images, config.metrics)

    def choose(self, trainer: Trainer) -> None:
        """Go back to the best student that was measured in the last stage, if any was."""
        self.selected = trainer.best.record(self.distiller.stage.name)
        if self.selected is not None:
            trainer.best.restore(trainer.result_weights())

    def export_stage(self, stage: Stage, cost: TrainingCost) -> None:
        """Export the student of every stage that has a sampler diffusers can express."""
        if isinstance(stage.value, int) and stage.value != self.config.method.steps:
            try:
                self.export(self.folder / f"pipeline-{stage.name}", cost)
            except ValueError as reason:
                print(f"stage {stage.name} is not exported: {reason}")

    def export_checkpoint(self, folder: Path) -> Path:
        """Write the student of the run's newest checkpoint."""
        trainer = self.trainer()
        trainer.restore()
        if trainer.step == 0:
            raise ValueError(f"train.output_dir: no checkpoint in {self.folder}")
        return self.export(folder, trainer.total_cost())

    def export(self, folder: Path, cost: TrainingCost) -> Path:
        """Write the student as it is now, and what it cost."""
        start = self.config.bank.init_from
        earlier = {} if start is None else read_contract(Path(start)).origin.training
        cost += TrainingCost(**earlier)
        critic = {key: network.sha256 for key, network in self.distiller.feature_networks().items()}
        origin = Origin(
            method=self.config.method_name,
            teacher=self.config.teacher.path,
            teacher_sha256=self.teacher_fingerprint,
            guidance_distilled=getattr(self.config.method, "guidance_scale", 1.0),
            config_hash=configuration.fingerprint(self.config.as_sections()),
            training=dataclasses.asdict(cost) if cost.steps else {},
            critic=critic,
            start={} if start is None else {"path": start, "training": earlier},
            method_facts=self.distiller.contract(),
            selected=self.selected or {},
            results={} if self.judge is None else self.measure() | {"num_samples": self.config.eval.num_samples},
        )
        network, lora = self.distiller.bank.extract(self.distiller.result_role), self.lora()
        if not is_main():  # a process that has only given its share of the weights
            return folder
        scale = 1 + (self.distiller.result.w or 0.0)
        export_pipeline(
            self.distiller.family, network.cpu(), self.distiller.sampler(), folder,
            origin=origin, guidance_scale=scale, lora=lora, links=self.links,
        )  # fmt: skip
        grids = sorted((self.folder / "samples").glob("step-*.png"))
        if grids:
            (folder / "samples.png").write_bytes(grids[-1].read_bytes())
        return folder

    def lora(self) -> dict[str, Tensor] | None:
        """The student's adapter, where stock diffusers can put one on the teacher; a further input is none."""
        bank, family = self.distiller.bank, self.distiller.family
        if not isinstance(bank, AdapterBank) or not family.loads_lora or family.inputs != Inputs():
            return None
        state = gathered(bank.lora_state(self.distiller.result_role), keep=is_main())
        return {name: tensor.float().cpu().contiguous() for name, tensor in state.items()}


class _NoLock:
    """What the other processes hold while the main one holds the run's lock."""

    def __enter__(self) -> None: ...

    def __exit__(self, *exception: object) -> None: ...


def distill(
    *, teacher: str, method: str | Mapping[str, Any], data: str | Mapping[str, Any], output_dir: str, **sections: Any
) -> Path:
    """Distil a teacher; the same as ``scripts/train.py``.

    Args:
        teacher: a diffusers directory, a hub id, or ``"embedded"``.
        method: a method's name, or its section (``{"name": "progressive", "steps": 4}``).
        data: a path of images, or the data section.
        output_dir: the run's folder; the same call again resumes there.
        sections: further sections: ``train={"steps": 2000}``, ``bank``, ``optim``, ``teacher_options``.

    Returns:
        The exported pipeline's directory.
    """
    mapping = {
        "teacher": {"path": str(teacher), **sections.pop("teacher_options", {})},
        "method": {"name": method} if isinstance(method, str) else dict(method),
        "data": {"name": "images", "path": str(data)} if isinstance(data, (str, Path)) else dict(data),
        "train": {"steps": 2000, **sections.pop("train", {}), "output_dir": str(output_dir)},
        **sections,
    }
    return Run(resolve(mapping)).train()


def make_bank(family: Family, config: BankConfig) -> NetworkBank:
    """The memory policy of a configuration around an opened teacher."""
    if config.name == "copy":
        return CopyBank(family.network)
    return AdapterBank(family.network, rank=config.rank, targets=family.lora_targets)


def read_student(folder: str, teacher: TeacherConfig, family: Family) -> dict[str, Tensor]:
    """The weights of a finished student, by name; what is trusted of its teacher is of it, too.

    Raises:
        ValueError: if the folder holds no pipeline, or not one of a student of this teacher.
    """
    try:
        student = load_teacher(
            TeacherConfig(path=folder, family=teacher.family, trust_remote_code=teacher.trust_remote_code)
        )
    except ValueError as error:
        raise ValueError(f"bank.init_from: {str(error).removeprefix('teacher.path: ')}") from error
    if student.prediction_type != family.prediction_type:
        raise ValueError(
            f"bank.init_from: {folder} predicts {student.prediction_type}, the teacher {family.prediction_type}; "
            "wanted a student of this teacher"
        )
    weights, own = student.network.state_dict(), family.network.state_dict()
    for name in sorted({*own, *weights}):
        found, wanted = (tuple(side[name].shape) if name in side else None for side in (weights, own))
        if found != wanted:
            raise ValueError(f"bank.init_from: {folder}: {name}: found {found}, wanted {wanted}, as the teacher has it")
    return weights
