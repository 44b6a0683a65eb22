r"""What the consistency family shares: functions that are constant along a trajectory of the teacher.

The probability-flow ODE carries ``x_t`` to one clean image. A *consistency function* names it from anywhere on the way,

.. math:: f(x_t, t) = f(x_s, s), \qquad f(x, t_{end}) = x,

and the second equation, the boundary, must hold by construction, or a constant would satisfy the first. Which end, and
how the network's own clean image is bent to it:

- variance preserving, flow, TrigFlow: the end is clean data, where ``sigma = 0`` and ``x_0 = x_t`` holds of itself;
- EDM: the end is ``sigma_min``, and ``f = c_skip x_t + c_out F`` with the shifted scalings of Song et al. 2023
  (arXiv 2303.01469, Appendix C), which is what diffusers' ``CMStochasticIterativeScheduler`` computes.

Every member trains a student on a pair ``(x_t, x_s)`` of neighbours on one trajectory: made by a step of the (guided)
teacher (CD, LCM, TCD), or by the same noise on the same image (CT, iCT, ECT), which agrees with it in expectation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from stepdistill.diffusion.samplers import ConsistencyKarras, ConsistencySampler, Sampler
from stepdistill.diffusion.schedule import DiscreteVP, Karras, NoiseSchedule
from stepdistill.networks.bank import STUDENT, NetworkBank
from stepdistill.networks.denoiser import Denoiser


def consistency(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor], w: Tensor | None = None
) -> Tensor:
    """``f(x_t, t)`` (B, ...) of the network in ``denoiser``'s role, for times (B,) not below the trajectory's end."""
    return denoiser.schedule.end_point(denoiser(x_t, t, cond, w=w).x0, x_t, t)


def time_grid(schedule: NoiseSchedule, intervals: int) -> Tensor:
    """``intervals + 1`` descending times from 1 to the end of the trajectory (``sigma_min`` for EDM, else 0)."""
    return schedule.trajectory(intervals)


def skip_grid(schedule: NoiseSchedule, steps: int, intervals: int) -> Tensor:
    """``steps + 1`` times of ``schedule.grid(intervals)``, as ``LCMScheduler`` and ``TCDScheduler`` choose them.

    >>> from stepdistill.diffusion.schedule import DiscreteVP
    >>> vp = DiscreteVP((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0))
    >>> vp.timestep(skip_grid(vp, 4, 50))[:-1].round().int().tolist()
    [999, 759, 499, 259]
    """
    grid = schedule.grid(intervals)
    return torch.cat([grid[[intervals * i // steps for i in range(steps)]], grid[-1:]])


def consistency_sampler(schedule: NoiseSchedule, steps: int, intervals: int) -> Sampler:
    """Multistep consistency sampling (Song et al. 2023, Algorithm 1) at times out of ``intervals``."""
    if isinstance(schedule, Karras):
        return ConsistencyKarras(schedule, steps, points=intervals + 1)
    return ConsistencySampler(schedule, skip_grid(schedule, steps, intervals))


def check_intervals(schedule: NoiseSchedule, steps: int, intervals: int, name: str) -> None:
    """Raise ``ValueError`` unless the trajectory can be cut into ``intervals`` and sampled in ``steps``."""
    if not 1 <= steps <= intervals:
        raise ValueError(f"method.steps: found {steps}, wanted 1 to {name} = {intervals}")
    if isinstance(schedule, DiscreteVP) and intervals > schedule.num_timesteps:
        raise ValueError(f"method.{name}: found {intervals}, but the teacher has {schedule.num_timesteps} timesteps")


def noise_to_signal(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """EDM's noise level of any schedule, ``sigma_t / alpha_t`` (B,), float64; infinite where there is no signal."""
    alpha_t, sigma_t = schedule(t)
    return sigma_t / alpha_t


@contextlib.contextmanager
def shared_dropout(bank: NetworkBank, role: str, x: Tensor) -> Iterator[None]:
    """``role``, called inside, drops the units that the student drops next: the passes shall differ in time alone.

    Song et al. 2023 and Geng et al. 2024 do so in their code. Without dropout in the student there is none in ``role``.
    """
    with bank.using(STUDENT) as student:
        drops = student.training
    with torch.random.fork_rng([x.device] if x.is_cuda else []), bank.using(role) as network:
        before = network.training
        network.train(drops)
        try:
            yield
        finally:
            network.train(before)
