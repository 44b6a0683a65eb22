"""Stopping a run, or leaving a step out, when a number is not finite.

:class:`FiniteGuard` acts before a step is made, and needs no host sync per step. Every turn passes its scalars to
:meth:`FiniteGuard.check`. The flag it returns stays on the device and is given to the optimiser, which skips its steps
as soon as the flag is raised; the flag is not lowered. The host reads the flag when it logs, measures and saves, and
then names rank, step, turn and term, and the samples of the step.

Under ``nan_policy: skip`` the host reads the flag in every turn: a turn that is not finite, and what would follow it in
its step, is left out, so that weights, averages and optimisers stay as they are. A budget keeps a run that only skips
from going on for days.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import final

import torch
from accelerate.utils import gather_object
from torch import Tensor

DATA, TEACHER = "the data", "the teacher's output"
"""Where a number that is not finite may come from before it reaches a loss."""

SHOWN = 8
"""So many samples are named in a message."""


class NonFiniteError(ValueError):
    """A loss or gradient became NaN or infinite; no weight was changed from that step on."""


class SkippedStepError(Exception):
    """The rest of a step is left out; the loop goes on with the next."""


class FiniteGuard:
    """A flag on the device that stays up, and the place where it was raised.

    Args:
        device: where the flag is.
        name: returns the name of a sample, by its index in the data.
    """

    def __init__(self, device: torch.device, name: Callable[[int], str] = str) -> None:
        self.device, self.name = device, name
        self.places: list[str] = []
        self._on_device: dict[tuple[str, ...], Tensor] = {}
        self.samples: dict[int, list[int]] = {}
        """By step, the samples of this process since the flag was last read."""
        self.reset()

    def reset(self) -> None:
        """Lower the flag."""
        self.flag = torch.zeros((), device=self.device)
        self.first = torch.full((), -1, dtype=torch.long, device=self.device)
        self._sources: dict[str, Tensor] = {}

    def note_samples(self, step: int, indices: Sequence[int]) -> None:
        """Remember which samples a step is made of."""
        self.samples.setdefault(step, []).extend(indices)

    def watch_data(self, tensors: Sequence[Tensor]) -> None:
        """Look for numbers that are not finite in a batch, as the networks see it."""
        if tensors:
            self._note(DATA, ~_all_finite(tensors))

    def watch_teacher(self, x_t: Tensor, output: Tensor) -> None:
        """Look for them in the teacher's output, if its input had none."""
        self._note(TEACHER, _all_finite([x_t]) & ~_all_finite([output]))

    def _note(self, source: str, bad: Tensor) -> None:
        self._sources[source] = bad | self._sources[source] if source in self._sources else bad

    def check(self, step: int, turn: str, values: dict[str, Tensor]) -> Tensor:
        """Raise the flag if any scalar is not finite in any process; return the flag, a float of 0 or 1."""
        never = torch.zeros((), dtype=torch.bool, device=self.device)
        sources = torch.stack([self._sources.get(source, never) for source in (DATA, TEACHER)])
        bad = ~torch.isfinite(torch.stack(list(map(Tensor.float, values.values()))))
        names = [f"{turn}/{DATA}", f"{turn}/{TEACHER}", *values]
        for name in names:
            if name not in self.places:
                self.places.append(name)
        places = self._places_of(tuple(names))
        # sources come first, the gradient norm last, which is bad whenever a loss is: the smallest place is the cause
        place = torch.where(torch.cat([sources, bad]), places, 2**31).min()
        self.first = torch.where((self.first < 0) & bad.any(), step * 2**20 + place, self.first)
        self.flag = torch.maximum(self.flag, bad.any().float())
        self._sources = {}
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.flag, torch.distributed.ReduceOp.MAX)
        return self.flag

    def _places_of(self, names: tuple[str, ...]) -> Tensor:
        """Return the places of these names on the device, copied there once: every copy is a host sync."""
        if names not in self._on_device:
            self._on_device[names] = torch.tensor(list(map(self.places.index, names)), device=self.device)
        return self._on_device[names]

    def raise_if_tripped(self) -> None:
        """Read the flag (a host sync). All processes call it together.

        Raises:
            NonFiniteError: naming rank, step, turn and term of what was first not finite, and the step's samples.
        """
        if self.flag.item():
            raise NonFiniteError(
                f"{self.explain()}; no weight was changed. Lower optim.*.lr, look at the samples and at "
                "train.precision, or set train.nan_policy to skip; the last checkpoint is good."
            )
        self.samples = {}

    def explain(self) -> str:
        """Return what was not finite first, of all processes, which call this together while the flag is up."""
        code = int(self.first.item())
        reports = gather_object([(code, self._describe(code))] if code >= 0 else [])
        first = min(code for code, _ in reports)
        return "; ".join(text for code, text in reports if code == first)

    def _describe(self, code: int) -> str:
        step, place = divmod(code, 2**20)
        turn, _, term = self.places[place].partition("/")
        what = term if term in (DATA, TEACHER) else repr(term)
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        return f"step {step + 1}, rank {rank}, turn {turn!r}: {what} is not finite (samples {self._names(step)})"

    def _names(self, step: int) -> str:
        indices = self.samples.get(step, [])
        names = [self.name(index) for index in indices[:SHOWN]]
        rest = indices[SHOWN:]
        return ", ".join(names) + (f" and those of index {', '.join(map(str, rest))}" if rest else "")


def _all_finite(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).all()


# ------------------------------------------------------------------------------------------------ policies

LIMIT, WINDOW = 10, 100
"""At most LIMIT of any WINDOW steps are skipped."""


class NanPolicy(abc.ABC):
    """What happens to a step with a number that is not finite.

    Args:
        guard: the run's.
        recent: steps skipped lately, before the run was resumed.
        total: how many were skipped in all.
    """

    def __init__(self, guard: FiniteGuard, recent: Sequence[int] = (), total: int = 0) -> None:
        self.guard, self.recent, self.total = guard, list(recent), total

    @abc.abstractmethod
    def before_move(self, step: int) -> None:
        """Decide, on all processes alike, whether an optimiser may step on the gradients that were checked."""

    @abc.abstractmethod
    def logged(self) -> dict[str, float]:
        """Return what a row of the log says about skipped steps."""


@final
class RaiseOnNan(NanPolicy):
    """The optimiser sees the flag on the device; the run ends when the host reads it."""

    def before_move(self, step: int) -> None:
        return

    def logged(self) -> dict[str, float]:
        return {}


@final
class SkipOnNan(NanPolicy):
    """The step ends before anything moves, until the budget is used up. The host waits for the device in each turn."""

    def before_move(self, step: int) -> None:
        if not self.guard.flag.item():
            return
        cause = self.guard.explain()
        self.guard.reset()
        self.total += 1
        self.recent = [*(past for past in self.recent if step - WINDOW < past < step), step]
        if len(self.recent) > LIMIT:
            raise NonFiniteError(
                f"{cause}; {len(self.recent)} of the last {WINDOW} steps were skipped, and at most {LIMIT} may be "
                "(train.nan_policy: skip). Lower optim.*.lr, or look at the samples; the last checkpoint is good."
            )
        raise SkippedStepError(cause)

    def logged(self) -> dict[str, float]:
        return {"skipped_steps": float(self.total)}


POLICIES: dict[str, type[NanPolicy]] = {"raise": RaiseOnNan, "skip": SkipOnNan}
"""By ``train.nan_policy``."""
