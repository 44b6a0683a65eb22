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
from stepdistill.inference.grids import save_grid
from stepdistill.inference.student import student_images
from stepdistill.methods.base import Distiller, Stage, Turn
from stepdistill.networks.bank import EMA, STUDENT
from stepdistill.randomness import Draws, derive_seed
from stepdistill.training.checkpoint import save_checkpoint, set_aside_later
from stepdistill.training.config import RunConfig
from stepdistill.training.cost import TrainingCost, counted, over_processes
from stepdistill.training.division import Division, resumed_division
from stepdistill.training.evaluation import Evaluation
from stepdistill.training.fsdp import split_shards
from stepdistill.training.guards import DivergenceError, DivergenceGuard, FiniteGuard, patience_of
from stepdistill.training.identity import RunIdentity
from stepdistill.training.interruption import INTERRUPTED, StopSignal
from stepdistill.training.metrics_log import MetricsLog
from stepdistill.training.optimizer_state import optimizer_tensors, restore_optimizer
from stepdistill.training.parallelism import choose_parallelism, make_accelerator
from stepdistill.training.run_state import load_weights, newest_checkpoint, trained_weights

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
        self.division = Division(self.accelerator.num_processes, self.config.accumulation, self.data.batch_size)
        if self.config.gradient_checkpointing:
            distiller.bank.enable_checkpointing()
        self.wrapped = self.parallelism.wrap(distiller)
        if not dataset.is_encoded:  # otherwise what encodes is on the device only while it samples
            distiller.family.to(self.device)
        self.distiller = distiller
        self.dataset = dataset
        self.identity = identity
        self.evaluation = evaluation
        self.folder = Path(self.config.output_dir)
        self.step = 0
        self.cost = TrainingCost()
        """This process's share; the main process's includes what the run had cost before it was resumed."""
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.trained = [parameter for turn in distiller.turns.values() for parameter in turn.params]
        self.log = MetricsLog(self.folder)
        self.unwritten: dict[str, Tensor] = {}
        """The newest scalars of every turn since the last row of the log, still on the device."""
        self.guard = FiniteGuard(self.device)
        self.divergence = DivergenceGuard(patience_of(self.config.steps))
        self.stop = StopSignal()

    # ------------------------------------------------------------------------------------------------ the loop

    def run(self, start: Position) -> Generator[Stage]:
        """Train from ``start``, where :meth:`restore` put the run, to the end; yield every stage when it is finished.

        Raises:
            SystemExit: after a SIGTERM, when the step is finished and saved.
        """
        stages = self.distiller.stages(self.config.steps)
        self._resume_log()
        if self.step == 0 and self.accelerator.is_main_process:
            self.evaluation.best.forget()
        batches = self._batches()
        first, done = start
        with self._progress(stages) as progress, self.stop:
            for index, stage in enumerate(stages[first:], start=first):
                self.distiller.stage = stage
                if done == 0:
                    self._begin_stage()
                for step_in_stage in range(done, stage.steps):
                    with counted(self.distiller.bank, self.cost):
                        logs = self._step(step_in_stage, [next(batches) for _ in range(self.division.accumulation)])
                        self.step += 1
                        self._report(logs, step_in_stage + 1, progress)
                    self._after_step(Position(index, step_in_stage + 1))
                done = 0
                yield stage

    def _begin_stage(self) -> None:
        self.distiller.begin_stage()
        for name, turn in self.distiller.turns.items():
            self.optimizers[name] = self._make_optimizer(turn)

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
        self.cost.steps += 1
        for batch in batches:
            self.cost.images += batch.size
        return logs

    def _move(self, turn: Turn, step_in_stage: int, batches: list[Batch]) -> dict[str, Tensor]:
        """Accumulate gradients over all micro-batches, then step the turn's optimiser."""
        optimizer, optim = self.optimizers[turn.name], self.optim[turn.name]
        self._train_only(turn)
        logs = self._accumulate(turn, batches)
        self.parallelism.average_gradients(turn.params)
        logs[f"{turn.name}/grad_norm"] = self.parallelism.clip(turn.params, optim.clip)
        scalars = {name: value for name, value in logs.items() if value.ndim == 0}
        flag = self.guard.check(self.step, turn.name, scalars)
        optimizer.found_inf = flag  # type: ignore[attr-defined]  # the step is skipped while it is 1
        for group in optimizer.param_groups:
            group["lr"] = optim.lr_at(step_in_stage, self.distiller.stage.steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return logs

    def _accumulate(self, turn: Turn, batches: list[Batch]) -> dict[str, Tensor]:
        """Add up the gradients of a turn's mean loss over micro-batches; return the mean of every scalar."""
        logs: dict[str, Tensor] = {}
        for micro, batch in enumerate(batches):
            last = micro == len(batches) - 1
            with contextlib.nullcontext() if last else self.parallelism.no_sync(self.wrapped):
                with self.parallelism.autocast():
                    losses = self.wrapped(turn.name, batch, self._draws(turn, micro, batch.size))
                (sum(losses.terms.values()) / len(batches)).backward()
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

    def _make_optimizer(self, turn: Turn) -> torch.optim.Optimizer:
        return self.optim[turn.name].make(split_shards(turn.params))

    def _batches(self) -> Iterator[Batch]:
        raw_batches = loader(
            self.dataset,
            batch_size=self.division.batch_size,
            seed=self.config.seed,
            start=self.step * self.division.accumulation,
            rank=self.accelerator.process_index,
            world=self.division.world,
            num_workers=self.data.num_workers,
        )
        for raw in raw_batches:
            yield self.dataset.encode(self.distiller.family, raw).to(self.device)

    # --------------------------------------------------------------------------------------- logging and saving

    def _report(self, logs: dict[str, Tensor], done: int, progress: tqdm) -> None:
        due = self.step % self.config.log_every == 0 or self.step == self.config.steps
        if self.device.type == "cpu" or due:
            self.guard.raise_if_tripped()
        progress.update()
        self.unwritten |= logs  # a turn that rests on this very step moved on an earlier one
        if due:
            self._log(self.unwritten, done, progress)
            self.unwritten = {}

    def _log(self, logs: dict[str, Tensor], done: int, progress: tqdm) -> None:
        stage, shown = self.distiller.stage, {}
        values = {name: round(float(value), 6) for name, value in logs.items()}
        lrs = {f"{name}/lr": optimizer.param_groups[0]["lr"] for name, optimizer in self.optimizers.items()}
        self._write_row(values | lrs)
        self._check_divergence(values)
        for name, value in values.items():
            if "grad_norm" not in name:
                shown[name.replace("/", " ")] = f"{value:.4g}"
        progress.set_description(f"{stage.name} {done}/{stage.steps}")
        progress.set_postfix(shown)

    def _write_row(self, values: dict[str, float]) -> None:
        self.accelerator.log(values, step=self.step)
        if self.accelerator.is_main_process:
            self.log.append(self.step, self.distiller.stage.name, values)

    def _check_divergence(self, values: dict[str, float]) -> None:
        """Stop a run that has diverged, and leave the last checkpoint from before as the newest."""
        try:
            self.divergence.check(self.step, values)
        except DivergenceError as error:
            if not self.accelerator.is_main_process:
                raise
            good = self.divergence.good_until
            assert good is not None
            raise DivergenceError(f"{error}. {set_aside_later(self.folder, good)}") from None

    def _after_step(self, position: Position) -> None:
        config, finished = self.config, self.step == self.config.steps
        if self.step % config.sample_every == 0 or finished:
            self._sample()
        if self.evaluation.is_due(self.step, finished=finished):
            self._measure()
        stop = self._any_stop_requested()
        if self.step % config.save_every == 0 or finished or stop:
            self._save(position)
        if stop and not finished:
            logger.warning(f"stopped by a signal after step {self.step}; run the same command again to go on")
            raise SystemExit(INTERRUPTED)

    def _sample(self, count: int = 32) -> None:
        """Write a grid of the result role's samples, from fixed noise and conditions."""
        if not self.parallelism.participates:
            return
        with self.parallelism.autocast():
            images = student_images(self.distiller, count, seed=self.config.seed, device=self.device)
        if self.accelerator.is_main_process:
            save_grid(images.pixels / 255, self.folder / "samples" / f"step-{self.step:06d}.png")

    def _measure(self) -> None:
        """Log the metrics of the result role, and keep its weights if they are the best so far."""
        values = self.evaluation.measure(self.distiller) if self.parallelism.participates else {}
        self._write_row({f"eval/{name}": value for name, value in values.items()})
        weights = self.parallelism.gather(self.result_weights())
        if self.accelerator.is_main_process:
            self.evaluation.best.offer(self.distiller.stage.name, self.step, values, weights)
        self.accelerator.wait_for_everyone()

    def _any_stop_requested(self) -> bool:
        """Whether any process was asked to stop; several processes ask each other on the steps that they log."""
        if self.accelerator.num_processes == 1:
            return self.stop.requested
        if self.step % self.config.log_every:
            return False
        asked = torch.tensor(float(self.stop.requested), device=self.device)
        return bool(self.accelerator.reduce(asked, reduction="sum").item())

    def _save(self, position: Position) -> None:
        groups = {"weights": self.parallelism.gather(trained_weights(self.distiller))}
        for name, optimizer in self.optimizers.items():
            groups[f"optimizer-{name}"] = self.parallelism.gather(optimizer_tensors(optimizer))
        state = {
            "stage": position.stage,
            "stage_name": self.distiller.stage.name,
            "done": position.step_in_stage,
            "cost": dataclasses.asdict(self.total_cost()),
            "division": dataclasses.asdict(self.division),
            "config": self.identity.values,
        }
        if self.accelerator.is_main_process:
            spare = self.divergence.good_until
            save_checkpoint(self.folder, self.step, groups, state, keep=self.config.keep, spare=spare)
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
        self.division = resumed_division(checkpoint, self.division)
        position = Position(checkpoint.state["stage"], checkpoint.state["done"])
        self.distiller.stage = self.distiller.stages(self.config.steps)[position.stage]
        load_weights(self.distiller, checkpoint.tensors("weights"))
        for name, turn in self.distiller.turns.items():
            self.optimizers[name] = self._make_optimizer(turn)
            restore_optimizer(self.optimizers[name], checkpoint.tensors(f"optimizer-{name}"))
        self.step = checkpoint.step
        if self.accelerator.is_main_process:
            # checkpoints from before costs were kept have none: counting starts from zero
            self.cost = TrainingCost(**checkpoint.state.get("cost", {}))
        logger.info(f"resuming from {checkpoint.path} at step {self.step}")
        return position

    def _resume_log(self) -> None:
        """Forget what was logged after the checkpoint; the divergence guard sees the remaining rows once more."""
        if not self.accelerator.is_main_process:
            return
        for row in self.log.cut_after(self.step):
            values = {name: value for name, value in row.items() if name.partition("/")[0] in self.distiller.turns}
            self.divergence.check(row["step"], values)

    @contextlib.contextmanager
    def _progress(self, stages: list[Stage]) -> Iterator[tqdm]:
        total = sum(stage.steps for stage in stages)
        disable = not self.accelerator.is_local_main_process
        with tqdm(total=total, initial=self.step, disable=disable, dynamic_ncols=True) as bar:
            yield bar

    def result_weights(self) -> dict[str, Tensor]:
        """Return the tensors of the role that is measured and exported."""
        return self.distiller.bank.state(self.distiller.result_role)

    def total_cost(self) -> TrainingCost:
        """Return what the run has cost so far, over all processes, which call this together."""
        return over_processes(self.cost, self.accelerator)
