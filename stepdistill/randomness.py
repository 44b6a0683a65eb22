"""Random numbers as a pure function of where they are used.

Training may not depend on the history of a random number generator: a resumed run has another history, and so has each
of several processes. Every draw is therefore seeded by (seed, step, turn, micro-batch), made for the *global* batch,
and cut to the rows of this process. So a resumed run repeats exactly, and n processes with batches of B get the numbers
of one process with a batch of n B.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed from numbers and names; nearby inputs give unrelated seeds."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Draws:
    """Random numbers of one micro-batch of one turn.

    Args:
        seed: the seed of this place in the run, see :func:`derive_seed`.
        batch_size: rows of this process.
        rank: index of this process.
        world: number of processes.
        device: where the numbers are made.
    """

    def __init__(
        self, seed: int, batch_size: int, *, rank: int = 0, world: int = 1, device: torch.device | str = "cpu"
    ) -> None:
        self.batch_size = batch_size
        self.rank = rank
        self.world = world
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        # numbers on the CPU need no synchronisation; with the same seed they would repeat the others
        self.host = torch.Generator().manual_seed(derive_seed(seed, "host"))

    def _rows(self, of_all: Tensor) -> Tensor:
        return of_all[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]

    def normal_like(self, x: Tensor) -> Tensor:
        """Return unit Gaussian noise of the shape (B, ...) and dtype of ``x``."""
        return self.normal(*x.shape[1:]).to(x.dtype)

    def normal(self, *shape: int) -> Tensor:
        """Return unit Gaussian noise (B, *shape) in float32."""
        every = (self.world * self.batch_size, *shape)
        return self._rows(torch.randn(every, generator=self.generator, device=self.device))

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Return uniform numbers (B,) in [low, high), float64."""
        every = self.world * self.batch_size
        numbers = torch.rand(every, generator=self.generator, device=self.device, dtype=torch.float64)
        return self._rows(low + (high - low) * numbers)

    def beta(self, a: float, b: float) -> Tensor:
        """Return numbers (B,) in [0, 1] of the distribution Beta(a, b), float64."""
        shapes = torch.full((2, 1), a, dtype=torch.float64, device=self.device)
        shapes[1] = b
        x, y = torch._standard_gamma(shapes.expand(2, self.world * self.batch_size), generator=self.generator)
        return self._rows(x / (x + y))

    def integers(self, low: int, high: int) -> Tensor:
        """Return uniform integers (B,) in {low, ..., high - 1}."""
        every = (self.world * self.batch_size,)
        return self._rows(torch.randint(low, high, every, generator=self.generator, device=self.device))

    def rows_of(self, length: int) -> list[int]:
        """Return B indices into a table of ``length`` rows, on the CPU."""
        return self._rows(torch.randint(length, (self.world * self.batch_size,), generator=self.host)).tolist()

    def shared_integer(self, low: int, high: int) -> int:
        """Return one integer in {low, ..., high - 1}, the same in every process."""
        return int(torch.randint(low, high, (1,), generator=self.host))

    def shared_uniforms(self, count: int) -> Tensor:
        """Return uniform numbers (count,) in [0, 1), float64, the same in every process, on the CPU."""
        return torch.rand(count, generator=self.host, dtype=torch.float64)
