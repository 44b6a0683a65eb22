"""How the samples of a step are divided: among processes, and those of a process into micro-batches.

The order of the data (:mod:`stepdistill.data.loader`) and every random number (:mod:`stepdistill.randomness`) belong to
places in the whole batch of a step. Another division therefore trains on the same samples with the same noise, and a
run may be resumed on another number of processes.
"""

from __future__ import annotations

import dataclasses

from accelerate.logging import get_logger

from stepdistill.files.ranges import PositiveInt
from stepdistill.training.checkpoint import Checkpoint, CheckpointError

logger = get_logger(__name__)


@dataclasses.dataclass(frozen=True)
class Division:
    """A division of the samples of a step.

    Attributes:
        world: number of processes.
        accumulation: micro-batches of each process.
        batch_size: samples of each of these.
    """

    world: PositiveInt
    accumulation: PositiveInt
    batch_size: PositiveInt

    @property
    def total(self) -> int:
        """Samples of a step, over all processes: the global batch."""
        return self.world * self.accumulation * self.batch_size

    def __str__(self) -> str:
        return f"{self.total} samples a step = {self.world} x accumulation {self.accumulation} x {self.batch_size}"

    def with_total(self, total: int) -> Division | None:
        """Return the division of ``total`` samples among these processes, or None if they cannot share them evenly.

        Micro-batches are the fewest, and therefore largest, that have at most ``batch_size`` samples.

        >>> Division(world=1, accumulation=1, batch_size=64).with_total(128)
        Division(world=1, accumulation=2, batch_size=64)
        >>> Division(world=4, accumulation=1, batch_size=64).with_total(128)
        Division(world=4, accumulation=1, batch_size=32)
        """
        each, rest = divmod(total, self.world)
        if rest:
            return None
        accumulation = -(-each // self.batch_size)
        while each % accumulation:
            accumulation += 1
        return Division(self.world, accumulation, each // accumulation)


def resumed_division(checkpoint: Checkpoint, configured: Division, *, has_buckets: bool = False) -> Division:
    """Return the division with which a run goes on from a checkpoint: the same samples a step, by these processes.

    Args:
        checkpoint: its state tells the division before, unless it is older than this.
        configured: what the configuration and the number of processes would give a new run.
        has_buckets: whether images have several sizes, whose order depends on the division.

    Raises:
        CheckpointError: if these processes cannot share the samples of a step.
    """
    before: Division | None = checkpoint.state.division
    if before is None:
        logger.warning(
            f"{checkpoint.path} does not record how many processes made it; assumed to be {configured.world}, as now"
        )
        return configured
    if before.world == configured.world:
        return before
    division = configured.with_total(before.total)
    if division is None:
        raise CheckpointError(
            f"{checkpoint.path} was made by {_processes(before.world)} ({before}), which "
            f"{_processes(configured.world)} cannot share evenly; resume on a number of processes that divides "
            f"{before.total}"
        )
    rest = "every step has the same samples and noise, but dropout and rounding differ"
    if has_buckets:
        rest = (
            "data.buckets have another order from here on, so that samples of this epoch may come twice or not at all"
        )
    logger.warning(
        f"{checkpoint.path} was made by {_processes(before.world)} ({before}); resuming with {configured.world} "
        f"({division}): {rest}"
    )
    return division


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"
