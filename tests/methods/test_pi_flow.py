"""pi-Flow: policies, their sampler and its scheduler, the widened head, the imitation loss, a student of a mixture."""

import pytest
import torch
from adversarial_students import taught_by
from contracts.cases import FLOW, PIXELS, scheduler_config
from diffusers import EDMEulerScheduler
from mixtures import batch_of, draw, draw_from, evenly, loss_of, train
from network_calls import calls_of
from oracles import SCHEDULES, Gaussian, PointNet, sliced_wasserstein, teacher_denoiser, three_clusters

from stepdistill.batch import Batch
from stepdistill.diffusion.ode import ode_step
from stepdistill.diffusion.policy import Policy, PolicySampler, segment_times
from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.samplers import DDIM
from stepdistill.diffusion.schedule import RectifiedFlow
from stepdistill.diffusion.schedulers import to_diffusers
from stepdistill.diffusion.shift import shifted, unshifted
from stepdistill.families.dit import DiT
from stepdistill.families.pixel import Pixel
from stepdistill.families.sd import SD
from stepdistill.families.sdxl import SDXL
from stepdistill.files.schema import build
from stepdistill.methods.pi_flow import PiFlow
from stepdistill.networks.adapter_bank import AdapterBank
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.networks.denoiser import Denoiser
from stepdistill.randomness import Draws

COSINE = SCHEDULES["cosine"]
SHIFTED = RectifiedFlow(shift=3.0)
LABELS = {"class_labels": torch.tensor([0, 1, 2, 0])}
both_banks = pytest.mark.parametrize("bank", ["copy", "adapter"])
schedules = pytest.mark.parametrize("schedule", [COSINE, SHIFTED], ids=["cosine", "flow"])


def tiny(bank="copy", make=Pixel.tiny, **options):
    family, config = make(), PiFlow.Config(**{"substeps": 8} | options)
    family.widen(config.points)
    banks = {"copy": CopyBank, "adapter": lambda net: AdapterBank(net, rank=2, targets=family.lora_targets)}
    return PiFlow(family, banks[bank](family.network), config)


def batch_of_images():
    return Batch(torch.randn(4, 1, 8, 8), LABELS, 4)


# ------------------------------------------------------------------------------------------------ segments, policies


@schedules
def test_segments_have_equal_raw_lengths_but_for_a_shorter_last(schedule):
    raw = unshifted(segment_times(schedule, 4, 0.5), schedule.shift)
    torch.testing.assert_close(-raw.diff(), torch.tensor([2, 2, 2, 1]).double() / 7, atol=1e-3, rtol=0)
    torch.testing.assert_close(shifted(raw, schedule.shift), segment_times(schedule, 4, 0.5))
    assert raw[0] == 1 and raw[-1] == 0
    assert segment_times(schedule, 1, 0.5).tolist() == [1, 0]


@schedules
@pytest.mark.parametrize("points", [1, 5])
def test_a_policy_of_one_clean_image_is_one_ddim_step(schedule, points):
    """However many network-free steps there are, and whether the image is emitted once or several times the same."""
    t, s = (torch.full((3,), time, dtype=torch.float64) for time in (0.9, 0.4))
    x0, eps = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64)
    x_t = Prediction(x0, eps).to_state(*schedule.coefficients(t, x0))
    policy = Policy(x0[:, None].repeat(1, points, 1, 1, 1), unshifted(t, schedule.shift), unshifted(s, schedule.shift))
    landed = policy.follow(x_t, 16, schedule)[-1]
    torch.testing.assert_close(landed, ode_step(Prediction(x0, eps), schedule, s))


def exact_policy(oracle, x_t, t, s, points):
    """The clean images that the perfect network sees along the exact path from ``x_t``."""
    start, end = unshifted(t, oracle.schedule.shift), unshifted(s, oracle.schedule.shift)
    images = []
    for place in torch.linspace(0, 1, points, dtype=torch.float64):
        tau = shifted(torch.lerp(start, end, place), oracle.schedule.shift)
        images.append(oracle.predict(oracle.solve(x_t, t, tau), tau))
    return Policy(torch.stack(images, 1), start, end)


