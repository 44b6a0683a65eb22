"""What a finished student is to a run: its start, or its teacher."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from stepdistill.diffusion.samplers import Sampler
from stepdistill.export.contract import CONTRACT, read_contract
from stepdistill.families.base import Family
from stepdistill.families.config import TeacherConfig
from stepdistill.families.hub import locate
from stepdistill.families.loading import load_teacher
from stepdistill.files.schema import build
from stepdistill.training.cost import TrainingCost


def warn_of_a_student(teacher: TeacherConfig, start: int | None) -> None:
    """Warn if a teacher is a student, which denoises at the times of its own few steps, if at any.

    Args:
        teacher: the section.
        start: number of the teacher's steps that the method begins with, if it has a grid of them.
    """
    contract = read_contract(locate(teacher))
    if contract.origin.method is None or start == contract.steps:
        return
    warnings.warn(
        f"teacher.path: {teacher.path}: expected a model that denoises at every time, got a student of "
        f"{contract.origin.method} for {contract.steps} steps, whose predictions are samples, and which was trained at "
        f"some times only; bank.init_from={teacher.path} starts from it under its own teacher",
        stacklevel=3,
    )


def warn_of_another_sampler(start: str | None, sampler: Sampler) -> None:
    """Warn if a run starts from a student that was made for another sampler, by which it scores worse than by its own.

    Args:
        start: the pipeline's folder, if any.
        sampler: the method's.
    """
    named = None if start is None else read_contract(Path(start)).sampler
    if named not in (None, sampler.name):
        warnings.warn(
            f"bank.init_from: {start}: expected a student made for this method's sampler, {sampler.name}, got one made "
            f"for {named}, which begins with worse images than its own (step 0 of eval.every shows them)",
            stacklevel=3,
        )


def cost_of(start: str | None) -> TrainingCost:
    """Return what the student in the folder ``start`` has cost; nothing if there is none, or it does not say.

    Raises:
        ConfigError: if its contract says it with other keys or types, naming the file and the key.
    """
    if start is None:
        return TrainingCost()
    folder = Path(start)
    return build(TrainingCost, read_contract(folder).origin.training, f"{folder / CONTRACT}: training")


def read_student(folder: str, teacher: TeacherConfig, family: Family) -> dict[str, Tensor]:
    """Return the weights of a finished student, by name; its folder is trusted as far as its teacher's is.

    Raises:
        ValueError: if the folder holds no pipeline, or that of another teacher's student.
    """
    if family.points != 1:
        raise ValueError("bank.init_from: expected none for a method that widens the network's head, got " + folder)
    try:
        student = load_teacher(
            TeacherConfig(path=folder, family=teacher.family, trust_remote_code=teacher.trust_remote_code)
        )
    except ValueError as error:
        raise ValueError(f"bank.init_from: {str(error).removeprefix('teacher.path: ')}") from error
    if student.prediction_type != family.prediction_type:
        raise ValueError(
            f"bank.init_from: {folder}: expected a student of this teacher, which predicts {family.prediction_type}, "
            f"got one that predicts {student.prediction_type}"
        )
    weights, own = student.network.state_dict(), family.network.state_dict()
    for name in sorted({*own, *weights}):
        shape, expected = _shape(weights, name), _shape(own, name)
        if shape != expected:
            raise ValueError(f"bank.init_from: {folder}: {name}: expected {expected} as in the teacher, got {shape}")
    return weights


def _shape(weights: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(weights[name].shape) if name in weights else None
