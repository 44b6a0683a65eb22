"""Training-free solvers: what a user would take instead of a student. All of them are diffusers' own.

Each is set up the way its authors recommend for few steps, on the teacher's own noise process: "trailing" spacing (the
first call sees pure noise), a last step to clean data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepdistill.config import nearest
from stepdistill.sampling import noise_process

SOLVERS = ("DDIM", "DPM-Solver++ 2M", "UniPC", "Euler", "Heun")


def make_solver(name: str, teacher: Mapping[str, Any]) -> Any:
    """The diffusers scheduler of a solver on a VP teacher's noise process.

    Args:
        name: one of :data:`SOLVERS`.
        teacher: the teacher's scheduler config.
    """
    from diffusers import (
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
        UniPCMultistepScheduler,
    )

    process = noise_process(teacher)
    match name:
        case "DDIM":
            return DDIMScheduler.from_config(
                process, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
            )
        case "DPM-Solver++ 2M":
            return DPMSolverMultistepScheduler.from_config(
                process, timestep_spacing="trailing", algorithm_type="dpmsolver++", solver_order=2,
                final_sigmas_type="zero", lower_order_final=True,
            )  # fmt: skip
        case "UniPC":
            return UniPCMultistepScheduler.from_config(
                process, timestep_spacing="trailing", solver_order=2, final_sigmas_type="zero"
            )
        case "Euler":
            return EulerDiscreteScheduler.from_config(process, timestep_spacing="trailing")
        case "Heun":
            return HeunDiscreteScheduler.from_config(process, timestep_spacing="trailing")
        case _:
            raise ValueError(f"solver {name!r}: unknown{nearest(name, SOLVERS)}")
