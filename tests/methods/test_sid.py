"""SiD: its loss in closed form, the way of its gradient, what a step costs, and a mixture's students."""

import math

import pytest
import torch
from adversarial_students import mode_shares, mode_test, taught_by, train_adversarially
from diffusers import DDIMScheduler, LCMScheduler
from mixtures import landing
from network_calls import calls_of
from oracles import SCHEDULES, Gaussian, teacher_denoiser, three_clusters

from stepdistill.batch import Batch
from stepdistill.diffusion.schedulers import to_diffusers
from stepdistill.families.pixel import Pixel
from stepdistill.losses.distribution_matching import denoising_loss
from stepdistill.losses.score_identity import (
    guided_denoising_loss,
    identity_error,
    identity_weight,
    over_finite,
    shielded,
)
from stepdistill.methods.sid import SiD
from stepdistill.networks.adapter_bank import AdapterBank
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.networks.denoiser import Denoiser
from stepdistill.randomness import Draws

COSINE = SCHEDULES["cosine"]
LABELS = {"class_labels": torch.tensor([0, 1, 2, 0])}
BATCH = Batch(None, LABELS, 4)
IMAGES = Batch(torch.randn(4, 1, 8, 8), LABELS, 4)
both_banks = pytest.mark.parametrize("bank", ["copy", "adapter"])


def tiny(bank="copy", **options):
    family = Pixel.tiny()
    banks = {"copy": CopyBank, "adapter": lambda net: AdapterBank(net, rank=2, targets=family.lora_targets)}
    return SiD(family, banks[bank](family.network), SiD.Config(**options))


# ----------------------------------------------------------------------------------------------- the Gaussian


@pytest.mark.parametrize("a", [0.0, 1.0, 1.2])
@pytest.mark.parametrize("width", [0.3, 0.7, 1.2])
@pytest.mark.parametrize("name", ["flow", "cosine", "karras"])
def test_of_gaussians_the_gradient_is_known_and_leads_to_the_teachers_width(name, width, a):
    """x = b z of a student, r and f exact for widths s and b: the derivative by b, with f held fixed, in closed form.

    With r = c_s x_t and f = c_b x_t, E[L] = (c_s - c_b) ((1 - a) (c_s V - alpha b^2) + a (c_b V - alpha b^2)).
    """
    s, size, schedule = 0.7, 100_000, SCHEDULES[name]
    kind = {"flow": "flow", "cosine": "v_prediction", "karras": "edm"}[name]
    t = schedule.inverse(torch.zeros(1, dtype=torch.float64))  # as much signal as noise
    (alpha,), (sigma,) = schedule(t)
    zero = torch.zeros(2, dtype=torch.float64)
    teacher, fake = (teacher_denoiser(Gaussian(zero, one, schedule, kind)) for one in (s, width))
    z, n = torch.randn(2, size, 2, 1, 1, dtype=torch.float64)
    for one in (z, n):  # second moments as in the limit of infinitely many
        one.flatten(1)[:] = one.flatten(1) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(one.flatten(1).T))).T
    b = torch.tensor(width, dtype=torch.float64, requires_grad=True)
    x, times = b * z, t.expand(size)
    x_t = schedule.add_noise(x, n, times)
    loss = identity_error(x, teacher(x_t, times, {}).x0, fake(x_t, times, {}).x0, a).double().mean()
    (found,) = torch.autograd.grad(loss, b)
    c_s, c_b = (alpha * v**2 / (alpha**2 * v**2 + sigma**2) for v in (s, width))
    variance, factor = alpha**2 * width**2 + sigma**2, c_s - c_b
    mixed = (1 - a) * c_s + a * c_b
    expected = factor * 2 * alpha * width * (mixed * alpha - 1)
    assert found.item() == pytest.approx(expected.item(), abs=0.02 * abs(expected.item()) + 2e-3)
    assert loss.item() == pytest.approx((factor * (mixed * variance - alpha * width**2)).item(), abs=0.01)
    assert math.copysign(1, found.item()) == math.copysign(1, width - s) or width == s


