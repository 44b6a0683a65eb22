"""Flow maps: the average velocity in closed form, under five targets and on every schedule; costs; a mixture."""

import math

import pytest
import torch
from contracts.cases import PIXELS, generators, pipeline_images, reference_images, train_student
from contracts.test_latent import check_export, check_lora
from mixtures import NEARER, ToldNet, TwoTimes, batch_of, landing, make, train
from network_calls import calls_of
from oracles import SCHEDULES, Gaussian, teacher_denoiser, three_clusters

from stepdistill.batch import Batch
from stepdistill.diffusion.ode import invert_step, ode_step
from stepdistill.diffusion.prediction import Prediction, from_x0
from stepdistill.diffusion.samplers import sample
from stepdistill.diffusion.schedule import expand
from stepdistill.families.base import Inputs
from stepdistill.families.pixel import Pixel
from stepdistill.families.sd import SD
from stepdistill.files.schema import build
from stepdistill.losses import average_velocity, intervals
from stepdistill.losses.average_velocity import Interval
from stepdistill.losses.regression import mean_square
from stepdistill.methods.flowmap import FlowMap
from stepdistill.networks.adapter_bank import AdapterBank
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.randomness import Draws

TWO = torch.tensor([0.3, -0.2], dtype=torch.float64)
KINDS = [("cosine", "v_prediction"), ("linear", "epsilon"), ("zero_snr", "v_prediction"), ("flow", "flow"),
         ("karras", "edm"), ("trig", "trigflow")]  # fmt: skip
TARGETS = ["difference", "jvp", "alpha", "shortcut", "split"]
every_kind = pytest.mark.parametrize(("name", "kind"), KINDS)
every_target = pytest.mark.parametrize("target", TARGETS)
both_banks = pytest.mark.parametrize("bank", ["copy", "adapter"])
BATCH = Batch(torch.randn(4, 1, 8, 8), {"class_labels": torch.tensor([0, 1, 2, 0])}, 4)


class FlowMapOfGaussian(Gaussian):
    """The perfect student: its step from any time to any other is the exact solution; without a second time, to 0."""

    def jump(self, x_t, t, s):
        x_s = self.solve(x_t, t, s)
        x0 = invert_step(x_t, x_s, t, s, self.schedule)
        x0 = torch.where(expand(t == s, x_t) > 0, self.predict(x_t, t), x0)
        return from_x0(x0, x_t, t, self.schedule, self.prediction_type)


class TwoSlices(TwoTimes):
    """Networks that lead to clean data under their time, and give the velocity under the negative time."""

    def call(self, network, x_t, t, cond, *, w=None, s=None):
        if (t < 0).all():
            return from_x0(network.predict(x_t, -t), x_t, -t, self.schedule, self.prediction_type)
        if isinstance(network, FlowMapOfGaussian):
            return network.jump(x_t, t, torch.zeros_like(t))
        return super().call(network, x_t, t, cond)


def perfect(name, kind, *, std=0.7, family=TwoTimes, **options):
    """A distiller of Gaussian data whose student is the exact flow map, and its teacher."""
    known = FlowMapOfGaussian(TWO, std, SCHEDULES[name], kind)
    distiller = make(FlowMap, Gaussian(TWO, std, SCHEDULES[name], kind), known, family=family, **options)
    for role in distiller.bank.roles[1:]:
        distiller.bank.networks[role] = known
    return distiller, known


def random_interval(distiller, oracle, size=100, seed=0):
    """States on paths, with the times that training draws, and where two steps part."""
    t, s, r = distiller.draw_times(Draws(seed, size))
    x_t = distiller.schedule.add_noise(oracle.draw(size), torch.randn(size, 2, 1, 1, dtype=torch.float64), t)
    return Interval(x_t, t, r), s


def residual(distiller, interval, s, scale=1.0):
    """The target of ``scale`` times the student's velocity, less that velocity."""
    _, target = distiller.student_and_target(interval, s, Prediction(interval.x_t, interval.x_t), {})
    return target - scale * distiller.target(interval.x_t, interval.t, {}, s=interval.r).flow()


