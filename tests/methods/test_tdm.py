"""TDM: the noise of a landed state, the importance weight, what a step costs, and a mixture's student."""

import math

import pytest
import torch
from adversarial_students import mode_shares, mode_test, taught_by, train_adversarially
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from mixtures import landing
from network_calls import calls_of
from oracles import SCHEDULES, Gaussian, three_clusters

from stepdistill.batch import Batch
from stepdistill.diffusion.ode import noise_up, ode_step
from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.schedulers import to_diffusers
from stepdistill.families.pixel import Pixel
from stepdistill.families.sd import SD
from stepdistill.losses.distribution_matching import both_scores, matching_gradient
from stepdistill.methods.tdm import TDM
from stepdistill.networks.adapter_bank import AdapterBank
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.randomness import Draws

COSINE = SCHEDULES["cosine"]
LABELS = {"class_labels": torch.tensor([0, 1, 2, 0])}
BATCH = Batch(None, LABELS, 4)
both_banks = pytest.mark.parametrize("bank", ["copy", "adapter"])
schedules = pytest.mark.parametrize("name", ["cosine", "linear", "flow", "karras"])


def tiny(bank="copy", **options):
    family = Pixel.tiny()
    banks = {"copy": CopyBank, "adapter": lambda net: AdapterBank(net, rank=2, targets=family.lora_targets)}
    return TDM(family, banks[bank](family.network), TDM.Config(**options))


# --------------------------------------------------------------------------------------------- the landed state


@schedules
def test_noising_up_keeps_the_marginals(name):
    schedule, s, size = SCHEDULES[name], 0.7, 200_000
    m, tau = torch.tensor([0.3]).double(), torch.tensor([0.6]).double()
    (alpha, sigma), (alpha_tau, sigma_tau) = schedule(m), schedule(tau)
    x = (alpha**2 * s**2 + sigma**2).sqrt() * torch.randn(size, 1, 1, 1, dtype=torch.float64)
    up = noise_up(x, m.expand(size), tau.expand(size), schedule, torch.randn_like)
    expected = (alpha_tau**2 * s**2 + sigma_tau**2).item()
    assert up.var().item() == pytest.approx(expected, rel=5 * math.sqrt(2 / size))


@schedules
def test_at_its_own_time_a_landed_state_has_the_students_own_noise_and_the_weight_knows_it(name):
    schedule = SCHEDULES[name]
    distiller = taught_by(TDM, three_clusters(COSINE, "v_prediction"))
    distiller.schedule = schedule
    x0, eps, noise = torch.randn(3, 50, 2, 1, 1, dtype=torch.float64)
    m = torch.full((50,), 0.5, dtype=torch.float64)
    x = noise_up(ode_step(Prediction(x0, eps), schedule, m), m, m, schedule, lambda _: noise)
    weight = distiller.importance(x0, x, m, noise)
    expected = (0.5 * (noise.square() - eps.square()).flatten(1).mean(1)).exp().clamp(max=20)
    torch.testing.assert_close(weight, expected)


def test_gaussian_noise_of_the_student_needs_no_weight():
    distiller = taught_by(TDM, three_clusters(COSINE, "v_prediction"))
    x0, eps, noise = torch.randn(3, 400, 256, 1, 1, dtype=torch.float64)
    m, tau = (torch.full((400,), time, dtype=torch.float64) for time in (0.3, 0.6))
    x = noise_up(ode_step(Prediction(x0, eps), COSINE, m), m, tau, COSINE, lambda _: noise)
    weight = distiller.importance(x0, x, tau, noise)
    assert weight.log().mean().item() == pytest.approx(0, abs=5 * weight.log().std().item() / 20)
    assert weight.mean().item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("interval", ["within", "above"])
def test_states_are_noised_up_and_never_below_where_they_landed(interval):
    distiller = tiny(interval=interval)
    times = distiller.sampler().times
    i = Draws(0, 5000).integers(0, 4)
    t, m = times[i], times[i + 1]
    tau = distiller.level(m, t, Draws(1, 5000))
    assert (tau >= m).all() and (tau >= 0.02).all()
    assert tau.max() > 0.97 and (tau <= (t if interval == "within" else 0.98)).all()
    late = tiny(interval=interval, first_time=0.8)
    times = late.sampler().times
    tau = late.level(times[i + 1], times[i], Draws(1, 5000))
    assert 0.77 < tau.max() <= 0.79 and (tau >= times[i + 1]).all()  # METHODS_2026, 17.1: below 790 of 800


# ------------------------------------------------------------------------------------------------- the losses


