"""What other programs read of a student in ``model_index.json``; stock diffusers ignores keys that it does not know.

vLLM-Omni samples students of flow teachers by DMD2 and its relatives from four keys: with Euler steps at these
timesteps, of a flow scheduler of this shift. Some pipelines of diffusers have fields of their own that say that a
network is a student, ``is_distilled`` and ``distilled_sigmas``.
"""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline

from stepdistill.diffusion.native_grids import UnshiftedTimes
from stepdistill.diffusion.samplers import Sampler
from stepdistill.diffusion.schedule import RectifiedFlow


def dmd2_keys(sampler: Sampler, guidance_scale: float) -> dict[str, Any]:
    """Return vLLM-Omni's keys; none for another process than a flow of usual times, as which it would sample it.

    The shift is 1, because the timesteps contain the grid's own.
    """
    match sampler.schedule:
        case UnshiftedTimes():  # whose timesteps are no noise levels
            return {}
        case RectifiedFlow():
            return {
                "dmd2_denoising_timesteps": sampler.schedule.timestep(sampler.times[:-1]).tolist(),
                "dmd2_num_inference_steps": sampler.steps,
                "dmd2_guidance_scale": guidance_scale,
                "dmd2_scheduler_shift": 1.0,
            }
    return {}


def mark_distilled(pipeline: DiffusionPipeline, sampler: Sampler, guidance_scale: float) -> None:
    """Set the fields by which a pipeline knows a student that is called without guidance, if it has them."""
    if guidance_scale != 1:
        return
    sigmas = sampler.schedule.explicit_sigmas(sampler.times[:-1]).get("sigmas")
    known = {"is_distilled": True, "distilled_sigmas": sigmas}
    own = {name: value for name, value in known.items() if name in pipeline.config}
    pipeline.register_to_config(**own)
