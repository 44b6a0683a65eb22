"""The noise process of a watched pipeline's scheduler, its grid, and what networks are told of a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stepdistill.diffusion.native_grids import UnshiftedTimes
from stepdistill.diffusion.reading import read_schedule
from stepdistill.diffusion.schedule import DiscreteVP, Karras, NoiseSchedule, RectifiedFlow
from stepdistill.diffusion.shift import shifted
from stepdistill.families.observation.comparing import apart
from stepdistill.families.observation.watching import Step

ROUNDED = 2e-3
"""Largest difference of a noise level and its timestep, which some schedulers round to whole numbers."""


def read_process(scheduler: Any) -> tuple[NoiseSchedule, str, dict[str, Any]]:
    """Return a scheduler's noise process, what networks predict, and a config of a scheduler that is read so.

    A scheduler with betas that is not known, or whose alphas are not those of its betas, is read by its alphas.
    """
    config = json.loads(scheduler.to_json_string())
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(alphas, Tensor):
        return *read_schedule(config), config
    try:
        schedule, prediction = read_schedule(config)
    except ValueError as error:
        if "cannot read the noise process" not in str(error):
            raise
    else:
        # Euler's scheduler keeps 2^-24 of signal where DDIM's keeps none
        if not isinstance(schedule, DiscreteVP) or (schedule.angles - DiscreteVP(alphas).angles).abs().max() < 1e-3:
            return schedule, prediction, config
    kept = torch.cat([torch.ones(1, dtype=torch.float64), alphas.double().cpu()])
    betas, predicts = (1 - kept[1:] / kept[:-1]).tolist(), config.get("prediction_type", "epsilon")
    config = {
        "_class_name": "DDIMScheduler", "num_train_timesteps": len(alphas), "prediction_type": predicts,
        "trained_betas": betas,
    }  # fmt: skip
    return *read_schedule(config), config


def read_shift(scheduler: Any, shift: float) -> float:
    """Return the shift of the grid that a call has just set, at its middle; ``shift`` if the scheduler's is fixed."""
    if not scheduler.config.get("use_dynamic_shifting"):
        return shift
    steps = len(scheduler.timesteps)
    u, sigma = 1 - (steps // 2) / steps, float(scheduler.sigmas[steps // 2])
    if (end := scheduler.config.get("shift_terminal")) is None:
        return sigma * (1 - u) / (u * (1 - sigma))
    # the grid was stretched to end there, which leaves the ratios of 1 - sigma = (1 - u) / (1 + (shift - 1) u)
    ratio = (1 - sigma) / (1 - end) * (1 - 1 / steps) / (1 - u)
    return 1 + (1 - ratio) / (ratio * u - 1 / steps)


def read_told(scheduler: Any, flow: RectifiedFlow, steps: Sequence[Step]) -> RectifiedFlow:
    """Return the flow with what its networks are told of a time; ``steps`` are those that the scheduler has just made.

    Raises:
        ValueError: if that is neither the noise level nor what it was before the shift.
    """
    levels, told = scheduler.sigmas.tolist(), [step.timestep for step in steps]
    u, sigma = told[len(steps) // 2] / flow.num_timesteps, levels[len(steps) // 2]
    inside = 0 < u < 1 and 0 < sigma < 1
    others = [UnshiftedTimes(sigma * (1 - u) / (u * (1 - sigma)), flow.num_timesteps)] if inside else []
    for known in (flow, *others):
        if all(abs(time_of(known, each) - level) < ROUNDED for each, level in zip(told, levels, strict=False)):
            return known
    raise ValueError(f"its scheduler steps from noise levels {levels[: len(steps)]} at timesteps {told}")


def makes_grid(scheduler: Any, schedule: NoiseSchedule) -> bool:
    """Return whether the grid that a call without one of its own has just set is the schedule's of as many steps."""
    steps, sigmas = len(scheduler.timesteps), getattr(scheduler, "sigmas", None)
    if sigmas is None or len(sigmas) != steps + 1:
        return False
    return apart(sigmas.double().cpu(), schedule.grid(steps)) < 1e-4


def time_of(schedule: NoiseSchedule, timestep: float) -> float:
    """Return the time in [0, 1] at which a schedule has this timestep."""
    match schedule:
        case DiscreteVP():
            return (timestep + 1) / schedule.num_timesteps
        case Karras():
            sigma = torch.tensor(4 * timestep / schedule.noise_scale, dtype=torch.float64).exp()
            return schedule.time_of(sigma).item()
        case UnshiftedTimes():
            return shifted(timestep / schedule.num_timesteps, schedule.shift)
        case RectifiedFlow():
            return timestep / schedule.num_timesteps
    raise AssertionError("a teacher has one of these processes")