# ---------------------------------------------------------------------------------------- times and coordinates


@every_kind
def test_flow_time_and_its_inverse(name, kind):
    schedule = SCHEDULES[name]
    t = torch.linspace(schedule.lowest_time, 1, 50, dtype=torch.float64)
    torch.testing.assert_close(average_velocity.time_at(schedule, average_velocity.flow_time(schedule, t)), t)
    if name == "flow":
        torch.testing.assert_close(average_velocity.flow_time(schedule, t), t)


@every_kind
def test_the_direction_is_the_derivative_of_a_straight_line_by_flow_time(name, kind):
    schedule = SCHEDULES[name]
    x0, eps = torch.randn(2, 5, 2, 1, 1, dtype=torch.float64)
    path, h = Prediction(x0, eps), 1e-6
    t = torch.linspace(0.3, 0.97, 5, dtype=torch.float64)
    tau = average_velocity.flow_time(schedule, t)
    _, dx, dt = average_velocity.direction(schedule, path, t)
    up, down = (average_velocity.time_at(schedule, tau + sign * h) for sign in (1, -1))
    torch.testing.assert_close(dt, (up - down) / (2 * h), rtol=0.02, atol=1e-6)  # betas: piecewise linear in t
    numeric = (ode_step(path, schedule, up) - ode_step(path, schedule, down)) / (2 * h)
    torch.testing.assert_close(dx, numeric, rtol=0.02, atol=1e-3)


@every_kind
def test_times_are_ordered_and_their_shares_are_as_asked(name, kind):
    distiller, _ = perfect(name, kind, equal=0.4, to_clean=0.3, from_noise=0.2)
    t, s, r = distiller.draw_times(Draws(0, 20_000))
    assert (r <= s).all() and (s <= t).all() and (t <= 1).all() and (t >= distiller.schedule.lowest_time).all()
    free = r < t
    shares = [(~free).double().mean(), (r[free] == 0).double().mean(), (t[free] == 1).double().mean()]
    for share, wanted in zip(shares, (0.4, 0.3, 0.2), strict=True):
        assert share.item() == pytest.approx(wanted, abs=0.02)


def test_a_flows_times_are_logit_normal_and_shifted_like_its_grid():
    schedule = Pixel.tiny(scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}).schedule
    t = intervals.shifted_log_normal_times(schedule, Draws(0, 20_000), -0.4, 0.8)
    unshifted = t / (3 - 2 * t)
    assert unshifted.logit().mean().item() == pytest.approx(-0.4, abs=0.03)
    assert unshifted.logit().std().item() == pytest.approx(0.8, abs=0.03)


@every_kind
def test_shortcuts_are_the_steps_of_samplers_of_one_to_sixty_four_steps(name, kind):
    schedule = SCHEDULES[name]
    t, s, r = intervals.dyadic_interval(schedule, Draws(0, 3000))
    assert (t > s).all() and (s > r).all()
    for steps in (1, 2, 4):
        grid = schedule.student_grid(steps)
        for begin, end in zip(grid[:-1], grid[1:], strict=True):
            assert ((t == begin) & (r == end)).any()


# ------------------------------------------------------------------------------------------------ the optimum


@every_kind
@every_target
def test_the_exact_flow_map_is_an_optimum_of_every_target(name, kind, target):
    """METHODS_2026, 14.10, 1 and 2: on every schedule, also at r = 0; ``difference`` up to the square of its step."""
    options = {"alpha_least": 0.0, "alpha_end": 0.01} if target == "alpha" else {}
    distiller, oracle = perfect(name, kind, target=target, **options)
    distiller.step_in_stage = 100
    interval, s = random_interval(distiller, oracle)
    size = residual(distiller, interval, s).abs().flatten(1).amax(1)
    assert size.isfinite().all() and (interval.r == 0).any() and (interval.t == 1).any() | (name == "karras")
    assert size.max() < (0.05 if target == "difference" else 1e-6)
    wrong = residual(distiller, interval, s, scale=1.1).abs().flatten(1).amax(1)
    assert wrong.median() > 0.01


