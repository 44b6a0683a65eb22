"""Noise schedules: diffusers' numbers at every timestep, maps that invert, states that travel between schedules."""

import itertools

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from oracles import SCHEDULES, VP_PROCESSES, Gaussian, native_types, three_clusters, time_of

from stepdistill.diffusion.ode import ode_step, transfer
from stepdistill.diffusion.prediction import to_prediction
from stepdistill.diffusion.reading import read_discrete_vp
from stepdistill.diffusion.schedule import DiscreteVP, Karras, RectifiedFlow
from stepdistill.diffusion.trig import Trig

TIMES = torch.linspace(0, 1, 129, dtype=torch.float64)
INSIDE = torch.linspace(0.1, 0.7, 13, dtype=torch.float64)  # log-SNRs that every schedule has

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
every_process = pytest.mark.parametrize("process", VP_PROCESSES.values(), ids=VP_PROCESSES.keys())


# ------------------------------------------------------------------------------------ the same as diffusers


@every_process
def test_vp_adds_noise_as_diffusers_at_every_timestep(process):
    scheduler = DDPMScheduler(**process)
    schedule = read_discrete_vp(scheduler.config)
    timesteps = torch.arange(1000)
    t = (timesteps + 1).double() / 1000
    x_0, noise = torch.randn(2, 1000, 1, 4, 4)
    ours = schedule.add_noise(x_0, noise, t)
    torch.testing.assert_close(ours, scheduler.add_noise(x_0, noise, timesteps), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(schedule.timestep(t), timesteps.double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(schedule(t)[0], scheduler.alphas_cumprod.double().sqrt(), atol=1e-12, rtol=0)


def test_trained_betas_and_another_number_of_timesteps():
    betas = torch.linspace(1e-4, 0.2, 50).tolist()
    scheduler = DDPMScheduler(num_train_timesteps=50, trained_betas=betas)
    alpha, _ = read_discrete_vp(scheduler.config)(torch.arange(1, 51).double() / 50)
    torch.testing.assert_close(alpha, scheduler.alphas_cumprod.double().sqrt(), atol=1e-12, rtol=0)


def test_flow_adds_noise_as_diffusers_at_every_timestep():
    scheduler = FlowMatchEulerDiscreteScheduler()
    x_0, noise = torch.randn(2, 1000, 1, 4, 4)
    t = RectifiedFlow().inverse(-2 * torch.logit(scheduler.timesteps.double() / 1000))
    ours = RectifiedFlow().add_noise(x_0, noise, t)
    torch.testing.assert_close(ours, scheduler.scale_noise(x_0, scheduler.timesteps, noise), atol=1e-5, rtol=0)
    torch.testing.assert_close(RectifiedFlow().timestep(t), scheduler.timesteps.double(), atol=1e-4, rtol=0)


def test_karras_adds_noise_and_counts_as_diffusers():
    scheduler, schedule = EDMEulerScheduler(), Karras()
    scheduler.set_timesteps(18)
    t = schedule.grid(18)[:-1]
    x_0, noise = torch.randn(2, 18, 1, 4, 4)
    torch.testing.assert_close(
        schedule.add_noise(x_0, noise, t), scheduler.add_noise(x_0, noise, scheduler.timesteps), atol=1e-4, rtol=1e-5
    )
    torch.testing.assert_close(schedule.timestep(t).float(), scheduler.timesteps, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------- shape of the maps


@every_schedule
def test_log_snr_falls_from_clean_data_to_noise(schedule):
    log_snr = schedule.log_snr(TIMES)
    assert (log_snr.diff() < 0).all()
    assert log_snr[0] == torch.inf
    alpha, sigma = schedule(torch.zeros(1))
    assert (alpha.item(), sigma.item()) == (1, 0)
    assert log_snr.dtype == alpha.dtype == sigma.dtype == torch.float64


@every_schedule
def test_inverse_is_the_inverse_also_at_both_ends(schedule):
    torch.testing.assert_close(schedule.inverse(schedule.log_snr(TIMES)), TIMES, atol=1e-9, rtol=0)


@every_schedule
def test_timestep_is_invertible(schedule):
    times = TIMES[1:]
    torch.testing.assert_close(time_of(schedule, schedule.timestep(times)), times, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", VP_PROCESSES)
def test_vp_keeps_unit_variance_between_timesteps(name):
    alpha, sigma = SCHEDULES[name](TIMES)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), atol=1e-14, rtol=0)


@pytest.mark.parametrize(("name", "is_zero"), [("linear", False), ("zero_snr", True), ("flow", True), ("trig", True)])
def test_terminal_signal_is_zero_only_where_it_is(name, is_zero):
    alpha, _ = SCHEDULES[name](torch.ones(1, dtype=torch.float64))
    assert (alpha.item() == 0) is is_zero


def test_initial_noise_has_the_spread_of_the_noisiest_state():
    noise = torch.ones(1)
    found = {name: schedule.initial_noise(noise).item() for name, schedule in SCHEDULES.items()}
    assert found == {"linear": 1, "scaled_linear": 1, "cosine": 1, "zero_snr": 1, "flow": 1, "karras": 80, "trig": 0.5}


@every_schedule
def test_half_precision_images_keep_their_precision(schedule):
    x_0 = torch.randn(3, 1, 2, 2, dtype=torch.bfloat16)
    assert schedule.add_noise(x_0, x_0, TIMES[[1, 2, 3]]).dtype == torch.bfloat16


@pytest.mark.parametrize("alphas", [[0.9, 0.9, 0.1], [1.0, 0.5], [0.2, 0.5]])
def test_a_schedule_that_does_not_fall_is_refused(alphas):
    with pytest.raises(ValueError, match="expected strictly decreasing values"):
        DiscreteVP(torch.tensor(alphas))


@every_schedule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_coefficients_are_the_schedule_in_the_shape_and_precision_of_the_images(schedule, dtype):
    t, like = TIMES[1:4], torch.zeros(3, 2, 4, 4, dtype=dtype)
    for found, exact in zip(schedule.coefficients(t, like), schedule(t), strict=True):
        assert found.shape == (3, 1, 1, 1) and found.dtype == dtype
        assert torch.equal(found.flatten(), exact.to(dtype))


def test_the_lowest_time_is_that_of_the_cleanest_image_in_training():
    assert SCHEDULES["linear"].timestep(torch.tensor(SCHEDULES["linear"].lowest_time, dtype=torch.float64)).item() == 0
    _, sigma = Karras()(torch.tensor(Karras().lowest_time, dtype=torch.float64))
    assert sigma.item() == pytest.approx(0.002, rel=1e-12)
    assert RectifiedFlow().lowest_time == Trig().lowest_time == 1e-3


# ------------------------------------------------------------------------------------------------------- grids


@every_schedule
def test_a_grid_is_made_once(schedule):
    assert schedule.grid(5) is schedule.grid(5)


@every_schedule
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
def test_a_grid_descends_from_one_to_zero(schedule, steps):
    grid = schedule.grid(steps)
    assert len(grid) == steps + 1 and grid[0] == 1 and grid[-1] == 0
    assert (grid.diff() < 0).all() and grid.dtype == torch.float64


@pytest.mark.parametrize("steps", [1, 2, 4, 5, 8, 10, 20, 25, 50, 1000])
def test_vp_grid_is_diffusers_trailing_spacing(steps):
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    schedule = SCHEDULES["linear"]
    ours = schedule.timestep(schedule.grid(steps)[:-1])
    assert ours.round().long().tolist() == scheduler.timesteps.tolist()
    torch.testing.assert_close(ours, ours.round(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["linear", "flow", "trig"])
@pytest.mark.parametrize("steps", [1, 3, 4, 8, 16, 24])
def test_grids_of_n_and_two_n_steps_are_nested(name, steps):
    schedule = SCHEDULES[name]
    torch.testing.assert_close(schedule.grid(2 * steps)[::2], schedule.grid(steps), atol=1e-15, rtol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_flow_grid_is_diffusers_shifted_grid(shift, steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    torch.testing.assert_close(RectifiedFlow(shift).grid(steps).float(), scheduler.sigmas, atol=1e-6, rtol=0)


@every_schedule
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_every_step_of_a_student_has_work_to_do(schedule, steps):
    """Karras' own grid of a few steps ends with one from ``sigma_min``."""
    grid = schedule.student_grid(steps)
    if isinstance(schedule, Karras):
        strides = grid[:-1].diff()
        assert len(grid) == steps + 1 and grid[0] == 1 and grid[-1] == 0
        assert grid[-2] > 1.3 * schedule.lowest_time and (strides - strides[:1]).abs().sum() < 1e-12
    else:
        assert torch.equal(grid, schedule.grid(steps))


@pytest.mark.parametrize("steps", [2, 5, 18])
def test_karras_grid_is_diffusers(steps):
    scheduler = EDMEulerScheduler()
    scheduler.set_timesteps(steps)
    _, sigma = Karras()(Karras().grid(steps))
    torch.testing.assert_close(sigma.float(), scheduler.sigmas, atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------- states that change schedules

pairs = pytest.mark.parametrize(
    ("source", "target"),
    [pytest.param(*pair, id="-".join(pair)) for pair in itertools.permutations(SCHEDULES, 2)],
)


@pairs
def test_a_state_travels_to_another_schedule_and_back(source, target):
    source, target = SCHEDULES[source], SCHEDULES[target]
    x_t = torch.randn(len(INSIDE), 2, 1, 1, dtype=torch.float64)
    x, t = transfer(x_t, INSIDE, source, target)
    torch.testing.assert_close(target.log_snr(t), source.log_snr(INSIDE), atol=1e-9, rtol=0)
    back, t_back = transfer(x, t, target, source)
    torch.testing.assert_close(t_back, INSIDE, atol=1e-10, rtol=0)
    torch.testing.assert_close(back, x_t, atol=1e-9, rtol=0)


@pairs
def test_perfect_networks_agree_on_a_state_that_travelled(source, target):
    source, target = SCHEDULES[source], SCHEDULES[target]
    x_t = source.add_noise(*torch.randn(2, len(INSIDE), 2, 1, 1, dtype=torch.float64), INSIDE)
    x, t = transfer(x_t, INSIDE, source, target)
    here, there = three_clusters(source, "sample"), three_clusters(target, "sample")
    torch.testing.assert_close(there.predict(x, t), here.predict(x_t, INSIDE), atol=1e-7, rtol=0)


@pairs
def test_odes_of_all_schedules_coincide(source, target):
    """A step and then the journey, or the journey and then the step: the same; so are the exact solutions."""
    source, target = SCHEDULES[source], SCHEDULES[target]
    t, s = INSIDE[1:], INSIDE[:-1]
    mean = torch.tensor([0.3, -0.7], dtype=torch.float64)
    x_t = torch.randn(len(t), 2, 1, 1, dtype=torch.float64)
    states = {}
    for schedule, (x, when) in {source: (x_t, t), target: transfer(x_t, t, source, target)}.items():
        prediction_type = native_types(schedule)[0]
        oracle = Gaussian(mean, 0.6, schedule, prediction_type)
        until = schedule.inverse(source.log_snr(s))
        scale = oracle_scale(schedule, prediction_type, x, when)
        prediction = to_prediction(
            oracle(scale * x, schedule.timestep(when)).sample, x, when, schedule, prediction_type
        )
        states[schedule] = ode_step(prediction, schedule, until), oracle.solve(x, when, until)
    for here, there in zip(states[source], states[target], strict=True):
        torch.testing.assert_close(transfer(here, s, source, target)[0], there, atol=1e-8, rtol=1e-8)


def oracle_scale(schedule, prediction_type, x, t):
    """What an EDM network's input is multiplied by; 1 for others."""
    if prediction_type != "edm":
        return torch.ones(())
    _, sigma = schedule(t)
    return ((sigma**2 + schedule.sigma_data**2) ** -0.5).reshape(-1, 1, 1, 1).to(x.dtype)


def test_pure_noise_travels_between_schedules_without_signal():
    x = torch.randn(3, 2, 1, 1, dtype=torch.float64)
    t = torch.ones(3, dtype=torch.float64)
    moved, t_moved = transfer(x, t, RectifiedFlow(), Trig(0.5))
    torch.testing.assert_close(moved, 0.5 * x)
    assert (t_moved == 1).all()
