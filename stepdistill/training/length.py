"""Whether a run is long enough for its student to learn anything."""

from __future__ import annotations

from stepdistill.methods.base import Distiller, Stage
from stepdistill.networks.bank import STUDENT


def check_length(distiller: Distiller, steps: int) -> None:
    """Raise ``ValueError`` unless every stage of a run of ``steps`` training steps updates the student."""
    begin = 0
    for stage in distiller.stages(steps):
        if not _updates_student(distiller, stage, begin, stage.steps):
            raise ValueError(
                f"train.steps: expected enough to update the student in every stage, got {steps}, of which stage "
                f"{stage.name!r} has {stage.steps}; take more, or a shorter warm-up or update interval"
            )
        begin += stage.steps


def student_has_moved(distiller: Distiller, steps: int, done: int) -> bool:
    """Return whether the first ``done`` of a run's ``steps`` training steps updated the student."""
    begin = 0
    for stage in distiller.stages(steps):
        if _updates_student(distiller, stage, begin, min(stage.steps, done - begin)):
            return True
        begin += stage.steps
    return False


def _updates_student(distiller: Distiller, stage: Stage, begin: int, steps: int) -> bool:
    """Return whether the student has a turn in the first ``steps`` of a stage, which begins at the run's ``begin``."""
    now, updates = (distiller.stage, distiller.step_in_stage), False
    distiller.stage, distiller.step_in_stage = stage, 0
    while not updates and distiller.step_in_stage < steps:
        updates = distiller.turns[STUDENT].when(begin + distiller.step_in_stage)
        distiller.step_in_stage += 1
    distiller.stage, distiller.step_in_stage = now
    return updates