@both_banks
def test_a_student_that_is_the_teacher_with_a_perfect_fake_score_feels_guidance_alone(bank):
    assert tiny(bank)("student", BATCH, Draws(0, 4)).terms["matching"].item() == 0
    assert tiny(bank, distance="huber")("student", BATCH, Draws(0, 4)).terms["matching"].item() == 0
    assert tiny(bank, guidance_scale=3.0)("student", BATCH, Draws(0, 4)).terms["matching"].item() > 0


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_of_one_segment_it_is_dmd_with_twice_the_gradient(guidance_scale):
    oracle = three_clusters(COSINE, "v_prediction", conditional=True)
    distiller = taught_by(TDM, oracle, 3, steps=1, guidance_scale=guidance_scale)
    with torch.no_grad():
        distiller.bank.networks["fake"].fc3.bias += 0.1
    (x0, _), x_tau, tau, noise = distiller.land(BATCH, Draws(0, 4))
    assert tau.min() >= 0.02 and tau.max() <= 0.98
    torch.testing.assert_close(x_tau, COSINE.add_noise(x0.detach(), noise, tau))
    scores = both_scores(distiller.guided_teacher(LABELS), distiller.fake, x0.detach(), noise, tau, LABELS)
    losses = distiller("student", BATCH, Draws(0, 4))
    losses.terms["matching"].backward()
    found = [p.grad.clone() for p in distiller.bank.params("student")]
    distiller.zero_grad()
    (2 * matching_gradient(x0.detach(), *scores) * x0 / x0.numel()).sum().backward()
    for gradient, parameter in zip(found, distiller.bank.params("student"), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-9)


def test_the_gradient_is_that_of_the_clean_image_alone():
    """METHODS_2026, 17.6, 7: written out with scores of fixed states; what they would pass on changes nothing."""
    oracle = three_clusters(COSINE, "v_prediction", conditional=True)
    distiller = taught_by(TDM, oracle, 3, steps=4)
    with torch.no_grad():
        distiller.bank.networks["fake"].fc3.bias += 0.1
    params = list(distiller.bank.params("student"))
    found = torch.autograd.grad(distiller("student", BATCH, Draws(0, 4)).terms["matching"], params)
    (x0, _), x_tau, tau, _ = distiller.land(BATCH, Draws(0, 4))
    assert len(tau.unique()) == 4 and not x_tau.requires_grad
    with torch.no_grad():
        real, seen = (one(x_tau, tau, LABELS).x0 for one in (distiller.teacher, distiller.fake))
    pull = 2 * matching_gradient(x0.detach(), real, seen) / x0.numel()
    for gradient, expected in zip(found, torch.autograd.grad(x0, params, pull), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-9)


@both_banks
@pytest.mark.parametrize(("guidance_scale", "teacher"), [(1.0, 1), (2.0, 2)])
def test_a_step_costs_what_the_paper_states(bank, guidance_scale, teacher):
    """METHODS_2026, 17.4: the rollout of K - 1 calls, student 1 with gradient, teacher 2 under guidance, fake 1."""
    distiller = tiny(bank, guidance_scale=guidance_scale)
    calls = calls_of(distiller, "student", BATCH, Draws(0, 4))
    assert calls == {"student": 3, "student with gradient": 1, "teacher": teacher, "fake": 1}
    assert calls_of(distiller, "fake", BATCH, Draws(0, 4)) == {"student": 4, "fake with gradient": 1}


@both_banks
def test_all_segments_of_one_rollout_cost_no_call_twice(bank):
    """METHODS_2026, 17.2: K of the student, all with gradient, and the scores of as many batches."""
    distiller = tiny(bank, all_segments=True, guidance_scale=2.0)
    calls = calls_of(distiller, "student", BATCH, Draws(0, 4))
    assert calls == {"student with gradient": 4, "teacher": 2 * 4, "fake": 4}


def test_all_segments_are_those_that_images_have_one_by_one():
    distiller = tiny(all_segments=True)
    (x0, _), x_tau, tau, _ = distiller.land_everywhere(BATCH, Draws(0, 4))
    times, segments = distiller.sampler().times, tau.reshape(4, 4)
    for i, segment in enumerate(segments):
        assert ((segment >= times[i + 1]) & (segment <= times[i])).all()
    assert x0.requires_grad and not x_tau.requires_grad and x0.shape == x_tau.shape == (16, 1, 8, 8)
    start = distiller.schedule.initial_noise(Draws(0, 4).normal(1, 8, 8))
    x = start
    for i in range(4):
        t, m = (times[k].expand(4) for k in (i, i + 1))
        prediction = distiller.student(x, t, LABELS)
        torch.testing.assert_close(x0.reshape(4, 4, 1, 8, 8)[i], prediction.x0)
        x = ode_step(prediction, distiller.schedule, m)


