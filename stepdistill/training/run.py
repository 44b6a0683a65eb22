"""From a configuration to a finished student, for the console, the scripts and Python callers."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from stepdistill import config as configuration
from stepdistill.data.base import locate_data
from stepdistill.data.columns import other_texts
from stepdistill.data.inventory import take_inventory
from stepdistill.data.latent_cache import encoders
from stepdistill.data.opening import check_apart, open_dataset
from stepdistill.discriminators.backbones import check_sizes
from stepdistill.export.contract import Origin
from stepdistill.export.links import check_links, frozen_folders
from stepdistill.export.pipeline import ExportConfig, export_pipeline
from stepdistill.export.provenance import public_name, teacher_license
from stepdistill.export.replacing import check_replaceable
from stepdistill.export.servers import dmd2_keys
from stepdistill.export.sharing import check_upload, upload
from stepdistill.families.additions import triggers
from stepdistill.families.base import Family, Inputs
from stepdistill.families.hub import locate
from stepdistill.families.loading import load_teacher
from stepdistill.files.writing import atomic_write, check_writable, writing_to
from stepdistill.inference.student import SampleSheets
from stepdistill.methods import find_method
from stepdistill.methods.base import Stage
from stepdistill.networks.adapter_bank import AdapterBank
from stepdistill.networks.bank import NetworkBank
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.networks.fingerprint import fingerprint_weights
from stepdistill.networks.launcher import check_environment
from stepdistill.networks.quantization import check_quantization
from stepdistill.networks.sharding import gathered, is_main
from stepdistill.training.config import SECTIONS, BankConfig, RunConfig, resolve
from stepdistill.training.cost import TrainingCost
from stepdistill.training.evaluation import Evaluation
from stepdistill.training.heartbeat import naming_a_failed_start
from stepdistill.training.identity import INVENTORY, RunIdentity, identify
from stepdistill.training.length import check_length
from stepdistill.training.memory import memory_plan
from stepdistill.training.optimizers import check_heads, check_installed
from stepdistill.training.parallelism import check_tracker, tracking
from stepdistill.training.run_lock import RunLock
from stepdistill.training.students import cost_of, read_student, warn_of_a_student, warn_of_another_sampler
from stepdistill.training.trainer import Trainer


class Run:
    """Everything that is built before the first training step.

    Raises:
        ValueError: for anything in the configuration that would make the run fail later.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.folder = Path(config.train.output_dir)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"train.output_dir: expected a folder, got the file {self.folder}")
        check_output(self.folder / "pipeline", config)
        check_apart(config.data, self.folder)
        check_environment()
        check_tracker(config.train.tracker)
        check_installed(config.optim)
        if config.teacher.quantization is not None:
            check_quantization(config.teacher.quantization, config.bank.name)
        torch.manual_seed(config.train.seed)
        self.family = load_teacher(config.teacher)
        warn_of_a_student(config.teacher, getattr(config.method, "start", None))
        self.triggers = triggers(config.teacher)  # now, while the files are there
        self.license = teacher_license(locate(config.teacher))
        copied = config.export.frozen == "copy"
        self.links = {} if copied else frozen_folders(locate(config.teacher), self.family, config.teacher)
        self.method = find_method(config.method_name)
        self.method.check(config.method, self.family)
        needs_images = self.method.trains_on_images(config.method)
        if needs_images and config.data.name not in ("images", "cache", "pairs"):
            raise ValueError(
                f"data.name: expected 'images', 'cache' or 'pairs' ({config.method_name!r} trains on images), "
                f"got {config.data.name!r}"
            )
        self.dataset = open_dataset(config.data, self.family, needs_images=needs_images)
        if self.dataset.captions is not None:
            self.family.use_captions(self.dataset.captions, other_texts(self.dataset.choices))
        with torch.random.fork_rng(devices=()):  # heads begin with the same weights whether a run is measured or not
            self.evaluation = Evaluation.open(config.eval, self.folder, self.family)
        self.teacher_fingerprint = fingerprint_weights(self.family.network)
        self.family.add_inputs(self.method.extra_inputs(config.method))
        self.family.widen(self.method.head_points(config.method))
        bank = make_bank(self.family, config.bank)
        self.start_cost = cost_of(config.bank.init_from)
        start = (
            None if config.bank.init_from is None else read_student(config.bank.init_from, config.teacher, self.family)
        )
        self.distiller = self.method(self.family, bank, config.method, ema=config.train.ema > 0, start=start)
        self._check_distiller()
        quantize(bank, config.teacher.quantization)
        warn_of_another_sampler(config.bank.init_from, self.method.make_sampler(config.method, self.family))
        self.sheets = SampleSheets(self.distiller, config.train.seed)
        self.selected: dict[str, Any] | None = None
        """Step and measurement by which the exported student was selected; None for the last student."""

    def _check_distiller(self) -> None:
        """Raise ``ValueError`` for what the method's stages, turns and networks would make fail later."""
        config, networks = self.config, self.distiller.feature_networks()
        check_length(self.distiller, config.train.steps)
        for stage in self.exported_stages():
            check_output(self.stage_folder(stage), config)
        check_heads(self.distiller, config.optim)
        check_sizes(networks, self.family.image_shape[0], config.data.buckets)
        self.evaluation.check_independent(networks)

    @property
    def identity(self) -> RunIdentity:
        """What must agree for a run to be resumed."""
        versions = {"teacher (weights)": self.teacher_fingerprint}
        if self.config.teacher.lora or self.config.teacher.embeddings:
            versions["teacher (encoders)"] = configuration.fingerprint_json(encoders(self.family))
        if self.dataset.version is not None:
            versions["data (version)"] = self.dataset.version
        data = take_inventory(self.dataset, locate_data(self.config.data).path)
        return identify(self.config, self.method, versions | self.distiller.versions, data)

    def plan(self) -> str:
        """Return the resolved configuration, and what will be held in memory, for ``--dry_run``."""
        resolved = configuration.to_yaml(self.config.as_sections())
        return f"{resolved}\n{memory_plan(self.distiller, self.config, encoded=self.dataset.is_encoded)}"

    def trainer(self) -> Trainer:
        """Return the loop over this run."""
        return Trainer(self.distiller, self.dataset, self.config, self.identity, self.evaluation)

    def train(self) -> Path:
        """Train, export, and return the pipeline's folder."""
        with writing_to(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with naming_a_failed_start():
            trainer = self.trainer()
        is_main_process = trainer.accelerator.is_main_process
        hub = self.config.export if is_main_process else ExportConfig()
        if hub.push_to_hub is not None:
            check_upload(hub.push_to_hub, private=hub.private)
        with RunLock(self.folder) if is_main_process else contextlib.nullcontext(), trainer.watched():
            start = trainer.restore()  # or refuse, before anything is written
            if is_main_process:
                if trainer.step == 0:
                    check_own_config(self.folder / "config.yaml")
                else:
                    print(f"resuming after step {trainer.step} of {self.config.train.steps}")
                self._write_config(trainer.identity)
            with tracking(trainer.accelerator), contextlib.closing(trainer.run(start)) as finished_stages:
                for stage in finished_stages:
                    self._end_stage(trainer, stage)
            cost = trainer.total_cost()
            if trainer.parallelism.participates:
                self.choose(trainer)
                self.export(self.folder / "pipeline", cost)
            trainer.accelerator.wait_for_everyone()
        if hub.push_to_hub is not None:  # the others no longer wait
            print(f"uploaded: {upload(self.folder / 'pipeline', hub.push_to_hub, private=hub.private)}")
        return self.folder / "pipeline"

    def _write_config(self, identity: RunIdentity) -> None:
        if self.links:
            check_links(self.folder)
        path = self.folder / "config.yaml"
        with writing_to(path), atomic_write(path) as partial:
            partial.write_text(configuration.to_yaml(self.config.as_sections()))
        if identity.data.parts:
            with writing_to(self.folder / INVENTORY):
                identity.data.write(self.folder / INVENTORY)

    def _end_stage(self, trainer: Trainer, stage: Stage) -> None:
        cost = trainer.total_cost()
        if trainer.parallelism.participates:
            self.export_stage(stage, cost)
        trainer.accelerator.wait_for_everyone()

    def choose(self, trainer: Trainer) -> None:
        """Restore the best student that was measured in the last stage, if this run measures distances."""
        if not (distances := self.evaluation.distances):
            return  # an earlier part of the run may have measured, which says nothing of the rest
        record = self.evaluation.best.record(self.distiller.stage.name)
        if record is None or record["metric"] not in distances:
            return
        self.selected = record
        self.evaluation.best.restore(trainer.result_weights())

    def exported_stages(self) -> list[Stage]:
        """Return the stages, without the last, after which a student of other steps than the finished one is there."""
        *earlier, _ = self.distiller.stages(self.config.train.steps)
        finished = self.config.method.steps
        return [stage for stage in earlier if isinstance(stage.value, int) and stage.value != finished]

    def stage_folder(self, stage: Stage) -> Path:
        """Return where the student of a stage is exported to."""
        return self.folder / f"pipeline-{stage.name}"

    def export_stage(self, stage: Stage, cost: TrainingCost) -> None:
        """Export the student of every stage but the last that has a sampler diffusers can express."""
        if stage in self.exported_stages():
            try:
                self.export(self.stage_folder(stage), cost)
            except ValueError as reason:
                print(f"stage {stage.name} is not exported: {reason}")

    def export_checkpoint(self, folder: Path) -> Path:
        """Write the student of the run's newest checkpoint."""
        check_output(folder, self.config)
        trainer = self.trainer()
        trainer.restore()
        if trainer.step == 0:
            raise ValueError(f"train.output_dir: no checkpoint in {self.folder}")
        return self.export(folder, trainer.total_cost())

    def export_start(self, folder: Path, steps: int | None = None) -> Path:
        """Write the student as it is before its first training step, under the method's own sampler.

        Args:
            folder: to write.
            steps: number of steps of the stage whose sampler it is; by default, or if there is none, the last's.

        Raises:
            ValueError: if the weights are no such student yet: the first stage converts what they predict.
        """
        if self.distiller.converts:
            raise ValueError(f"{self.folder}: expected a student at step 0, got a prediction still to be converted")
        check_output(folder, self.config)
        stages = self.distiller.stages(self.config.train.steps)
        self.distiller.stage = next((stage for stage in stages if stage.value == steps), stages[-1])
        return self.export(folder, TrainingCost())

    def export(self, folder: Path, cost: TrainingCost) -> Path:
        """Write the pipeline of the student as it is now, with what it cost; return its folder."""
        start, cost = self.config.bank.init_from, cost + self.start_cost
        earlier = dataclasses.asdict(self.start_cost) if self.start_cost.steps else {}
        critic = {key: network.sha256 for key, network in self.distiller.feature_networks().items()}
        origin = Origin(
            method=self.config.method_name,
            teacher=self.config.teacher.path,
            teacher_options=self.config.teacher.options(),
            triggers=self.triggers,
            teacher_sha256=self.teacher_fingerprint,
            license=self.license,
            data=None if self.config.data.path is None else public_name(self.config.data.path),
            guidance_distilled=getattr(self.config.method, "guidance_scale", 1.0),
            config_hash=configuration.fingerprint_json(self.config.as_sections()),
            training=dataclasses.asdict(cost) if cost.steps else {},
            critic=critic,
            start={} if start is None else {"path": start, "training": earlier},
            method_facts=self.distiller.contract(),
            selected=self.selected or {},
            results=self.evaluation.results(self.distiller),
            measured_on=self.evaluation.measured_on(),
        )
        samples = self.sheets.make()
        with self.distiller.bank.beside_teacher(self.distiller.result_role):
            network, lora = self.distiller.bank.extract(self.distiller.result_role), self.lora()
        if not is_main():  # this process has only contributed its shards of the weights
            return folder
        scale, sampler = 1 + (self.distiller.result.w or 0.0), self.distiller.sampler()
        export_pipeline(
            self.distiller.family, network.cpu(), sampler, folder,
            origin=origin, guidance_scale=scale, lora=lora, links=self.links, samples=samples,
            index=dmd2_keys(sampler, scale) if self.distiller.serves_as_dmd2 else {},
        )  # fmt: skip
        return folder

    def lora(self) -> dict[str, Tensor] | None:
        """Return the student's adapter, or None if stock diffusers could not load it into the teacher."""
        bank, family = self.distiller.bank, self.distiller.family
        adapter = bank.lora_state(self.distiller.result_role)
        if adapter is None or not family.loads_lora or family.inputs != Inputs() or family.points != 1:
            return None
        state = gathered(adapter, keep=is_main())
        return {name: tensor.float().cpu().contiguous() for name, tensor in state.items()}


def distill(
    *, teacher: str, method: str | Mapping[str, Any], data: str | Mapping[str, Any], output_dir: str, **sections: Any
) -> Path:
    """Distil a teacher, as ``stepdistill train`` does.

    Args:
        teacher: a diffusers directory, a hub id, or ``"embedded"``.
        method: a method's name, or its section (``{"name": "progressive", "steps": 4}``).
        data: a path of images, or the data section.
        output_dir: the run's folder; the same call again resumes it.
        sections: further sections: ``train={"steps": 2000}``, ``bank``, ``optim``, ``teacher_options``.

    Returns:
        The exported pipeline's folder.
    """
    given = configuration.to_dict(sections)
    mapping = {
        "teacher": configuration.section(given.pop("teacher_options", None), path=teacher),
        "method": {"name": method} if isinstance(method, str) else method,
        "data": {"name": "images", "path": data} if isinstance(data, (str, Path)) else data,
        "train": configuration.section(given.pop("train", None), {"steps": 2000}, output_dir=output_dir),
        **given,
    }
    config = resolve(configuration.to_dict(mapping))
    check_writable(Path(config.train.output_dir))
    return Run(config).train()


def check_output(folder: Path, config: RunConfig) -> None:
    """Raise ``ValueError`` if an export to ``folder`` would replace something other than an export.

    That is: files of the user's, the run itself, its teacher, or the student that it started from.
    """
    used = (config.train.output_dir, config.teacher.path, config.bank.init_from)
    check_replaceable(folder, tuple(path for path in used if path is not None))


def check_own_config(path: Path) -> None:
    """Raise ``ValueError`` if a run that begins would replace a configuration that no run wrote."""
    if not path.is_file():
        return
    sections = configuration.read_config(path)
    if sections.keys() != {*SECTIONS} or path.read_text("utf-8") != configuration.to_yaml(sections):
        raise ValueError(f"{path}: expected none, or that of a run, got another, which train.output_dir would replace")


def make_bank(family: Family, config: BankConfig) -> NetworkBank:
    """Return the networks of a configuration's memory policy, around an opened teacher."""
    if config.name == "copy":
        return CopyBank(family.network)
    return AdapterBank(family.network, rank=config.rank, targets=family.lora_targets)


def quantize(bank: NetworkBank, form: str | None) -> None:
    """Hold the frozen layers of a bank of adapters in fewer bits, if asked to, when all its roles are there."""
    if form is not None:
        cast(AdapterBank, bank).quantize(form)
