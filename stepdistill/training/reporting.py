"""What a run tells while it trains: rows of the log, the tracker, the progress bar, and whether it diverges."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from stepdistill.files.writing import writing_to
from stepdistill.inference.grids import save_grid
from stepdistill.inference.sampling import Images
from stepdistill.methods.base import Stage
from stepdistill.training.checkpoint import set_aside_later
from stepdistill.training.divergence import DivergenceError, DivergenceGuard, patience_of
from stepdistill.training.metrics_log import MetricsLog

WAITING = "time/waiting"
"""Where a row holds the share of the time since the last one that was spent waiting for data, encoding not counted."""


Item = TypeVar("Item")


class Waiting:
    """The share of the time that a loop waits for its data."""

    def __init__(self) -> None:
        self._waited, self._since = 0.0, time.perf_counter()

    def timed(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items, and count the seconds until each is there."""
        start = time.perf_counter()
        for item in items:
            self._waited += time.perf_counter() - start
            yield item
            start = time.perf_counter()

    def take(self) -> float:
        """Return the share since the last call, in [0, 1]."""
        now = time.perf_counter()
        share = self._waited / max(now - self._since, 1e-9)
        self._waited, self._since = 0.0, now
        return round(min(share, 1.0), 4)


class Reporter:
    """Collects the scalars of turns, and tells them when a row is due.

    Args:
        accelerator: the run's; its main process writes.
        folder: the run's.
        steps: training steps of the whole run.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, steps: int) -> None:
        self.accelerator, self.folder = accelerator, folder
        self.log = MetricsLog(folder)
        self.divergence = DivergenceGuard(patience_of(steps))
        self.waiting = Waiting()
        self._unwritten: dict[str, Tensor] = {}
        """The newest scalars of every turn since the last row, still on the device."""

    def resume(self, step: int) -> None:
        """Forget what was logged and sampled after a checkpoint; an export must not show samples of later steps."""
        if not self.accelerator.is_main_process:
            return
        self.log.cut_after(step or -1)  # a run from the beginning measures its start again
        for path in (self.folder / "samples").glob("step-*.png"):
            number = path.stem.removeprefix("step-")
            if number.isdecimal() and int(number) > step:
                path.unlink()

    def progress(self, total: int, initial: int) -> tqdm:
        """Return a bar of ``total`` steps, of which ``initial`` are done."""
        disable = not self.accelerator.is_local_main_process
        return tqdm(total=total, initial=initial, disable=disable, dynamic_ncols=True)

    def collect(self, logs: Mapping[str, Tensor]) -> None:
        """Take the scalars of a step; a turn that rests on the step of a row moved on an earlier one."""
        self._unwritten |= logs

    def write(self, step: int, stage: Stage, further: Mapping[str, float]) -> dict[str, float]:
        """Write a row of what was collected and of ``further`` numbers; return what was collected.

        Raises:
            DivergenceError: if the run has diverged, saying which checkpoint is from before.
        """
        values = {name: float(f"{value:.6g}") for name, value in self._averages().items()}
        self._unwritten = {}
        self.write_row(step, stage, {**values, **further, WAITING: self.waiting.take()})
        self._check_divergence(step, values)
        return values

    def _averages(self) -> dict[str, float]:
        """Return what was collected, of several processes the average: all judge the run by the same numbers."""
        if self.accelerator.num_processes == 1 or not self._unwritten:
            return {name: float(value) for name, value in self._unwritten.items()}
        scalars = torch.stack([torch.as_tensor(value).float() for value in self._unwritten.values()])
        means = self.accelerator.reduce(scalars.to(self.accelerator.device), reduction="mean")
        return dict(zip(self._unwritten, means.tolist(), strict=True))

    def write_samples(self, step: int, images: Images) -> None:
        """Write a grid of a step's samples."""
        if self.accelerator.is_main_process:
            path = self.folder / "samples" / f"step-{step:06d}.png"
            with writing_to(path):
                save_grid(images.pixels / 255, path)

    def write_row(self, step: int, stage: Stage, values: Mapping[str, float]) -> None:
        """Write a row to the log and the tracker."""
        self.accelerator.log(dict(values), step=step)
        if self.accelerator.is_main_process:
            self.log.append(step, stage.name, values)

    def _check_divergence(self, step: int, values: Mapping[str, float]) -> None:
        """Stop a run that has diverged, and leave the last checkpoint from before as the newest."""
        try:
            self.divergence.check(step, values)
        except DivergenceError as error:
            if not self.accelerator.is_main_process:
                raise
            good = self.divergence.good_until
            assert good is not None
            raise DivergenceError(f"{error}. {set_aside_later(self.folder, good)}") from None


def show(bar: tqdm, title: str, values: Mapping[str, float]) -> None:
    """Show the losses beside a progress bar."""
    shown = {}
    for name, value in values.items():
        if "grad_norm" not in name:
            shown[name.replace("/", " ")] = f"{value:.4g}"
    bar.set_description(title)
    bar.set_postfix(shown)
