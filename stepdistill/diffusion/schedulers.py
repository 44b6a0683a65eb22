"""Diffusers schedulers: read as noise schedules, and made from samplers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from stepdistill.diffusion.schedule import DiscreteVP, Karras, NoiseSchedule, RectifiedFlow


def read_schedule(config: Mapping[str, Any]) -> tuple[NoiseSchedule, str]:
    """The noise schedule and prediction type that a diffusers scheduler config stands for.

    Raises:
        ValueError: for a scheduler whose process is unknown here, or an epsilon-network asked to see pure noise.
    """
    name = config.get("_class_name", "DDPMScheduler")
    if "FlowMatch" in name or config.get("prediction_type") == "flow_prediction":
        shift = config.get("shift", config.get("flow_shift", 1.0)) or 1.0
        return RectifiedFlow(shift, config.get("num_train_timesteps", 1000)), "flow"
    if name.startswith("EDM"):
        keys = ("sigma_min", "sigma_max", "sigma_data", "rho")
        return Karras(**{key: config[key] for key in keys if key in config}), "edm"
    if name == "CMStochasticIterativeScheduler":
        keys = ("sigma_min", "sigma_max", "sigma_data", "rho")
        return Karras(**{key: config[key] for key in keys if key in config}, noise_scale=1000.0), "edm"
    if "beta_schedule" not in config and "trained_betas" not in config:
        raise ValueError(f"scheduler: cannot read the noise process of {name!r}: it has no betas and is no flow")
    schedule = DiscreteVP.from_config(config)
    prediction_type = config.get("prediction_type", "epsilon")
    alpha_1, _ = schedule(torch.ones(1))
    if prediction_type == "epsilon" and alpha_1.item() == 0:
        raise ValueError(
            "scheduler: prediction_type 'epsilon' at zero terminal SNR (alpha_T = 0) cannot tell the clean image; "
            "wanted 'v_prediction' or 'sample', or rescale_betas_zero_snr: false"
        )
    return schedule, prediction_type
