"""Flow maps, what is easily got wrong (METHODS_2026, 14): one velocity, stop-gradients, dropout, precision, scales."""

import math

import pytest
import torch
from diffusers import FlowMapEulerDiscreteScheduler
from mixtures import TwoTimes, batch_of, make
from oracles import SCHEDULES, Gaussian, Oracle, points, teacher_denoiser

from stepdistill.batch import Batch
from stepdistill.diffusion.ode import invert_step
from stepdistill.diffusion.prediction import Prediction, from_x0
from stepdistill.diffusion.samplers import TwoTimeDDIM
from stepdistill.diffusion.schedule import RectifiedFlow, expand
from stepdistill.families.pixel import Pixel
from stepdistill.losses import average_velocity
from stepdistill.losses.average_velocity import Interval
from stepdistill.methods.flowmap import FlowMap
from stepdistill.networks.adapter_bank import AdapterBank
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.networks.modes import is_single_precision, single_precision
from stepdistill.randomness import Draws

TARGETS = ["difference", "jvp", "alpha", "shortcut", "split"]
KINDS = [("cosine", "v_prediction"), ("linear", "epsilon"), ("flow", "flow"), ("karras", "edm"), ("trig", "trigflow")]
every_kind = pytest.mark.parametrize(("name", "kind"), KINDS)
every_target = pytest.mark.parametrize("target", TARGETS)
both_banks = pytest.mark.parametrize("bank", ["copy", "adapter"])
BATCH = Batch(torch.randn(4, 1, 8, 8), {"class_labels": torch.tensor([0, 1, 2, 0])}, 4)


def tiny(bank="copy", dropout=0.0, **options):
    family, config = Pixel.tiny(), FlowMap.Config(**options)
    family.add_inputs(FlowMap.extra_inputs(config))
    for module in family.network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    banks = {"copy": CopyBank, "adapter": lambda net: AdapterBank(net, rank=2, targets=family.lora_targets)}
    return FlowMap(family, banks[bank](family.network), config)


def at_times(distiller, x_t, t, r):
    """States with their times and, as there is no other image, themselves as the data."""
    t, r = (torch.as_tensor(time, dtype=torch.float64).expand(len(x_t)) for time in (t, r))
    return Interval(x_t, t, r), average_velocity.time_within(distiller.schedule, t, r, 0.5), Prediction(x_t, x_t)


# -------------------------------------------------------------------------------------------- one velocity for both


class TwoClasses(TwoTimes):
    """Class 0 is one Gaussian, and what stands for no class is the other one."""

    def null_cond(self, cond):
        return {name: torch.ones_like(labels) for name, labels in cond.items()}


class FlowMapOfGuided(Gaussian):
    """The exact flow map under guidance: two Gaussians of one width are guided to a third one."""

    def jump(self, x_t, t, s):
        x0 = invert_step(x_t, self.solve(x_t, t, s), t, s, self.schedule)
        x0 = torch.where(expand(t == s, x_t) > 0, self.predict(x_t, t), x0)
        return from_x0(x0, x_t, t, self.schedule, self.prediction_type)


def guided(name, kind, **options):
    """A distiller at guidance scale 3 whose student is the exact flow map of the guided teacher."""
    mine, free = torch.tensor([0.5, -0.2]).double(), torch.tensor([-0.4, 0.3]).double()
    teacher = Oracle(torch.stack([mine, free]), 0.7, SCHEDULES[name], kind, classes=(0, 1))
    distiller = make(FlowMap, teacher, teacher, 2, family=TwoClasses, guidance_scale=3.0, **options)
    known = FlowMapOfGuided(free + 3 * (mine - free), 0.7, SCHEDULES[name], kind)
    for role in distiller.bank.roles[1:]:
        distiller.bank.networks[role] = known
    return distiller


@every_kind
@every_target
def test_of_the_guided_teacher_the_exact_flow_map_is_an_optimum(name, kind, target):
    """14.11, T1: path and tangent are the guided velocity, whatever data the states are made of."""
    options = {"alpha_least": 0.0, "alpha_end": 0.01} if target == "alpha" else {}
    distiller = guided(name, kind, target=target, **options)
    distiller.step_in_stage = 100
    t = torch.tensor([0.9, 0.8, 0.6, 0.5, 0.5]).double()
    r = torch.tensor([0.1, 0.7, 0.0, 0.5, 0.2]).double()
    x_t = distiller.schedule.add_noise(torch.randn(5, 2, 1, 1).double(), torch.randn(5, 2, 1, 1).double(), t)
    interval, s, data = at_times(distiller, x_t, t, r)
    student, wanted = distiller.student_and_target(interval, s, data, {"class_labels": torch.zeros(5).long()})
    assert (student - wanted).abs().max() < (0.02 if target == "difference" else 1e-6)


