"""Trajectory consistency: the function's two orders, its optimum, strategic stochastic sampling, and a mixture."""

import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler, TCDScheduler
from mixtures import NEARER, ToldNet, TwoTimes, batch_of, evenly, landing, loss_of, make, train, turned
from oracles import (
    SCHEDULES,
    VP_PROCESSES,
    Gaussian,
    sliced_wasserstein,
    teacher_denoiser,
    three_clusters,
)

from stepdistill.batch import Batch
from stepdistill.diffusion.ode import invert_step, ode_step
from stepdistill.diffusion.prediction import Prediction, from_x0
from stepdistill.diffusion.samplers import DDIM, ConsistencySampler, StrategicStochasticSampler, sample
from stepdistill.diffusion.schedulers import to_diffusers
from stepdistill.families.pixel import Pixel
from stepdistill.files.schema import build
from stepdistill.losses.consistency import skip_grid
from stepdistill.methods.tcd import TCD, jump, midpoint
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.networks.denoiser import Denoiser

TWO = torch.tensor([0.3, -0.2], dtype=torch.float64)
TYPES = {"cosine": "v_prediction", "flow": "flow", "karras": "edm", "trig": "trigflow"}


def times(*values, size=5):
    return [torch.full((size,), value, dtype=torch.float64) for value in values]


# --------------------------------------------------------------------------------------------- the function


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("time", [1.0, 0.4])
def test_a_jump_to_where_one_is_changes_nothing(name, order, time):
    schedule = SCHEDULES[name]
    oracle = three_clusters(schedule, TYPES[name])
    x, (t,) = torch.randn(5, 2, 1, 1, dtype=torch.float64), times(time)
    assert torch.equal(jump(teacher_denoiser(oracle).conditioned({}), x, t, t, schedule, order), x)


@pytest.mark.parametrize("name", TYPES)
def test_order_one_is_ddim_as_an_exponential_integrator(name):
    schedule = SCHEDULES[name]
    oracle = three_clusters(schedule, TYPES[name])
    x, (t, s) = torch.randn(5, 2, 1, 1, dtype=torch.float64), times(0.8, 0.3)
    prediction = teacher_denoiser(oracle)(x, t, {})
    (alpha_s, sigma_s), (_, sigma_t) = ([c[:, None, None, None] for c in schedule(time)] for time in (s, t))
    h = (schedule.log_snr(s) - schedule.log_snr(t))[:, None, None, None] / 2
    integrator = sigma_s / sigma_t * x - alpha_s * torch.expm1(-h) * prediction.x0
    landed = jump(teacher_denoiser(oracle).conditioned({}), x, t, s, schedule, 1)
    assert torch.allclose(landed, integrator, atol=1e-10)
    assert torch.allclose(landed, ode_step(prediction, schedule, s), atol=1e-10)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("order", [1, 2])
def test_jumps_of_a_constant_clean_image_compose(name, order):
    schedule = SCHEDULES[name]
    x0 = torch.randn(5, 2, 1, 1, dtype=torch.float64)
    x, (t, u, s) = torch.randn(5, 2, 1, 1, dtype=torch.float64), times(0.9, 0.5, 0.2)

    def denoise(x_t, time):
        alpha, sigma = (c[:, None, None, None] for c in schedule(time))
        return Prediction(x0, (x_t - alpha * x0) / sigma)

    through = jump(denoise, jump(denoise, x, t, u, schedule, order), u, s, schedule, order)
    assert torch.allclose(through, jump(denoise, x, t, s, schedule, order), atol=1e-9)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("order", [1, 2])
def test_chained_jumps_have_their_order(name, order):
    schedule = SCHEDULES[name]
    oracle = Gaussian(TWO, 0.3, schedule, TYPES[name])
    denoise = teacher_denoiser(oracle).conditioned({})
    x = torch.randn(5, 2, 1, 1, dtype=torch.float64)
    start, end = (schedule.inverse(torch.tensor([-2 * math.log(level)])).expand(5) for level in (3.0, 0.3))

    def error(steps):
        state = x
        grid = schedule.inverse(torch.linspace(-2 * math.log(3.0), -2 * math.log(0.3), steps + 1, dtype=torch.float64))
        for t, s in zip(grid[:-1], grid[1:], strict=True):
            state = jump(denoise, state, t.expand(5), s.expand(5), schedule, order)
        return (state - oracle.solve(x, start, end)).abs().max().item()

    assert math.log2(error(16) / error(32)) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("name", TYPES)