def test_at_zero_its_value_is_the_fisher_divergence_and_at_one_nothing():
    schedule, size, zero = SCHEDULES["flow"], 200_000, torch.zeros(2, dtype=torch.float64)
    teacher, fake = (teacher_denoiser(Gaussian(zero, one, schedule, "flow")) for one in (0.7, 1.2))
    t, x = torch.full((size,), 0.6, dtype=torch.float64), 1.2 * torch.randn(size, 2, 1, 1, dtype=torch.float64)
    x_t = schedule.add_noise(x, torch.randn_like(x), t)
    real, seen = teacher(x_t, t, {}).x0, fake(x_t, t, {}).x0
    fisher = (real - seen).square().mean().item()
    assert identity_error(x, real, seen, 0.0).mean().item() == pytest.approx(fisher, rel=0.05)
    assert identity_error(x, real, seen, 1.0).mean().item() == pytest.approx(0, abs=0.05 * fisher)


# ----------------------------------------------------------------------------------------------- the gradient


def cut_off(monkeypatch, role):
    """Keep the gradient from passing through the network of ``role`` to its input."""
    call = Denoiser.__call__
    monkeypatch.setattr(
        Denoiser, "__call__",
        lambda self, x, *args, **named: call(self, x.detach() if self.role == role else x, *args, **named),
    )  # fmt: skip


def largest_gradient(distiller):
    """The loss, and the largest entry of its gradient by the student's weights."""
    loss = distiller("student", BATCH, Draws(0, 4)).terms["identity"]
    return loss.item(), max(g.abs().max().item() for g in torch.autograd.grad(loss, distiller.bank.params("student")))


@both_banks
@pytest.mark.parametrize("weight", ["linear", "classic"])
def test_a_fake_score_that_is_the_teacher_gives_no_loss_and_no_gradient(monkeypatch, bank, weight):
    """What passes through the two networks is opposite; only the sum over both, at the image, is rounded in float32."""
    distiller = tiny(bank, weight=weight, guidance_scale=2.0, fake_guidance_scale=2.0)
    loss, both = largest_gradient(distiller)
    cut_off(monkeypatch, "fake")
    _, through_the_teacher = largest_gradient(distiller)
    assert loss == 0 and through_the_teacher > 0
    assert both < 4 * torch.finfo(torch.float32).eps * through_the_teacher


def moved(**options):
    """A distiller of the mixture whose fake score is not its teacher, its other networks frozen."""
    distiller = taught_by(SiD, three_clusters(COSINE, "v_prediction", conditional=True), 3, **options)
    with torch.no_grad():
        distiller.bank.networks["fake"].fc3.bias += 0.1
    distiller.bank.networks["fake"].requires_grad_(False)
    return distiller


def student_gradients(distiller):
    distiller("student", BATCH, Draws(0, 4)).terms["identity"].backward()
    return [p.grad for p in distiller.bank.params("student")]


def test_the_gradient_passes_through_both_networks_and_trains_neither(monkeypatch):
    """Cut off from the images, they would be another method."""
    whole = moved()
    with_them = student_gradients(whole)
    for role in ("fake", "teacher"):
        assert all(p.grad is None for p in whole.bank.networks[role].parameters())
    for role in ("fake", "teacher"):
        with monkeypatch.context() as patch:
            cut_off(patch, role)
            cut = student_gradients(moved())
        assert any((a - b).abs().max() > 1e-3 * a.abs().max() for a, b in zip(with_them, cut, strict=True))


@pytest.mark.parametrize("name", ["flow", "cosine", "karras"])
def test_the_weight_is_the_share_of_signal_or_the_inverse_error(name):
    schedule = SCHEDULES[name]
    t, x0, real = torch.tensor([0.2, 0.7]).double(), torch.randn(2, 3, 1, 1), torch.randn(2, 3, 1, 1)
    alpha, sigma = schedule(t)
    found = identity_weight("linear", schedule, t, x0, real)
    torch.testing.assert_close(found.double(), alpha / (alpha + sigma), rtol=1e-6, atol=0)
    if name == "flow":
        torch.testing.assert_close(found.double(), 1 - t, rtol=1e-6, atol=0)
    found = identity_weight("classic", schedule, t, x0.requires_grad_(), real.requires_grad_())
    torch.testing.assert_close(found, 1 / (x0 - real).abs().flatten(1).mean(1))
    assert not found.requires_grad


