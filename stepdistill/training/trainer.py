"""The training loop, visible from top to bottom.

A run is stages of steps of turns of micro-batches. Everything a step needs is a pure function of (seed, step): the
order of the data, every random number, the learning rate. The state of a run is therefore its weights, its optimisers
and one number, and a run that was killed and started again ends in the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.logging import get_logger
from torch import Tensor
from tqdm.auto import tqdm

from stepdistill.batch import Batch
from stepdistill.data.base import Dataset
from stepdistill.data.loader import loader
from stepdistill.inference.student import student_images
from stepdistill.methods.base import Distiller, Stage, Turn
from stepdistill.networks.bank import EMA, STUDENT
from stepdistill.randomness import Draws, derive_seed
from stepdistill.training.checkpoint import save_checkpoint
from stepdistill.training.config import RunConfig
from stepdistill.training.cost import FORWARDS, TrainingCost, counted, over_processes
from stepdistill.training.division import Division, resumed_division
from stepdistill.training.evaluation import Evaluation
from stepdistill.training.fsdp import split_shards
from stepdistill.training.guards import POLICIES, FiniteGuard, SkippedStepError
from stepdistill.training.heartbeat import Heartbeat, naming_the_lost
from stepdistill.training.identity import RunIdentity
from stepdistill.training.interruption import ECHO, Agreement, StopSignal, exit_code
from stepdistill.training.length import student_has_moved
from stepdistill.training.offloading import Encoding
from stepdistill.training.optimizer_state import optimizer_tensors, restore_optimizer
from stepdistill.training.optimizers import rate_of, step_at
from stepdistill.training.parallelism import choose_parallelism, make_accelerator
from stepdistill.training.reporting import Reporter, show
from stepdistill.training.run_state import SavedState, load_weights, newest_checkpoint, trained_weights
from stepdistill.training.scaling import LossScaling

logger = get_logger(__name__)


class Position(NamedTuple):
    """Where a run is."""

    stage: int = 0
    """Index of the stage."""
    step_in_stage: int = 0
    """Steps of it that are done."""


class Trainer:
    """Trains a distiller on data.

    Args:
        distiller: the method, its networks built.
        dataset: where raw batches come from.
        config: the run's; of its sections ``train``, ``optim`` and ``data`` are read.
        identity: what must not change between a run and its resumption.
        evaluation: what is measured on the way.
    """

    def __init__(
        self, distiller: Distiller, dataset: Dataset, config: RunConfig, identity: RunIdentity, evaluation: Evaluation
    ) -> None:
        self.config, self.optim, self.data = config.train, config.optim, config.data
        self.accelerator = make_accelerator(self.config)
        self.parallelism = choose_parallelism(self.accelerator, self.config.precision)
        self.device = self.accelerator.device
        self.scaling = LossScaling(self.config.precision, self.device)
        self.division = Division(self.accelerator.num_processes, self.config.accumulation, self.data.batch_size)
        if self.config.gradient_checkpointing:
            distiller.bank.enable_checkpointing()
        self.wrapped = self.parallelism.wrap(distiller)
        if self.config.compile:
            distiller.bank.enable_compilation()
        self.encode = Encoding(dataset, distiller, self.config, self.device, self.division.world)
        self.distiller = distiller
        self.dataset = dataset
        self.identity = identity
        self.evaluation = evaluation
        self.folder = Path(self.config.output_dir)
        self.step = 0
        self.cost = TrainingCost(teacher_forwards=distiller.prepared_forwards * self.accelerator.is_main_process)
        """This process's share; the main process's includes what the run had cost before it was resumed."""
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.trained = [parameter for turn in distiller.turns.values() for parameter in turn.params]
        self.reporter = Reporter(self.accelerator, self.folder, self.config.steps)
        self.guard = FiniteGuard(self.device, dataset.name)
        self.nan = POLICIES[self.config.nan_policy](self.guard)
        distiller.teacher.watch = self.guard.watch_teacher
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        self.stop = StopSignal(echo=ECHO if world > 1 else 0.0)
        self.agreement = Agreement(self.accelerator, self.config.log_every)
        self.heartbeat = Heartbeat(self.folder, rank, world, self.config.timeout)

    # ------------------------------------------------------------------------------------------------ the loop

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Watch the other processes and the data workers: if one is lost, end with a sentence that names it.

        Raises:
            LostProcessError: naming it.
        """
        with self.heartbeat, naming_the_lost(self.heartbeat):
            yield

    def run(self, start: Position) -> Generator[Stage]:
        """Train from ``start``, where :meth:`restore` put the run, to the end; yield every stage when it is finished.

        Raises:
            SystemExit: after a signal, when the step is finished and saved, with 128 + the signal's number.
        """
        stages = self.distiller.stages(self.config.steps)
        self.reporter.resume(self.step)
        if self.step == 0 and self.accelerator.is_main_process:
            self.evaluation.best.forget()
        batches = self._batches()
        first, done = start
        total = sum(stage.steps for stage in stages)
        with self.reporter.progress(total, self.step) as progress, self.stop:
            for index, stage in enumerate(stages[first:], start=first):
                self.distiller.stage = stage
                if done == 0:
                    self._begin_stage()
                if self.step == 0 and self.evaluation.is_due(0, finished=False) and not self.distiller.converts:
                    self._measure()
                for step_in_stage in range(done, stage.steps):
                    with counted(self.distiller.bank, self.cost):
                        self._train_on(step_in_stage, [next(batches) for _ in range(self.division.accumulation)])
                        self._report(step_in_stage + 1, progress)
                    self._after_step(Position(index, step_in_stage + 1))
                done = 0
                self.guard.raise_if_tripped()
                yield stage

    def _train_on(self, step_in_stage: int, batches: list[Batch]) -> None:
        """Train one step, or leave it out if it is not finite and the policy says so."""
        self.heartbeat.advance()
        try:
            self.reporter.collect(self._step(step_in_stage, batches))
        except SkippedStepError as skipped:
            logger.warning(f"skipped: {skipped}")
            for optimizer in self.optimizers.values():
                optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.cost.steps += 1
        for batch in batches:
            self.cost.images += batch.size

    def _begin_stage(self) -> None:
        self.distiller.begin_stage()
        for turn in self.distiller.turns.values():
            self._make_optimizers(turn)

    def _step(self, step_in_stage: int, batches: list[Batch]) -> dict[str, Tensor]:
        """Step every turn that is due once; return what to log, still on the device."""
        logs: dict[str, Tensor] = {}
        self.distiller.step_in_stage = step_in_stage
        self.distiller.bank.train()  # dropout, where networks have it; sampling switches it off
        for turn in self.distiller.turns.values():
            if turn.when(self.step):
                logs |= self._move(turn, step_in_stage, batches)
        self.distiller.after_step()
        if self.config.ema:
            # a young average follows closely, so that it forgets the weights it started from
            keep = min(self.config.ema, (1 + step_in_stage) / (10 + step_in_stage))
            self.distiller.bank.blend(EMA, STUDENT, keep)
        return logs

    def _move(self, turn: Turn, step_in_stage: int, batches: list[Batch]) -> dict[str, Tensor]:
        """Accumulate gradients over all micro-batches, then step the turn's optimiser, and that of its head."""
        self._train_only(turn)
        logs = self._accumulate(turn, batches)
        self.parallelism.average_gradients(turn.params)
        self.scaling.unscale(turn.name, [self.optimizers[part] for part in turn.parts])
        for name, params in turn.parts.items():
            logs[f"{name}/grad_norm"] = self.parallelism.clip(params, self.optim[name].clip)
        scalars = {name: value for name, value in logs.items() if value.ndim == 0}
        self.scaling.check(turn.name, scalars)
        flag = self.guard.check(self.step, turn.name, scalars)
        self.nan.before_move(self.step)
        for name in turn.parts:
            rate = self.optim[name].lr_at(step_in_stage, self.distiller.stage.steps)
            step_at(self.optimizers[name], rate, flag)
        return logs

    def _accumulate(self, turn: Turn, batches: list[Batch]) -> dict[str, Tensor]:
        """Add up the gradients of a turn's mean loss over micro-batches; return the mean of every scalar."""
        logs: dict[str, Tensor] = {}
        for micro, batch in enumerate(batches):
            last = micro == len(batches) - 1
            with contextlib.nullcontext() if last else self.parallelism.no_sync(self.wrapped):
                with self.parallelism.autocast():
                    losses = self.wrapped(turn.name, batch, self._draws(turn, micro, batch.size))
                self.scaling.of(turn.name).scale(sum(losses.terms.values()) / len(batches)).backward()
            for name, value in {**losses.terms, **losses.metrics}.items():
                key = f"{turn.name}/{name}"
                logs[key] = logs.get(key, 0) + value.detach() / len(batches)
        return logs

    def _train_only(self, turn: Turn) -> None:
        """Ask for gradients of this turn's parameters alone; they may still flow through the others."""
        for parameter in self.trained:
            parameter.requires_grad_(False)
        for parameter in turn.params:
            parameter.requires_grad_(True)

    def _draws(self, turn: Turn, micro: int, size: int) -> Draws:
        """Return the random numbers of a micro-batch: its part of one large batch, however that is divided."""
        parts = self.division.accumulation * self.division.world
        part = micro * self.division.world + self.accelerator.process_index
        torch.manual_seed(derive_seed(self.config.seed, self.step, turn.name, part))  # dropout
        seed = derive_seed(self.config.seed, self.step, turn.name)
        return Draws(seed, size, rank=part, world=parts, device=self.device)

    def _make_optimizers(self, turn: Turn) -> None:
        for name, params in turn.parts.items():
            self.optimizers[name] = self.optim[name].make(split_shards(params))

    def _batches(self) -> Iterator[Batch]:
        raw_batches = loader(
            self.dataset, batch_size=self.division.batch_size, seed=self.config.seed, num_workers=self.data.num_workers,
            start=self.step * self.division.accumulation, rank=self.accelerator.process_index,
            world=self.division.world,
        )  # fmt: skip
        for raw in self.reporter.waiting.timed(raw_batches):
            self.guard.note_samples(self.step, raw.indices)
            batch = self.encode(raw)
            self.guard.watch_data(batch.tensors)
            self.heartbeat.advance()
            yield batch

    # --------------------------------------------------------------------------------------- logging and saving

    def _report(self, done: int, progress: tqdm) -> None:
        due = self.step % self.config.log_every == 0 or self.step == self.config.steps
        if self.device.type == "cpu" or due:
            self.guard.raise_if_tripped()
        progress.update()
        if due:
            rates = {f"{name}/lr": rate_of(optimizer) for name, optimizer in self.optimizers.items()}
            stage = self.distiller.stage
            rates |= self.nan.logged() | self.scaling.logged() | self._cost_so_far()
            values = self.reporter.write(self.step, stage, rates)
            show(progress, f"{stage.name} {done}/{stage.steps}", values)

    def _after_step(self, position: Position) -> None:
        config, finished = self.config, self.step == self.config.steps
        samples = self.step % config.sample_every == 0 or finished
        measures = self.evaluation.is_due(self.step, finished=finished)
        stop = self.agreement.on(self.step, self.stop.received)
        saves = self.step % config.save_every == 0 or finished or bool(stop)
        if samples or measures or saves:
            self.guard.raise_if_tripped()  # so that every checkpoint is from before a number that is not finite
        if samples:
            self._sample()
        if measures:
            self._measure()
        if saves:
            self._save(position)
        if stop and not finished:
            logger.warning(f"stopped by a signal after step {self.step}; run the same command again to resume")
            raise SystemExit(exit_code(stop))

    def _sample(self, count: int = 32) -> None:
        """Write a grid of the result role's samples, from fixed noise and conditions."""
        if not self.parallelism.participates:
            return
        with self.parallelism.autocast():
            images = student_images(self.distiller, count, seed=self.config.seed, device=self.device)
        self.reporter.write_samples(self.step, images)

    def _measure(self) -> None:
        """Log the metrics of the result role, and keep its weights if they are the best so far; a start is never."""
        values = self.evaluation.measure(self.distiller) if self.parallelism.participates else {}
        row = {f"eval/{name}": value for name, value in values.items()}
        self.reporter.write_row(self.step, self.distiller.stage, row | self._cost_so_far())
        if student_has_moved(self.distiller, self.config.steps, self.step):  # fake scores and critics may begin alone
            weights = self.parallelism.gather(self.result_weights())
            if self.accelerator.is_main_process:
                stage, sampling = self.distiller.stage.name, self.distiller.sampler().contract()
                self.evaluation.best.offer(stage, self.step, values, weights, sampling)
        self.accelerator.wait_for_everyone()

    def _cost_so_far(self) -> dict[str, float]:
        return {FORWARDS: self.total_cost().teacher_forwards}

    def _save(self, position: Position) -> None:
        groups = {"weights": self.parallelism.gather(trained_weights(self.distiller))}
        for name, optimizer in self.optimizers.items():
            groups[f"optimizer-{name}"] = self.parallelism.gather(optimizer_tensors(optimizer))
        divergence = self.reporter.divergence
        state = SavedState(
            stage=position.stage, stage_name=self.distiller.stage.name, done=position.step_in_stage,
            cost=self.total_cost(), division=self.division, config=self.identity.values, signs=divergence.since,
            skipped=self.nan.recent, skipped_in_all=self.nan.total, scales=self.scaling.state(),
        )  # fmt: skip
        if self.accelerator.is_main_process:
            save_checkpoint(
                self.folder, self.step, groups, dataclasses.asdict(state), keep=self.config.keep,
                spare=divergence.good_until,
            )  # fmt: skip
        self.accelerator.wait_for_everyone()

    def restore(self) -> Position:
        """Load the newest checkpoint, if there is one, and return where to go on.

        Raises:
            CheckpointError: if it was made by another configuration, or none is valid.
        """
        checkpoint = newest_checkpoint(self.folder, self.accelerator)
        if checkpoint is None:
            return Position()
        self.identity.check(checkpoint)
        has_buckets = self.dataset.buckets is not None
        self.division = resumed_division(checkpoint, self.division, has_buckets=has_buckets)
        state, stages = checkpoint.state, self.distiller.stages(self.config.steps)
        state.check(checkpoint, stages)
        self.distiller.stage = stages[state.stage]
        load_weights(self.distiller, checkpoint.tensors("weights"), str(checkpoint.path))
        for turn in self.distiller.turns.values():
            self._make_optimizers(turn)
        for name, optimizer in self.optimizers.items():
            restore_optimizer(optimizer, checkpoint.tensors(f"optimizer-{name}"))
        self.step = checkpoint.step
        self.nan = POLICIES[self.config.nan_policy](self.guard, state.skipped, state.skipped_in_all)
        self.reporter.divergence.resume(state.signs)
        self.scaling.resume(state.scales)
        if self.accelerator.is_main_process:
            self.cost = state.cost
            self.evaluation.best.check()
        return Position(state.stage, state.done)

    def result_weights(self) -> dict[str, Tensor]:
        """Return the tensors of the role that is measured and exported."""
        return self.distiller.bank.state(self.distiller.result_role)

    def total_cost(self) -> TrainingCost:
        """Return what the run has cost so far, over all processes, which call this together."""
        return over_processes(self.cost, self.accelerator)
