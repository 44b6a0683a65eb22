"""Grids and times of flows as their own pipelines make them, where one shift does not state them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from stepdistill.diffusion.schedule import RectifiedFlow

USUAL_STEPS = 50
"""Steps at which the shift of training times is that of the grid: the default of FLUX.2's pipelines."""


class StepShiftedFlow(RectifiedFlow):
    """A rectified flow whose grid is moved towards noise by a shift that depends on its number of steps.

    Args:
        shift_of: the shift of the grid, by its number of steps.
        num_timesteps: of the scheduler.
    """

    def __init__(self, shift_of: Callable[[int], float], num_timesteps: int = 1000) -> None:
        super().__init__(shift_of(USUAL_STEPS), num_timesteps)
        self.shift_of = shift_of

    def _make_grid(self, steps: int) -> Tensor:
        return RectifiedFlow(self.shift_of(steps)).grid(steps)


class UnshiftedTimes(RectifiedFlow):
    """A rectified flow whose networks are told the place on the even grid, before the shift (CogView 4)."""

    def timestep(self, t: Tensor) -> Tensor:
        """Return ``1000 u`` for the times ``t = shift u / (1 + (shift - 1) u)``."""
        t = t.double()
        return self.num_timesteps * t / (self.shift - (self.shift - 1) * t)

    def explicit_sigmas(self, t: Tensor) -> dict[str, list[float]]:
        """Return the times and what the network is told: a call takes both, and drops the fractions of the second."""
        return {"sigmas": t.tolist(), "timesteps": [round(told, 6) for told in self.timestep(t).tolist()]}
