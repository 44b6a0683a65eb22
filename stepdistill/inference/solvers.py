"""Training-free solvers, the alternative to a student. All of them are diffusers' own.

Each is set up as its authors recommend for few steps, on the teacher's own noise process: "trailing" spacing (the
first step starts at pure noise) and a last step to clean data. diffusers' Heun of flows ends otherwise: its last but
one noise level is always the lowest (0.001 without a shift), so that its last call is hardly used.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from stepdistill.diffusion.reading import noise_process, read_schedule
from stepdistill.diffusion.schedule import RectifiedFlow
from stepdistill.export.contract import read_contract
from stepdistill.export.pipeline import apply_contract
from stepdistill.families.base import Family
from stepdistill.families.config import TeacherConfig
from stepdistill.families.guiding import guiding_arguments
from stepdistill.families.hub import locate
from stepdistill.families.loading import load_teacher
from stepdistill.files.words import nearest

SOLVERS = ("DDIM", "DPM-Solver++ 2M", "DPM-Solver++ SDE", "UniPC", "Euler", "Heun")


def make_solver(name: str, teacher: Mapping[str, Any]) -> Any:
    """Return the diffusers scheduler of a solver on the noise process of a VP teacher or a flow.

    Args:
        name: one of :data:`SOLVERS`.
        teacher: the teacher's scheduler config.

    Raises:
        ValueError: if the name is unknown, or the teacher's process is EDM's.
    """
    from diffusers import (
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
        UniPCMultistepScheduler,
    )

    schedule, prediction_type = read_schedule(teacher)
    if prediction_type in ("edm", "edm_v"):
        raise ValueError(f"solver: expected a teacher with betas or a flow, got {teacher.get('_class_name', 'none')!r}")
    if isinstance(schedule, RectifiedFlow):
        return make_flow_solver(name, schedule)
    process = noise_process(teacher)
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
            return HeunDiscreteScheduler.from_config(_in_betas(process), timestep_spacing="trailing")
        case _:
            raise ValueError(f"solver: got {name!r}{nearest(name, SOLVERS)}")


def _in_betas(process: Mapping[str, Any]) -> dict[str, Any]:
    """Return a process with its betas written out if it was rescaled to zero terminal SNR, which Heun's would ignore.

    They are those of Euler's scheduler, which ends just short of that.
    """
    from diffusers import EulerDiscreteScheduler

    if not process.get("rescale_betas_zero_snr"):
        return dict(process)
    alphas_cumprod = EulerDiscreteScheduler.from_config(process).alphas_cumprod.double()
    before = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    return {"num_train_timesteps": len(alphas_cumprod), "trained_betas": (1 - alphas_cumprod / before).tolist(),
            "prediction_type": process.get("prediction_type", "epsilon")}  # fmt: skip


def make_flow_solver(name: str, flow: RectifiedFlow) -> Any:
    """Return the diffusers scheduler of a solver on a flow, with the flow's shift; DDIM is Euler there."""
    from diffusers import (
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
        FlowMatchHeunDiscreteScheduler,
        UniPCMultistepScheduler,
    )

    own: dict[str, Any] = {"num_train_timesteps": flow.num_timesteps, "shift": flow.shift}
    multistep: dict[str, Any] = {
        "num_train_timesteps": flow.num_timesteps, "flow_shift": flow.shift, "use_flow_sigmas": True,
        "prediction_type": "flow_prediction", "solver_order": 2, "final_sigmas_type": "zero",
    }  # fmt: skip
    match name:
        case "DDIM" | "Euler":
            return FlowMatchEulerDiscreteScheduler(**own)
        case "Heun":
            return FlowMatchHeunDiscreteScheduler(**own)
        case "UniPC":
            return UniPCMultistepScheduler(**multistep)
        case "DPM-Solver++ 2M" | "DPM-Solver++ SDE":
            algorithm = "dpmsolver++" if name.endswith("2M") else "sde-dpmsolver++"
            return DPMSolverMultistepScheduler(algorithm_type=algorithm, lower_order_final=True, **multistep)
        case _:
            raise ValueError(f"solver: got {name!r}{nearest(name, SOLVERS)}")


def steps_within(solver: str, calls: int, *, guided: bool = False) -> int:
    """Return the most steps that cost at most ``calls`` network calls an image; 0 if even one step costs more.

    A guided step calls the network twice; so does a step of Heun, except the last.

    >>> steps_within("DDIM", 4), steps_within("DDIM", 4, guided=True), steps_within("Heun", 8), steps_within("Heun", 1)
    (4, 2, 4, 1)
    """
    calls = calls // 2 if guided else calls
    return (calls + 1) // 2 if solver == "Heun" else calls


def solver_of(family: Family, name: str) -> Any | None:
    """Return the diffusers scheduler of a solver for a teacher; None is the own one of a latent flow's pipeline.

    Raises:
        ValueError: if there is none, or another than ``DDIM`` is asked for a latent flow, whose pipeline moves the grid
            by itself.
    """
    if family.prediction_type != "flow" or family.predicts_pixels:
        return make_solver(name, family.scheduler_config)
    if name != "DDIM":
        own = family.scheduler_config.get("_class_name")
        raise ValueError(f"solver: expected 'DDIM', which is {own!r} for this teacher, got {name!r}")
    return None


def check_steps(scheduler: Mapping[str, Any], steps: int, key: str, teacher: str) -> None:
    """Raise ``ValueError`` if a teacher with this scheduler config is asked for more steps than it has timesteps."""
    most = scheduler.get("num_train_timesteps", steps)
    if steps > most:
        raise ValueError(f"{key}: expected at most {most}, on which {teacher} was trained, got {steps}")


def teacher_call(family: Family, call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call's arguments, ``guidance_scale`` (1 is none) in the words of the teacher's pipeline."""
    others = dict(call)
    scale = others.pop("guidance_scale", None)
    return others if scale is None else {**others, **family.guidance_arguments(scale)}


def load_to_call(config: TeacherConfig) -> Family:
    """Open a teacher in single precision: its pipeline's call needs all parts in one."""
    return load_teacher(dataclasses.replace(config, dtype="float32"))


def teacher_pipeline(config: TeacherConfig, solver: str) -> Any:
    """Return :func:`pipeline_under` of a teacher that is opened for it."""
    return pipeline_under(load_to_call(config), config, solver)


def called_teacher(config: TeacherConfig, solver: str, call: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return :func:`pipeline_under` of a teacher that is opened for it, and :func:`teacher_call` of ``call``."""
    family = load_to_call(config)
    return pipeline_under(family, config, solver), teacher_call(family, call)


def pipeline_under(family: Family, config: TeacherConfig, solver: str) -> Any:
    """Return a teacher's pipeline under a solver; a bare call has the size and guidance of its section.

    Args:
        family: the teacher, in single precision.
        config: the ``teacher`` section of its configuration.
        solver: one of :data:`SOLVERS`; ``DDIM`` of a latent flow is its pipeline's own scheduler.

    Raises:
        ValueError: if the teacher has no such solver.
    """
    pipeline = family.teacher_pipeline(solver_of(family, solver))
    accepted = inspect.signature(type(pipeline).__call__).parameters
    asked = {**family.pipeline_kwargs, **guiding_arguments(family)}
    call = {name: value for name, value in asked.items() if name in accepted}
    contract = read_contract(locate(config))
    return apply_contract(pipeline, dataclasses.replace(contract, call=contract.call or call))
