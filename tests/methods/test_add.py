"""ADD: the teacher's part in closed form, what the critic is told, both banks, and a student that covers all modes."""

import pytest
import torch
from adversarial_students import mode_shares, mode_test, taught_by, train_adversarially
from mixtures import batch_of
from network_calls import calls_of
from oracles import CENTRES, SCHEDULES, Gaussian, Oracle, three_clusters

from stepdistill.batch import Batch
from stepdistill.diffusion.schedule import expand
from stepdistill.families.pixel import Pixel
from stepdistill.families.sd import SD
from stepdistill.files.schema import build
from stepdistill.losses.student_inputs import student_input
from stepdistill.methods.add import ADD, NFSD_SCALE, distillation_weight
from stepdistill.networks.adapter_bank import AdapterBank
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.randomness import Draws

TWO = torch.tensor([0.3, -0.2], dtype=torch.float64)
COSINE = SCHEDULES["cosine"]


def teacher_of(data, conditional=False):
    oracle = three_clusters(COSINE, "v_prediction", conditional=conditional)
    return taught_by(ADD, oracle, 3 if conditional else None, **{"steps": 2, **data})


class Fixed(Draws):
    """Numbers that repeat: every call of a kind returns the same."""

    def uniform(self, low=0.0, high=1.0):
        return Draws(1, self.batch_size).uniform(low, high)

    def normal(self, *shape):
        return Draws(2, self.batch_size).normal(*shape)


# -------------------------------------------------------------------------------------------- the teacher's part


@pytest.mark.parametrize("name", SCHEDULES)
def test_weights_are_the_papers(name):
    schedule, t = SCHEDULES[name], torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    alpha, sigma = schedule(t)
    expected = (1 + sigma**2).rsqrt() if name == "karras" else alpha
    assert torch.allclose(distillation_weight(schedule, t, "exponential"), expected)
    assert distillation_weight(COSINE, t, "sds").allclose(COSINE(t)[0] * COSINE(t)[1] / 2)


def test_the_teacher_judges_at_no_time_below_those_it_knows(monkeypatch):
    distiller, seen = teacher_of({}), []
    monkeypatch.setattr(type(distiller.schedule), "lowest_time", 0.7)
    monkeypatch.setattr(distiller, "distillation_target", lambda x0, noise, t, cond: seen.append(t) or x0)
    x0 = torch.randn(100, 2, 1, 1, dtype=torch.float64)
    distiller.distillation_loss(x0, x0, {}, Draws(0, 100))
    assert 0.7 <= seen[0].min() < 0.72