def test_the_midpoint_point_lies_between(name):
    schedule = SCHEDULES[name]
    t, s = torch.tensor([1.0, 1.0, 0.5, 0.02]), torch.tensor([0.9, 0.02, 0.4, 0.01])
    u = midpoint(t.double(), s.double(), schedule)
    assert ((s - 1e-12 <= u) & (u <= t + 1e-12)).all()
    middle = (schedule.log_snr(t[2:3].double()) + schedule.log_snr(s[2:3].double())) / 2
    assert torch.allclose(schedule.log_snr(u[2:3]), middle, atol=1e-6)


# -------------------------------------------------------------------------------------------- the optimum


@pytest.mark.parametrize("name", TYPES)
def test_the_loss_is_zero_where_the_teacher_is_exact_in_one_jump(name):
    """Data of one point: the clean image is constant on a trajectory, and every jump is the exact solution."""
    schedule = SCHEDULES[name]
    oracle = Gaussian(TWO, 0.0, schedule, TYPES[name])
    for order in (1, 2):
        assert loss_of(make(TCD, oracle, oracle, order=order), batch_of(oracle, 64)) < 1e-6


def test_the_exact_solution_is_an_optimum_only_in_the_limit_of_a_fine_grid():
    oracle = Gaussian(TWO, 0.5, SCHEDULES["cosine"], "v_prediction")
    losses = [
        loss_of(make(TCD, oracle, oracle, order=2, solver_steps=n, distance="l2"), batch_of(oracle, 512)).item()
        for n in (10, 100)
    ]
    assert losses[1] < 0.1 * losses[0]


