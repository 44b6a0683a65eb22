r"""Few-step samplers: a grid of times and a rule, the same in training, evaluation and the exported pipeline.

A sampler is a descending grid of times and a rule that turns the network's prediction at ``t`` into the state at the
next time ``s``. It is used three times with the same numbers: in training, to roll a student out (:func:`rollout`); in
evaluation (:func:`sample`); and after export, by the diffusers scheduler that
:func:`stepdistill.diffusion.schedulers.to_diffusers` makes of it. A student is only as good as the grid it is sampled
on, so tests compare the two to 1e-5.

Training-free solvers (DPM-Solver++, UniPC, Heun, ...) are diffusers' own, see :mod:`stepdistill.inference.solvers`.

References: DDIM, Song et al. 2021 (arXiv 2010.02502), Eq. 12; multistep consistency sampling, Song et al. 2023
(2303.01469), Algorithm 1.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Collection, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from stepdistill.diffusion.ode import Noise, noise_up, ode_step
from stepdistill.diffusion.picked import origin_steps
from stepdistill.diffusion.prediction import Denoise, Prediction
from stepdistill.diffusion.schedule import DiscreteVP, Karras, NoiseSchedule, expand


class Sampler(abc.ABC):
    """The rule and grid that a student is sampled with.

    Args:
        schedule: the networks' schedule.
        times: n + 1 strictly descending times, from that of the first step to 0.

    Raises:
        ValueError: if the times do not descend, or do not end at 0.
    """

    name: ClassVar[str]
    """The rule's name in sampling contracts; it stays when the class is renamed."""
    adds_noise: ClassVar[bool] = True
    """Whether the steps between the first and the last add fresh noise."""

    def __init__(self, schedule: NoiseSchedule, times: Tensor) -> None:
        times = times.double().cpu()
        if times.ndim != 1 or len(times) < 2 or not (times.diff() < 0).all() or times[-1] != 0:
            raise ValueError(f"sampler times: expected strictly descending times that end at 0, got {times.tolist()}")
        self.schedule = schedule
        self.times = times
        self._times_on = {times.device: times}
        self.pipeline_kwargs: dict[str, Any] = {}
        """Arguments, besides the number of steps, that a call of the exported pipeline must pass to its scheduler."""

    @property
    def steps(self) -> int:
        """Number of steps, each one network call."""
        return len(self.times) - 1

    def times_on(self, device: torch.device) -> Tensor:
        """Return the times (steps + 1,) on a device; they are copied there once."""
        if device not in self._times_on:
            self._times_on[device] = self.times.to(device)
        return self._times_on[device]

    def target_time(self, s: Tensor) -> Tensor | None:
        """Return the second time that a two-time network takes on a step to ``s`` (B,); None for all other networks."""
        del s
        return None

    @abc.abstractmethod
    def step(self, prediction: Prediction, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        """Return the state at times ``s`` (B,), given the network's prediction at ``t`` (B,)."""

    def contract(self) -> dict[str, Any]:
        """Return the facts about this sampler that a sampling contract holds, as JSON values."""
        timesteps = self.schedule.timestep(self.times[:-1])
        return {"sampler": self.name, "steps": self.steps, "timesteps": timesteps.tolist()}


class DDIM(Sampler):
    """The deterministic step ``x_s = alpha_s x_0 + sigma_s eps``: DDIM, and Euler for flows and EDM.

    Where the grid of a discrete process begins below pure noise, a call must name its timesteps.
    """

    name = "DDIM"
    adds_noise = False

    def __init__(self, schedule: NoiseSchedule, times: Tensor) -> None:
        super().__init__(schedule, times)
        if self.times[0] < 1:
            self.pipeline_kwargs.update(schedule.explicit_timesteps(self.times[:-1]))

    def step(self, prediction: Prediction, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        del t, noise
        return ode_step(prediction, self.schedule, s)


class TwoTimeDDIM(DDIM):
    """DDIM of a network that is told where its step ends."""

    def target_time(self, s: Tensor) -> Tensor:
        return s


class ConsistencySampler(Sampler):
    """Predict the clean image, then noise it afresh: the sampler of consistency models, DMD2 and ADD.

    Where no scheduler chooses the grid of a discrete process, because it begins below pure noise or is uneven, a call
    must name its timesteps.
    """

    name = "Renoise"

    def __init__(self, schedule: NoiseSchedule, times: Tensor) -> None:
        super().__init__(schedule, times)
        if isinstance(schedule, DiscreteVP) and origin_steps(self.times, schedule.num_timesteps) is None:
            self.pipeline_kwargs.update(schedule.explicit_timesteps(self.times[:-1]))

    def step(self, prediction: Prediction, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        del t
        alpha_s, sigma_s = self.schedule.coefficients(s, prediction.x0)
        return alpha_s * prediction.x0 + sigma_s * noise(prediction.x0)


class ConsistencyKarras(Sampler):
    """Multistep consistency sampling of EDM-style students (Song et al. 2023, Algorithm 1).

    A trajectory ends at ``sigma_min``: that noise is already there when fresh noise lifts it to the next level.

    Args:
        schedule: the networks' schedule.
        steps: number of steps, each one network call.
        points: noise levels from sigma_max to sigma_min, even in ``sigma^(1 / rho)``, of which every
            (points // steps)-th is used.
        rho: of these levels; by default the schedule's own, Karras' grid.
    """

    name = "ConsistencyKarras"

    def __init__(self, schedule: Karras, steps: int, points: int, rho: float | None = None) -> None:
        stride = points // steps
        self.points, self.rho = points, schedule.rho if rho is None else rho
        ends = torch.tensor([schedule.sigma_max, schedule.sigma_min], dtype=torch.float64) ** (1 / self.rho)
        levels = torch.lerp(ends[0], ends[1], torch.linspace(0, 1, points, dtype=torch.float64)) ** self.rho
        times = schedule.time_of(levels[: stride * steps : stride]).clamp(max=1)
        super().__init__(schedule, torch.cat([times, torch.zeros(1, dtype=torch.float64)]))
        self.karras = schedule

    def step(self, prediction: Prediction, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        x_t = prediction.to_state(*self.schedule.coefficients(t, prediction.x0))
        x_end = self.schedule.end_point(prediction.x0, x_t, t)
        _, sigma_s = self.schedule(s)
        lift = (sigma_s**2 - self.karras.sigma_min**2).clamp(min=0).sqrt()
        return x_end + expand(lift, x_end) * noise(x_end)


def rho_through(sigma: float, schedule: Karras) -> float:
    """Return the rho of the levels, even in ``sigma^(1 / rho)`` from end to end, whose middle is ``sigma``.

    >>> round(rho_through(2.5152, Karras()), 2)
    7.0

    Raises:
        ValueError: if ``sigma`` is not between the geometric and the arithmetic mean of both ends (rho infinite and 1).
    """
    low, high = schedule.sigma_min, schedule.sigma_max
    limits = math.sqrt(low * high), (low + high) / 2
    if not limits[0] < sigma < limits[1]:
        raise ValueError(f"method.mid_sigma: expected between {limits[0]:.4g} and {limits[1]:.4g}, got {sigma}")
    below, above = 0.0, 1.0  # of 1 / rho, in which the middle grows
    for _ in range(60):
        power = (below + above) / 2
        too_low = ((low**power + high**power) / 2) ** (1 / power) < sigma
        below, above = (power, above) if too_low else (below, power)
    return 1 / above


class StrategicStochasticSampler(Sampler):
    """Strategic stochastic sampling (Zheng et al. 2024, arXiv 2402.19159): jump to (1 - gamma) s, then noise up to s.

    As in ``TCDScheduler``, the grid of a discrete process ends at timestep 0, and (1 - gamma) s is a whole timestep.

    Args:
        schedule: the networks' schedule.
        times: as for every sampler.
        gamma: 0 is deterministic (DDIM), 1 noises the clean image afresh.
        two_time: whether the network takes the time it jumps to as an input.
    """

    name = "TCD"

    def __init__(self, schedule: NoiseSchedule, times: Tensor, gamma: float, *, two_time: bool = False) -> None:
        super().__init__(schedule, times)
        self.gamma = gamma
        self.two_time = two_time
        self.pipeline_kwargs["eta"] = gamma

    def targets(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return the times that a step to ``s`` (B,) jumps to, and those it ends at after noising up, each (B,)."""
        return self.schedule.shortened(s, 1 - self.gamma)

    def target_time(self, s: Tensor) -> Tensor | None:
        return self.targets(s)[0] if self.two_time else None

    def step(self, prediction: Prediction, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        del t
        below, end = self.targets(s)
        x_below = ode_step(prediction, self.schedule, below)
        return x_below if self.gamma == 0 else noise_up(x_below, below, end, self.schedule, noise)

    def contract(self) -> dict[str, Any]:
        return super().contract() | {"gamma": self.gamma}


class DoubleStep(Sampler):
    """The stochastic sampler of guided distillation (Meng et al. 2022, arXiv 2210.03142, Section 3.3).

    Every step but the last jumps two grid points down and adds fresh noise to go up by one. The last step goes straight
    to clean data, one point down: :meth:`landing` gives the jumps that a student must be trained for.
    """

    name = "DoubleStep"

    def landing(self, s: Tensor) -> Tensor:
        """Return the times (B,) that steps ending at grid times ``s`` (B,) jump to: one grid point below, or 0."""
        times = self.times_on(s.device)
        nearest = (times - s[:, None]).abs().argmin(1)
        return times[(nearest + 1).clamp(max=self.steps)]

    def step(self, prediction: Prediction, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        del t
        landing = self.landing(s)
        return noise_up(ode_step(prediction, self.schedule, landing), landing, s, self.schedule, noise)


class NoiseCorrected(Sampler):
    """DDIM whose first step takes the initial noise itself for the noise (Kohler et al. 2024, arXiv 2405.05224).

    A noise prediction errs at pure noise, where its error is divided by almost nothing; yet the noise in that state is
    known. For networks whose prediction gives exactly that noise (velocity or clean image at zero terminal SNR, flows)
    this is DDIM.
    """

    name = "NoiseCorrected"
    adds_noise = False

    def step(self, prediction: Prediction, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        del noise
        x_t = prediction.to_state(*self.schedule.coefficients(t, prediction.x0))
        known = x_t / self.schedule.initial_noise(torch.ones_like(x_t))
        eps = torch.where(expand(t == 1, x_t) > 0, known, prediction.eps)
        return ode_step(Prediction(prediction.x0, eps), self.schedule, s)


def sample(denoise: Denoise, sampler: Sampler, x: Tensor, noise: Noise = torch.randn_like) -> Tensor:
    """Run all steps from the initial state ``x`` (B, ...) at ``sampler.times[0]`` to clean images.

    Args:
        denoise: returns the prediction at states (B, ...) and times (B,), with condition and guidance already applied.
        sampler: grid and rule.
        x: initial state, ``schedule.initial_noise(unit noise)``.
        noise: source of fresh noise for stochastic samplers.
    """
    return rollout(denoise, sampler, x, sampler.steps, noise)


def rollout(denoise: Denoise, sampler: Sampler, x: Tensor, steps: int, noise: Noise) -> Tensor:
    """Return the state at ``sampler.times[steps]``; with ``steps`` = 0 the initial state itself.

    Gradients follow the caller's mode: wrap the call in ``torch.no_grad`` for a student's backward simulation.
    """
    for state in states(denoise, sampler, x, steps, noise):
        x = state
    return x


def states(denoise: Denoise, sampler: Sampler, x: Tensor, steps: int, noise: Noise) -> Iterator[Tensor]:
    """Yield ``x`` and the states (B, ...) at which the first ``steps`` steps end; see :func:`rollout`."""
    yield x
    for index in range(steps):
        t, s = _interval(sampler, index, x)
        x = sampler.step(_predict(denoise, sampler, x, t, s), t, s, noise)
        yield x


class Visit(NamedTuple):
    """A state on a sampler's way, and what the network sees there."""

    x_t: Tensor
    """The state (B, ...), without gradient."""
    t: Tensor
    """Its time (B,)."""
    prediction: Prediction
    end: Tensor
    """The time (B,) at which the step from there ends."""


def visits(
    denoise: Denoise, sampler: Sampler, x: Tensor, calls: int, noise: Noise, *, learns_at: Collection[int] = ()
) -> list[Visit]:
    """Return the first ``calls`` states that a sampler visits from ``x`` on, each with the prediction there.

    The predictions carry a gradient where the index of their call is in ``learns_at`` and the caller's mode has one.
    No gradient flows from one state to the next.
    """
    visited = []
    for index in range(calls):
        t, s = _interval(sampler, index, x)
        with torch.set_grad_enabled(torch.is_grad_enabled() and index in learns_at):
            prediction = _predict(denoise, sampler, x, t, s)
        visited.append(Visit(x, t, prediction, s))
        if index < calls - 1:
            x = sampler.step(Prediction(*map(Tensor.detach, prediction)), t, s, noise)
    return visited


def _interval(sampler: Sampler, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the times (B,) at which a step begins and ends."""
    two = sampler.times[index : index + 2]
    t, s = (x.new_full((len(x),), time.item(), dtype=two.dtype) for time in two)  # a copy would be a host sync
    return t, s


def _predict(denoise: Denoise, sampler: Sampler, x: Tensor, t: Tensor, s: Tensor) -> Prediction:
    target = sampler.target_time(s)
    return denoise(x, t) if target is None else denoise(x, t, target)