def test_the_importance_weight_is_a_density_ratio_of_one_pixel_and_clipped():
    """17.1: exp(mean(n^2 - mix^2) / 2), which the number of pixels does not change."""
    distiller = taught_by(TDM, three_clusters(COSINE, "v_prediction"), importance_clip=2.0)
    tau = torch.full((2,), 0.5, dtype=torch.float64)
    alpha, sigma = COSINE.coefficients(tau, torch.zeros(2, 1, 1, 1).double())
    for size in (1, 9):
        x0 = torch.randn(2, 2, size, size, dtype=torch.float64)
        mix, noise = torch.ones_like(x0), torch.tensor([1.2, 3.0]).double().reshape(2, 1, 1, 1).expand_as(x0)
        found = distiller.importance(x0, alpha * x0 + sigma * mix, tau, noise)
        torch.testing.assert_close(found, torch.tensor([math.exp(0.22), 2.0]).double())


def test_the_fake_scores_weight_is_the_clamped_ratio_of_signal_to_noise():
    gaussian = Gaussian(torch.tensor([0.3, -0.2]).double(), 0.7, COSINE, "v_prediction")
    distiller = taught_by(TDM, gaussian, steps=2, snr_clamp=5.0)
    batch = Batch(None, {}, 64)
    (x0, _), x_tau, tau, noise = distiller.land(batch, Draws(3, 64))
    error = (distiller.fake(x_tau, tau, {}).x0 - x0).square().flatten(1).mean(1)
    weight = COSINE.log_snr(tau).exp().clamp(max=5) * distiller.importance(x0, x_tau, tau, noise)
    found = distiller("fake", batch, Draws(3, 64)).terms["denoising"]
    torch.testing.assert_close(found.double(), (weight * error).mean(), rtol=1e-5, atol=1e-9)


# --------------------------------------------------------------------------------------- samplers and students


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_authors_grid_of_a_stable_diffusion_teacher_is_sampled_by_a_stock_scheduler(steps):
    family = SD.tiny()
    config = TDM.Config(steps=steps, first_time=0.8)
    TDM.check(config, family)
    sampler = TDM.make_sampler(config, family)
    scheduler = to_diffusers(sampler, family.scheduler_config)
    assert isinstance(scheduler, DPMSolverMultistepScheduler)
    timesteps = sampler.pipeline_kwargs["timesteps"]
    assert timesteps == {1: [799], 2: [799, 399], 4: [799, 599, 399, 199]}[steps]
    scheduler.set_timesteps(timesteps=timesteps)
    x = state = torch.randn(2, 4, 4, 4)
    for index, t in enumerate(scheduler.timesteps):
        now, then = (sampler.times[i].expand(2) for i in (index, index + 1))
        alpha, sigma = family.schedule.coefficients(now, x)
        x = ode_step(Prediction((x - sigma * x.tanh()) / alpha, x.tanh()), family.schedule, then)
        state = scheduler.step(state.tanh(), t, state).prev_sample
        torch.testing.assert_close(state, x, atol=1e-4, rtol=1e-4)


def test_from_pure_noise_it_is_sampled_by_ddim():
    distiller = tiny()
    assert isinstance(to_diffusers(distiller.sampler(), distiller.family.scheduler_config), DDIMScheduler)
    TDM.check(TDM.Config(first_time=0.8), Pixel.tiny())  # the pipeline takes timesteps


@pytest.mark.product
@pytest.mark.parametrize(
    ("steps", "options"), [(1, {}), (2, {}), (4, {}), (2, {"interval": "above"}), (2, {"all_segments": True})]
)
def test_students_land_on_the_distribution_and_cover_all_modes(steps, options):
    """Within 0.25 of the data by sliced Wasserstein; DDIM of the perfect teacher has 1.1, 0.45 and 0.14."""
    torch.manual_seed(0)
    oracle = three_clusters(COSINE, "v_prediction")
    options = {"steps": steps, "student_update_interval": 3} | options
    distiller = train_adversarially(TDM, oracle, 900, lr=5e-3, size=256, **options)
    shares, stray = mode_shares(distiller, 4000)
    student, teacher = landing(distiller, oracle, steps, size=6000)
    assert mode_test(shares, 1) < 0.02 and stray < 0.1, shares
    assert student < 0.25 and (steps == 4 or student < 0.5 * teacher)