def test_a_difference_has_an_error_of_the_square_of_its_step():
    errors = []
    distiller, oracle = perfect("flow", "flow", equal=0.0, from_noise=0.0)
    interval, s = random_interval(distiller, oracle)
    for step in (0.02, 0.01):
        distiller, _ = perfect("flow", "flow", step=step)
        inside = (interval.t - interval.r > 0.1) & (interval.t < 0.95)
        errors.append(residual(distiller, interval, s)[inside].abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.3)


@every_kind
@every_target
def test_at_equal_times_every_target_is_the_velocity(name, kind, target):
    """14.10, 4: also at t = 1, where there may be no signal."""
    options = {"alpha_begin": 0.0} if target == "alpha" else {}
    oracle = three_clusters(SCHEDULES[name], kind)
    distiller = make(FlowMap, ToldNet(oracle), oracle, family=TwoTimes, target=target, **options)
    t = torch.tensor([1.0, 0.6, 0.4], dtype=torch.float64)
    x_t = distiller.schedule.add_noise(oracle.draw(3), torch.randn(3, 2, 1, 1, dtype=torch.float64), t)
    interval = Interval(x_t, t, t)
    path = distiller.path(interval, Prediction(x_t, x_t), {})
    assert torch.equal(distiller.student_and_target(interval, t, Prediction(x_t, x_t), {})[1], path.flow())


def fixed_interval(distiller, t=0.9, r=0.1):
    """One state of the specification's example: data of standard deviation 0.7 about 0."""
    x_t = torch.ones(1, 2, 1, 1, dtype=torch.float64)
    return Interval(x_t, *(torch.full((1,), time, dtype=torch.float64) for time in (t, r)))


def alpha_residual(alpha, scale):
    known = FlowMapOfGaussian(torch.zeros(2, dtype=torch.float64), 0.7, SCHEDULES["flow"], "flow")
    distiller = make(FlowMap, known, known, family=TwoTimes, target="alpha")
    interval = fixed_interval(distiller)
    path = Prediction(*teacher_denoiser(known)(interval.x_t, interval.t, {}))
    s = average_velocity.time_within(distiller.schedule, interval.t, interval.r, alpha)

    def average(x_t, t, r):
        prediction = distiller.student(x_t, t, {}, s=r)
        return Prediction(scale * prediction.x0, scale * prediction.eps)

    found = average_velocity.interpolated(average, path, interval, s, distiller.schedule)
    return (found - average(*interval).flow()).abs().max().item()


def test_alphas_residual_tends_to_alpha_times_that_of_the_derivative_and_its_bias_to_its_square():
    """14.10, 3, with the specification's own numbers."""
    for alpha, expected in {1.0: 0.678, 0.5: 0.123, 0.1: 2.5e-3}.items():
        assert alpha_residual(alpha, 1.0) == pytest.approx(expected, rel=0.03)
    for alpha, expected in {0.1: 0.0772, 0.01: 0.1021, 0.001: 0.1042}.items():
        assert alpha_residual(alpha, 1.1) / alpha == pytest.approx(expected, abs=2e-4)
    exact = [alpha_residual(alpha, 1.0) for alpha in (0.1, 0.01, 0.001)]
    assert exact[0] / exact[1] == pytest.approx(100, rel=0.3) and exact[1] / exact[2] == pytest.approx(100, rel=0.05)
    scaled = [alpha_residual(alpha, 1.1) / alpha for alpha in (0.01, 0.001, 0.0001)]
    assert abs(scaled[1] - scaled[2]) < 0.2 * abs(scaled[0] - scaled[2])


