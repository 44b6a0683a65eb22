"""Training-free solvers: what a user would take instead of a student. All of them are diffusers' own.

Each is set up the way its authors recommend for few steps, on the teacher's own noise process: "trailing" spacing (the
first call sees pure noise), a last step to clean data.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping
from typing import Any

from stepdistill.config import nearest
from stepdistill.diffusion.schedule import DiscreteVP, RectifiedFlow
from stepdistill.diffusion.schedulers import noise_process, read_schedule
from stepdistill.export.contract import read_contract
from stepdistill.export.pipeline import apply_contract
from stepdistill.families.config import TeacherConfig
from stepdistill.families.latent import LatentFamily
from stepdistill.families.loading import load_teacher, locate
from stepdistill.families.pixel import Pixel
from stepdistill.pipelines.class_conditional import ClassConditionalPipeline

SOLVERS = ("DDIM", "DPM-Solver++ 2M", "DPM-Solver++ SDE", "UniPC", "Euler", "Heun")


def make_solver(name: str, teacher: Mapping[str, Any]) -> Any:
    """The diffusers scheduler of a solver on a VP teacher's noise process.

    Args:
        name: one of :data:`SOLVERS`.
        teacher: the teacher's scheduler config.

    Raises:
        ValueError: for another name, or a teacher whose process has no betas (a flow, EDM).
    """
    from diffusers import (
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
        UniPCMultistepScheduler,
    )

    process = noise_process(teacher)
    if not isinstance(read_schedule(teacher)[0], DiscreteVP):
        raise ValueError(f"solvers: wanted a teacher with betas, found {teacher.get('_class_name', 'none')!r}")
    match name:
        case "DDIM":
            return DDIMScheduler.from_config(
                process, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
            )
        case "DPM-Solver++ 2M" | "DPM-Solver++ SDE":
            algorithm = "dpmsolver++" if name.endswith("2M") else "sde-dpmsolver++"
            return DPMSolverMultistepScheduler.from_config(
                process, timestep_spacing="trailing", algorithm_type=algorithm, solver_order=2,
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


def steps_within(solver: str, calls: int, *, guided: bool = False) -> int:
    """The most steps that take at most ``calls`` network calls an image; 0 if not even one step does.

    A guided step calls the network twice; a step of Heun does so too, but for the last.

    >>> steps_within("DDIM", 4), steps_within("DDIM", 4, guided=True), steps_within("Heun", 8), steps_within("Heun", 1)
    (4, 2, 4, 1)
    """
    calls = calls // 2 if guided else calls
    return (calls + 1) // 2 if solver == "Heun" else calls


def teacher_pipeline(config: TeacherConfig, solver: str) -> Any:
    """A teacher as a pipeline under a solver, in single precision; a bare call has its size and its own guidance.

    Args:
        config: the ``teacher`` section of a configuration.
        solver: one of :data:`SOLVERS`; for a flow's ``DDIM`` its own scheduler stands.
    """
    family = load_teacher(dataclasses.replace(config, dtype="float32"))  # a call wants all parts in one precision
    if isinstance(family, Pixel):
        scheduler = make_solver(solver, family.scheduler_config)
        return ClassConditionalPipeline(family.network, scheduler, null_class=family.null_class)
    assert isinstance(family, LatentFamily), "the families are pixel and latent"
    taken = inspect.signature(type(family.pipe).__call__).parameters
    call = {name: value for name, value in family.pipeline_kwargs.items() if name in taken}
    contract = read_contract(locate(config))
    pipeline = apply_contract(family.pipe, dataclasses.replace(contract, call=contract.call or call))
    flows = isinstance(read_schedule(json.loads(pipeline.scheduler.to_json_string()))[0], RectifiedFlow)
    if not (flows and solver == "DDIM"):
        pipeline.scheduler = make_solver(solver, pipeline.scheduler.config)
    return pipeline