def test_a_sample_that_is_not_finite_counts_nothing():
    x0 = torch.randn(4, 3, 1, 1, requires_grad=True)
    broken = torch.tensor([1.0, torch.nan, 1.0, torch.inf]).reshape(4, 1, 1, 1)

    def gradient(rows):
        x = shielded(x0)[rows]
        loss = over_finite(identity_error(x, 2 * x * broken[rows], x.sin(), 1.0)) * len(rows)
        return loss.detach(), torch.autograd.grad(loss, x0)[0]

    for found, expected in zip(gradient([0, 1, 2, 3]), gradient([0, 2]), strict=True):
        torch.testing.assert_close(found, expected)


# ----------------------------------------------------------------------------------------------------- turns


@pytest.mark.parametrize("levels", ["above", "full"])
def test_noise_levels_are_logit_normal_in_a_flows_time_above_where_the_next_step_begins(levels):
    """Of four steps on a flow the next begins at 0.75, 0.5, 0.25 or, after the last, nowhere."""
    oracle, ends, size = three_clusters(SCHEDULES["flow"], "flow"), set(), 3000
    distiller = taught_by(SiD, oracle, location=math.log(2), scale=0.5, levels=levels)
    wanted = torch.sigmoid(math.log(2) + 0.5 * torch.randn(400_000, dtype=torch.float64))
    for seed in (0, 2, 5, 14):  # one for each of the steps
        calls = Draws(seed, size).shared_integer(0, 4) + 1
        end = distiller.sampler().times[calls].item() if levels == "above" else 0.0
        with torch.no_grad():
            _, t = distiller.generate(Batch(None, {}, size), Draws(seed, size))
        expected = wanted[wanted > end].clamp(max=0.98)
        assert t.min() >= end
        assert t.mean().item() == pytest.approx(expected.mean().item(), abs=0.01)
        assert t.std().item() == pytest.approx(expected.std().item(), abs=0.01)
        ends.add(end)
    assert len(ends) == (4 if levels == "above" else 1)


def test_a_fake_score_that_is_read_under_guidance_is_trained_under_it():
    """What is trained is read: the minimum of its loss is E[x | x_t] of the guided output."""
    distiller = moved(fake_guidance_scale=3.0)
    x0, noise, t = torch.randn(4, 2, 1, 1).double(), torch.randn(4, 2, 1, 1).double(), torch.full((4,), 0.5).double()
    x_t = COSINE.add_noise(x0, noise, t)
    guided = distiller.fake.guided(LABELS, 2.0)(x_t, t)
    alpha, sigma = COSINE.coefficients(t, x0)
    expected = (guided.velocity(alpha, sigma) - (alpha * noise - sigma * x0)).square().flatten(1).mean(1)
    found = guided_denoising_loss(distiller.fake, 2.0, x0, noise, t, LABELS)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-8)
    plain = guided_denoising_loss(distiller.fake, 0.0, x0, noise, t, LABELS)
    torch.testing.assert_close(plain, denoising_loss(distiller.fake, x0, noise, t, LABELS), rtol=1e-5, atol=1e-8)


@both_banks
@pytest.mark.parametrize(("guidance_scale", "calls"), [(1.0, 1), (4.5, 2)])
def test_a_step_costs_what_the_paper_states(bank, guidance_scale, calls):
    """METHODS_2026, 16.3: a rollout, student 1, teacher and fake score 1 or, guided, 2, both with input gradient."""
    distiller = tiny(bank, guidance_scale=guidance_scale, fake_guidance_scale=guidance_scale)
    rolled = set()
    for seed in range(8):
        counted = calls_of(distiller, "student", BATCH, Draws(seed, 4))
        rolled.add(counted.pop("student", 0))
        assert counted == {
            "student with gradient": 1, "teacher with gradient": calls, "fake with gradient": calls,
        }  # fmt: skip
        counted = calls_of(distiller, "fake", BATCH, Draws(seed, 4))
        assert 1 <= counted.pop("student") <= 4 and counted == {"fake with gradient": calls}
    assert rolled <= {0, 1, 2, 3} and len(rolled) > 2


