r"""Grids of flows in a stock scheduler, for pipelines whose call takes no times.

``FlowMatchEulerDiscreteScheduler`` makes a grid of n steps itself: with its shift q it moves n numbers, evenly from 1
to the q-shifted 1 / T, towards noise once more, and ``shift_terminal`` stretches them so that 1 stays and the last
is as given. Both maps are quotients of linear functions, and so is the grid of one shift: equal first, second and last
times make them equal everywhere. The fit is exact for its own number of steps only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stepdistill.diffusion.shift import shifted

EXACT = 1e-6
"""Largest difference of a fitted time."""


def fit_grid(times: Tensor, num_timesteps: int = 1000) -> dict[str, float]:
    """Return the scheduler's arguments with which it makes the grid ``times``, n + 1 of them down to 0.

    Every grid of up to three steps, and every grid of one shift, can be fitted.

    >>> fit_grid(torch.tensor([1, 0.9375, 0.8333333, 0.625, 0]).double())["shift_terminal"]
    0.625

    Raises:
        ValueError: if there are no such arguments.
    """
    wanted = times[:-1].double()
    if len(wanted) == 1 and wanted[0] == 1:
        return {"shift": 1.0}
    last, low, high = wanted[-1].item(), -0.5 * math.log(num_timesteps), 0.5 * math.log(num_timesteps)
    for _ in range(60 if len(wanted) > 2 else 0):
        middle = (low + high) / 2
        below = made_grid(math.exp(middle), last, len(wanted), num_timesteps)[1] < wanted[1]
        low, high = (middle, high) if below else (low, middle)
    shift = math.exp((low + high) / 2)
    made = made_grid(shift, last, len(wanted), num_timesteps)
    if not torch.allclose(made, wanted, atol=EXACT, rtol=0):
        raise ValueError(
            f"method: expected a grid of one shift or of at most 3 steps, got {[round(t, 4) for t in times.tolist()]}: "
            "the teacher's pipeline takes no times, and its stock scheduler makes no others (a number of steps that "
            "divides method.solver_steps or method.start gives one)"
        )
    return {"shift": shift, "shift_terminal": last}


def made_grid(shift: float, last: float, steps: int, num_timesteps: int) -> Tensor:
    """Return the times (steps,), before 0, that the scheduler makes with these arguments."""
    lowest = shifted(1 / num_timesteps, shift)
    moved = shifted(torch.linspace(1, lowest, steps, dtype=torch.float64), shift)
    return 1 - (1 - moved) * (1 - last) / (1 - moved[-1])