def test_alpha_falls_from_one_to_its_end_along_a_sigmoid():
    distiller, _ = perfect("flow", "flow", target="alpha", alpha_begin=0.2, alpha_end=0.6, alpha_least=0.1)
    found = []
    for step in range(0, 101, 20):
        distiller.step_in_stage = step
        found.append(distiller.alpha())
    assert found[0] == pytest.approx(1) and found[1] == pytest.approx(1, abs=1e-4)
    assert found[2] == pytest.approx(0.55) and found[3] == pytest.approx(0.1, abs=1e-4)
    assert found == sorted(found, reverse=True)
    to_zero, _ = perfect("flow", "flow", target="alpha")
    to_zero.step_in_stage = 40
    assert to_zero.alpha() == 0


def test_the_form_of_improved_mean_flow_has_the_same_gradient():
    """14.10, 5: V = u + (t - r) sg(du/dt) against v, without a normalisation."""
    oracle = three_clusters(SCHEDULES["flow"], "flow")
    distiller = make(FlowMap, ToldNet(oracle).double(), oracle, family=TwoTimes, target="jvp", power=0.0)
    for parameter in distiller.bank.params("student"):
        parameter.data += 0.1 * torch.randn_like(parameter)
    interval, _ = random_interval(distiller, oracle, 16)
    path = distiller.path(interval, Prediction(interval.x_t, interval.x_t), {})
    derivative = distiller.derivative(interval, path, {})
    gradients = []
    for added, wanted in [
        (0, path.flow() - average_velocity.gap(distiller.schedule, interval) * derivative),
        (average_velocity.gap(distiller.schedule, interval) * derivative, path.flow()),
    ]:
        u = distiller.student(interval.x_t, interval.t, {}, s=interval.r).flow()
        loss = (u + added - wanted).square().sum()
        gradients.append(torch.autograd.grad(loss, list(distiller.bank.params("student")), allow_unused=True))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_from_data_the_derivatives_target_is_right_in_the_mean_and_alphas_is_not():
    """14.10, 7: linear in the velocity, or not; the same state, with many images and noises that make it."""
    known = FlowMapOfGaussian(torch.zeros(2, dtype=torch.float64), 0.7, SCHEDULES["flow"], "flow")
    size, t = 40_000, 0.8
    interval = Interval(*(part.repeat_interleave(size, 0) for part in fixed_interval(None, t, 0.1)))
    mean = 1.0 * (1 - t) * 0.49 / ((1 - t) ** 2 * 0.49 + t**2)
    std = 0.7 * t / math.sqrt((1 - t) ** 2 * 0.49 + t**2)
    x0 = mean + std * torch.randn(size, 2, 1, 1, dtype=torch.float64)
    data = Prediction(x0, (interval.x_t - (1 - t) * x0) / t)
    biases = {}
    for target, options in {"jvp": {}, "alpha": {"alpha_least": 0.5, "alpha_end": 0.01}}.items():
        distiller = make(FlowMap, known, known, family=TwoTimes, target=target, velocity="data", **options)
        distiller.step_in_stage = 100
        found = distiller.along_path(interval, data, {}) - distiller.student(*interval[:2], {}, s=interval.r).flow()
        biases[target] = found.mean().abs().item(), found.std().item() / math.sqrt(2 * size)
    assert biases["jvp"][0] < 5 * biases["jvp"][1]
    exact = alpha_residual(0.5, 1.0)
    assert biases["alpha"][0] > 20 * biases["alpha"][1] and exact > 0


# ---------------------------------------------------------------------------------------------------- two slices


@pytest.mark.parametrize(("name", "kind"), [pair for pair in KINDS if pair[0] != "karras"])
@pytest.mark.parametrize("target", ["jvp", "difference"])
def test_of_two_slices_the_exact_student_is_an_optimum(name, kind, target):
    options = {"step": 1e-4} if target == "difference" else {}
    distiller, oracle = perfect(name, kind, family=TwoSlices, slices="two", target=target, from_noise=0.0, **options)
    batch = batch_of(oracle, 64)
    losses = distiller("student", batch, Draws(0, 64)).terms
    assert losses["anchor"] < 1e-6 and losses["consistency"] < 1e-3
    interval, _ = random_interval(distiller, oracle)
    interval = Interval(interval.x_t, interval.t, torch.zeros_like(interval.t))
    path = distiller.path(interval, Prediction(interval.x_t, interval.x_t), {})
    mean, u = distiller.along_path(interval, path, {}), distiller.student(*interval[:2], {}).flow()
    assert (mean - u).abs().max() < (1e-6 if target == "jvp" else 1e-3)


