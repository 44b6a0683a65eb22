"""Diffusers schedulers, made from samplers.

:func:`to_diffusers` translates each sampler into the scheduler that takes the same steps, stock wherever one exists.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from stepdistill.diffusion.picked import origin_steps
from stepdistill.diffusion.policy import PolicySampler
from stepdistill.diffusion.reading import EDM_KEYS, noise_process
from stepdistill.diffusion.samplers import (
    DDIM,
    ConsistencyKarras,
    ConsistencySampler,
    DoubleStep,
    NoiseCorrected,
    Sampler,
    StrategicStochasticSampler,
)
from stepdistill.diffusion.schedule import DiscreteVP, Karras, RectifiedFlow
from stepdistill.diffusion.trig import Trig


@functools.singledispatch
def to_diffusers(sampler: Sampler, teacher: Mapping[str, Any]) -> Any:
    """Return the diffusers scheduler that takes the same steps as ``sampler``.

    Args:
        sampler: grid and rule.
        teacher: the config of the teacher's scheduler, whose noise process is kept.

    Raises:
        ValueError: if no scheduler can express this grid.
    """
    del teacher
    raise AssertionError(f"no scheduler is known for the sampler {sampler.name}")


@to_diffusers.register
def _ddim(sampler: DDIM, teacher: Mapping[str, Any]) -> Any:
    match sampler.schedule:
        case RectifiedFlow():
            return _flow(sampler.schedule)
        case Karras():
            return _edm_euler(sampler, sampler.schedule, teacher)
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    if "timesteps" in sampler.pipeline_kwargs:  # which DDIMScheduler does not take; of order 1, the solver is DDIM
        return DPMSolverMultistepScheduler.from_config(noise_process(teacher), solver_order=1)
    check_trailing_grid(sampler)
    # without clipping and with a last step to clean data, whatever the teacher's own sampler does
    return DDIMScheduler.from_config(
        noise_process(teacher), timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )


@to_diffusers.register
def _consistency(sampler: ConsistencySampler, teacher: Mapping[str, Any]) -> Any:
    from diffusers import LCMScheduler, SCMScheduler

    match sampler.schedule:
        case Trig():
            return SCMScheduler(sigma_data=sampler.schedule.sigma_data)
        case RectifiedFlow():
            return _flow(sampler.schedule, stochastic_sampling=True)
        case Karras():
            if sampler.steps != 1:
                raise ValueError(f"no stock scheduler re-noises an EDM student: expected 1 step, got {sampler.steps}")
            return _edm_euler(sampler, sampler.schedule, teacher)
    return LCMScheduler.from_config(
        noise_process(teacher),
        original_inference_steps=origin_steps(sampler.times, timesteps_of(sampler)) or timesteps_of(sampler),
        timestep_scaling=1e4,  # c_skip < 1e-8 on every timestep but 0: the network's x_0 itself
        set_alpha_to_one=True,
        clip_sample=False,
    )


@to_diffusers.register
def _consistency_karras(sampler: ConsistencyKarras, teacher: Mapping[str, Any]) -> Any:
    from diffusers import CMStochasticIterativeScheduler

    from stepdistill.pipelines.noise_embedding import EDMConsistencyScheduler

    if teacher.get("prediction_type", "epsilon") != "epsilon":
        raise ValueError("method: no scheduler takes consistency steps with EDM's v_prediction; expected Euler steps")
    rule = EDMConsistencyScheduler if sampler.karras.noise_scale == 1 else CMStochasticIterativeScheduler
    process = edm_process(sampler.karras) | {"rho": sampler.rho}
    return rule(num_train_timesteps=sampler.points, clip_denoised=False, **process)


@to_diffusers.register
def _strategic_stochastic(sampler: StrategicStochasticSampler, teacher: Mapping[str, Any]) -> Any:
    match sampler.schedule:
        case DiscreteVP():
            from diffusers import TCDScheduler

            origin = picked_from(sampler)
            return TCDScheduler.from_config(noise_process(teacher), original_inference_steps=origin, clip_sample=False)
    if sampler.gamma == 0:
        return to_diffusers(DDIM(sampler.schedule, sampler.times), teacher)
    raise ValueError(f"gamma: expected 0, got {sampler.gamma}: no stock scheduler noises flows or EDM back up")


@to_diffusers.register
def _double_step(sampler: DoubleStep, teacher: Mapping[str, Any]) -> Any:
    from stepdistill.pipelines.double_step import DoubleStepScheduler

    require_vp(sampler)
    check_trailing_grid(sampler)
    return DoubleStepScheduler(**noise_process(teacher), timestep_spacing="trailing", clip_sample=False)


@to_diffusers.register
def _noise_corrected(sampler: NoiseCorrected, teacher: Mapping[str, Any]) -> Any:
    from stepdistill.pipelines.noise_corrected import NoiseCorrectedScheduler

    require_vp(sampler)
    assert torch.equal(sampler.times, sampler.schedule.grid(sampler.steps)), "expected the trailing grid"
    return NoiseCorrectedScheduler(
        **noise_process(teacher), timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )


@to_diffusers.register
def _policy(sampler: PolicySampler, teacher: Mapping[str, Any]) -> Any:
    from stepdistill.pipelines.policy import PolicyScheduler

    own: dict[str, Any] = {"last_segment": sampler.last, "substeps": sampler.substeps}
    match sampler.schedule:
        case RectifiedFlow():
            total, shift = sampler.schedule.num_timesteps, sampler.schedule.shift
            return PolicyScheduler(num_train_timesteps=total, shift=shift, prediction_type="flow", **own)
        case DiscreteVP():
            return PolicyScheduler(**noise_process(teacher), **own)
    raise ValueError(f"method: expected a flow or betas to follow a policy on, got {type(sampler.schedule).__name__}")


def _flow(schedule: RectifiedFlow, **options: Any) -> Any:
    """Return Euler's scheduler without shift: the pipeline's explicit sigmas already contain it."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=schedule.num_timesteps, shift=1.0, **options)