@schedules
def test_with_exact_clean_images_more_points_land_nearer_to_the_exact_end(schedule):
    """METHODS_2026, 20: of a Gaussian, in the limit of many network-free steps."""
    oracle = Gaussian(torch.tensor([0.3, -0.2]).double(), 0.7, schedule, "v_prediction")
    t, s = (torch.full((64,), time, dtype=torch.float64) for time in (0.95, 0.3))
    x_t = torch.randn(64, 2, 1, 1, dtype=torch.float64)
    exact, errors = oracle.solve(x_t, t, s), []
    for points in (2, 4, 10):
        landed = exact_policy(oracle, x_t, t, s, points).follow(x_t, 400, schedule)[-1]
        errors.append((landed - exact).abs().max().item())
    assert errors[2] < errors[1] < errors[0] and errors[2] < 0.01


# --------------------------------------------------------------------------------------------------- widened heads


@pytest.mark.parametrize("make", [Pixel.tiny, SD.tiny, SDXL.tiny], ids=["pixel", "sd", "sdxl"])
def test_a_widened_head_gives_the_teachers_prediction_several_times(make):
    plain, wide = make(), make()
    wide.widen(3)
    x_t, t = torch.randn(2, *plain.sample_shape), torch.tensor([0.9, 0.4]).double()
    cond = plain.example_cond([0, 1])
    bank = CopyBank(wide.network)
    bank.fork("student")
    with torch.no_grad():
        expected = Denoiser(plain, CopyBank(plain.network), "teacher").raw(x_t, t, cond)
        found = Denoiser(wide, bank, "student").raw(x_t, t, cond)
        teacher = Denoiser(wide, bank, "teacher").raw(x_t, t, cond)
    assert wide.network.config.out_channels == 3 * plain.network.config.out_channels
    assert found.shape[1] == 3 * x_t.shape[1] and teacher.shape == x_t.shape
    for prediction in (*found.chunk(3, 1), teacher):
        torch.testing.assert_close(prediction, expected, atol=1e-6, rtol=1e-5)


@both_banks
def test_at_first_a_segment_is_the_teachers_ddim_step(bank):
    """METHODS_2026, 20: before training a policy lands where the teacher's step does, in every segment."""
    distiller = tiny(bank)
    sampler, cond, x = distiller.sampler(), LABELS, torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        for t, s in zip(sampler.times[:-1].expand(4, -1).T, sampler.times[1:].expand(4, -1).T, strict=True):
            landed = sampler.step(distiller.student(x, t, cond), t, s, torch.randn_like)
            expected = ode_step(distiller.teacher(x, t, cond), distiller.schedule, s)
            torch.testing.assert_close(landed, expected, rtol=1e-4, atol=1e-4)


def test_families_without_such_a_head_and_edm_teachers_are_refused():
    with pytest.raises(ValueError, match="DiT have no head that can be widened"):
        DiT.tiny().widen(2)
    DiT.tiny().widen(1)
    with pytest.raises(ValueError, match="expected a flow or betas to follow a policy on, got Karras"):
        PiFlow.check(PiFlow.Config(), Pixel.tiny(scheduler=scheduler_config(EDMEulerScheduler())))
    with pytest.raises(ValueError, match="window: expected at most substeps = 2, got 3"):
        build(PiFlow.Config, {"substeps": 2})


# -------------------------------------------------------------------------------------------------------- the loss


@both_banks
@pytest.mark.parametrize(("guidance_scale", "calls"), [(1.0, 1), (2.0, 2)])
def test_a_step_costs_what_the_paper_states(bank, guidance_scale, calls):
    """METHODS_2026, 20: one call of the student with gradient, and ``states`` of the teacher, guided twice as many."""
    distiller = tiny(bank, guidance_scale=guidance_scale, states=3)
    expected = {"student with gradient": 1, "teacher": 3 * calls}
    assert calls_of(distiller, "student", batch_of_images(), Draws(0, 4)) == expected
    distiller = tiny(bank, guidance_scale=guidance_scale, states=3, start="rollout")
    assert calls_of(distiller, "student", batch_of_images(), Draws(0, 4)) == expected | {"student": 3}


@schedules
@pytest.mark.parametrize("start", ["data", "rollout"])
def test_of_a_single_point_the_start_is_an_optimum(schedule, start):
    kind = "flow" if isinstance(schedule, RectifiedFlow) else "v_prediction"
    oracle = Gaussian(torch.tensor([0.3, -0.2]).double(), 0.0, schedule, kind)
    distiller = taught_by(PiFlow, oracle, start=start)
    assert loss_of(distiller, batch_of(oracle, 64)).item() == pytest.approx(0, abs=1e-9)