def test_a_relaxed_target_is_the_mean_velocity_at_noise_and_nothing_new_at_clean_data():
    u, mean = torch.randn(2, 3, 2, 1, 1, dtype=torch.float64)
    tau = torch.tensor([0.0, 0.75, 1.0], dtype=torch.float64)
    found = average_velocity.relaxed(u, mean, tau)
    assert torch.equal(found[0], u[0])
    torch.testing.assert_close(found[1], u[1] - 0.5 * (u[1] - mean[1]).clamp(-1, 1))
    torch.testing.assert_close(found[2], u[2] - (u[2] - mean[2]).clamp(-1, 1))
    torch.testing.assert_close(average_velocity.turned(u, 3 * u), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(average_velocity.turned(u, -u), torch.full((3,), 2.0), atol=1e-6, rtol=0)


# -------------------------------------------------------------------------------------------- the real networks


@pytest.mark.parametrize("bank", ["copy", "adapter"])
@pytest.mark.parametrize("make_teacher", [SD.tiny, PIXELS["pixel-flow"]])
def test_a_student_of_two_slices_is_exported_as_a_stock_network(tmp_path, make_teacher, bank):
    run = train_student(tmp_path, make_teacher(), "flowmap", bank, options={"slices": "two"})
    images = check_export(run)
    assert run.family.inputs == Inputs()
    if bank == "adapter" and run.family.loads_lora:
        check_lora(run, images)


@pytest.mark.parametrize("make_teacher", [PIXELS["pixel"], pytest.param(SD.tiny, marks=pytest.mark.product)])
def test_a_student_that_is_told_the_scale_is_exported_with_it_and_the_second_time(tmp_path, make_teacher):
    options = {"guidance_range": [1.0, 3.0], "guidance_scale": 2.0}
    run = train_student(tmp_path, make_teacher(), "flowmap", "copy", options=options)
    images = check_export(run)
    run.distiller.result.w = 0.0
    assert not torch.equal(reference_images(run, 3, seed=5), images)


def tiny(bank="copy", **options):
    family, config = Pixel.tiny(), FlowMap.Config(**options)
    family.add_inputs(FlowMap.extra_inputs(config))
    banks = {"copy": CopyBank, "adapter": lambda net: AdapterBank(net, rank=2, targets=family.lora_targets)}
    return FlowMap(family, banks[bank](family.network), config)


@both_banks
def test_at_first_the_student_is_the_teacher_for_every_second_time(bank):
    """14.10, 6."""
    distiller, t = tiny(bank), torch.tensor([1.0, 0.8, 0.5, 0.1], dtype=torch.float64)
    for s in (0 * t, 0.5 * t, t):
        found = distiller.student.raw(BATCH.x0, t, BATCH.cond, s=s)
        assert torch.equal(found, distiller.teacher.raw(BATCH.x0, t, BATCH.cond))


COUNTS = {
    "difference": {"student": 2},
    "jvp": {},  # the forward derivative is in the pass with gradient
    "alpha": {"student": 1},
    "shortcut": {"target": 2},
    "split": {"student": 2},
}


@both_banks
@every_target
@pytest.mark.parametrize(("guidance_scale", "teacher"), [(1.0, 1), (2.0, 2)])
def test_a_step_costs_what_the_papers_state(bank, target, guidance_scale, teacher):
    """METHODS_2026, 14.9: the teacher once, twice under guidance, the student's gradient, and the target's calls."""
    distiller = tiny(bank, target=target, guidance_scale=guidance_scale, equal=1.0)
    calls = calls_of(distiller, "student", BATCH, Draws(0, 4))
    assert calls == {"teacher": teacher, "student with gradient": 1} | COUNTS[target]
    data = tiny(bank, target=target, velocity="data", equal=1.0)
    assert "teacher" not in calls_of(data, "student", BATCH, Draws(0, 4))


@both_banks
@pytest.mark.parametrize(("target", "calls"), [("jvp", {}), ("difference", {"student": 2})])
def test_two_slices_cost_two_forwards_with_gradient_and_the_derivative(bank, target, calls):
    distiller = tiny(bank, target=target, slices="two")
    found = calls_of(distiller, "student", BATCH, Draws(0, 4))
    assert found == {"teacher": 1, "student with gradient": 2} | calls


@pytest.mark.parametrize("target", ["shortcut", "split"])
def test_composition_asks_the_teacher_for_pairs_of_equal_times_alone(target):
    distiller, seen = tiny(target=target, equal=0.4), []
    distiller.teacher.watch = lambda x_t, output: seen.append(len(x_t))
    for seed in range(8):
        t, _, r = distiller.draw_times(Draws(seed, 4))
        distiller.draw_times = lambda draws, times=(t, (t + r) / 2, r): times
        distiller("student", BATCH, Draws(seed, 4))
        assert seen.pop() == max(1, int((t == r).sum()))  # never none, or processes would wait for each other
        del distiller.draw_times


@every_target
def test_the_second_time_is_learned(target):
    distiller = tiny(target=target, equal=0.1)
    distiller("student", BATCH, Draws(0, 4)).terms["loss"].backward()
    branch = distiller.bank.networks["student"].condition_embedding.s_embedding.linear_2.weight
    assert branch.grad.abs().max() > 0


def test_the_default_loss_is_divided_by_its_error_and_its_length_knows_no_alpha():
    distiller, oracle = perfect("flow", "flow", target="alpha", alpha_least=0.5, alpha_end=0.01, power=0.5)
    batch = batch_of(oracle, 32)
    for power, weight in ((0.5, 1.0), (1.0, 0.5)):
        distiller, oracle = perfect("flow", "flow", target="alpha", alpha_least=0.5, alpha_end=0.01, power=power)
        distiller.step_in_stage = 100
        losses, draws = distiller("student", batch, Draws(0, 32)), Draws(0, 32)
        noise = draws.normal_like(batch.x0)
        t, _, r = distiller.draw_times(draws)
        interval = Interval(distiller.state(batch.x0, noise, t), t, r)
        path = distiller.path(interval, Prediction(batch.x0, noise), {})
        student = distiller.student(interval.x_t, t, {}, s=r).flow()
        error = mean_square(student, distiller.along_path(interval, path, {}))
        weights = torch.where(t == r, 1.0, weight)
        expected = (weights * error / (error + 1e-3) ** power).mean()
        torch.testing.assert_close(losses.terms["loss"], expected, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------------------------ guidance


@pytest.mark.parametrize("kappa", [0.0, 0.5, 0.92])
def test_a_student_that_guides_itself_settles_at_the_guided_velocity(kappa):
    """METHODS_2026, 14.5 b: its scale is omega / (1 - kappa)."""
    data, free = (Prediction(*torch.randn(2, 3, 2, 1, 1, dtype=torch.float64)) for _ in range(2))
    scale = torch.tensor([1.0, 2.5, 4.0], dtype=torch.float64)
    g = scale.reshape(3, 1, 1, 1)
    guided = Prediction(*(u + g * (v - u) for v, u in zip(data, free, strict=True)))
    found = average_velocity.guided_by_itself(data, free, guided, scale - 1, kappa)
    torch.testing.assert_close(found, guided)
    off = average_velocity.guided_by_itself(data, free, free, scale - 1, kappa)
    assert torch.equal(off.x0[0], data.x0[0])  # without guidance the data's own, whatever the student says


def test_of_a_student_that_guides_itself_a_share_of_the_batch_has_no_condition_and_no_guidance():
    distiller, size = tiny(velocity="data", guidance_scale=3.0, condition_dropout=0.4), 4000
    labels = {"class_labels": torch.arange(size) % 3}
    cond, w = distiller.guidance(labels, Draws(0, size))
    free = cond["class_labels"] == distiller.family.null_cond(labels)["class_labels"]
    assert free.double().mean().item() == pytest.approx(0.4, abs=0.03)
    assert torch.equal(w, torch.where(free, 0.0, 2.0).double())
    assert torch.equal(cond["class_labels"][~free], labels["class_labels"][~free])


@pytest.mark.parametrize(("mix", "calls"), [(0.0, 1), (0.5, 2)])
def test_a_student_that_guides_itself_calls_itself_without_a_condition_and_no_teacher(mix, calls):
    distiller = tiny(velocity="data", guidance_scale=3.0, guidance_mix=mix)
    found = calls_of(distiller, "student", BATCH, Draws(0, 4))
    assert found == {"student with gradient": 1, "student": 2 + calls}


def test_above_a_time_the_velocity_is_not_guided():
    distiller, t = tiny(guidance_scale=3.0, guidance_until=0.5), torch.tensor([0.9, 0.8, 0.2, 0.1]).double()
    given = Interval(BATCH.x0, t, t), Prediction(BATCH.x0, BATCH.x0), BATCH.cond
    found = distiller.path(*given).x0
    for weight, rows in ((0.0, slice(0, 2)), (2.0, slice(2, 4))):
        expected = distiller.teacher.guided(BATCH.cond, weight)(BATCH.x0, t).x0.detach()
        torch.testing.assert_close(found[rows], expected[rows])


@pytest.mark.parametrize("options", [{"target": target} for target in TARGETS] + [{"slices": "two"}])
def test_a_student_that_is_told_the_scale_regresses_the_velocity_of_that_scale(options, monkeypatch):
    distiller, told = tiny(guidance_range=(1.0, 5.0), guidance_scale=2.0, equal=1.0, **options), []
    call = Pixel.call
    monkeypatch.setattr(
        Pixel, "call",
        lambda self, network, *given, w=None, s=None: told.append(w) or call(self, network, *given, w=w, s=s),
    )  # fmt: skip
    distiller("student", BATCH, Draws(0, 4))
    w = [one for one in told if one is not None]
    assert len(told) > len(w) > 0 and all(torch.equal(one, w[0]) for one in w)  # the teacher is told of none
    assert ((w[0] >= 0) & (w[0] <= 4)).all() and len(w[0].unique()) == 4
    t = torch.full((4,), 0.4)
    found = distiller.path(Interval(BATCH.x0, t, t), Prediction(BATCH.x0, BATCH.x0), BATCH.cond, w[0]).x0
    torch.testing.assert_close(found, distiller.teacher.guided(BATCH.cond, w[0])(BATCH.x0, t).x0)
    assert distiller.contract() == {"guidance_range": [1.0, 5.0]} and distiller.result.w == 1.0


# ---------------------------------------------------------------------------------------- samplers and students


@every_kind
def test_with_the_exact_flow_map_any_number_of_steps_ends_at_the_same_images(name, kind):
    """14.10, 8."""
    distiller, oracle = perfect(name, kind)
    x = distiller.schedule.initial_noise(torch.randn(20, 2, 1, 1, dtype=torch.float64))
    ends = []
    for steps in (1, 7):
        sampler = FlowMap.make_sampler(FlowMap.Config(steps=steps), distiller.family)
        ends.append(sample(distiller.student.conditioned({}), sampler, x))
    torch.testing.assert_close(*ends, atol=1e-6, rtol=0)
    one, zero = torch.ones(20, dtype=torch.float64), torch.zeros(20, dtype=torch.float64)
    torch.testing.assert_close(ends[0], oracle.solve(x, one, zero), atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("kind", ["pixel", "pixel-flow", "pixel-edm", "pixel-unconditional", "pixel-zero-snr"])
def test_an_export_tells_its_network_where_every_step_ends_also_the_last(kind, steps):
    family, config = PIXELS[kind](), FlowMap.Config(steps=steps)
    family.add_inputs(FlowMap.extra_inputs(config))
    distiller = FlowMap(family, CopyBank(family.network), config)
    cond = family.example_cond(range(3))
    with torch.no_grad():
        told = distiller.bank.networks["student"].condition_embedding.s_embedding.linear_2.weight
        told.add_(torch.randn_like(told))
        start = family.schedule.initial_noise(reference_noise(family, 3))
        expected = family.decode(sample(distiller.student.conditioned(cond), distiller.sampler(), start))
        untold = family.decode(sample(distiller.teacher.conditioned(cond), distiller.sampler(), start))
    assert (expected - untold).abs().max() > 0.1
    pipeline = family.pipeline(distiller.bank.extract("student"), distiller.sampler(), 1.0)
    assert (pipeline_images(pipeline, family, 3, seed=1) - expected).abs().max() < 1e-5


def reference_noise(family, count):
    """What a pipeline draws of one generator an image."""
    return torch.stack([torch.randn(family.sample_shape, generator=one) for one in generators(count, 1)])


@pytest.mark.parametrize(
    ("target", "train_steps", "lr", "waves"),
    [
        ("difference", 1200, 3e-3, 32), ("jvp", 1200, 5e-3, 32), ("alpha", 1200, 3e-3, 32),
        ("shortcut", 800, 1e-2, 0), ("split", 800, 1e-2, 0),
    ],
)  # fmt: skip
@pytest.mark.product
def test_one_student_of_the_mixture_lands_on_it_in_one_two_and_four_calls(target, train_steps, lr, waves):
    """An average of 0.999 would lag behind so short a training of ``shortcut``."""
    oracle = three_clusters(SCHEDULES["cosine"], "v_prediction")
    torch.manual_seed(0)
    options = {"log_sigma_mean": 0.0, "log_sigma_std": 1.6, "equal": 0.4, "power": 0.5, "target": target}
    options |= {"target_ema": 0.9} if target == "shortcut" else {}
    network = ToldNet(oracle, waves=waves)
    distiller = train(FlowMap, oracle, train_steps, network=network, family=TwoTimes, lr=lr, **options)
    for calls, part in NEARER.items():
        student, teacher = landing(distiller, oracle, calls)
        assert student < part * teacher, (calls, student, teacher)


# --------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"velocity": "data", "guidance_scale": 2.0, "slices": "two"}, "expected 1 with velocity 'data' and slices"),
        ({"guidance_range": (3.0, 2.0)}, "1 <= low < high"),
        ({"target": "split", "equal": 0.0}, "equal: expected above 0 with target 'split'"),
        ({"slices": "two", "target": "split"}, "target: expected 'difference' or 'jvp' with slices 'two', got 'split'"),
        ({"alpha_begin": 0.5}, "alpha_end: expected above alpha_begin = 0.5, got 0.4"),
        ({"step": 0.0}, "step: expected above 0"),
    ],
)
def test_what_contradicts_itself_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(FlowMap.Config, options)


def test_a_teacher_that_cannot_is_refused():
    edm = Pixel.tiny(scheduler={"_class_name": "EDMEulerScheduler", "sigma_max": 20.0, "sigma_min": 0.002,
                                "sigma_data": 0.5, "rho": 7.0, "prediction_type": "epsilon"})  # fmt: skip
    FlowMap.check(FlowMap.Config(), edm)
    with pytest.raises(ValueError, match="slices: expected 'free' for an EDM teacher"):
        FlowMap.check(FlowMap.Config(slices="two"), edm)
    with pytest.raises(ValueError, match="must divide the teacher's 1000"):
        FlowMap.check(FlowMap.Config(steps=3), Pixel.tiny())
    assert FlowMap.extra_inputs(FlowMap.Config(slices="two")) == Inputs()
