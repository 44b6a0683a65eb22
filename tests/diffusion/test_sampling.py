"""Samplers: diffusers takes the same steps, the ODE converges at its order, a step and its inversion cancel."""

import pytest
import torch
from diffusers import DDIMScheduler
from oracles import SCHEDULES, VP_PROCESSES, Gaussian, native_types, teacher_denoiser, three_clusters

from stepdistill.diffusion.ode import invert_step, ode_step
from stepdistill.diffusion.prediction import to_prediction
from stepdistill.diffusion.reading import read_discrete_vp
from stepdistill.diffusion.samplers import (
    DDIM,
    ConsistencySampler,
    StrategicStochasticSampler,
    rollout,
    sample,
)
from stepdistill.diffusion.schedule import Karras, RectifiedFlow, expand
from stepdistill.diffusion.schedulers import to_diffusers

vp_teachers = pytest.mark.parametrize(
    ("process", "prediction_type"),
    [
        pytest.param(process, prediction_type, id=f"{name}-{prediction_type}")
        for name, process in VP_PROCESSES.items()
        for prediction_type in ("epsilon", "v_prediction", "sample")
        if (name, prediction_type) != ("zero_snr", "epsilon")  # refused when the teacher is opened
    ],
)


def fresh_noise(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator)


def assert_twins(sampler, scheduler, prediction_type, **set_timesteps):
    """Both take every step from the same state with the same network; the states differ by rounding only."""
    schedule = sampler.schedule
    scheduler.set_timesteps(**set_timesteps)
    oracle = three_clusters(schedule, prediction_type)
    ours, theirs = fresh_noise(7), torch.Generator().manual_seed(7)
    x = schedule.initial_noise(torch.randn(64, 2, 1, 1))
    assert len(scheduler.timesteps) == sampler.steps
    for timestep, t, s in zip(scheduler.timesteps, sampler.times[:-1], sampler.times[1:], strict=True):
        assert schedule.timestep(t).item() == pytest.approx(timestep.item(), abs=1e-3)
        t_batch, s_batch = t.expand(len(x)), s.expand(len(x))
        network_input = scheduler.scale_model_input(x, timestep) if isinstance(schedule, Karras) else x
        output = oracle(network_input, schedule.timestep(t_batch)).sample
        expected = scheduler.step(output, timestep, x, generator=theirs).prev_sample
        tolerance = max(1e-5, rounding(sampler, prediction_type, x, t, s))
        x = sampler.step(to_prediction(output, x, t_batch, schedule, prediction_type), t_batch, s_batch, ours)
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, expected, atol=tolerance, rtol=1e-5)


def rounding(sampler, prediction_type, x, t, s):
    """What float32 leaves of the state, which an epsilon-network's clean image divides by alpha_t."""
    alpha_t, alpha_s = sampler.schedule(t)[0].item(), sampler.schedule(s)[0].item()
    amplification = max(1.0, alpha_s / alpha_t) if prediction_type == "epsilon" else 1.0
    return 4 * torch.finfo(torch.float32).eps * x.abs().max().item() * amplification


@vp_teachers
@pytest.mark.parametrize("steps", [1, 2, 4, 10, 50])
@pytest.mark.parametrize("rule", [DDIM, ConsistencySampler])
def test_vp_samplers_equal_their_diffusers_twins(rule, process, prediction_type, steps):
    # a teacher's own way of sampling must not leak into the student's
    teacher = DDIMScheduler(**process, prediction_type=prediction_type, clip_sample=True, set_alpha_to_one=False)
    schedule = read_discrete_vp(teacher.config)
    sampler = rule(schedule, schedule.grid(steps))
    assert_twins(sampler, to_diffusers(sampler, teacher.config), prediction_type, num_inference_steps=steps)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 7, 38])
@pytest.mark.parametrize("total", [1000, 999])
def test_renoising_takes_any_number_of_steps_on_the_grid_that_lcm_picks(total, steps):
    process = {"num_train_timesteps": total, "beta_schedule": "linear", "prediction_type": "v_prediction"}
    schedule = read_discrete_vp(process)
    sampler = ConsistencySampler(schedule, schedule.renoising_grid(steps))
    assert_twins(sampler, to_diffusers(sampler, process), "v_prediction", num_inference_steps=steps)
    assert total % steps or torch.equal(sampler.times, schedule.grid(steps))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 7])
@pytest.mark.parametrize("rule", [DDIM, ConsistencySampler])
def test_flow_samplers_equal_their_diffusers_twins(rule, shift, steps):
    schedule = RectifiedFlow(shift)
    sampler = rule(schedule, schedule.grid(steps))
    assert_twins(sampler, to_diffusers(sampler, {"shift": shift}), "flow", sigmas=sampler.times[:-1].tolist())


