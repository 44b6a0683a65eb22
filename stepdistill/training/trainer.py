"""The training loop, visible from top to bottom.

A run is stages of steps of turns of micro-batches. Everything a step needs is a pure function of (seed, step): the
data's order, every random number, the learning rate. So the state of a run is its weights, its optimisers and one
number, and a run that was killed and started again ends in the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list
from torch import Tensor
from tqdm.auto import tqdm

from stepdistill.batch import Batch
from stepdistill.data.base import Dataset
from stepdistill.data.latent_cache import CacheData
from stepdistill.data.loader import loader
from stepdistill.inference.grids import save_grid
from stepdistill.inference.student import student_images
from stepdistill.methods.base import Distiller, Stage, Turn
from stepdistill.networks.bank import EMA, STUDENT, TEACHER
from stepdistill.networks.sharding import gathered, write
from stepdistill.randomness import Draws, derive_seed
from stepdistill.training.checkpoint import (
    Checkpoint,
    check_identity,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    set_aside_later,
)
from stepdistill.training.config import RENAMED, TrainConfig
from stepdistill.training.cost import TrainingCost, counted, over_processes
from stepdistill.training.fsdp import agree, by_kind, clip_gradients, is_wanted, shard_bank
from stepdistill.training.guards import DivergenceError, DivergenceGuard, FiniteGuard, patience_of
from stepdistill.training.optimizer_state import optimizer_tensors, restore_optimizer
from stepdistill.training.optimizers import OptimConfig
from stepdistill.training.selection import BestStudent

logger = get_logger(__name__)


INTERRUPTED = 143
"""Exit code after a SIGTERM: the step was finished and saved."""


class Trainer:
    """Runs a distiller on data.

    Args:
        distiller: the method, its networks built.
        dataset: where raw batches come from.
        batch_size: images of one micro-batch of one process.
        config: the ``train`` section.
        optim: one entry a turn.
        identity: what must not change between a run and its resumption, flat ``{"section.key": value}``.
        defaults: what a checkpoint of an older version, which had no such key, is taken to have had.
        num_workers: processes that decode images.
        on_stage_end: called on the main process, and on all where networks are sharded, with the stage and the run's
            cost up to its end, for exports.
        measure: called on the main process every ``measure_every`` steps; what it returns is logged.
        measure_every: 0 is never.
        measured_on: what ``measure`` measures on, JSON values: the best student's record says so.
    """

    def __init__(
        self,
        distiller: Distiller,
        dataset: Dataset,
        *,
        batch_size: int,
        config: TrainConfig,
        optim: dict[str, OptimConfig],
        identity: dict[str, Any],
        defaults: Mapping[str, Any] = MappingProxyType({}),
        num_workers: int = 0,
        on_stage_end: Callable[[Stage, TrainingCost], None] | None = None,
        measure: Callable[[], dict[str, float]] = dict,
        measure_every: int = 0,
        measured_on: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.accelerator = make_accelerator(config)
        self.device = self.accelerator.device
        if config.gradient_checkpointing:
            distiller.bank.enable_checkpointing()
        self.sharded = is_wanted(self.accelerator)
        if self.sharded:
            shard_bank(distiller, self.accelerator)
        self.participates = self.sharded or self.accelerator.is_main_process
        """Whether this process samples and exports with the main one: it must, where each has a share of a network."""
        self.distiller = distiller.to(self.device)
        if not isinstance(dataset, CacheData):  # else what encodes is on the device to sample only
            distiller.family.to(self.device)
        self.dataset = dataset
        self.batch_size = batch_size
        self.config = config
        self.optim = optim
        self.identity = identity
        self.defaults = defaults
        self.num_workers = num_workers
        self.on_stage_end = on_stage_end
        self.measure = measure
        self.measure_every = measure_every
        self.folder = Path(config.output_dir)
        self.step = 0
        self.cost = TrainingCost()
        """This process's share; what a resumed run had cost before is in the main process's."""
        self.stop_requested = False
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.unwritten: dict[str, Tensor] = {}
        """The newest scalars of every turn that moved since the last row of the log, still on the device."""
        self.guard = FiniteGuard(self.device)
        self.divergence = DivergenceGuard(patience_of(config.steps))
        self.best = BestStudent(self.folder, measured_on)
        self.trained = [parameter for turn in distiller.turns.values() for parameter in turn.params]
        several = self.accelerator.num_processes > 1 and not self.sharded
        self.wrapped = self.accelerator.prepare(distiller) if several else distiller

    # ------------------------------------------------------------------------------------------------ the loop

    def run(self, first: int, done: int) -> TrainingCost:
        """Train to the end, from stage ``first`` of which ``done`` steps are made: where :meth:`restore` put it.

        Returns:
            What the run cost, over all processes and resumptions.
        """
        stages = self.distiller.stages(self.config.steps)
        self._take_up_log()
        if self.step == 0 and self.accelerator.is_main_process:
            self.best.forget()
        batches = self._batches()
        with self._progress(stages) as progress, self._signals():
            for index, stage in enumerate(stages[first:], start=first):
                self.distiller.stage = stage
                if done == 0:
                    self._begin_stage()
                for step_in_stage in range(done, stage.steps):
                    with counted(self.distiller.bank, self.cost):
                        logs = self._step(step_in_stage, [next(batches) for _ in range(self.config.accumulation)])
                        self.step += 1
                        self._report(logs, stage, step_in_stage + 1, progress)
                    self._after_step(stage, step_in_stage + 1, index)
                done = 0
                self._end_stage(stage)
        return self.total_cost()

    def _begin_stage(self) -> None:
        self.distiller.begin_stage()
        self.optimizers = {name: self._make_optimizer(turn) for name, turn in self.distiller.turns.items()}

    def _step(self, step_in_stage: int, batches: list[Batch]) -> dict[str, Tensor]:
        """One step: every turn that is due moves once; returns what to log, still on the device."""
        logs: dict[str, Tensor] = {}
        self.distiller.step_in_stage = step_in_stage
        self.distiller.bank.train()  # dropout, where the networks have it; sampling switches it off
        for turn in self.distiller.turns.values():
            if turn.when(self.step):
                logs |= self._move(turn, step_in_stage, batches)
        self.distiller.after_step()
        if self.config.ema:
            # a young average follows closely, so that it forgets the weights it started from
            keep = min(self.config.ema, (1 + step_in_stage) / (10 + step_in_stage))
            self.distiller.bank.blend(EMA, STUDENT, keep)
        self.cost.steps += 1
        self.cost.images += sum(batch.size for batch in batches)
        return logs

    def _move(self, turn: Turn, step_in_stage: int, batches: list[Batch]) -> dict[str, Tensor]:
        """Gradients over all micro-batches, then one step of the turn's optimiser."""
        optimizer, optim = self.optimizers[turn.name], self.optim[turn.name]
        self._train_only(turn)
        logs: dict[str, Tensor] = {}
        for micro, batch in enumerate(batches):
            last = micro == len(batches) - 1
            with contextlib.nullcontext() if last or self.sharded else self.accelerator.no_sync(self.wrapped):
                with self.accelerator.autocast():
                    losses = self.wrapped(turn.name, batch, self._draws(turn, micro, batch.size))
                self.accelerator.backward(sum(losses.terms.values()) / len(batches))
            for name, value in {**losses.terms, **losses.metrics}.items():
                key = f"{turn.name}/{name}"
                logs[key] = logs.get(key, 0) + value.detach() / len(batches)
        if self.sharded:
            agree(turn.params)
        clip = clip_gradients if self.sharded else torch.nn.utils.clip_grad_norm_
        logs[f"{turn.name}/grad_norm"] = clip(turn.params, optim.clip)
        flag = self.guard.check(self.step, turn.name, {k: v for k, v in logs.items() if v.ndim == 0})
        optimizer.found_inf = flag  # type: ignore[attr-defined]  # the step is skipped while it is 1
        for group in optimizer.param_groups:
            group["lr"] = optim.lr_at(step_in_stage, self.distiller.stage.steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return logs

    def _train_only(self, turn: Turn) -> None:
        """Gradients for this turn's parameters alone; they may still flow through the others."""
        for parameter in self.trained:
            parameter.requires_grad_(False)
        for parameter in turn.params:
            parameter.requires_grad_(True)

    def _draws(self, turn: Turn, micro: int, size: int) -> Draws:
        """A micro-batch of a process is a part of one large batch, whose numbers depend on no division into parts."""
        parts = self.config.accumulation * self.accelerator.num_processes
        part = micro * self.accelerator.num_processes + self.accelerator.process_index
        torch.manual_seed(derive_seed(self.config.seed, self.step, turn.name, part))  # dropout
        seed = derive_seed(self.config.seed, self.step, turn.name)
        return Draws(seed, size, rank=part, world=parts, device=self.device)

    def _make_optimizer(self, turn: Turn) -> torch.optim.Optimizer:
        return self.optim[turn.name].make(by_kind(turn.params))

    def _batches(self) -> Iterator[Batch]:
        raw = loader(
            self.dataset,
            batch_size=self.batch_size,
            seed=self.config.seed,
            start=self.step * self.config.accumulation,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            num_workers=self.num_workers,
        )
        encode = self.dataset.encode if isinstance(self.dataset, CacheData) else self.distiller.family.encode
        return (encode(batch).to(self.device) for batch in raw)

    # ---------------------------------------------------------------------------------------- beside the loop

    def _report(self, logs: dict[str, Tensor], stage: Stage, done: int, progress: tqdm) -> None:
        due = self.step % self.config.log_every == 0 or self.step == self.config.steps
        if self.device.type == "cpu" or due:
            self.guard.raise_if_tripped()
        progress.update()
        self.unwritten |= logs  # a turn that rests on this very step moved on an earlier one
        if due:
            self._log(self.unwritten, stage, done, progress)
            self.unwritten = {}

    def _after_step(self, stage: Stage, done: int, index: int) -> None:
        config, finished = self.config, self.step == self.config.steps
        if self.step % config.sample_every == 0 or finished:
            self._sample()
        if self.measure_every and (self.step % self.measure_every == 0 or finished):
            self._measure(stage)
        stop = self._stop_agreed()
        if self.step % config.save_every == 0 or finished or stop:
            self._save(stage, done, index)
        if stop and not finished:
            logger.warning(f"stopped on a signal after step {self.step}; the same command goes on from there")
            raise SystemExit(INTERRUPTED)

    def _log(self, logs: dict[str, Tensor], stage: Stage, done: int, progress: tqdm) -> None:
        values = {name: round(float(value), 6) for name, value in logs.items()}
        lrs = {f"{name}/lr": optimizer.param_groups[0]["lr"] for name, optimizer in self.optimizers.items()}
        self._write_row(stage, values | lrs)
        self._check_divergence(values)
        shown = {name.replace("/", " "): f"{value:.4g}" for name, value in values.items() if "grad_norm" not in name}
        progress.set_description(f"{stage.name} {done}/{stage.steps}")
        progress.set_postfix(shown)

    def _check_divergence(self, values: dict[str, float]) -> None:
        """Stop where training has diverged, and leave the last checkpoint from before as the newest."""
        try:
            self.divergence.check(self.step, values)
        except DivergenceError as error:
            if not self.accelerator.is_main_process:
                raise
            good = self.divergence.good_until
            assert good is not None
            raise DivergenceError(f"{error}. {set_aside_later(self.folder, good)}") from None

    def _write_row(self, stage: Stage, values: dict[str, float]) -> None:
        self.accelerator.log(values, step=self.step)
        if not self.accelerator.is_main_process:
            return
        row = {"step": self.step, "stage": stage.name, "time": round(time.time(), 2)} | values
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _measure(self, stage: Stage) -> None:
        main = self.accelerator.is_main_process
        values = self.measure() if self.participates else {}
        self._write_row(stage, {f"eval/{name}": value for name, value in values.items()})
        weights = gathered(self.result_weights(), keep=main)
        if main:
            self.best.offer(stage.name, self.step, values, weights)
        self.accelerator.wait_for_everyone()

    def _sample(self, count: int = 32) -> None:
        """A grid of the result role's samples: fixed noise, fixed conditions."""
        if not self.participates:
            return
        with self.accelerator.autocast():
            images = student_images(self.distiller, count, seed=self.config.seed, device=self.device)
        if self.accelerator.is_main_process:
            save_grid(images.pixels / 255, self.folder / "samples" / f"step-{self.step:06d}.png")

    def _end_stage(self, stage: Stage) -> None:
        cost = self.total_cost()
        if self.on_stage_end is not None and self.participates:
            self.on_stage_end(stage, cost)
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def _progress(self, stages: list[Stage]) -> Iterator[tqdm]:
        disable = not self.accelerator.is_local_main_process
        with tqdm(total=sum(s.steps for s in stages), initial=self.step, disable=disable, dynamic_ncols=True) as bar:
            yield bar

    def _stop_agreed(self) -> bool:
        """Whether any process was asked to stop; several processes ask each other when they log."""
        if self.accelerator.num_processes == 1:
            return self.stop_requested
        if self.step % self.config.log_every:
            return False
        asked = torch.tensor(float(self.stop_requested), device=self.device)
        return bool(self.accelerator.reduce(asked, reduction="sum").item())

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM finishes the step, saves and leaves; a second one leaves at once."""

        def request(number: int, frame: object) -> None:
            del frame
            self.stop_requested = True
            signal.signal(number, signal.SIG_DFL)

        before = signal.signal(signal.SIGTERM, request)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    # -------------------------------------------------------------------------------------------- checkpoints

    def _weights(self) -> dict[str, Tensor]:
        """Everything training made: all roles but the teacher, and the method's own modules."""
        bank, prefix = self.distiller.bank, "bank."
        roles = {f"{role}/{k}": v for role in bank.roles if role != TEACHER for k, v in bank.state(role).items()}
        own = {k: v for k, v in self.distiller.state_dict().items() if not k.startswith(prefix)}
        return roles | own

    def result_weights(self) -> dict[str, Tensor]:
        """The tensors of the role that is measured and exported."""
        return self.distiller.bank.state(self.distiller.result_role)

    def _save(self, stage: Stage, done: int, index: int) -> None:
        cost, main = dataclasses.asdict(self.total_cost()), self.accelerator.is_main_process
        groups = {"weights": self._weights()}
        groups |= {f"optimizer-{name}": optimizer_tensors(opt) for name, opt in self.optimizers.items()}
        groups = {name: gathered(tensors, keep=main) for name, tensors in groups.items()}
        if main:
            state = {"stage": index, "stage_name": stage.name, "done": done, "cost": cost, "config": self.identity}
            save_checkpoint(
                self.folder, self.step, groups, state, keep=self.config.keep, spare=self.divergence.good_until
            )
        self.accelerator.wait_for_everyone()

    def restore(self) -> tuple[int, int]:
        """Load the newest checkpoint, if any; returns the stage to go on with and its steps already done."""
        checkpoint = self._newest_checkpoint()
        if checkpoint is None:
            return 0, 0
        check_identity(checkpoint, self.identity, self.defaults, renamed=RENAMED)
        index, done = checkpoint.state["stage"], checkpoint.state["done"]
        self.distiller.stage = self.distiller.stages(self.config.steps)[index]
        self._load_weights(checkpoint.tensors("weights"))
        for name, turn in self.distiller.turns.items():
            self.optimizers[name] = self._make_optimizer(turn)
            restore_optimizer(self.optimizers[name], checkpoint.tensors(f"optimizer-{name}"))
        self.step = checkpoint.step
        if self.accelerator.is_main_process:
            # a run from before costs were kept goes on from zero: the steps that are counted tell
            self.cost = TrainingCost(**checkpoint.state.get("cost", {}))
        logger.info(f"resuming from {checkpoint.path} at step {self.step}")
        return index, done

    def total_cost(self) -> TrainingCost:
        """What the run cost up to here, over all processes, which have to ask together."""
        return over_processes(self.cost, self.accelerator)

    def _newest_checkpoint(self) -> Checkpoint | None:
        """The checkpoint to go on from; the main process chooses it, since that may set a corrupt one aside."""
        checkpoint = latest_checkpoint(self.folder) if self.accelerator.is_main_process else None
        if self.accelerator.num_processes == 1:
            return checkpoint
        (path,) = broadcast_object_list([checkpoint and str(checkpoint.path)])
        return checkpoint if path is None or checkpoint is not None else load_checkpoint(path)

    @torch.no_grad()
    def _load_weights(self, tensors: dict[str, Tensor]) -> None:
        targets = self._weights()
        unused = self.distiller.unused_roles
        tensors = {name: tensor for name, tensor in tensors.items() if name.partition("/")[0] not in unused}
        if missing := sorted(set(targets) ^ set(tensors)):
            raise ValueError(f"checkpoint: its tensors are not this run's; first difference: {missing[0]!r}")
        for name, target in targets.items():
            write(target, tensors[name])

    def _take_up_log(self) -> None:
        """Forget what was logged after the checkpoint, whose steps are run again; the guard sees the rest once more."""
        path = self.folder / "metrics.jsonl"
        if not path.is_file() or not self.accelerator.is_main_process:
            return
        lines = path.read_text(encoding="utf-8").splitlines(True)
        whole = [line for line in lines if line.endswith("\n")]  # a kill may have cut the last one
        kept = [line for line in whole if json.loads(line)["step"] <= self.step]
        path.write_text("".join(kept), encoding="utf-8")
        for row in map(json.loads, kept):
            values = {name: value for name, value in row.items() if name.partition("/")[0] in self.distiller.turns}
            self.divergence.check(row["step"], values)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate with the project's choices: one wrapped distiller, unused parameters allowed, explicit precision."""
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # or processes on CPUs would not find each other
        mixed_precision={"fp32": "no", "bf16": "bf16"}[config.precision],
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=config.output_dir,
    )
    if config.tracker != "none":
        accelerator.init_trackers("stepdistill")
    return accelerator
