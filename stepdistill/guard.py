"""Stops a run at its first non-finite number, before anything has been stepped, without a host sync a step.

Every turn hands its scalars to :meth:`FiniteGuard.check`. The flag it returns stays on the device and is given to the
fused optimiser, which skips its step while the flag is up; it never comes down. The host looks at the flag when it logs
anyway, and then names step, turn and term.
"""

from __future__ import annotations

import torch
from torch import Tensor


class NonFiniteError(ValueError):
    """A loss or gradient became NaN or infinite; no weight was changed from that step on."""


class FiniteGuard:
    """A sticky device-side flag and the place where it was raised."""

    def __init__(self, device: torch.device) -> None:
        self.flag = torch.zeros((), device=device)
        self.first = torch.full((), -1, dtype=torch.long, device=device)
        self.places: list[str] = []

    def check(self, step: int, turn: str, values: dict[str, Tensor]) -> Tensor:
        """Raise the flag if any scalar is not finite in any process; returns the flag, a float of 0 or 1."""
        names = [name for name in values if name not in self.places]
        self.places += names
        bad = ~torch.isfinite(torch.stack([value.float() for value in values.values()]))
        places = torch.tensor([self.places.index(name) for name in values], device=bad.device)
        # the gradient norm comes last and is bad whenever a loss is: the smallest place is the cause
        place = torch.where(bad, places, 2**31).min()
        self.first = torch.where((self.first < 0) & bad.any(), step * 2**20 + place, self.first)
        self.flag = torch.maximum(self.flag, bad.any().float())
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.flag, torch.distributed.ReduceOp.MAX)
        return self.flag

    def raise_if_tripped(self) -> None:
        """Look at the flag (a host sync).

        Raises:
            NonFiniteError: naming the step, the turn and the term that was first not finite.
        """
        if not self.flag.item():
            return
        code = int(self.first.item())
        if code < 0:
            raise NonFiniteError("a loss or gradient of another process is not finite; nothing was stepped")
        step, place = divmod(code, 2**20)
        turn, _, term = self.places[place].partition("/")
        raise NonFiniteError(
            f"step {step + 1}, turn {turn!r}: {term!r} is not finite; nothing was stepped. "
            "Lower optim.*.lr, or look at the batch and at train.precision; the last checkpoint is good."
        )
