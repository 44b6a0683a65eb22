"""Diffusers schedulers: read as noise schedules, and made from samplers.

:func:`to_diffusers` translates each sampler into the scheduler that takes the same steps, stock wherever one exists.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from stepdistill.diffusion.samplers import (
    DDIM,
    ConsistencyKarras,
    ConsistencySampler,
    DoubleStep,
    NoiseCorrected,
    Sampler,
    StrategicStochasticSampler,
)
from stepdistill.diffusion.schedule import DiscreteVP, Karras, NoiseSchedule, RectifiedFlow, Trig

EDM_KEYS = ("sigma_min", "sigma_max", "sigma_data", "rho")
PROCESS_KEYS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
    "prediction_type", "rescale_betas_zero_snr",
)  # fmt: skip
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
"""Beta schedules that every scheduler of diffusers knows."""


# ---------------------------------------------------------------------------------- from diffusers


def read_schedule(config: Mapping[str, Any]) -> tuple[NoiseSchedule, str]:
    """Return the noise schedule and the prediction type of a diffusers scheduler config.

    Raises:
        ValueError: if the scheduler's process is unknown here, or an epsilon-network would have to see pure noise.
    """
    name = config.get("_class_name", "DDPMScheduler")
    if "FlowMatch" in name or config.get("prediction_type") == "flow_prediction":
        shift = config.get("shift", config.get("flow_shift", 1.0)) or 1.0
        return RectifiedFlow(shift, config.get("num_train_timesteps", 1000)), "flow"
    if name.startswith("EDM"):
        return read_karras(config, noise_scale=1.0), "edm"
    if name == "CMStochasticIterativeScheduler":
        return read_karras(config, noise_scale=1000.0), "edm"
    if "beta_schedule" not in config and "trained_betas" not in config:
        raise ValueError(f"scheduler: cannot read the noise process of {name!r}: it has no betas and is no flow")
    schedule = read_discrete_vp(config)
    prediction_type = config.get("prediction_type", "epsilon")
    alpha_1, _ = schedule(torch.ones(1))
    if prediction_type == "epsilon" and alpha_1.item() == 0:
        raise ValueError(
            "scheduler: prediction_type 'epsilon' at zero terminal SNR (alpha_T = 0) cannot predict the clean image; "
            "expected 'v_prediction' or 'sample', or rescale_betas_zero_snr: false"
        )
    return schedule, prediction_type


def read_karras(config: Mapping[str, Any], noise_scale: float) -> Karras:
    """Return the process of an EDM or consistency-model scheduler config."""
    given = {key: config[key] for key in EDM_KEYS if key in config}
    return Karras(**given, noise_scale=noise_scale)


def read_discrete_vp(config: Mapping[str, Any]) -> DiscreteVP:
    """Return the process of a scheduler config with betas: any beta schedule, trained betas, zero terminal SNR."""
    from diffusers import DDIMScheduler

    return DiscreteVP(DDIMScheduler(**noise_process(config)).alphas_cumprod)


def noise_process(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a VP scheduler's config that defines the training process, without the sampling options.

    Missing keys get DDIM's defaults. They are written out because LCM's and TCD's schedulers have other defaults.
    """
    from diffusers import DDIMScheduler

    given = {key: config[key] for key in PROCESS_KEYS if config.get(key) is not None}
    if given.get("trained_betas") is None and given.get("beta_schedule", "linear") not in BETA_SCHEDULES:
        given |= {"trained_betas": own_betas(config), "beta_schedule": "linear", "rescale_betas_zero_snr": False}
    whole = DDIMScheduler(**given).config
    return {key: whole[key] for key in PROCESS_KEYS if whole[key] not in (None, False)}


def own_betas(config: Mapping[str, Any]) -> list[float]:
    """Return the betas of a schedule that the scheduler's own class knows and others do not (sigmoid, laplace, ...).

    Raises:
        ValueError: if its class does not know it either.
    """
    import diffusers

    name, schedule = config.get("_class_name", "DDPMScheduler"), config["beta_schedule"]
    cls = getattr(diffusers, name, None) if str(name).endswith("Scheduler") else None
    try:
        if cls is None:
            raise NotImplementedError
        return cls.from_config(dict(config)).betas.tolist()
    except (NotImplementedError, AttributeError):
        known = ", ".join(BETA_SCHEDULES)
        raise ValueError(
            f"scheduler/scheduler_config.json: beta_schedule: expected one that {name} knows ({known}, ...), got "
            f"{schedule!r}"
        ) from None


# ------------------------------------------------------------------------------------ to diffusers


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
            return _edm_euler(sampler, sampler.schedule)
    from diffusers import DDIMScheduler

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
            return _edm_euler(sampler, sampler.schedule)
    return LCMScheduler.from_config(
        noise_process(teacher),
        original_inference_steps=origin_steps(sampler) if sampler.times[0] == 1 else timesteps_of(sampler),
        timestep_scaling=1e4,  # c_skip < 1e-8 on every timestep but 0: the network's x_0 itself
        set_alpha_to_one=True,
        clip_sample=False,
    )


@to_diffusers.register
def _consistency_karras(sampler: ConsistencyKarras, teacher: Mapping[str, Any]) -> Any:
    from diffusers import CMStochasticIterativeScheduler

    from stepdistill.pipelines.noise_embedding import EDMConsistencyScheduler

    del teacher
    rule = EDMConsistencyScheduler if sampler.karras.noise_scale == 1 else CMStochasticIterativeScheduler
    return rule(num_train_timesteps=sampler.points, clip_denoised=False, **edm_process(sampler.karras))


@to_diffusers.register
def _strategic_stochastic(sampler: StrategicStochasticSampler, teacher: Mapping[str, Any]) -> Any:
    match sampler.schedule:
        case DiscreteVP():
            from diffusers import TCDScheduler

            origin = origin_steps(sampler)
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


def _flow(schedule: RectifiedFlow, **options: Any) -> Any:
    """Return Euler's scheduler without shift: the pipeline's explicit sigmas already contain it."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=schedule.num_timesteps, shift=1.0, **options)


def _edm_euler(sampler: Sampler, schedule: Karras) -> Any:
    """Return Euler's scheduler for EDM, in the teacher's noise embedding."""
    from diffusers import EDMEulerScheduler

    from stepdistill.pipelines.noise_embedding import ConsistencyEulerScheduler

    if not torch.equal(sampler.times, schedule.grid(sampler.steps)):
        raise ValueError(f"no stock scheduler takes these {sampler.steps} Euler steps: expected the grid of Karras")
    rule = EDMEulerScheduler if schedule.noise_scale == 1 else ConsistencyEulerScheduler
    return rule(**edm_process(schedule))


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


def origin_steps(sampler: Sampler) -> int:
    """Return the finest grid out of which ``LCMScheduler`` and ``TCDScheduler`` pick exactly ``sampler.times``.

    Raises:
        ValueError: if there is none.
    """
    total, steps = timesteps_of(sampler), sampler.steps
    positions = (sampler.times[:-1] * total).round().long().tolist()
    for origin in range(total, steps - 1, -1):
        if total % origin == 0 and positions == _picked(origin, steps, total):
            return origin
    raise ValueError(
        f"no stock scheduler samples at the timesteps {[i - 1 for i in positions]}: it takes every n-th of a grid "
        f"whose number of steps must divide the teacher's {total} timesteps"
    )


def _picked(origin: int, steps: int, total: int) -> list[int]:
    """Positions in 1 to ``total`` that the two schedulers pick for ``steps`` steps out of a grid of ``origin``."""
    return [total - origin * i // steps * (total // origin) for i in range(steps)]
