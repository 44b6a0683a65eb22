r"""Few-step samplers, and the contract that makes training, evaluation and the exported pipeline agree.

A sampler is a descending grid of times and a rule that turns what the network sees at ``t`` into the state at the next
time ``s``. It is used three times with the same numbers: in training, to roll a student out (:func:`rollout`); in
evaluation (:func:`sample`); and after export, by the diffusers scheduler that :meth:`Sampler.scheduler` names. That the
two agree is tested to 1e-5, because a student is only as good as the grid it is called on.

Training-free solvers (DPM-Solver++, UniPC, Heun, ...) are diffusers' own and live in :mod:`stepdistill.benchmark`.

References: DDIM, Song et al. 2021 (arXiv 2010.02502), Eq. 12; multistep consistency sampling, Song et al. 2023
(2303.01469), Algorithm 1.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from stepdistill.denoiser import Denoiser, Prediction
from stepdistill.schedule import DiscreteVP, Karras, NoiseSchedule, RectifiedFlow, Trig, expand

Noise = Callable[[Tensor], Tensor]
"""Fresh unit Gaussian noise of the shape of its argument."""


class Sampler(abc.ABC):
    """The rule a student is sampled with.

    Args:
        schedule: the networks' schedule.
        times: n + 1 strictly descending times, from where the first call happens to 0.

    Raises:
        ValueError: if the times do not descend, or do not end at 0.
    """

    def __init__(self, schedule: NoiseSchedule, times: Tensor) -> None:
        times = times.double().cpu()
        if times.ndim != 1 or len(times) < 2 or not (times.diff() < 0).all() or times[-1] != 0:
            raise ValueError(f"sampler times must strictly descend to 0; found {times.tolist()}")
        self.schedule = schedule
        self.times = times

    @property
    def steps(self) -> int:
        """How many network calls a sample takes."""
        return len(self.times) - 1

    @abc.abstractmethod
    def step(self, prediction: Prediction, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        """The state at times ``s`` (B,) from what the network sees at ``t`` (B,)."""

    @abc.abstractmethod
    def scheduler(self, teacher: Mapping[str, Any]) -> Any:
        """The diffusers scheduler that takes the same steps.

        Args:
            teacher: the config of the teacher's scheduler, whose noise process is kept.

        Raises:
            ValueError: if no stock scheduler can express this grid.
        """

    def contract(self) -> dict[str, Any]:
        """What a caller must know to sample as trained: JSON values."""
        timesteps = self.schedule.timestep(self.times[:-1])
        return {"sampler": type(self).__name__, "steps": self.steps, "timesteps": timesteps.tolist()}


class DDIM(Sampler):
    """The deterministic step ``x_s = alpha_s x_0 + sigma_s eps``: DDIM, and Euler for flows and EDM."""

    def step(self, prediction: Prediction, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        del t, noise
        alpha_s, sigma_s = (expand(coefficient, prediction.x0) for coefficient in self.schedule(s))
        return prediction.to_state(alpha_s, sigma_s)

    def scheduler(self, teacher: Mapping[str, Any]) -> Any:
        from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

        if isinstance(self.schedule, RectifiedFlow):
            return flow_scheduler(FlowMatchEulerDiscreteScheduler, self.schedule)
        if isinstance(self.schedule, Karras):
            levels = {"sigma_min": self.schedule.sigma_min, "sigma_max": self.schedule.sigma_max}
            return EDMEulerScheduler(**levels, sigma_data=self.schedule.sigma_data, rho=self.schedule.rho)
        check_trailing_grid(self)
        # without clipping and with a last step to clean data, whatever the teacher's own sampler did
        return DDIMScheduler.from_config(
            noise_process(teacher), timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
        )


class Renoise(Sampler):
    """Predict the clean image, then noise it afresh: multistep consistency sampling, and DMD2's and ADD's."""

    def step(self, prediction: Prediction, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        del t
        alpha_s, sigma_s = (expand(coefficient, prediction.x0) for coefficient in self.schedule(s))
        return alpha_s * prediction.x0 + sigma_s * noise(prediction.x0)

    def scheduler(self, teacher: Mapping[str, Any]) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler

        if isinstance(self.schedule, RectifiedFlow):
            return flow_scheduler(FlowMatchEulerDiscreteScheduler, self.schedule, stochastic_sampling=True)
        check_trailing_grid(self)
        return LCMScheduler.from_config(
            noise_process(teacher),
            original_inference_steps=self.steps,  # its grid is then the trailing one
            timestep_scaling=1e4,  # c_skip < 1e-8 on every timestep but 0: the network's x_0 itself
            set_alpha_to_one=True,
            clip_sample=False,
        )


def noise_process(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a VP scheduler's config that says what the network was trained on, and nothing of how it samples."""
    keys = (
        "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
        "prediction_type", "rescale_betas_zero_snr",
    )  # fmt: skip
    return {key: config[key] for key in keys if config.get(key) is not None}