@pytest.mark.parametrize("weighting", ["exponential", "sds"])
def test_the_gradient_is_two_c_times_the_difference_and_no_path_leads_through_the_renoised_image(weighting):
    distiller = teacher_of({"weighting": weighting})
    x0 = torch.randn(6, 2, 1, 1, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(distiller.distillation_loss(x0, x0, {}, Fixed(0, 6)), x0)
    t, noise = Fixed(0, 6).uniform(1e-3, 1.0), Fixed(0, 6).normal(2, 1, 1).double()
    x_t = COSINE.add_noise(x0.detach(), noise, t)
    c = expand(distillation_weight(COSINE, t, weighting), x0)
    expected = 2 * c * (x0 - distiller.teacher(x_t, t, {}).x0) / x0.numel()
    assert torch.allclose(gradient, expected.detach(), rtol=1e-4, atol=1e-7)


def test_sds_is_score_distillation():
    """The gradient is w(t) (eps_psi - eps) with w = sigma^2."""
    distiller = teacher_of({"weighting": "sds"})
    x0 = torch.randn(6, 2, 1, 1, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(distiller.distillation_loss(x0, x0, {}, Fixed(0, 6)), x0)
    t, noise = Fixed(0, 6).uniform(1e-3, 1.0), Fixed(0, 6).normal(2, 1, 1).double()
    eps = distiller.teacher(COSINE.add_noise(x0.detach(), noise, t), t, {}).eps
    expected = expand(COSINE(t)[1] ** 2, x0) * (eps - noise) / x0.numel()
    assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-6)


def test_noise_free_score_distillation():
    """The gradient is w(t) (delta_D + s delta_C), the noise itself nowhere in it."""
    distiller = teacher_of({"weighting": "nfsd"}, conditional=True)
    cond = {"class_labels": torch.tensor([0, 1, 2, 0, 1, 2])}
    x0 = torch.randn(6, 2, 1, 1, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(distiller.distillation_loss(x0, x0, cond, Fixed(0, 6)), x0)
    t, noise = Fixed(0, 6).uniform(1e-3, 1.0), Fixed(0, 6).normal(2, 1, 1).double()
    x_t = COSINE.add_noise(x0.detach(), noise, t)
    given = distiller.teacher(x_t, t, cond).eps
    free = distiller.teacher(x_t, t, {"class_labels": torch.full((6,), 3)}).eps
    direction = expand(t < 0.2, x_t) * free + NFSD_SCALE * (given - free)
    expected = expand(COSINE(t)[1] ** 2, x0) * direction / x0.numel()
    assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-6)


def test_at_early_times_noise_free_score_distillation_leads_away_from_the_negative_prompt():
    """delta_D is eps of no prompt less eps of the negative one; late, eps of no prompt itself."""
    distiller = teacher_of({"weighting": "nfsd"}, conditional=True)
    distiller.negative = {"class_labels": torch.tensor([1])}
    cond = {"class_labels": torch.tensor([0, 2, 0, 2])}
    x0, noise = torch.randn(2, 4, 2, 1, 1, dtype=torch.float64)
    t = torch.tensor([0.1, 0.15, 0.5, 0.9], dtype=torch.float64)
    x_t = COSINE.add_noise(x0, noise, t)
    given, free, negative = (
        distiller.teacher(x_t, t, {"class_labels": labels}).eps
        for labels in (cond["class_labels"], torch.full((4,), 3), torch.ones(4).long())
    )
    domain = torch.cat([free[:2], (free - negative)[2:]])
    alpha, sigma = (expand(coefficient, x0) for coefficient in COSINE(t))
    expected = x0 - sigma / alpha * (domain + NFSD_SCALE * (given - free))
    torch.testing.assert_close(distiller.distillation_target(x0, noise, t, cond), expected)


def test_an_answer_that_is_the_data_costs_nothing():
    """Point data: whatever the noise, the teacher's denoising is the point."""
    point = Gaussian(TWO, 0.0, COSINE, "v_prediction")
    distiller = taught_by(ADD, point)
    answer = TWO[:, None, None].expand(5, -1, -1, -1)
    assert distiller.distillation_loss(answer, answer, {}, Draws(0, 5)).item() < 1e-12


# -------------------------------------------------------------------------------------- what the student is shown


@pytest.mark.parametrize("name", ["linear", "cosine", "flow", "karras"])
def test_at_the_first_time_the_student_is_shown_nothing_of_the_data(name):
    schedule = SCHEDULES[name]
    a, b, noise = torch.randn(3, 4, 2, 1, 1, dtype=torch.float64)
    t = torch.tensor([1.0, 1.0, 0.5, 0.5], dtype=torch.float64)
    shown = student_input(schedule, a, noise, t)
    assert torch.equal(shown[:2], schedule.initial_noise(noise[:2]))
    assert torch.equal(shown[:2], student_input(schedule, b, noise, t)[:2])
    assert torch.equal(shown[2:], schedule.add_noise(a, noise, t)[2:])


def test_the_times_are_those_of_the_finished_student():
    distiller = teacher_of({})
    _, t = distiller.generate(batch_of(three_clusters(COSINE, "v_prediction"), 200), Draws(0, 200))
    assert set(t.tolist()) == {1.0, 0.5}
    four = teacher_of({"steps": 4}).sampler()
    assert four.schedule.timestep(four.times[:-1]).round().tolist() == [999, 749, 499, 249]


def test_both_turns_tell_the_critic_of_the_image_where_the_student_was_shown_some(monkeypatch):
    family = Pixel.tiny(size=16)
    distiller = ADD(family, CopyBank(family.network), ADD.Config(steps=4))
    told, original = [], distiller.critic.condition
    distiller.critic.condition = lambda cond, real, t: told.append((real(), t)) or original(cond, real, t)
    batch = family_batch(family, 64)
    for turn in ("student", "critic"):
        distiller(turn, batch, Draws(3, 64))
        with torch.no_grad():
            _, t = distiller.generate(batch, Draws(3, 64))
        x0, at = told.pop()
        assert torch.equal(x0, batch.x0) and torch.equal(at, t) and len(t.unique()) == 4


def test_weights_scale_their_terms():
    family = Pixel.tiny(size=16)
    terms = []
    for options in ({"distillation": 1.0, "r1": 1.0}, {"distillation": 3.0, "r1": 2.0}):
        torch.manual_seed(0)
        distiller = ADD(family, CopyBank(family.network), ADD.Config(**options))
        batch = family_batch(family, 8)
        student, critic = (distiller(turn, batch, Draws(3, 8)).terms for turn in ("student", "critic"))
        terms.append(student | critic)
    ratio = {name: (terms[1][name] / terms[0][name]).item() for name in terms[0]}
    assert ratio == pytest.approx({"adversarial": 1, "distillation": 3, "loss": 1, "r1": 2}, rel=1e-4)
    free = ADD(family, CopyBank(family.network), ADD.Config(r1=0.0))
    assert set(free("critic", family_batch(family, 8), Draws(3, 8)).terms) == {"loss"}


def test_without_distillation_the_teacher_is_not_asked():
    """It shows the critic its blocks, which are no calls of it."""
    family = Pixel.tiny()
    distiller = ADD(family, CopyBank(family.network), ADD.Config(distillation=0.0))
    batch = family_batch(family, 4)
    assert calls_of(distiller, "student", batch, Draws(3, 4)) == {"student with gradient": 1}
    assert set(distiller("student", batch, Draws(3, 4)).terms) == {"adversarial"}


def test_of_latents_the_teachers_part_compares_images_where_that_is_wanted():
    family = SD.tiny()
    x0 = torch.randn(2, *family.sample_shape, requires_grad=True)
    cond, losses = family.example_cond(range(2)), {}
    for decoded in (False, True):
        distiller = ADD(family, CopyBank(family.network), ADD.Config(decoded=decoded))
        images = family.decode(x0) if decoded else x0
        losses[decoded] = distiller.distillation_loss(x0, images, cond, Fixed(0, 2))
        (gradient,) = torch.autograd.grad(losses[decoded], x0)
        assert gradient.flatten(1).abs().max(1).values.min() > 0
    t, noise = Fixed(0, 2).uniform(1e-3, 1.0), Fixed(0, 2).normal(*family.sample_shape)
    with torch.no_grad():
        target = distiller.distillation_target(x0, noise, t, cond)
        images = (family.decode(x0) - family.decode(target)).square().flatten(1).mean(1)
    weight = distillation_weight(family.schedule, t, "exponential").float()
    torch.testing.assert_close(losses[True].detach(), (weight * images).mean(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("bank", ["copy", "adapter"])
def test_each_turn_moves_its_own_and_nothing_reaches_the_teacher(bank):
    family = Pixel.tiny(size=16)
    banks = {"copy": CopyBank, "adapter": lambda n: AdapterBank(n, rank=2, targets=family.lora_targets)}
    distiller = ADD(family, banks[bank](family.network), ADD.Config(r1=1.0))
    batch = family_batch(family, 4)
    for name, turn in distiller.turns.items():
        for other in distiller.turns.values():
            for parameter in other.params:
                parameter.requires_grad_(other is turn)
        sum(distiller(name, batch, Draws(0, 4)).terms.values()).backward()
        touched = {id(p) for p in distiller.parameters() if p.grad is not None}
        assert touched and touched <= {id(p) for p in turn.params}
        distiller.zero_grad(set_to_none=True)


def family_batch(family, size):
    return Batch(torch.randn(size, *family.sample_shape), family.example_cond(range(size)), size)


# ---------------------------------------------------------------------------------------------------- bad input


def test_bad_options_and_teachers_are_refused():
    with pytest.raises(ValueError, match="'epsilon' with alpha_T"):
        ADD.check(ADD.Config(), Pixel.tiny(prediction_type="epsilon"))
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        build(ADD.Config, {"steps": 0})
    with pytest.raises(ValueError, match="guidance_scale"):
        ADD.check(ADD.Config(guidance_scale=0.5), Pixel.tiny())
    with pytest.raises(ValueError, match="null class"):
        ADD.check(ADD.Config(weighting="nfsd"), Pixel.tiny(num_classes=None))
    with pytest.raises(ValueError, match="takes no text"):
        ADD.check(ADD.Config(weighting="nfsd", negative_prompt="dull"), Pixel.tiny())
    with pytest.raises(ValueError, match="expected only with weighting 'nfsd'"):
        ADD.Config(negative_prompt="dull")
    with pytest.raises(ValueError, match="guidance_scale: expected 1 with weighting 'nfsd'"):
        ADD.Config(weighting="nfsd", guidance_scale=2.0)


def test_one_class_is_refused_in_the_first_step_unless_the_critic_ignores_classes():
    family = Pixel.tiny()
    distiller = ADD(family, CopyBank(family.network), ADD.Config())
    batch = family_batch(family, 16)
    batch.cond["class_labels"][:] = 1
    with pytest.raises(ValueError, match="all 16 labels of the first batch are 1"):
        distiller("critic", batch, Draws(0, 16))
    free = ADD(Pixel.tiny(), CopyBank(Pixel.tiny().network), ADD.Config(conditioning="none"))
    free("critic", batch, Draws(0, 16))


# ------------------------------------------------------------------------------------------------- the outcome


def test_a_one_step_student_of_a_mixture_covers_all_modes():
    """Bound: chi-square over the modes of at most 0.02 a sample, which is shares within 6 % or so of a third.

    It starts as a student of the same clusters in uneven parts, 0.15 by that measure, and without the critic's word
    would end at 0.16 and 0.12 (seeds 0, 1). The oracle itself would be one point to start from, which a critic moves as
    a whole, to one cluster; R1 of 1 blinds the critic to the parts.
    """
    oracle = three_clusters(COSINE, "v_prediction")
    start = Oracle(CENTRES, 0.2, COSINE, "v_prediction", weights=torch.tensor([0.5, 0.3, 0.2]))
    distiller = train_adversarially(ADD, oracle, 200, size=256, imitated=start, distillation=0.5, r1=0.1)
    shares, stray = mode_shares(distiller, 4000)
    assert mode_test(shares, 1) < 0.02, shares
    assert stray < 0.3
