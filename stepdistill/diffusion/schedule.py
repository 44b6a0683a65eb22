r"""Noise schedules: how much signal and how much noise is in ``x_t``.

Every diffusion or flow model is described by the same two numbers,

.. math:: x_t = \alpha_t x_0 + \sigma_t \epsilon, \qquad \epsilon \sim N(0, I),

with a time ``t`` in [0, 1] that is 0 for clean data and 1 for the noisiest input the network knows. Everything else
follows from the log signal-to-noise ratio ``log_snr(t) = 2 log(alpha_t / sigma_t)``, which strictly decreases in t. Two
models whose log-SNRs agree see the same image up to a scale, so a state can be moved between schedules
(:func:`stepdistill.diffusion.ode.transfer`).

======================  ==================  ====================  ==============================================
schedule                alpha_t             sigma_t               time
======================  ==================  ====================  ==============================================
:class:`DiscreteVP`     cos(angle)          sin(angle)            t = (i + 1) / T is diffusers' timestep i
:class:`RectifiedFlow`  1 - t               t                     t is the flow's own time
:class:`Karras`         1                   sigma_max * t^rho     Karras' rho-grid is uniform in t
``trig.Trig``           cos(pi t / 2)       sigma_d sin(pi t / 2) the angle of TrigFlow is pi t / 2
======================  ==================  ====================  ==============================================

Times and coefficients are float64. They are converted to the images' precision only where they multiply an image.

References: Song et al. 2021 (arXiv 2011.13456); Karras et al. 2022 (2206.00364); Liu et al. 2022 (2209.03003);
Lu & Song 2024 (2410.11081).
"""

from __future__ import annotations

import abc
import math

import torch
from torch import Tensor

from stepdistill.diffusion.picked import evenly_picked
from stepdistill.diffusion.shift import shifted

FINEST = 128
"""Steps of the grid that steps of a student are made of: the jumps of shortcut models have the lengths of 1 to 64."""


def expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """Return a coefficient (B,) as (B, 1, ..., 1), in the dtype and on the device of ``like``."""
    return coefficient.to(like.device, like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def edm_scalings(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(c_skip, c_out, c_in)`` of EDM (Karras et al. 2022, Table 1)."""
    total = (sigma**2 + sigma_data**2).sqrt()
    return sigma_data**2 / total**2, sigma * sigma_data / total, 1 / total


class NoiseSchedule(abc.ABC):
    """The map from time to ``(alpha_t, sigma_t)``."""

    sigma_data: float = 1.0
    """Standard deviation of the data, used by EDM's and TrigFlow's preconditioning."""
    shift: float = 1.0
    """How far a flow's grid is moved towards noise; 1 is not at all."""

    def __init__(self) -> None:
        self._grids: dict[int, Tensor] = {}

    @abc.abstractmethod
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(alpha_t, sigma_t)`` in float64, each of the shape of ``t``, for ``t`` in [0, 1]."""

    @abc.abstractmethod
    def timestep(self, t: Tensor) -> Tensor:
        """Return what the network embeds at time ``t``, in float64."""

    @abc.abstractmethod
    def inverse(self, log_snr: Tensor) -> Tensor:
        """Return the time at which the log-SNR is ``log_snr``: ``inverse(log_snr(t)) == t``."""

    @abc.abstractmethod
    def _make_grid(self, steps: int) -> Tensor:
        """Compute :meth:`grid`."""

    @property
    def lowest_time(self) -> float:
        """The smallest time at which networks are trained; at 0 a noise prediction has nothing to predict."""
        return 1e-3

    def grid(self, steps: int) -> Tensor:
        """Return ``steps + 1`` descending times from 1 to 0, a sampler's grid: float64, on the CPU.

        The tensor is shared by all callers and must not be changed.
        """
        if steps not in self._grids:
            self._grids[steps] = self._make_grid(steps)
        return self._grids[steps]

    def student_grid(self, steps: int) -> Tensor:
        """Return the grid of a student of a few deterministic steps; as :meth:`grid`, except for Karras' grids."""
        return self.grid(steps)

    def renoising_grid(self, steps: int) -> Tensor:
        """Return the grid of a sampler that noises clean images again; as :meth:`grid`, unless LCM's picks others."""
        return self.grid(steps)

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(alpha_t, sigma_t)`` at times (B,), each expanded to (B, 1, ..., 1) for ``like``."""
        alpha_t, sigma_t = self(t)
        return expand(alpha_t, like), expand(sigma_t, like)

    def trajectory(self, intervals: int) -> Tensor:
        """Return ``intervals + 1`` descending times from 1 to the end of the trajectory of consistency models."""
        return self.grid(intervals)

    def log_snr(self, t: Tensor) -> Tensor:
        """Return ``2 log(alpha_t / sigma_t)``: infinity at clean data, minus infinity where there is no signal."""
        alpha_t, sigma_t = self(t)
        return 2 * (alpha_t.log() - sigma_t.log())

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return ``alpha_t x_0 + sigma_t noise`` for images (B, ...) and times (B,)."""
        alpha_t, sigma_t = self.coefficients(t, x_0)
        return alpha_t * x_0 + sigma_t * noise

    def network_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return what the network is given of states (B, ...) at times (B,): the states, or EDM's ``c_in x_t``."""
        del t
        return x_t

    def initial_noise(self, noise: Tensor) -> Tensor:
        """Scale unit Gaussian ``noise`` to the state at t = 1 that a sampler starts from."""
        _, sigma_1 = self(torch.ones(1, dtype=torch.float64))
        return noise * max(1.0, sigma_1.item())

    def end_point(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the consistency function (B, ...), whose boundary condition ``f(x, t_min) = x`` holds exactly.

        Args:
            x_0: the network's prediction of the clean image (B, ...) in ``x_t``.
            x_t: states (B, ...).
            t: their times (B,).
        """
        return torch.where(expand(t == 0, x_t) > 0, x_t, x_0)

    def shortened(self, t: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
        """Return ``fraction * t`` and ``t``, both rounded to whole timesteps where the process is discrete."""
        return fraction * t, t

    def explicit_timesteps(self, t: Tensor) -> dict[str, list[int]]:
        """Return the times (n,) as an argument ``timesteps`` of a scheduler; empty if its grid needs no such argument.

        Raises:
            ValueError: if a time is no whole timestep of a discrete process.
        """
        del t
        return {}

    def explicit_sigmas(self, t: Tensor) -> dict[str, list[float]]:
        """Return the times (n,) as an argument ``sigmas`` of a pipeline; empty if its scheduler finds them itself."""
        del t
        return {}


class DiscreteVP(NoiseSchedule):
    """The variance-preserving process of a diffusers scheduler with T timesteps.

    Between two timesteps the angle ``atan2(sigma, alpha)`` is interpolated linearly, so that the process keeps unit
    variance, both ends are exact (clean data, and zero terminal SNR if the betas have it) and the map is invertible.

    Args:
        alphas_cumprod: the T cumulative products of ``1 - beta``, shape (T,).
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        super().__init__()
        alphas_cumprod = alphas_cumprod.double().cpu()
        angles = torch.atan2((1 - alphas_cumprod).sqrt(), alphas_cumprod.sqrt())
        self.angles = torch.cat([angles.new_zeros(1), angles])
        self.num_timesteps = len(angles)
        self._angles_on = {self.angles.device: self.angles}
        if not (self.angles.diff() > 0).all():
            raise ValueError(
                "alphas_cumprod: expected strictly decreasing values below 1, got a flat or rising stretch"
            )

    @property
    def lowest_time(self) -> float:
        """The time of diffusers' timestep 0."""
        return 1 / self.num_timesteps

    def angles_on(self, device: torch.device) -> Tensor:
        """Return the table of angles (T + 1,) on a device; it is copied there once."""
        if device not in self._angles_on:
            self._angles_on[device] = self.angles.to(device)
        return self._angles_on[device]

    def angle(self, t: Tensor) -> Tensor:
        """Return ``atan2(sigma_t, alpha_t)`` in [0, pi / 2]."""
        angles = self.angles_on(t.device)
        position = t.double() * self.num_timesteps
        left = position.floor().long().clamp(0, self.num_timesteps - 1)
        # lerp is exact at both ends, so a timestep of the scheduler keeps exactly its alpha
        return torch.lerp(angles[left], angles[left + 1], position - left)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = self.angle(t)
        alpha_t = torch.where(angle == math.pi / 2, 0.0, angle.cos())  # cos(pi / 2) is 6e-17 in floating point
        return alpha_t, angle.sin()

    def timestep(self, t: Tensor) -> Tensor:
        """Return diffusers' timestep ``t T - 1``, which may be fractional."""
        return t.double() * self.num_timesteps - 1

    def inverse(self, log_snr: Tensor) -> Tensor:
        angles = self.angles_on(log_snr.device)
        angle = torch.atan2(torch.ones_like(log_snr).double(), (log_snr.double() / 2).exp())
        right = torch.searchsorted(angles, angle.contiguous()).clamp(1, self.num_timesteps)
        left_angle, right_angle = angles[right - 1], angles[right]
        t = (right - 1 + (angle - left_angle) / (right_angle - left_angle)) / self.num_timesteps
        return t.clamp(0, 1)

    def _make_grid(self, steps: int) -> Tensor:
        """Compute diffusers' "trailing" grid, whose timesteps are integers, as in training.

        The grids of n and n / 2 steps are nested, also if n does not divide T.
        """
        total = self.num_timesteps
        return torch.tensor([round(total * i / steps) / total for i in range(steps, -1, -1)], dtype=torch.float64)

    def renoising_grid(self, steps: int) -> Tensor:
        """Return the timesteps that ``LCMScheduler`` picks out of all T: rounded up, such as 999, 666, 333.

        Where ``steps`` divides T, this is diffusers' "trailing" grid.
        """
        total = self.num_timesteps
        positions = [total - place for place in evenly_picked(total, steps)]
        return torch.tensor([*positions, 0], dtype=torch.float64) / total

    def shortened(self, t: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
        """Round as ``TCDScheduler`` does: the smallest result is timestep 0, and fractions are rounded down."""
        timestep = (t.double() * self.num_timesteps - 1).round().clamp(min=0)
        # the scheduler multiplies in float32, where a whole number may come out that float64 puts slightly lower
        below = torch.floor(fraction * timestep.float()).double()
        return (below + 1) / self.num_timesteps, (timestep + 1) / self.num_timesteps

    def explicit_timesteps(self, t: Tensor) -> dict[str, list[int]]:
        timesteps = self.timestep(t)
        if (timesteps - timesteps.round()).abs().max() > 1e-6:
            raise ValueError(f"sampler times: expected whole timesteps, got {timesteps.tolist()}")
        return {"timesteps": timesteps.round().long().tolist()}


class RectifiedFlow(NoiseSchedule):
    """Straight lines between data and noise; ``shift`` moves the sampling grid towards noise (SD3, Eq. 23)."""

    def __init__(self, shift: float = 1.0, num_timesteps: int = 1000) -> None:
        super().__init__()
        self.shift = shift
        self.num_timesteps = num_timesteps

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.double()
        return 1 - t, t

    def timestep(self, t: Tensor) -> Tensor:
        """Return ``1000 t``, the timestep of diffusers' flow-matching schedulers."""
        return t.double() * self.num_timesteps

    def inverse(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr.double() / 2)

    def _make_grid(self, steps: int) -> Tensor:
        return shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), self.shift)

    def explicit_sigmas(self, t: Tensor) -> dict[str, list[float]]:
        """Return the times as ``sigmas``: an exported scheduler has no shift, so the call gives the grid."""
        return {"sigmas": t.tolist()}


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
        super().__init__()
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.rho = rho
        self.sigma_data = sigma_data
        self.noise_scale = noise_scale
        self.initial_sigma = sigma_max
        """Standard deviation of the state that a sampler starts from; some pipelines add that of the data."""

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma_t = self.sigma_max * t.double() ** self.rho
        return torch.ones_like(sigma_t), sigma_t

    @property
    def lowest_time(self) -> float:
        """The time of ``sigma_min``, where trajectories end."""
        return (self.sigma_min / self.sigma_max) ** (1 / self.rho)

    def time_of(self, sigma: Tensor) -> Tensor:
        """Return the time at which the noise level is ``sigma``."""
        return (sigma.double() / self.sigma_max) ** (1 / self.rho)

    def timestep(self, t: Tensor) -> Tensor:
        _, sigma_t = self(t)
        return self.noise_scale * 0.25 * (sigma_t + 1e-44).log()

    def network_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        _, sigma = self(t)
        return edm_scalings(expand(sigma, x_t), self.sigma_data)[2] * x_t

    def initial_noise(self, noise: Tensor) -> Tensor:
        return noise * max(1.0, self.initial_sigma)

    def inverse(self, log_snr: Tensor) -> Tensor:
        return self.time_of((-log_snr.double() / 2).exp())

    def _make_grid(self, steps: int) -> Tensor:
        """Compute EDM's Eq. 5: ``steps`` noise levels from sigma_max to sigma_min, then 0."""
        levels = torch.linspace(1, self.lowest_time, steps, dtype=torch.float64)
        return torch.cat([levels, torch.zeros(1, dtype=torch.float64)])

    def student_grid(self, steps: int) -> Tensor:
        """Return every n-th time of a fine :meth:`grid`: the last of a few would be ``sigma_min``, nearly clean."""
        stride = max(1, FINEST // steps)
        return self.grid(steps * stride)[::stride]

    def trajectory(self, intervals: int) -> Tensor:
        """Return ``intervals + 1`` descending times from 1 to that of ``sigma_min``, where a trajectory ends."""
        return self.grid(intervals + 1)[:-1]

    def end_point(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return ``c_skip(sigma - sigma_min) x_t + (1 - sigma_min / sigma) c_out(sigma) F``: the boundary is sigma_min.

        ``c_out F`` is written as ``x_0 - c_skip(sigma) x_t`` (Song et al. 2023, Appendix C).
        """
        _, sigma = self(t)
        skip, _, _ = edm_scalings(sigma, self.sigma_data)
        shifted_skip, _, _ = edm_scalings(sigma - self.sigma_min, self.sigma_data)
        rest = x_0 - expand(skip, x_t) * x_t
        return expand(shifted_skip, x_t) * x_t + expand(1 - self.sigma_min / sigma, x_t) * rest