@pytest.mark.parametrize("steps", [2, 5, 18])
def test_edm_sampler_equals_its_diffusers_twin(steps):
    sampler = DDIM(Karras(), Karras().grid(steps))
    assert_twins(sampler, to_diffusers(sampler, {}), "edm", num_inference_steps=steps)


@pytest.mark.parametrize("times", [[0.4, 0.0], [0.9, 0.5, 0.25, 0.0]])
def test_renoising_from_below_pure_noise_equals_its_twin_at_named_timesteps(times):
    schedule = SCHEDULES["linear"]
    sampler = ConsistencySampler(schedule, torch.tensor(times, dtype=torch.float64))
    assert sampler.pipeline_kwargs == {"timesteps": [round(1000 * t) - 1 for t in times[:-1]]}
    scheduler = to_diffusers(sampler, {**VP_PROCESSES["linear"], "prediction_type": "v_prediction"})
    assert_twins(sampler, scheduler, "v_prediction", **sampler.pipeline_kwargs)


@pytest.mark.parametrize(
    ("times", "is_picked"),
    [
        ([1.0, 0.605, 0.0], False),
        ([1.0, 0.6, 0.0], True),
        ([1.0, 0.817, 0.6, 0.333, 0.0], False),
        ([1.0, 0.75, 0.5, 0.25, 0.0], True),
    ],
)
def test_renoising_at_times_of_ones_own_equals_its_twin(times, is_picked):
    schedule = SCHEDULES["linear"]
    sampler = ConsistencySampler(schedule, torch.tensor(times, dtype=torch.float64))
    assert (sampler.pipeline_kwargs == {}) == is_picked
    scheduler = to_diffusers(sampler, {**VP_PROCESSES["linear"], "prediction_type": "v_prediction"})
    call = {"num_inference_steps": len(times) - 1} if is_picked else sampler.pipeline_kwargs
    assert_twins(sampler, scheduler, "v_prediction", **call)


@pytest.mark.parametrize(
    ("rule", "times"),
    [(DDIM, [1.0, 0.7, 0.0]), (lambda *of: StrategicStochasticSampler(*of, 0.2), [1.0, 0.7, 0.0]), (DDIM, None)],
)
def test_a_grid_that_no_stock_scheduler_samples_is_refused(rule, times):
    schedule = SCHEDULES["linear"]
    grid = schedule.grid(16) if times is None else torch.tensor(times)
    with pytest.raises(ValueError, match="must divide the teacher's 1000 timesteps"):
        to_diffusers(rule(schedule, grid), VP_PROCESSES["linear"])


@pytest.mark.parametrize("times", [[1.0], [1.0, 0.5], [0.5, 1.0, 0.0], [1.0, 1.0, 0.0], [[1.0, 0.0]]])
def test_times_that_do_not_descend_to_zero_are_refused(times):
    with pytest.raises(ValueError, match="expected strictly descending times that end at 0"):
        DDIM(RectifiedFlow(), torch.tensor(times))


def test_times_are_copied_to_a_device_once():
    sampler, device = DDIM(RectifiedFlow(), torch.tensor([1.0, 0.5, 0.0])), torch.device("meta")
    assert sampler.times_on(device) is sampler.times_on(device)
    assert sampler.times_on(device).device == device and sampler.times_on(sampler.times.device) is sampler.times


def test_the_contract_says_what_a_caller_needs():
    schedule = SCHEDULES["linear"]
    assert DDIM(schedule, schedule.grid(4)).contract() == {
        "sampler": "DDIM",
        "steps": 4,
        "timesteps": [999.0, 749.0, 499.0, 249.0],
    }


# ---------------------------------------------------------------------------------------------- whole journeys

MEAN = torch.tensor([0.3, -0.8], dtype=torch.float64)
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def start(schedule, size=16):
    return schedule.initial_noise(torch.randn(size, 2, 1, 1, dtype=torch.float64))


@every_schedule
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_ddim_multiplies_by_the_product_of_gains(schedule, steps):
    """For Gaussian data every step is linear, and its factor is known."""
    # a VP epsilon-network at pure noise is the one that loses digits: sample-prediction everywhere
    oracle = Gaussian(MEAN, 0.5, schedule, "sample")
    sampler, x = DDIM(schedule, schedule.grid(steps)), start(schedule)
    gain = torch.ones(1, dtype=torch.float64)
    for t, s in zip(sampler.times[:-1], sampler.times[1:], strict=True):
        gain = gain * oracle.gain(t, s)
    found = sample(teacher_denoiser(oracle).conditioned({}), sampler, x)
    centred = x - oracle.centre(x, sampler.times[:1])
    torch.testing.assert_close(found, MEAN[:, None, None] + gain * centred, atol=1e-10, rtol=0)


