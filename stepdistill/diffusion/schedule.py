r"""Noise schedules: how much signal and how much noise is in ``x_t``.

Every diffusion or flow model is seen through the same two numbers,

.. math:: x_t = \alpha_t x_0 + \sigma_t \epsilon, \qquad \epsilon \sim N(0, I),

with a time ``t`` in [0, 1] that is 0 for clean data and 1 for the noisiest input the network knows. Everything else
follows from the log signal-to-noise ratio ``log_snr(t) = 2 log(alpha_t / sigma_t)``, which strictly decreases in t: two
models whose log-SNRs agree see the same picture up to a scale, which is what lets a state travel between schedules.

======================  ==================  ====================  ==============================================
schedule                alpha_t             sigma_t               time
======================  ==================  ====================  ==============================================
:class:`DiscreteVP`     cos(angle)          sin(angle)            t = (i + 1) / T is diffusers' timestep i
:class:`RectifiedFlow`  1 - t               t                     t is the flow's own time
:class:`Karras`         1                   sigma_max * t^rho     Karras' rho-grid is uniform in t
:class:`Trig`           cos(pi t / 2)       sigma_d sin(pi t / 2) the angle of TrigFlow is pi t / 2
======================  ==================  ====================  ==============================================

Times and coefficients are float64; they meet the images' precision only where they multiply an image.

References: Song et al. 2021 (arXiv 2011.13456); Karras et al. 2022 (2206.00364); Liu et al. 2022 (2209.03003);
Lu & Song 2024 (2410.11081).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """A coefficient of shape (B,) as (B, 1, ..., 1) in the dtype and on the device of ``like``."""
    return coefficient.to(like.device, like.dtype).reshape(-1, *[1] * (like.ndim - 1))


class NoiseSchedule(abc.ABC):
    """The map from time to ``(alpha_t, sigma_t)``; abstract or final, never overridden."""

    sigma_data: float = 1.0
    """Standard deviation of the data, which EDM's and TrigFlow's preconditioning know."""

    @abc.abstractmethod
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(alpha_t, sigma_t)`` in float64, each of the shape of ``t``, for ``t`` in [0, 1]."""

    @abc.abstractmethod
    def timestep(self, t: Tensor) -> Tensor:
        """What the network embeds at time ``t``, in float64."""

    @abc.abstractmethod
    def inverse(self, log_snr: Tensor) -> Tensor:
        """The time at which the log-SNR is ``log_snr``: ``inverse(log_snr(t)) == t``."""

    @abc.abstractmethod
    def grid(self, steps: int) -> Tensor:
        """``steps + 1`` descending times from 1 to 0: where a sampler of ``steps`` network calls stops."""

    def log_snr(self, t: Tensor) -> Tensor:
        """``2 log(alpha_t / sigma_t)``; plus infinity at clean data, minus infinity where there is no signal."""
        alpha_t, sigma_t = self(t)
        return 2 * (alpha_t.log() - sigma_t.log())

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(alpha_t, sigma_t)`` of times (B,) as (B, 1, ..., 1), with the dtype and device of ``like``."""
        alpha_t, sigma_t = self(t)
        return expand(alpha_t, like), expand(sigma_t, like)

    def trajectory(self, intervals: int) -> Tensor:
        """Return ``intervals + 1`` descending times from 1 to the end of the trajectory of consistency models."""
        return self.grid(intervals)

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``alpha_t x_0 + sigma_t noise`` for images (B, ...) and times (B,)."""
        alpha_t, sigma_t = self.coefficients(t, x_0)
        return alpha_t * x_0 + sigma_t * noise

    def initial_noise(self, noise: Tensor) -> Tensor:
        """The state at t = 1 that a sampler starts from, given unit Gaussian ``noise``."""
        _, sigma_1 = self(torch.ones(1, dtype=torch.float64))
        return noise * max(1.0, sigma_1.item())


class DiscreteVP(NoiseSchedule):
    """The variance-preserving process of a diffusers scheduler with T timesteps.

    Between two timesteps the angle ``atan2(sigma, alpha)`` is interpolated linearly, so that the process keeps unit
    variance, both ends are exact (clean data, and zero terminal signal where the betas say so) and the map inverts.

    Args:
        alphas_cumprod: the T cumulative products of ``1 - beta``, shape (T,).
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        alphas_cumprod = alphas_cumprod.double().cpu()
        angles = torch.atan2((1 - alphas_cumprod).sqrt(), alphas_cumprod.sqrt())
        self.angles = torch.cat([angles.new_zeros(1), angles])
        self.num_timesteps = len(angles)
        if not (self.angles.diff() > 0).all():
            raise ValueError("alphas_cumprod must strictly decrease from below 1; found a flat or rising stretch")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DiscreteVP:
        """From a diffusers scheduler config: any beta schedule, trained betas, ``rescale_betas_zero_snr``."""
        from diffusers import DDIMScheduler

        return cls(DDIMScheduler(**noise_process(config)).alphas_cumprod)

    def angle(self, t: Tensor) -> Tensor:
        """``atan2(sigma_t, alpha_t)`` in [0, pi / 2]."""
        position = t.double().cpu() * self.num_timesteps
        left = position.floor().long().clamp(0, self.num_timesteps - 1)
        # lerp is exact at both ends, so that a timestep of the scheduler keeps its very alpha
        return torch.lerp(self.angles[left], self.angles[left + 1], position - left).to(t.device)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = self.angle(t)
        alpha_t = torch.where(angle == math.pi / 2, 0.0, angle.cos())  # cos(pi / 2) is 6e-17 in floating point
        return alpha_t, angle.sin()

    def timestep(self, t: Tensor) -> Tensor:
        """Diffusers' timestep ``t T - 1``, fractional between two of them."""
        return t.double() * self.num_timesteps - 1

    def inverse(self, log_snr: Tensor) -> Tensor:
        angle = torch.atan2(torch.ones_like(log_snr).double(), (log_snr.double() / 2).exp()).cpu()
        right = torch.searchsorted(self.angles, angle.contiguous()).clamp(1, self.num_timesteps)
        left_angle, right_angle = self.angles[right - 1], self.angles[right]
        t = (right - 1 + (angle - left_angle) / (right_angle - left_angle)) / self.num_timesteps
        return t.clamp(0, 1).to(log_snr.device)

    def grid(self, steps: int) -> Tensor:
        """Diffusers' "trailing" grid: integer timesteps, so that the network sees what it was trained on.

        The grids of n and n / 2 steps are nested, also where n does not divide T.
        """
        total = self.num_timesteps
        return torch.tensor([round(total * i / steps) / total for i in range(steps, -1, -1)], dtype=torch.float64)


