"""Where the steps of consistency students begin, and how ``mid_sigma`` moves them."""

import pytest
import torch

from stepdistill.diffusion.native_grids import StepShiftedFlow
from stepdistill.diffusion.reading import read_discrete_vp
from stepdistill.diffusion.schedule import Karras, RectifiedFlow
from stepdistill.diffusion.trig import Trig
from stepdistill.losses.consistency import consistency_sampler, level_sampler, moved_to, noise_to_signal
from stepdistill.losses.self_consistency import angle_sampler

COSINE = read_discrete_vp({"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"})
FLUX_2 = StepShiftedFlow(lambda steps: 2 + 10 / steps)
SAMPLERS = {
    "cd": lambda schedule, steps, middle: consistency_sampler(schedule, steps, 16, "intervals", middle),
    "lcm": lambda schedule, steps, middle: consistency_sampler(schedule, steps, 25, "solver_steps", middle),
    "ict": lambda schedule, steps, middle: level_sampler(schedule, steps, 80.0, middle),
    "scm": lambda schedule, steps, middle: angle_sampler(steps, schedule, middle),
}


def levels(sampler):
    return noise_to_signal(sampler.schedule, sampler.times[1:-1])


def test_the_grid_of_a_flow_is_moved_by_its_shift():
    flow = RectifiedFlow()
    t = flow.grid(4)
    torch.testing.assert_close(moved_to(3.0, flow, t, t[2]), 3 * t / (1 + 2 * t))


def test_betas_are_moved_to_whole_timesteps_of_as_many_times_the_level():
    t = COSINE.grid(4)
    moved = moved_to(1.4, COSINE, t, t[2])
    assert torch.equal((1000 * moved).round(), 1000 * moved) and moved[0] == 1
    own, new = noise_to_signal(COSINE, t[1:-1]), noise_to_signal(COSINE, moved[1:-1])
    torch.testing.assert_close(new / own, (1.4 / own[1]).expand(3), atol=0, rtol=0.01)


def test_the_middle_of_a_grid_leaves_it_where_it_is():
    middle = torch.tensor(0.5, dtype=torch.float64)
    own = noise_to_signal(COSINE, middle).item()
    for steps in (2, 3, 4, 8):
        grid = COSINE.grid(steps)
        torch.testing.assert_close(moved_to(own, COSINE, grid, middle), grid, atol=1e-9, rtol=0)


@pytest.mark.parametrize("method", SAMPLERS)
def test_the_second_of_two_steps_begins_at_the_middle(method):
    for schedule in (COSINE, RectifiedFlow(), RectifiedFlow(shift=3.0), FLUX_2, Karras()):
        assert levels(SAMPLERS[method](schedule, 2, 1.4)).item() == pytest.approx(1.4, rel=0.01), schedule


@pytest.mark.parametrize("method", ["cd", "scm"])
def test_a_call_names_moved_timesteps_and_no_others(method):
    moved, even, single = (SAMPLERS[method](COSINE, *asked) for asked in [(2, 1.5), (2, None), (1, 1.5)])
    assert moved.pipeline_kwargs == {"timesteps": (1000 * moved.times[:-1] - 1).round().long().tolist()}
    assert even.pipeline_kwargs == single.pipeline_kwargs == {}


def test_a_middle_that_a_schedule_cannot_have_is_refused():
    for schedule, middle in [(COSINE, 1e6), (COSINE, 1e-6), (Karras(), 100.0), (Trig(), 1.4)]:
        with pytest.raises(ValueError, match="method.mid_sigma: expected"):
            SAMPLERS["scm"](schedule, 4, middle)