def test_both_turns_look_at_levels_of_one_law(monkeypatch):
    """METHODS_2026, 16.2: the fake score learns at the times at which it is read."""
    distiller, seen, raw = tiny(levels="full", steps=1), {"fake": [], "student": []}, Denoiser.raw

    def watched(self, x_t, t, *given, **told):
        seen[turn].extend([t] if self.role == "fake" else [])
        return raw(self, x_t, t, *given, **told)

    monkeypatch.setattr(Denoiser, "raw", watched)
    for turn in seen:
        distiller(turn, IMAGES, Draws(5, 4))
    assert len(seen["fake"]) == len(seen["student"]) == 1 and torch.equal(seen["fake"][0], seen["student"][0])


def test_fake_score_and_student_take_turns():
    turns = tiny(fake_warmup=3).turns
    assert list(turns) == ["fake", "student"]
    assert [step for step in range(6) if turns["student"].when(step)] == [3, 4, 5]
    assert all(turns["fake"].when(step) for step in range(6))


def test_a_critic_joins_with_real_images():
    assert not SiD.trains_on_images(SiD.Config()) and SiD.trains_on_images(SiD.Config(gan_weight=0.1))
    plain, judged = tiny(), tiny(gan_weight=0.1, gan_start=5)
    assert set(judged("fake", IMAGES, Draws(0, 4)).terms) == {"denoising", "critic"}
    first = judged("student", IMAGES, Draws(0, 4)).terms
    assert torch.equal(first["identity"], plain("student", IMAGES, Draws(0, 4)).terms["identity"])
    assert set(first) == {"identity"}
    with pytest.raises(ValueError, match="gan_weight: expected above 0 with gan_start = 5, got 0"):
        SiD.Config(gan_start=5)
    judged.step_in_stage = 5
    assert judged("student", IMAGES, Draws(0, 4)).terms["gan"] > 0
    assert len(judged.turns["fake"].head) > 0


# -------------------------------------------------------------------------------------- samplers and students


def test_both_samplers_are_stock():
    family = Pixel.tiny()
    for noise, scheduler in (("fresh", LCMScheduler), ("ddim", DDIMScheduler)):
        sampler = SiD.make_sampler(SiD.Config(noise=noise), family)
        assert isinstance(to_diffusers(sampler, family.scheduler_config), scheduler)


def test_guidance_of_either_needs_a_null_condition():
    for option in ("guidance_scale", "fake_guidance_scale"):
        with pytest.raises(ValueError, match="unconditional"):
            SiD.check(SiD.Config(**{option: 2.0}), Pixel.tiny(num_classes=None))


@pytest.mark.product
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_students_land_on_the_distribution_and_cover_all_modes(steps):
    """Within 0.25 of the data by sliced Wasserstein; the perfect teacher has 1.1, 0.45 and 0.16 in as many calls.

    Under ``levels: full`` the last of four steps, matched together with the first ones' blur, ends at 0.18 to 0.21.
    """
    torch.manual_seed(0)
    oracle = three_clusters(COSINE, "v_prediction")
    options = {"steps": steps, "student_update_interval": 3}
    distiller = train_adversarially(SiD, oracle, 900, lr=5e-3, size=256, **options)
    shares, stray = mode_shares(distiller, 4000)
    student, teacher = landing(distiller, oracle, steps, size=6000)
    assert mode_test(shares, 1) < 0.02 and stray < 0.2, (shares, stray)
    assert student < 0.25 and student < (0.9 if steps == 4 else 0.5) * teacher