# ---------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("name", VP_PROCESSES)
@pytest.mark.parametrize("gamma", [0.0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_sampler_equals_tcd_scheduler(name, gamma, steps):
    schedule = SCHEDULES[name]
    sampler = StrategicStochasticSampler(schedule, skip_grid(schedule, steps, 50), gamma)
    scheduler = to_diffusers(sampler, DDIMScheduler(**VP_PROCESSES[name], prediction_type="v_prediction").config)
    assert isinstance(scheduler, TCDScheduler)
    teacher = teacher_denoiser(three_clusters(schedule, "v_prediction"))
    noises = torch.randn(steps, 4, 2, 1, 1, dtype=torch.float64)
    x = start = torch.randn(4, 2, 1, 1, dtype=torch.float64)
    scheduler.set_timesteps(steps)
    rest = iter(noises)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("diffusers.schedulers.scheduling_tcd.randn_tensor", lambda *_, **__: next(rest))
        for timestep in scheduler.timesteps:
            t = (timestep.double() + 1).expand(4) / 1000
            x = scheduler.step(teacher.raw(x, t, {}), timestep, x, eta=gamma).prev_sample
    own = iter(noises)
    assert torch.allclose(sample(teacher.conditioned({}), sampler, start, lambda _: next(own)), x, atol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", ["cosine", "flow", "trig"])
def test_a_step_keeps_the_marginal(name, gamma):
    """With the exact jump of Gaussian data, the state after a step has the standard deviation of its time."""
    schedule = SCHEDULES[name]
    oracle = Gaussian(torch.zeros(2), 0.5, schedule, TYPES[name])
    sampler = StrategicStochasticSampler(schedule, schedule.grid(2), gamma)
    t, s = times(0.5000000, 0.4, size=20000)
    x0 = 0.5 * torch.randn(20000, 2, 1, 1, dtype=torch.float64)
    x_t = schedule.add_noise(x0, torch.randn_like(x0), t)
    below, end = sampler.targets(s)
    exact = oracle.solve(x_t, t, below)
    (alpha_b, sigma_b), (alpha_s, sigma_s) = ([c[:1] for c in schedule(time)] for time in (below, end))
    # a prediction whose DDIM step is the exact solution
    state = Prediction(exact / alpha_b, torch.zeros_like(exact))
    moved = sampler.step(state, t, s, torch.randn_like)
    assert moved.std().item() == pytest.approx((0.25 * alpha_s**2 + sigma_s**2).sqrt().item(), rel=0.02)


def test_gamma_zero_is_ddim_and_one_is_renoising():
    schedule = SCHEDULES["flow"]
    denoise = teacher_denoiser(three_clusters(schedule, "flow")).conditioned({})
    x, fresh = torch.randn(2, 6, 2, 1, 1)
    grid = schedule.grid(3)
    for gamma, rule in ((0.0, DDIM), (1.0, ConsistencySampler)):
        a, b = (
            sample(denoise, sampler, x, lambda _: fresh)
            for sampler in (StrategicStochasticSampler(schedule, grid, gamma), rule(schedule, grid))
        )
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.3])
@pytest.mark.parametrize("num_classes", [3, None])
def test_the_exported_pipeline_samples_as_the_student_was_trained(gamma, num_classes):
    family = Pixel.tiny(num_classes=num_classes)
    sampler = StrategicStochasticSampler(family.schedule, skip_grid(family.schedule, 4, 50), gamma)
    pipeline = family.pipeline(family.network, sampler, 1.0)
    pipeline.set_progress_bar_config(disable=True)
    cond = family.example_cond(range(3))
    images = pipeline(
        **(cond or {"batch_size": 3}), output_type="pt", generator=torch.Generator().manual_seed(1)
    ).images
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(3, *family.sample_shape, generator=generator)

    def noise(x):
        return torch.randn(x.shape, generator=generator)

    teacher = Denoiser(family, CopyBank(family.network), "teacher")
    with torch.no_grad():
        expected = family.decode(sample(teacher.conditioned(cond), sampler, start, noise))
    assert (images - expected).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------- two-time students


class ProductOfGains(Gaussian):
    """The two-time student of Gaussian data: its jump is the teacher's DDIM steps in between, in closed form."""

    def __init__(self, *args, grid):
        super().__init__(*args)
        self.grid = grid

    def jump(self, x_t, t, s):
        i, j = ((self.grid - time[:, None]).abs().argmin(1) for time in (t, s))
        steps = self.gain(self.grid[:-1], self.grid[1:]).log().cumsum(0)
        total = torch.cat([torch.zeros(1), steps]).double()
        factor = (total[j] - total[i]).exp()[:, None, None, None]
        x_s = self.centre(x_t, s) + factor * (x_t - self.centre(x_t, t))
        here = i == j  # nowhere to go: what is seen does not matter
        x0 = invert_step(x_t, x_s, t, torch.where(here, torch.zeros_like(s), s), self.schedule)
        return from_x0(x0, x_t, t, self.schedule, self.prediction_type).nan_to_num()


@pytest.mark.parametrize("name", ["cosine", "flow"])
def test_a_student_that_sees_where_it_jumps_can_be_the_teachers_own_steps(name):
    schedule, kind = SCHEDULES[name], TYPES[name]
    oracle = Gaussian(TWO, 0.5, schedule, kind)
    known = ProductOfGains(TWO, 0.5, schedule, kind, grid=schedule.grid(10))
    family = TwoTimes(known, schedule, kind)
    distiller = TCD(family, CopyBank(known), TCD.Config(two_time=True, solver_steps=10, distance="l2"))
    batch = batch_of(oracle, 256)
    assert loss_of(distiller, batch) < 1e-12
    known.jump = lambda x_t, t, s: known(x_t, schedule.timestep(t)).sample  # the teacher's one step is not
    distiller.bank.networks["student"].jump = distiller.bank.networks["target"].jump = known.jump
    assert loss_of(distiller, batch) > 1e-5


@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_a_two_time_student_is_told_its_jump_in_training_sampling_and_export(gamma):
    family = Pixel.tiny()
    config = TCD.Config(two_time=True, gamma=gamma)
    family.add_inputs(TCD.extra_inputs(config))
    distiller = TCD(family, CopyBank(family.network), config)
    cond = family.example_cond(range(3))
    batch = Batch(torch.randn(3, 1, 8, 8), cond, 3)
    loss_of(distiller, batch).backward()
    student = distiller.bank.networks["student"]
    told = student.condition_embedding.s_embedding.linear_2.weight
    assert told.grad.abs().max() > 0
    with torch.no_grad():
        told.add_(torch.randn_like(told))
        generator = torch.Generator().manual_seed(1)
        start = torch.randn(3, *family.sample_shape, generator=generator)

        def noise(x):
            return torch.randn(x.shape, generator=generator)

        expected = family.decode(sample(distiller.student.conditioned(cond), distiller.sampler(), start, noise))
    pipeline = family.pipeline(distiller.bank.extract("student"), distiller.sampler(), 1.0)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(**cond, output_type="pt", generator=torch.Generator().manual_seed(1)).images
    assert (images - expected).abs().max() < 1e-5


def test_two_time_and_a_second_call_exclude_each_other():
    with pytest.raises(ValueError, match="expected 1 with two_time"):
        TCD.Config(two_time=True, order=2)


# -------------------------------------------------------------------------------------------- trained students


def student_of(oracle, train_steps, **options):
    return train(TCD, oracle, train_steps, solver_steps=20, target_ema=0.9, distance="l2", **options)


@pytest.mark.product
def test_one_student_of_the_mixture_lands_on_it_in_two_and_four_calls():
    """Not in one: see below."""
    oracle = three_clusters(SCHEDULES["cosine"], "v_prediction")
    distiller = student_of(oracle, 800)
    for calls in (2, 4):
        student, teacher = landing(distiller, oracle, calls)
        assert student < NEARER[calls] * teacher, (calls, student, teacher)


def test_of_one_clean_image_for_all_jumps_the_best_does_not_land_in_one_call():
    """The one nearest to what exact jumps from pure noise want, by the loss's square, is pulled to the middle."""
    schedule = SCHEDULES["cosine"]
    oracle, grid = three_clusters(schedule, "v_prediction"), schedule.grid(20)
    denoise, exact = teacher_denoiser(oracle).conditioned({}), evenly(oracle, 3000)
    start = x = turned(3000).double()
    (one,), (alpha_1, sigma_1) = times(1.0, size=3000), schedule(grid[0])
    best, total = torch.zeros_like(x), 0.0
    for t, s in itertools.pairwise(grid):
        for now, then in itertools.pairwise(torch.linspace(t.item(), s.item(), 9, dtype=torch.float64)):
            x = ode_step(denoise(x, now.expand(3000)), schedule, then.expand(3000))
        alpha_s, sigma_s = schedule(s)
        weight = (alpha_s - sigma_s / sigma_1 * alpha_1) ** 2
        best, total = best + weight * invert_step(start, x, one, s.expand(3000), schedule), total + weight
    teacher = sliced_wasserstein(denoise(start, one).x0, exact)
    assert sliced_wasserstein(x, exact) < 0.5 * NEARER[1] * teacher
    assert sliced_wasserstein(best / total, exact) > 1.2 * NEARER[1] * teacher


@pytest.mark.product
def test_one_that_is_told_where_it_jumps_lands_in_one_call_too():
    oracle = three_clusters(SCHEDULES["cosine"], "v_prediction")
    distiller = student_of(oracle, 800, network=ToldNet(oracle), family=TwoTimes, two_time=True)
    for calls, part in NEARER.items():
        student, teacher = landing(distiller, oracle, calls)
        assert student < part * teacher, (calls, student, teacher)


# --------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 3.0}, "unconditional"),
        ({"steps": 51}, "expected 1 to solver_steps = 50"),
        ({"steps": 3, "solver_steps": 30}, "must divide the teacher's 1000"),
    ],
)
def test_what_cannot_work_is_said_before_the_first_step(options, message):
    with pytest.raises(ValueError, match=message):
        TCD.check(TCD.Config(**options), Pixel.tiny(num_classes=None))


def test_gamma_out_of_range_is_refused():
    with pytest.raises(ValueError, match="gamma: expected at least 0 and at most 1, got 1.5"):
        build(TCD.Config, {"gamma": 1.5})


def test_a_flow_student_with_fresh_noise_has_no_stock_scheduler():
    family = Pixel.tiny(scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler"})
    with pytest.raises(ValueError, match="gamma: expected 0, got 0.3"):
        TCD.check(TCD.Config(gamma=0.3), family)
    TCD.check(TCD.Config(gamma=0.0), family)
