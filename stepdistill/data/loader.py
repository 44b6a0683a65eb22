"""The order of samples.

Samples have a *global position* 0, 1, 2, ... that runs on through all epochs. The sample at a position,
whether it is mirrored, and which of its captions is taken, depend on (seed, position) alone:

    epoch, offset = divmod(position, length);    index = permutation(seed, epoch)[offset]

Micro-batch m of rank r takes the ``batch_size`` positions from (m * world + r) * batch_size on. The whole state of the
data is therefore m: a resumed run and any number of workers see the same samples in the same order, and so does another
number of processes that starts from the same position.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from stepdistill.batch import RawBatch
from stepdistill.data.base import Dataset
from stepdistill.data.buckets import Stretch
from stepdistill.diffusion.schedule import expand

TOLERATED = 10
"""Fewer unreadable samples than this are never too many."""


TOLERATED_SHARE = 0.01
"""A larger share of the samples read is too many."""


AHEAD = 2
"""Micro-batches of stored samples that are read before they are asked for."""


def sample_indices(position: int, count: int, length: int, seed: int) -> list[int]:
    """Return the samples at ``count`` global positions from ``position`` on, in a data set of ``length`` samples.

    Every epoch, the positions from a multiple of ``length`` to the next, holds every sample once.

    >>> sample_indices(0, 3, 3, seed=0) == sample_indices(0, 1, 3, seed=0) + sample_indices(1, 2, 3, seed=0)
    True
    """
    return [int(index) for index in _column(0, position, count, length, seed)]


def mirrored(position: int, count: int, length: int, seed: int) -> torch.Tensor:
    """Return whether the sample at each of ``count`` positions is mirrored: (count,) bool, true for half of them."""
    return torch.tensor(_column(1, position, count, length, seed), dtype=torch.bool)


def dropped(position: int, count: int, length: int, seed: int, share: float) -> list[bool]:
    """Return whether the caption at each of ``count`` positions is dropped: true for ``share`` of them."""
    return [bool(number < share) for number in _column(2, position, count, length, seed)]


def drawn(choices: Sequence[Sequence[str]], position: int, length: int, seed: int) -> tuple[str, ...]:
    """Return one of the captions of the sample at each position from ``position`` on, all of one chance.

    Args:
        choices: captions of the samples at these positions, at least one each.
        position: the first.
        length: number of samples in the data set.
        seed: of the order.
    """
    numbers = _column(3, position, len(choices), length, seed)
    return tuple(texts[int(number * len(texts))] for texts, number in zip(choices, numbers, strict=True))


def _column(which: int, position: int, count: int, length: int, seed: int) -> list[Any]:
    """Return one of the arrays of :func:`_epoch` at ``count`` positions."""
    values = []
    for place in range(position, position + count):
        epoch, offset = divmod(place, length)
        values.append(_epochs(seed, length)(epoch)[which][offset])
    return values


@functools.lru_cache(maxsize=64)  # buckets have seeds of their own
def _epochs(seed: int, length: int) -> Callable[[int], tuple[np.ndarray, ...]]:
    """Return :func:`_epoch` of one order; it keeps two epochs, because a batch may end one and begin the next."""
    return functools.lru_cache(maxsize=2)(lambda epoch: _epoch(seed, epoch, length))


def _epoch(seed: int, epoch: int, length: int) -> tuple[np.ndarray, ...]:
    """Return an epoch's order, by place: the sample, whether it is mirrored, and two numbers in [0, 1).

    The first may drop the caption, the second chooses one of several.
    """
    generator = np.random.default_rng((seed, epoch))
    order, mirrored = generator.permutation(length), generator.random(length) < 0.5
    return order, mirrored, generator.random(length), generator.random(length)


def loader(
    dataset: Dataset, *, batch_size: int, seed: int, start: int = 0, rank: int = 0, world: int = 1, num_workers: int = 0
) -> Iterator[RawBatch]:
    """Yield the micro-batches of one process, without end, from micro-batch ``start`` on.

    Every unreadable sample that is skipped is named in one warning.

    Args:
        dataset: what to load from.
        batch_size: samples per micro-batch and process.
        seed: seed of the order, the same on every rank; at least 0.
        start: number of micro-batches that each rank has already taken.
        rank: this process, in [0, world).
        world: number of processes.
        num_workers: loading processes; 0 loads in this process. Batches do not depend on it.

    Raises:
        ValueError: from the iterator, if a sample is unreadable and may not be skipped, or at least 10 samples and more
            than 1% of those read are unreadable.
    """
    assert batch_size >= 1 and start >= 0 and 0 <= rank < world
    if dataset.is_encoded:
        num_workers = 0  # a thread reads stored samples, which need no decoding
    batches = DataLoader(
        _MicroBatches(dataset, batch_size, seed, rank, world),
        batch_size=None,
        sampler=itertools.count(start),
        num_workers=num_workers,
        worker_init_fn=_leave_group,
        generator=torch.Generator(),  # otherwise starting the loader would draw from the global generator
    )
    counted = _counted(batches, Unreadable(len(dataset)))
    return _ahead(_encoded(dataset, counted)) if dataset.is_encoded else counted


def _encoded(dataset: Dataset, batches: Iterable[RawBatch]) -> Iterator[RawBatch]:
    for batch in batches:
        yield dataclasses.replace(batch, encoded=dataset.read_encoded(batch))


def _ahead(batches: Iterator[RawBatch]) -> Iterator[RawBatch]:
    """Yield endless batches, of which a thread takes the next ones meanwhile."""
    thread = ThreadPoolExecutor(1, "data")
    try:
        waiting = collections.deque(thread.submit(next, batches) for _ in range(AHEAD))
        while True:
            waiting.append(thread.submit(next, batches))
            yield waiting.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)


def _leave_group(worker: int) -> None:
    """Put a worker into a group of its own: a Ctrl-C for the run must not end it before the run has saved."""
    del worker
    os.setpgid(0, 0)
    signal.set_wakeup_fd(-1)  # its signals are not the run's


def _counted(batches: Iterable[RawBatch | ValueError], unreadable: Unreadable) -> Iterator[RawBatch]:
    for batch in batches:
        if isinstance(batch, ValueError):
            raise batch
        unreadable.count(batch)
        yield batch


@dataclasses.dataclass(frozen=True)
class _MicroBatches(TorchDataset):
    """Micro-batch m as item m, so that a DataLoader's workers can share the work and keep the order.

    An error is an item too: raised in a worker, it would arrive wrapped in that worker's traceback and delay the exit.
    """

    dataset: Dataset
    batch_size: int
    seed: int
    rank: int
    world: int

    def __getitem__(self, micro_batch: int) -> RawBatch | ValueError:
        try:
            return self._load(micro_batch)
        except ValueError as error:
            return error

    def _stretch(self, micro_batch: int) -> Stretch:
        if self.dataset.buckets is not None:
            return self.dataset.buckets.stretch(micro_batch, self.batch_size, self.rank, self.world, self.seed)
        position = (micro_batch * self.world + self.rank) * self.batch_size
        return Stretch(range(len(self.dataset)), position, self.seed)

    def _load(self, micro_batch: int) -> RawBatch:
        stretch = self._stretch(micro_batch)
        position, length, seed = stretch.position, len(stretch.samples), stretch.seed
        where = (position, self.batch_size, length, seed)
        batch = self.dataset.load([int(stretch.samples[place]) for place in sample_indices(*where)])
        if self.dataset.choices is not None:
            choices = [self.dataset.choices[index] for index in batch.indices]
            batch = dataclasses.replace(batch, captions=drawn(choices, position, length, seed))
        if batch.captions is not None and self.dataset.caption_dropout:
            captions = _drop(batch.captions, dropped(*where, self.dataset.caption_dropout))
            batch = dataclasses.replace(batch, captions=captions)
        if not self.dataset.flip:
            return batch
        turned = mirrored(*where)
        if batch.images is None:
            return dataclasses.replace(batch, mirrored=turned)
        images = torch.where(expand(turned, batch.images) > 0, batch.images.flip(-1), batch.images)
        return dataclasses.replace(batch, images=images)


def _drop(captions: Sequence[str], dropped: Sequence[bool]) -> tuple[str, ...]:
    return tuple("" if drop else caption for caption, drop in zip(captions, dropped, strict=True))


class Unreadable:
    """Counts the distinct samples that were skipped, warns of each, and raises an error when there are too many."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._read = 0
        self._seen: set[str] = set()

    def count(self, batch: RawBatch) -> None:
        """Count the unreadable samples of a batch.

        Raises:
            ValueError: if at least 10 samples, and more than 1% of those read, are unreadable.
        """
        self._read = min(self._length, self._read + len(batch.indices) + len(batch.unreadable))
        for problem in batch.unreadable:
            if problem not in self._seen:
                self._seen.add(problem)
                warnings.warn(f"skipped unreadable image {problem} ({len(self._seen)} so far)", stacklevel=3)
        if len(self._seen) >= TOLERATED and len(self._seen) > TOLERATED_SHARE * self._read:
            raise ValueError(
                f"{len(self._seen)} of {self._read} images read are unreadable, more than {TOLERATED_SHARE:.0%};"
                f" the last is {batch.unreadable[-1]}"
            )
