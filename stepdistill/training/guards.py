"""Stops a run that has gone wrong: at once at a number that is not finite, and after a while where training diverges.

:class:`FiniteGuard` acts before anything has been stepped, without a host sync a step.

Every turn hands its scalars to :meth:`FiniteGuard.check`. The flag it returns stays on the device and is given to the
optimiser, which skips its step while the flag is up; it never comes down. The host looks at the flag when it logs
anyway, and then names step, turn and term.

:class:`DivergenceGuard` reads the diagnostics that adversarial and distribution-matching methods log, and names which
of the known ways to fail it sees: a run that goes on for hours as a collapsed one helps nobody.
"""

from __future__ import annotations

from collections.abc import Mapping

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


class DivergenceError(ValueError):
    """Training has failed in a way that has a name."""


ADVICE = {
    "the fake score lags": "it denoises the student's images worse than the teacher does, so their difference is no "
    "gradient: raise student_update_interval, or optim.fake.lr, or lower optim.student.lr",
    "the diversity collapsed": "the student's images are almost all alike: raise the distillation or regression "
    "weight, or lower optim.student.lr",
    "the critic is saturated": "it tells every image right, so the student learns nothing from it: lower its learning "
    "rate, raise r1, or give the student's turn more steps",
}


RENAMED = {"spread": "diversity_ratio", "lag": "fake_score_error_ratio"}
"""Scalars of older logs, and what they are called now."""


def with_current_names(values: Mapping[str, float]) -> dict[str, float]:
    """Return logged scalars without their turn, those of older logs under their present names."""
    found = {name.rpartition("/")[2]: value for name, value in values.items()}
    return {RENAMED.get(name, name): value for name, value in found.items()}


ROWS = 10
"""Rows that a sign must stand for, however short the run: if one batch in ten deceives, ten in a row are 1e-10."""


def patience_of(steps: int) -> int:
    """For how many steps a run of ``steps`` may show a sign: a third of them, up to 500; it could have recovered."""
    return min(500, steps // 3)


class DivergenceGuard:
    """Looks at what is logged, and stops a run in which a sign has stood long and been seen often.

    Networks need steps to recover, so that a phase is told from an end by steps; a batch can deceive, so that a sign is
    told from chance by rows of the log.

    Args:
        patience: steps over which the same sign has to stand, see :func:`patience_of`.
        rows: of the log that have to show it, one after the other.
    """

    def __init__(self, patience: int, rows: int = ROWS) -> None:
        self.patience, self.rows = patience, rows
        self.since: dict[str, list[int]] = {cause: [] for cause in ADVICE}

    @property
    def good_until(self) -> int | None:
        """The last step before the first of the signs that stand now, from which a run can be saved; else None."""
        began = [steps[0] for steps in self.since.values() if steps]
        return min(began) - 1 if began else None

    def check(self, step: int, values: Mapping[str, float]) -> None:
        """Note the values logged at ``step``, by ``turn/name``; those of turns that did not move are missing.

        Raises:
            DivergenceError: naming the cause, since when it stands, and what helps.
        """
        for cause, standing in self.signs(with_current_names(values)).items():
            steps = self.since[cause]
            steps.append(step)
            if not standing:
                steps.clear()
            elif len(steps) >= self.rows and step - steps[0] >= self.patience:
                raise DivergenceError(f"step {step}: {cause}, since step {steps[0]}: {ADVICE[cause]}")

    def signs(self, values: Mapping[str, float]) -> dict[str, bool]:
        """Which causes can be seen in the values, and whether they are."""
        seen = {}
        if "diversity_ratio" in values:
            seen["the diversity collapsed"] = values["diversity_ratio"] < 0.1
        if {"accuracy_real", "accuracy_fake"} <= values.keys():
            seen["the critic is saturated"] = min(values["accuracy_real"], values["accuracy_fake"]) > 0.995
        if "fake_score_error_ratio" in values:
            seen["the fake score lags"] = values["fake_score_error_ratio"] > 1.25
        return seen
