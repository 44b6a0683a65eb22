"""Grids in a stock scheduler that is told the number of steps only."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from stepdistill.diffusion.fitted import fit_grid
from stepdistill.diffusion.schedule import RectifiedFlow


def stock_grid(times):
    scheduler = FlowMatchEulerDiscreteScheduler(**fit_grid(times))
    scheduler.set_timesteps(len(times) - 1)
    return scheduler.sigmas.double()


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 5.0, 8.0, 12.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_a_grid_of_one_shift_is_made_exactly(shift, steps):
    times = RectifiedFlow(shift).grid(steps)
    torch.testing.assert_close(stock_grid(times), times, atol=1e-6, rtol=0)


@pytest.mark.parametrize("times", [[1, 0.752, 0.522, 0], [1, 0.9, 0.3, 0], [1, 0.3, 0], [1, 0.6, 0.5, 0]])
def test_any_grid_of_up_to_three_steps_is_made_exactly(times):
    times = torch.tensor(times, dtype=torch.float64)
    torch.testing.assert_close(stock_grid(times), times, atol=1e-6, rtol=0)


@pytest.mark.parametrize("times", [[1, 0.9, 0.5, 0.4, 0], [0.8, 0.4, 0]])
def test_others_are_refused(times):
    with pytest.raises(ValueError, match="expected a grid of one shift"):
        fit_grid(torch.tensor(times, dtype=torch.float64))