class RectifiedFlow(NoiseSchedule):
    """Straight lines between data and noise; ``shift`` moves the sampling grid towards noise (SD3, Eq. 23)."""

    def __init__(self, shift: float = 1.0, num_timesteps: int = 1000) -> None:
        self.shift = shift
        self.num_timesteps = num_timesteps

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.double()
        return 1 - t, t

    def timestep(self, t: Tensor) -> Tensor:
        """``1000 t``, as diffusers' flow-matching schedulers count."""
        return t.double() * self.num_timesteps

    def inverse(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr.double() / 2)

    def grid(self, steps: int) -> Tensor:
        t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        return self.shift * t / (1 + (self.shift - 1) * t)


class Karras(NoiseSchedule):
    """The variance-exploding process of EDM: ``alpha = 1`` and ``sigma = sigma_max t^rho``.

    The network embeds ``noise_scale * log(sigma) / 4``: 1 as in EDM, 1000 as in the consistency-model code.
    """

    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        sigma_data: float = 0.5,
        noise_scale: float = 1.0,
    ) -> None:
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.rho = rho
        self.sigma_data = sigma_data
        self.noise_scale = noise_scale

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma_t = self.sigma_max * t.double() ** self.rho
        return torch.ones_like(sigma_t), sigma_t

    def time_of(self, sigma: Tensor) -> Tensor:
        """The time at which the noise level is ``sigma``."""
        return (sigma.double() / self.sigma_max) ** (1 / self.rho)

    def timestep(self, t: Tensor) -> Tensor:
        _, sigma_t = self(t)
        return self.noise_scale * 0.25 * (sigma_t + 1e-44).log()

    def inverse(self, log_snr: Tensor) -> Tensor:
        return self.time_of((-log_snr.double() / 2).exp())

    def grid(self, steps: int) -> Tensor:
        """EDM's Eq. 5: ``steps`` noise levels from sigma_max to sigma_min, then 0."""
        t_min = (self.sigma_min / self.sigma_max) ** (1 / self.rho)
        return torch.cat([torch.linspace(1, t_min, steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])

    def trajectory(self, intervals: int) -> Tensor:
        """Return ``intervals + 1`` descending times from 1 to that of ``sigma_min``, where a trajectory ends."""
        return self.grid(intervals + 1)[:-1]


class Trig(NoiseSchedule):
    """TrigFlow: data of standard deviation ``sigma_data`` turned into noise of the same along a quarter circle."""

    def __init__(self, sigma_data: float = 0.5) -> None:
        self.sigma_data = sigma_data

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = self.timestep(t)
        return torch.where(t == 1, 0.0, angle.cos()), self.sigma_data * angle.sin()

    def timestep(self, t: Tensor) -> Tensor:
        """The angle in radians."""
        return t.double() * (math.pi / 2)

    def inverse(self, log_snr: Tensor) -> Tensor:
        return torch.atan((-log_snr.double() / 2).exp() / self.sigma_data) / (math.pi / 2)

    def grid(self, steps: int) -> Tensor:
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)

    def initial_noise(self, noise: Tensor) -> Tensor:
        return noise * self.sigma_data


def noise_process(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a VP scheduler's config that says what the network was trained on, and nothing of how it samples.

    What the config leaves out is DDIM's default. It is written out, since the defaults of LCM's and TCD's schedulers
    are those of another process.
    """
    from diffusers import DDIMScheduler

    keys = (
        "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
        "prediction_type", "rescale_betas_zero_snr",
    )  # fmt: skip
    given = {key: config[key] for key in keys if config.get(key) is not None}
    whole = DDIMScheduler(**given).config
    return {key: whole[key] for key in keys if whole[key] not in (None, False)}


def transfer(x_t: Tensor, t: Tensor, source: NoiseSchedule, target: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """The same state under another schedule: ``(x, t)`` of equal log-SNR, where the probability-flow ODEs coincide.

    Args:
        x_t: states (B, ...) of ``source`` at times ``t`` (B,).
        t: times (B,) whose log-SNR lies in the range of ``target``.
        source: the schedule the states live on.
        target: the schedule they are wanted on.
    """
    t_target = target.inverse(source.log_snr(t))
    alpha_t, sigma_t = source(t)
    alpha, sigma = target(t_target)
    # the radius sqrt(alpha^2 + sigma^2) scales both parts alike and never vanishes, unlike alpha or sigma alone
    scale = torch.hypot(alpha, sigma) / torch.hypot(alpha_t, sigma_t)
    return x_t * expand(scale, x_t), t_target