def _edm_euler(sampler: Sampler, schedule: Karras, teacher: Mapping[str, Any]) -> Any:
    """Return Euler's scheduler for EDM, in the teacher's noise embedding.

    Noise levels even in Karras' time are his grid down to the last of them, which therefore is the scheduler's
    ``sigma_min``.
    """
    from diffusers import EDMEulerScheduler

    from stepdistill.pipelines.noise_embedding import ConsistencyEulerScheduler

    times = sampler.times[:-1]
    if not torch.allclose(times, torch.linspace(1, times[-1].item(), len(times), dtype=torch.float64), atol=1e-9):
        raise ValueError(f"no stock scheduler takes these {sampler.steps} Euler steps: expected the grid of Karras")
    process = edm_process(schedule)
    if not torch.equal(sampler.times, schedule.grid(sampler.steps)):
        process["sigma_min"] = schedule(times[-1])[1].item()
    rule = EDMEulerScheduler if schedule.noise_scale == 1 else ConsistencyEulerScheduler
    return rule(**process, prediction_type=teacher.get("prediction_type", "epsilon"))


def edm_process(schedule: Karras) -> dict[str, float]:
    """Return the process as arguments of diffusers' EDM schedulers."""
    return {key: getattr(schedule, key) for key in EDM_KEYS}


# ------------------------------------------------------------------------------------ what diffusers can express


def require_vp(sampler: Sampler) -> None:
    """Raise ``ValueError`` unless the sampler's process has betas."""
    match sampler.schedule:
        case DiscreteVP():
            return
    raise ValueError(f"the sampler {sampler.name} is exported for VP teachers only, not for flows or EDM")


def timesteps_of(sampler: Sampler) -> int:
    """Return the number of timesteps of a sampler's discrete process."""
    assert isinstance(sampler.schedule, DiscreteVP), "the process is discrete"
    return sampler.schedule.num_timesteps


def check_trailing_grid(sampler: Sampler) -> None:
    """Raise ``ValueError`` unless stock schedulers' "trailing" spacing of ``sampler.steps`` gives ``sampler.times``."""
    total, steps = timesteps_of(sampler), sampler.steps
    if total % steps or not torch.equal(sampler.times, sampler.schedule.grid(steps)):
        possible = [n for n in range(1, 65) if total % n == 0]
        raise ValueError(
            f"no stock scheduler samples this grid of {steps} steps exactly: "
            f"steps must divide the teacher's {total} timesteps, for example {possible}"
        )


def picked_from(sampler: Sampler) -> int:
    """Return the finest grid out of which ``TCDScheduler`` picks exactly ``sampler.times``.

    Raises:
        ValueError: if there is none.
    """
    total = timesteps_of(sampler)
    origin = origin_steps(sampler.times, total)
    if origin is None:
        timesteps = (sampler.times[:-1] * total - 1).round().long().tolist()
        raise ValueError(
            f"no stock scheduler samples at the timesteps {timesteps}: it takes every n-th of a grid whose number of "
            f"steps must divide the teacher's {total} timesteps"
        )
    return origin
