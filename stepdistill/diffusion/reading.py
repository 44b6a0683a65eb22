"""Diffusers schedulers, read as noise schedules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from stepdistill.diffusion.schedule import DiscreteVP, Karras, NoiseSchedule, RectifiedFlow

EDM_KEYS = ("sigma_min", "sigma_max", "sigma_data", "rho")
PROCESS_KEYS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
    "prediction_type", "rescale_betas_zero_snr",
)  # fmt: skip

VP_SCHEDULERS = (
    "DDIMScheduler", "DDIMInverseScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler",
    "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverMultistepInverseScheduler",
    "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
    "LCMScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "RePaintScheduler", "SASolverScheduler", "TCDScheduler",
    "UniPCMultistepScheduler", "DoubleStepScheduler", "NoiseCorrectedScheduler",
)  # fmt: skip
"""Schedulers whose noise process is that of their betas: of diffusers, and of :mod:`stepdistill.pipelines`."""

FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")

EDM_SCHEDULERS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "EDMConsistencyScheduler")

EDM_PREDICTIONS = {"epsilon": "edm", "v_prediction": "edm_v"}
"""The names of EDM's schedulers for the sign of the network's output, and ours."""

VP_PREDICTIONS = ("epsilon", "v_prediction", "sample")

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
"""Those of ``DDIMScheduler``; others are read off the teacher's own scheduler."""


def read_schedule(config: Mapping[str, Any]) -> tuple[NoiseSchedule, str]:
    """Return the noise schedule and the prediction type of a diffusers scheduler config.

    Raises:
        ValueError: if the scheduler's process is unknown here, or an epsilon-network would have to see pure noise.
    """
    name = config.get("_class_name", "DDPMScheduler")
    if name in FLOW_SCHEDULERS or (name in VP_SCHEDULERS and is_flow(config, name)):
        return read_flow(config, name), "flow"
    if name in EDM_SCHEDULERS:
        return read_karras(config, noise_scale=1.0), _read_prediction(config, name, EDM_PREDICTIONS)
    if name == "CMStochasticIterativeScheduler":
        return read_karras(config, noise_scale=1000.0), "edm"
    if name not in VP_SCHEDULERS:
        raise ValueError(
            f"scheduler: cannot read the noise process of {name!r}: it is none of diffusers' schedulers with betas, of "
            "flow matching or of EDM"
        )
    if config.get("timestep_type", "discrete") != "discrete":
        raise ValueError(f"scheduler: {name}: timestep_type: expected 'discrete', got {config['timestep_type']!r}")
    schedule = read_discrete_vp(config)
    prediction_type = _read_prediction(config, name, {kind: kind for kind in VP_PREDICTIONS})
    alpha_1, _ = schedule(torch.ones(1))
    if prediction_type == "epsilon" and alpha_1.item() == 0:
        raise ValueError(
            "scheduler: prediction_type 'epsilon' at zero terminal SNR (alpha_T = 0) cannot predict the clean image; "
            "expected 'v_prediction' or 'sample', or rescale_betas_zero_snr: false"
        )
    return schedule, prediction_type


def _read_prediction(config: Mapping[str, Any], name: str, known: Mapping[str, str]) -> str:
    """Return our name of a config's prediction type; raise ``ValueError`` if it is not one of ``known``."""
    found = config.get("prediction_type", "epsilon")
    if found not in known:
        raise ValueError(f"scheduler: {name}: prediction_type: expected one of {', '.join(known)}, got {found!r}")
    return known[found]


def is_flow(config: Mapping[str, Any], name: str) -> bool:
    """Return whether a solver for betas is set to solve a flow.

    Raises:
        ValueError: if only its noise levels or only its prediction are those of a flow.
    """
    levels, prediction = config.get("use_flow_sigmas", False), config.get("prediction_type", "epsilon")
    if levels != (prediction == "flow_prediction"):
        raise ValueError(
            f"scheduler: {name}: expected use_flow_sigmas: true and prediction_type: flow_prediction together, got "
            f"{levels} and {prediction!r}"
        )
    return bool(levels)


def read_flow(config: Mapping[str, Any], name: str) -> RectifiedFlow:
    """Return the process of a flow-matching scheduler config; raise ``ValueError`` if its time runs backwards."""
    if config.get("invert_sigmas"):
        raise ValueError(f"scheduler: {name}: invert_sigmas: expected false, got true: time 1 must be noise")
    shift = config.get("shift", config.get("flow_shift", 1.0)) or 1.0
    return RectifiedFlow(shift, config.get("num_train_timesteps", 1000))


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

    Missing keys get DDIM's defaults. They are written out because LCM's and TCD's schedulers have other defaults. A
    beta schedule that DDIM does not know is written out as its betas.
    """
    from diffusers import DDIMScheduler

    given = {key: config[key] for key in PROCESS_KEYS if config.get(key) is not None}
    if "trained_betas" not in given and given.get("beta_schedule", "linear") not in BETA_SCHEDULES:
        given["trained_betas"] = own_betas(config)
        del given["beta_schedule"]
    whole = DDIMScheduler(**given).config
    return {key: whole[key] for key in PROCESS_KEYS if whole[key] not in (None, False)}


def own_betas(config: Mapping[str, Any]) -> list[float]:
    """Return the betas of the scheduler that a config names, before they are rescaled to zero terminal SNR."""
    import diffusers

    name, kind = config.get("_class_name", "DDPMScheduler"), config["beta_schedule"]
    try:
        scheduler = getattr(diffusers, name).from_config({**config, "rescale_betas_zero_snr": False})
    except (AttributeError, NotImplementedError) as error:
        raise ValueError(f"scheduler: {name} knows no beta_schedule {kind!r}") from error
    return scheduler.betas.tolist()