def test_from_data_a_difference_of_a_large_step_is_wrong_in_the_mean():
    """14.10, 7: where the step is small, images and noises that make one state give the exact velocity in the mean.

    They come in pairs, mirrored at their mean, so that for a Gaussian the mean is exact.
    """
    schedule, t, r = SCHEDULES["flow"], 0.8, 0.1
    known = FlowMapOfGuided(torch.zeros(2).double(), 0.7, schedule, "flow")
    variance, half = (1 - t) ** 2 * 0.49 + t**2, torch.randn(500, 2, 1, 1, dtype=torch.float64)
    x0 = (1 - t) * 0.49 / variance + 0.7 * t / math.sqrt(variance) * torch.cat([half, -half])
    x_t, biases = torch.ones_like(x0), []
    for step in (0.005, 0.4):
        distiller = make(FlowMap, known, known, family=TwoTimes, velocity="data", step=step)
        interval, _, _ = at_times(distiller, x_t, t, r)
        found = distiller.along_path(interval, Prediction(x0, (x_t - (1 - t) * x0) / t), {})
        biases.append((found - distiller.student(*interval[:2], {}, s=interval.r).flow()).mean().abs().item())
    assert biases[0] < 1e-4 and biases[1] > 0.01


# ------------------------------------------------------------------------------------------------- stop-gradients


@both_banks
@every_target
def test_no_target_carries_a_gradient(bank, target):
    """14.2: R = u - sg(target)."""
    distiller = tiny(bank, target=target)
    interval, s, data = at_times(distiller, BATCH.x0, [0.9, 0.7, 0.5, 0.4], [0.0, 0.3, 0.5, 0.1])
    student, wanted = distiller.student_and_target(interval, s, data, BATCH.cond)
    assert student.requires_grad and not wanted.requires_grad


def test_of_two_slices_both_targets_and_the_weight_are_constants():
    """14.3: sin(pi t / 2) e / sg(e + 1e-3)^(1/2) and MSE + 1 - cos, both written out with their gradients."""
    velocity, anchor = (torch.randn(3, 2, 4, 4).requires_grad_() for _ in range(2))
    mean, path = (0.3 * torch.randn(3, 2, 4, 4).requires_grad_() for _ in range(2))
    tau = torch.tensor([0.1, 0.5, 0.9])
    terms, _ = average_velocity.flow_anchored(velocity, mean.detach(), anchor, path.detach(), tau)
    share = (1 - (1 - tau).sqrt()).reshape(3, 1, 1, 1)
    gap = share * (velocity - mean).clamp(-1, 1).detach()
    error = gap.square().mean((1, 2, 3))
    weight = (math.pi / 2 * tau).sin() / (error + 1e-3).sqrt()
    torch.testing.assert_close(terms["consistency"], (weight * error).mean())
    (found,) = torch.autograd.grad(terms["consistency"], velocity)
    torch.testing.assert_close(found, 2 * weight.reshape(3, 1, 1, 1) * gap / velocity.numel())
    cosine = (anchor * path).sum(1) / (anchor.norm(dim=1) * path.norm(dim=1))
    expected = (anchor - path).square().mean() + 1 - cosine.mean()
    torch.testing.assert_close(terms["anchor"], expected)
    found, wanted = (torch.autograd.grad(one, anchor, retain_graph=True)[0] for one in (terms["anchor"], expected))
    torch.testing.assert_close(found, wanted)


# -------------------------------------------------------------------------------------------- dropout and precision


def random_states(distiller, monkeypatch):
    """The state of the random numbers at every call of a network in training mode, and how many were not."""
    seen, still, call = [], [], Pixel.call

    def watched(self, network, *given, **told):
        (seen if network.training else still).append(torch.random.get_rng_state())
        return call(self, network, *given, **told)

    monkeypatch.setattr(Pixel, "call", watched)
    distiller("student", BATCH, Draws(0, 4))
    return seen, still


@pytest.mark.parametrize("options", [{"target": one} for one in TARGETS] + [{"slices": "two"}], ids=str)
def test_all_passes_of_the_student_drop_the_same_units(options, monkeypatch):
    """14.2 and 14.3: a difference of two calls with other masks would be that of the masks."""
    distiller = tiny(dropout=0.5, equal=0.5, **options)
    distiller.bank.networks["student"].train()
    seen, _ = random_states(distiller, monkeypatch)
    assert len(seen) > (options.get("target") != "jvp") and all(torch.equal(one, seen[0]) for one in seen)


@pytest.mark.parametrize(("mix", "calls"), [(0.0, 1), (0.5, 2)])
def test_the_students_own_guidance_has_no_dropout(mix, calls, monkeypatch):
    """14.11, T7."""
    distiller = tiny(dropout=0.5, velocity="data", guidance_scale=3.0, guidance_mix=mix)
    distiller.bank.networks["student"].train()
    seen, still = random_states(distiller, monkeypatch)
    assert len(still) == calls and len(seen) == 3


def test_a_difference_is_taken_in_float32_under_autocast():
    """14.11, T8: in bfloat16 a difference over 0.005 would be rounding noise."""
    distiller = tiny()
    interval, _, data = at_times(distiller, BATCH.x0, 0.6, 0.2)
    path = distiller.path(interval, data, BATCH.cond)
    expected = distiller.derivative(interval, path, BATCH.cond)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(distiller.derivative(interval, path, BATCH.cond), expected)
        low = average_velocity.central_difference(
            distiller.average(BATCH.cond), path, interval, 0.005, distiller.schedule
        )
    assert (low - expected).norm() > 0.1 * expected.norm()
    with single_precision(distiller.bank, "student", torch.device("cpu")):
        assert not torch.is_autocast_enabled("cpu")