def check_trailing_grid(sampler: Sampler) -> None:
    """Raise ``ValueError`` unless stock schedulers' "trailing" spacing of ``sampler.steps`` gives ``sampler.times``."""
    assert isinstance(sampler.schedule, DiscreteVP)
    total, steps = sampler.schedule.num_timesteps, sampler.steps
    if total % steps or not torch.equal(sampler.times, sampler.schedule.grid(steps)):
        possible = [n for n in range(1, 65) if total % n == 0]
        raise ValueError(
            f"no stock scheduler samples this grid of {steps} steps exactly: "
            f"steps must divide the teacher's {total} timesteps, for example {possible}"
        )


def flow_scheduler(cls: type, schedule: RectifiedFlow, **options: Any) -> Any:
    """A flow-matching scheduler without shift: that of the student's grid is in the explicit sigmas of its pipeline."""
    return cls(num_train_timesteps=schedule.num_timesteps, shift=1.0, **options)


def sample(
    denoise: Callable[[Tensor, Tensor], Prediction], sampler: Sampler, x: Tensor, noise: Noise = torch.randn_like
) -> Tensor:
    """Run all steps from the initial state ``x`` (B, ...) at ``sampler.times[0]`` to clean images.

    Args:
        denoise: the prediction at states (B, ...) and times (B,), conditioning and guidance already inside.
        sampler: grid and rule.
        x: initial state, ``schedule.initial_noise(unit noise)``.
        noise: source of fresh noise for stochastic samplers.
    """
    return rollout(denoise, sampler, x, sampler.steps, noise)


def rollout(
    denoise: Callable[[Tensor, Tensor], Prediction], sampler: Sampler, x: Tensor, steps: int, noise: Noise
) -> Tensor:
    """The state at ``sampler.times[steps]``; with ``steps`` = 0 the initial state itself.

    Gradients follow the caller's mode: wrap the call in ``torch.no_grad`` for a student's backward simulation.
    """
    for t, s in zip(sampler.times[:steps], sampler.times[1 : steps + 1], strict=True):
        t_batch, s_batch = t.expand(len(x)).to(x.device), s.expand(len(x)).to(x.device)
        x = sampler.step(denoise(x, t_batch), t_batch, s_batch, noise)
    return x


def bind(
    denoiser: Denoiser, cond: Mapping[str, Tensor], w: Tensor | None = None
) -> Callable[[Tensor, Tensor], Prediction]:
    """A denoiser with its conditioning fixed, as :func:`sample` and :func:`rollout` want it."""
    return lambda x_t, t: denoiser(x_t, t, cond, w=w)


def ode_step(prediction: Prediction, schedule: NoiseSchedule, s: Tensor) -> Tensor:
    """One DDIM (Euler) step of the probability-flow ODE to times ``s`` (B,)."""
    alpha_s, sigma_s = (expand(coefficient, prediction.x0) for coefficient in schedule(s))
    return prediction.to_state(alpha_s, sigma_s)


def invert_step(x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The clean image whose single DDIM step from ``(x_t, t)`` lands on ``(x_s, s)``, in float64.

    ``x_0 = (x_s - (sigma_s / sigma_t) x_t) / (alpha_s - (sigma_s / sigma_t) alpha_t)``: the target of progressive
    distillation (Salimans & Ho 2022, Eq. 8) and of TRACT. Numerator and divisor are differences of nearly equal
    numbers, hence the precision.
    """
    x_t, x_s = x_t.double(), x_s.double()
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (
        tuple(expand(coefficient, x_t) for coefficient in schedule(time)) for time in (t, s)
    )
    ratio = sigma_s / sigma_t
    return (x_s - ratio * x_t) / (alpha_s - ratio * alpha_t)
