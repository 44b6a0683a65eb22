"""Stopping a run that diverges: it has not failed yet, but its diagnostics say that it will.

:class:`DivergenceGuard` reads the diagnostics that adversarial and distribution-matching methods log, and names the
known failure that it recognises, so that a collapsed run does not continue for hours.
"""

from __future__ import annotations

from collections.abc import Mapping


class DivergenceError(ValueError):
    """Training has failed in a way that has a name."""


ADVICE = {
    "the fake score lags": "it denoises the student's images worse than the teacher does, so their difference is not "
    "a gradient: raise student_update_interval, or optim.fake.lr, or lower optim.student.lr; if it did so from the "
    "first rows on, lower optim.fake.lr, whose noise it then is",
    "the diversity collapsed": "the student's images are almost identical: raise the distillation or regression "
    "weight, or lower optim.student.lr",
    "the critic is saturated": "it classifies every image correctly, so the student learns nothing from it: lower its "
    "learning rate, raise r1, or give the student's turn more steps",
}


RENAMED = {"spread": "diversity_ratio", "lag": "fake_score_error_ratio"}
"""Names of scalars in older logs, and their present ones."""


def with_current_names(values: Mapping[str, float]) -> dict[str, float]:
    """Return logged scalars without their turn, those of older logs under their present names."""
    current = {}
    for key, value in values.items():
        name = key.rpartition("/")[2]
        current[RENAMED.get(name, name)] = value
    return current


ROWS = 10
"""Rows in a row that must show a sign, however short the run: if one batch in ten misleads, ten do with 1e-10."""


def patience_of(steps: int) -> int:
    """Return for how many steps a run of ``steps`` may show a sign, as it may recover: a third of them, up to 500."""
    return min(500, steps // 3)


class DivergenceGuard:
    """Stops a run whose log has shown a sign of failure for many steps and in many rows.

    Networks may need steps to recover, so a sign must last for a number of steps; a single batch may mislead, so a sign
    must appear in a number of consecutive rows.

    Args:
        patience: steps over which a sign must last, see :func:`patience_of`.
        rows: consecutive rows of the log that must show it.
    """

    def __init__(self, patience: int, rows: int = ROWS) -> None:
        self.patience, self.rows = patience, rows
        self.since: dict[str, list[int]] = {cause: [] for cause in ADVICE}
        """The logged steps at which each sign has been present without a break."""

    def resume(self, signs: Mapping[str, list[int]]) -> None:
        """Go on from the signs of an earlier run, ``since`` as it was; those of other versions are left out."""
        for cause in self.since:
            self.since[cause] = list(signs.get(cause, []))

    @property
    def good_until(self) -> int | None:
        """The last step before the earliest of the present signs, to which a run can go back; None without a sign."""
        first_steps = [steps[0] for steps in self.since.values() if steps]
        return min(first_steps) - 1 if first_steps else None

    def check(self, step: int, values: Mapping[str, float]) -> None:
        """Take note of the values logged at ``step``, by ``turn/name``; those of turns that did not move are missing.

        Raises:
            DivergenceError: naming the cause, since when it is present, and a remedy.
        """
        for cause, present in self.signs(with_current_names(values)).items():
            steps = self.since[cause]
            steps.append(step)
            if not present:
                steps.clear()
            elif len(steps) >= self.rows and step - steps[0] >= self.patience:
                raise DivergenceError(f"step {step}: {cause}, since step {steps[0]}: {ADVICE[cause]}")

    def signs(self, values: Mapping[str, float]) -> dict[str, bool]:
        """Return which signs the values tell about, and whether each is present."""
        seen = {}
        if "diversity_ratio" in values:
            seen["the diversity collapsed"] = values["diversity_ratio"] < 0.1
        if {"accuracy_real", "accuracy_fake"} <= values.keys():
            seen["the critic is saturated"] = min(values["accuracy_real"], values["accuracy_fake"]) > 0.995
        if "fake_score_error_ratio" in values:
            seen["the fake score lags"] = values["fake_score_error_ratio"] > 1.25
        return seen
