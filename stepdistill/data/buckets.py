"""Images of several sizes: every batch has one, and the order is a pure function of the seed and the position.

Every sample belongs to the bucket whose proportions are nearest to its own. A bucket has an endless order of its own,
in which every epoch holds each of its samples once. Step k of all processes together takes its samples from one bucket:
in every N steps, N being the number of samples, a bucket with n samples has n, in an order drawn from the seed. So
samples of all buckets are seen equally often, none is left over, and the whole state of the data is k. Another number
of processes sees another order.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from stepdistill.randomness import derive_seed


@dataclasses.dataclass(frozen=True)
class Stretch:
    """A part of the endless order of some samples.

    Attributes:
        samples: these samples, by their index in the data set.
        position: the first place.
        seed: of the order.
    """

    samples: Sequence[int] | np.ndarray
    position: int
    seed: int


@dataclasses.dataclass(frozen=True, eq=False)
class Buckets:
    """The samples of every bucket that has some.

    Attributes:
        sizes: (height, width) of each in pixels.
        samples: of each the indices, ascending.
    """

    sizes: tuple[tuple[int, int], ...]
    samples: tuple[np.ndarray, ...]

    @functools.cached_property
    def size_of(self) -> dict[int, tuple[int, int]]:
        """The (height, width) of every sample, by its index."""
        found = {}
        for size, samples in zip(self.sizes, self.samples, strict=True):
            found.update(dict.fromkeys(samples.tolist(), size))
        return found

    def stretch(self, micro_batch: int, batch_size: int, rank: int, world: int, seed: int) -> Stretch:
        """Return the stretch from whose beginning one process takes a micro-batch."""
        counts = tuple(map(len, self.samples))
        cycle, place = divmod(micro_batch, sum(counts))
        order, earlier = _cycle(seed, cycle, counts)
        bucket = int(order[place])
        taken = cycle * counts[bucket] + int(earlier[place])
        position = (taken * world + rank) * batch_size
        return Stretch(self.samples[bucket], position, derive_seed(seed, "bucket", bucket))


@functools.lru_cache(maxsize=2)
def _cycle(seed: int, cycle: int, counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the bucket at every place of a cycle, and how often that bucket was there earlier in the cycle."""
    order = np.random.default_rng((seed, cycle, len(counts))).permutation(np.repeat(np.arange(len(counts)), counts))
    earlier = np.empty_like(order)
    for bucket, count in enumerate(counts):
        earlier[order == bucket] = np.arange(count)
    return order, earlier


def sort_into(sizes: Sequence[tuple[int, int]], shapes: Sequence[tuple[int, int]]) -> Buckets:
    """Sort samples of these shapes (height, width) into the buckets ``sizes``; of equally near ones, into the first.

    >>> sort_into([(64, 64), (64, 128)], [(10, 11), (10, 30), (20, 20)]).samples
    (array([0, 2]), array([1]))
    """
    ratios = [math.log(height / width) for height, width in sizes]
    nearest = [int(np.argmin(np.abs(np.subtract(ratios, math.log(height / width))))) for height, width in shapes]
    kept, samples = [], []
    for bucket, size in enumerate(sizes):
        members = np.flatnonzero(np.array(nearest) == bucket)
        if len(members):
            kept.append(size)
            samples.append(members)
    return Buckets(tuple(kept), tuple(samples))