def test_layers_that_cast_their_input_compute_in_float32_for_a_difference():
    """As bitsandbytes' layers of 4 bits do on a base of bfloat16; the difference was rounding noise."""
    distiller, cpu = tiny(), torch.device("cpu")
    layer = next(m for m in distiller.bank.networks["student"].modules() if isinstance(m, torch.nn.Linear))
    layer.compute_dtype = torch.bfloat16
    assert not is_single_precision(distiller.bank, "student", cpu)
    with single_precision(distiller.bank, "student", cpu):
        assert layer.compute_dtype == torch.float32 and is_single_precision(distiller.bank, "student", cpu)
    assert layer.compute_dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------------- weights


def test_the_derivative_grows_from_nothing_over_the_warm_up():
    """14.3."""
    distiller = guided("flow", "flow", target="jvp", warmup=10)
    interval, _, data = at_times(distiller, torch.randn(4, 2, 1, 1).double(), 0.8, 0.2)
    path = distiller.path(interval, data, {"class_labels": torch.zeros(4).long()})
    derivative = torch.randn(4, 2, 1, 1, dtype=torch.float64)
    for step, grown in ((0, 0.0), (5, 0.5), (10, 1.0), (20, 1.0)):
        distiller.step_in_stage = step
        found = distiller.corrected(interval, path, derivative)
        torch.testing.assert_close(found, path.flow() - grown * 0.6 * derivative)


@pytest.mark.parametrize(("power", "weight"), [(0.0, 2.0), (0.5, 1.0), (1.0, 0.5)])
def test_the_weight_of_alphas_loss_is_alpha_to_the_power_of_twice_p_less_one(power, weight):
    """14.2; no alpha is in the residual of a pair of equal times, whose weight is 1."""
    distiller = guided("flow", "flow", target="alpha", alpha_least=0.5, alpha_end=0.01, power=power, equal=0.5)
    plain, distiller.step_in_stage = average_velocity.normalised, 100
    oracle = Gaussian(torch.zeros(2).double(), 0.7, SCHEDULES["flow"], "flow")
    batch = Batch(batch_of(oracle, 8).x0, {"class_labels": torch.zeros(8).long()}, 8)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(average_velocity, "normalised", lambda *given: seen.append(plain(*given)) or seen[0])
        loss = distiller("student", batch, Draws(0, 8)).terms["loss"]
    draws = Draws(0, 8)
    draws.normal_like(batch.x0)
    t, _, r = distiller.draw_times(draws)
    assert 0 < (t == r).sum() < 8
    torch.testing.assert_close(loss, (torch.where(t == r, 1.0, weight) * seen[0]).mean())


@pytest.mark.parametrize(("name", "kind"), [("cosine", "v_prediction"), ("linear", "epsilon")])
def test_an_error_of_the_average_velocity_is_that_of_the_networks_output_scaled(name, kind):
    """14.6: by (alpha + sigma) from a VP velocity, by (alpha + sigma) / alpha from noise, hence p > 0 for such nets."""
    schedule, t = SCHEDULES[name], torch.tensor([0.2, 0.6, 0.95]).double()
    x_t = torch.randn(3, 2, 1, 1, dtype=torch.float64)
    outputs = torch.randn(2, 3, 2, 1, 1, dtype=torch.float64)
    denoiser = teacher_denoiser(Gaussian(torch.zeros(2).double(), 0.7, schedule, kind))
    flows = []
    for output in outputs:
        denoiser.raw = lambda *given, output=output, **told: output
        flows.append(denoiser(x_t, t, {}).flow())
    alpha, sigma = schedule.coefficients(t, x_t)
    factor = (alpha + sigma) / (alpha if kind == "epsilon" else 1)
    torch.testing.assert_close((flows[0] - flows[1]).abs(), factor * (outputs[0] - outputs[1]).abs())


# ------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_on_a_flow_the_steps_are_those_of_diffusers_flow_map_scheduler(shift):
    """14.8: given unshifted noise levels, which it shifts itself."""
    schedule = RectifiedFlow(shift=shift)
    sampler = TwoTimeDDIM(schedule, schedule.grid(4))
    scheduler = FlowMapEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(4)
    torch.testing.assert_close(scheduler.timesteps.double(), 1000 * sampler.times[:-1], rtol=1e-5, atol=0)
    x = state = torch.randn(*points((0.0, 0.0), (1.0, 1.0)).shape)
    for index, timestep in enumerate(scheduler.timesteps):
        velocity = (x + index).sin()
        t, s = (time.expand(2) for time in sampler.times[index : index + 2])
        x = sampler.step(Prediction(x - expand(t, x) * velocity, x + expand(1 - t, x) * velocity), t, s, torch.randn)
        state = scheduler.step((state + index).sin(), timestep, state).prev_sample
        torch.testing.assert_close(state, x, rtol=1e-4, atol=1e-5)