def test_exact_policies_are_an_optimum_in_the_limit_of_many_points_and_steps(monkeypatch):
    oracle = Gaussian(torch.tensor([0.3, -0.2]).double(), 0.7, COSINE, "v_prediction")
    losses = []
    for points, substeps in ((2, 8), (16, 64)):
        distiller = taught_by(PiFlow, oracle, points=points, substeps=substeps, window=1)
        times = distiller.sampler().times

        def student(x_t, t, cond, times=times, points=points):
            s = times[(times[:-1] - t[:, None]).abs().argmin(1) + 1]
            x0 = exact_policy(oracle, x_t, t, s, points).x0.flatten(1, 2)
            return Prediction(x0, x0)

        monkeypatch.setattr(distiller, "student", student)
        losses.append(loss_of(distiller, batch_of(oracle, 256)).item())
    assert losses[1] < losses[0] / 20 and losses[1] < 1e-4


def test_no_gradient_flows_through_the_states_at_which_the_policy_is_corrected(monkeypatch):
    """With a window of one step the gradient is that of the velocity at fixed states, written out."""
    oracle = three_clusters(COSINE, "v_prediction")
    distiller = taught_by(PiFlow, oracle, points=2, states=1, window=1, steps=2)
    visited = []
    velocity = distiller.velocity
    monkeypatch.setattr(distiller, "velocity", lambda *given: visited.append(given) or velocity(*given))
    loss_of(distiller, batch_of(oracle, 16)).backward()
    ((policy, x, place),) = visited
    assert policy.x0.requires_grad and not x.requires_grad
    tau = shifted(distiller.raw(policy, place), COSINE.shift)
    alpha, sigma = COSINE.coefficients(tau, x)
    x0 = policy.at(distiller.raw(policy, place))
    by_hand = (x - alpha * x0) / sigma - x0
    torch.testing.assert_close(velocity(policy, x, place), by_hand, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------ sampler, student


@pytest.mark.parametrize("name", ["pixel", "pixel-sample", "pixel-zero-snr", "pixel-flow"])
@pytest.mark.parametrize("steps", [1, 3, 4])
def test_the_exported_scheduler_takes_the_samplers_steps(name, steps):
    family = PIXELS[name]()
    sampler = PolicySampler(family.schedule, steps, 0.5, points=3, substeps=16)
    scheduler = to_diffusers(sampler, family.scheduler_config)
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(
        scheduler.timesteps.double(), family.schedule.timestep(sampler.times[:-1]), atol=1e-3, rtol=0
    )
    family.points = 3
    denoiser = Denoiser(family, CopyBank(family.network), "student")
    x = state = torch.randn(2, 1, 8, 8)
    for index, timestep in enumerate(scheduler.timesteps):
        output = torch.cat([(0.3 * n + x).sin() for n in range(3)], 1)
        denoiser.raw = lambda *given, output=output, **options: output
        now, then = (time.expand(2) for time in sampler.times[index : index + 2])
        x = sampler.step(denoiser(x, now, {}), now, then, torch.randn_like)
        state = scheduler.step(output, timestep, state).prev_sample
        torch.testing.assert_close(state, x, atol=2e-5, rtol=1e-4)


def test_flow_schedulers_keep_the_teachers_shift():
    family = Pixel.tiny(scheduler=scheduler_config(FLOW))
    scheduler = to_diffusers(PolicySampler(family.schedule, 2, 1.0, 3, 8), family.scheduler_config)
    scheduler.set_timesteps(2)
    assert scheduler.config.shift == 3 and scheduler.timesteps.tolist() == pytest.approx([1000, 750])


@pytest.mark.product
def test_a_student_of_a_mixture_is_nearer_to_the_data_than_its_teacher():
    oracle = three_clusters(COSINE, "v_prediction")
    network = PointNet(COSINE, oracle, waves=32)
    distiller = train(PiFlow, oracle, 400, network=network, steps=2, points=6, substeps=12, states=2, window=1, lr=4e-3)
    exact, ddim = evenly(oracle, 3000), DDIM(COSINE, COSINE.grid(2))
    teacher = sliced_wasserstein(draw_from(teacher_denoiser(oracle), ddim, 3000), exact)
    assert sliced_wasserstein(draw(distiller, 3000), exact) < 0.6 * teacher