@every_schedule
def test_ddim_is_a_solver_of_first_order(schedule):
    """Halving the step halves the error against the exact solution of the ODE, in a range without singular ends."""
    oracle = Gaussian(MEAN, 0.5, schedule, "sample")
    t, s = torch.tensor([0.7], dtype=torch.float64), torch.tensor([0.2], dtype=torch.float64)
    x_t = torch.randn(1, 2, 1, 1, dtype=torch.float64)
    errors = []
    for steps in (64, 128):
        x = x_t
        grid = torch.linspace(0.7, 0.2, steps + 1, dtype=torch.float64)
        for now, then in zip(grid[:-1, None], grid[1:, None], strict=True):
            x = ode_step(teacher_denoiser(oracle)(x, now, {}), schedule, then)
        errors.append((x - oracle.solve(x_t, t, s)).norm().item())
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)


@pytest.mark.parametrize("name", ["cosine", "zero_snr", "flow", "karras", "trig"])
def test_a_point_is_reached_in_one_step(name):
    schedule = SCHEDULES[name]
    denoiser = teacher_denoiser(Gaussian(MEAN, 0.0, schedule, "sample"))
    for rule in (DDIM, ConsistencySampler):
        found = sample(denoiser.conditioned({}), rule(schedule, schedule.grid(1)), start(schedule))
        torch.testing.assert_close(found, MEAN[:, None, None].expand_as(found))


def test_renoise_is_exact_for_what_it_forgets():
    """Each step starts from fresh noise, so its state is alpha x_0 + sigma noise with the seen x_0."""
    schedule = SCHEDULES["cosine"]
    oracle = Gaussian(MEAN, 0.0, schedule, "sample")
    sampler, x = ConsistencySampler(schedule, schedule.grid(4)), start(schedule, 20_000)
    state = rollout(teacher_denoiser(oracle).conditioned({}), sampler, x, 2, torch.randn_like)
    alpha, sigma = schedule(sampler.times[2:3])
    torch.testing.assert_close(state.mean(0).flatten(), alpha * MEAN, atol=0.03, rtol=0)
    torch.testing.assert_close(state.std(0).flatten(), sigma.expand(2), atol=0.03, rtol=0)


@pytest.mark.parametrize("rule", [DDIM, ConsistencySampler])
def test_a_rollout_is_the_beginning_of_a_sample(rule):
    schedule = SCHEDULES["cosine"]
    denoise = teacher_denoiser(three_clusters(schedule, "v_prediction")).conditioned({})
    sampler, x = rule(schedule, schedule.grid(4)), start(schedule).float()
    assert torch.equal(rollout(denoise, sampler, x, 0, fresh_noise(0)), x)
    noise = fresh_noise(0)
    half = rollout(denoise, sampler, x, 2, noise)
    rest = rule(schedule, sampler.times[2:])
    assert torch.equal(sample(denoise, rest, half, noise), sample(denoise, sampler, x, fresh_noise(0)))


@every_schedule
@pytest.mark.parametrize("prediction_type_index", [0, -1])
def test_an_inverted_step_gives_the_clean_image_back(schedule, prediction_type_index):
    prediction_type = native_types(schedule)[prediction_type_index]
    t = torch.linspace(0.2, 0.9, 8, dtype=torch.float64)
    s = t - torch.linspace(0.01, 0.2, 8, dtype=torch.float64)
    x_t, output = torch.randn(2, 8, 2, 1, 1, dtype=torch.float64)
    prediction = to_prediction(output, x_t, t, schedule, prediction_type)
    x_s = ode_step(prediction, schedule, s)
    torch.testing.assert_close(invert_step(x_t, x_s, t, s, schedule), prediction.x0, atol=1e-7, rtol=1e-7)


def test_inversion_is_done_in_float64():
    schedule = SCHEDULES["linear"]
    t, s = torch.tensor([1.0]).double(), torch.tensor([0.999]).double()
    x_t, x0 = torch.randn(2, 1, 2, 1, 1)
    alpha, sigma = (expand(coefficient, x_t.double()) for coefficient in schedule(t))
    x_s = ode_step(to_prediction(x0.double(), x_t.double(), t, schedule, "sample"), schedule, s)
    found = invert_step(x_t, x_s, t, s, schedule)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, x0.double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("left_out", ["beta_schedule", "beta_start", "beta_end"])
def test_what_a_schedulers_config_leaves_out_is_the_same_for_schedule_and_twins(left_out):
    """LCM's and TCD's own defaults are another process than DDIM's, which the schedule is read with."""
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.001, "beta_end": 0.015}
    config = {name: value for name, value in config.items() if name != left_out}
    schedule = read_discrete_vp(config)
    alpha, _ = schedule(torch.arange(1, 1001) / 1000)
    for sampler in (
        DDIM(schedule, schedule.grid(4)),
        ConsistencySampler(schedule, schedule.grid(4)),
        StrategicStochasticSampler(schedule, schedule.grid(4), 0.3),
    ):
        torch.testing.assert_close(
            to_diffusers(sampler, config).alphas_cumprod.double(), alpha**2, atol=1e-6, rtol=1e-6
        )
