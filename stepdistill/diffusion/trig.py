"""TrigFlow, the process of continuous-time consistency models (Lu & Song 2024, arXiv 2410.11081)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stepdistill.diffusion.schedule import NoiseSchedule


class Trig(NoiseSchedule):
    """TrigFlow: data of standard deviation ``sigma_data`` turned into noise of the same along a quarter circle."""

    def __init__(self, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.sigma_data = sigma_data

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = self.timestep(t)
        return torch.where(t == 1, 0.0, angle.cos()), self.sigma_data * angle.sin()

    def timestep(self, t: Tensor) -> Tensor:
        """Return the angle in radians."""
        return t.double() * (math.pi / 2)

    def inverse(self, log_snr: Tensor) -> Tensor:
        return torch.atan((-log_snr.double() / 2).exp() / self.sigma_data) / (math.pi / 2)

    def _make_grid(self, steps: int) -> Tensor:
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)

    def initial_noise(self, noise: Tensor) -> Tensor:
        return noise * self.sigma_data
