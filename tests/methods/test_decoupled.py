"""The terms that later papers add to DMD2: closed forms, costs, and that each is off unless it is asked for."""

import copy

import pytest
import torch
from adversarial_students import mode_shares, mode_test, train_adversarially
from network_calls import calls_of
from oracles import SCHEDULES, Gaussian, Oracle, points, teacher_denoiser, three_clusters

from stepdistill.batch import Batch
from stepdistill.diffusion.guidance import GuidanceRule, from_flow, guide, rescaled
from stepdistill.diffusion.ode import ode_step
from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.samplers import DDIM, Visit
from stepdistill.diffusion.shift import shifted
from stepdistill.families.pixel import Pixel
from stepdistill.files.schema import build
from stepdistill.losses.distribution_matching import Matching, divergence_weight, divisor
from stepdistill.losses.levels import MATCHED, cleaner_times, dynamic_times, random_grid, shifted_times
from stepdistill.losses.student_inputs import landing_loss, off_trajectory
from stepdistill.methods.dmd2 import DMD2
from stepdistill.networks.adapter_bank import AdapterBank
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.networks.denoiser import Denoiser
from stepdistill.randomness import Draws

COSINE, FLOW = SCHEDULES["cosine"], SCHEDULES["flow"]
LABELS = {"class_labels": torch.tensor([0, 1, 2, 0])}
KINDS = [("cosine", "v_prediction"), ("linear", "epsilon"), ("flow", "flow"), ("karras", "edm")]
both_banks = pytest.mark.parametrize("bank", ["copy", "adapter"])


def batch_of_four():
    return Batch(torch.randn(4, 1, 8, 8), LABELS, 4)


def tiny(bank="copy", *, apart=True, **options):
    family = Pixel.tiny()
    banks = {"copy": CopyBank, "adapter": lambda net: AdapterBank(net, rank=2, targets=family.lora_targets)}
    distiller = DMD2(family, banks[bank](family.network), DMD2.Config(**{"student_update_interval": 2} | options))
    with torch.no_grad():  # apart from the teacher, so that every path carries something
        for role in ("student", "fake") if apart else ():
            for parameter in distiller.bank.params(role):
                parameter += 0.02 * torch.randn_like(parameter)
    return distiller


def gradient_of(term, x0):
    (gradient,) = torch.autograd.grad(term, x0)
    return gradient * x0.numel()


# ------------------------------------------------------------------------------------------------- guidance


@pytest.mark.parametrize("kind", ["none", "token", "global"])
@pytest.mark.parametrize(("name", "prediction"), KINDS)
def test_a_scale_of_one_is_the_conditional_prediction_whatever_the_rescaling(name, prediction, kind):
    schedule, x_t, t = SCHEDULES[name], torch.randn(3, 2, 4, 4).double(), torch.tensor([0.2, 0.5, 0.9]).double()
    given, free = (from_flow(torch.randn_like(x_t), x_t, t, schedule) for _ in range(2))
    for seen, expected in zip(guide(given, free, 0.0, x_t, t, schedule, GuidanceRule(kind)), given, strict=True):
        torch.testing.assert_close(seen, expected)


@pytest.mark.parametrize(("name", "prediction"), KINDS)
def test_a_velocity_is_turned_into_a_prediction_of_the_same_state(name, prediction):
    schedule, x_t, t = SCHEDULES[name], torch.randn(3, 2, 4, 4).double(), torch.tensor([0.2, 0.5, 0.9]).double()
    prediction = from_flow(velocity := torch.randn_like(x_t), x_t, t, schedule)
    torch.testing.assert_close(prediction.flow(), velocity)
    torch.testing.assert_close(prediction.to_state(*schedule.coefficients(t, x_t)), x_t)


@pytest.mark.parametrize("side", [4, 5])
def test_rescaling_keeps_the_norm_of_every_token_or_never_lengthens_the_image(side):
    velocity, like = 3 * torch.randn(2, 3, side, side), torch.randn(2, 3, side, side)
    tokens = torch.nn.functional.pixel_unshuffle if side == 4 else lambda x, _: x
    seen = rescaled(velocity, like, "token")
    torch.testing.assert_close(tokens(seen, 2).norm(dim=1), tokens(like, 2).norm(dim=1))
    torch.testing.assert_close(rescaled(velocity, like, "global").flatten(1).norm(dim=1), like.flatten(1).norm(dim=1))
    assert torch.equal(rescaled(like, velocity, "global"), like)


def test_a_clip_is_rescaled_as_one_image_or_by_the_tokens_of_its_frames():
    velocity, like = 3 * torch.randn(2, 3, 5, 4, 6), torch.randn(2, 3, 5, 4, 6)
    whole = (rescaled(velocity, like, "global") / velocity).flatten(1)
    torch.testing.assert_close(whole, whole[:, :1].expand_as(whole))
    for rescale in ("token", "row"):
        seen = rescaled(velocity, like, rescale)
        for frame in range(5):
            torch.testing.assert_close(seen[:, :, frame], rescaled(velocity[:, :, frame], like[:, :, frame], rescale))


# ------------------------------------------------------------------------------------------ matching and guidance


@both_banks
def test_without_guidance_there_is_no_second_term_and_no_second_call(bank):
    distiller = tiny(bank, split=True, gan_weight=0.0)
    assert list(distiller("student", batch_of_four(), Draws(0, 4)).terms) == ["matching"]
    assert calls_of(distiller, "student", batch_of_four(), Draws(0, 4))["teacher"] == 1


def test_a_fake_score_that_is_the_teacher_leaves_only_what_guidance_adds():
    distiller = tiny(split=True, guidance_scale=3.0, gan_weight=0.0, apart=False)
    terms = distiller("student", batch_of_four(), Draws(0, 4)).terms
    assert terms["matching"].item() == 0 and terms["augmentation"].item() > 0


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("top", [0.25, 0.5, 1.0])
def test_guidance_is_evaluated_only_at_levels_cleaner_than_the_students_input_and_matching_at_all(top, shift):
    t = torch.full((20_000,), top, dtype=torch.float64)
    times = cleaner_times(FLOW, Draws(0, 20_000), t, shift)
    assert times.max() <= top and times.max() > 0.95 * top and times.min() < 0.02
    raw = shifted(times, 1 / shift) / shifted(t, 1 / shift)
    torch.testing.assert_close(raw.mean().item(), 0.5, atol=0.01, rtol=0)  # uniform before the shift
    torch.testing.assert_close(raw.var().item(), 1 / 12, atol=0.005, rtol=0)


def test_a_flows_shift_moves_levels_as_its_grid():
    assert shifted(torch.tensor(0.25), 3.0).item() == pytest.approx(0.5)
    t = torch.rand(9)
    torch.testing.assert_close(shifted(shifted(t, 3.0), 1 / 3.0), t)
    schedule = copy.copy(FLOW)
    schedule.shift = 3.0
    times = shifted_times(schedule, Draws(0, 50_000))
    assert MATCHED[0] <= times.min() and times.max() <= MATCHED[1]
    assert (times > 0.5).double().mean().item() == pytest.approx(0.75, abs=0.01)
    assert torch.equal(shifted_times(COSINE, Draws(0, 9)), Draws(0, 9).uniform().clamp(*MATCHED))


def test_guidance_moves_images_along_the_difference_of_class_and_whole():
    """Two classes N(+-mu, s^2): c - u = (1 - pi_+(x_t)) 2 mu sigma^2 / (alpha^2 s^2 + sigma^2), METHODS_2026 15.6."""
    mu, s = 1.2, 0.4
    oracle = Oracle(points((mu, 0.0), (-mu, 0.0)).flatten(1), s, COSINE, "v_prediction", classes=(0, 1))
    teacher = teacher_denoiser(oracle, 2)
    x0 = torch.zeros(1, 2, 1, 1, dtype=torch.float64).requires_grad_()
    cond = {"class_labels": torch.tensor([0])}
    pulls = []
    for time in (0.02, 0.3, 0.6, 0.9):
        t = torch.tensor([time], dtype=torch.float64)
        (alpha, sigma), noise = COSINE(t), Draws(1, 1).normal_like(x0)
        variance = alpha**2 * s**2 + sigma**2
        x_t = COSINE.add_noise(x0.detach(), noise, t)
        other = torch.sigmoid(-2 * alpha * mu * x_t[0, 0, 0, 0] / variance)
        term = Matching(teacher, teacher, 3.0).augmentation(x0, cond, Draws(1, 1), t)["augmentation"]
        size = divisor(x0.detach(), teacher(x_t, t, cond).x0, 1e-6)
        pull = -gradient_of(term, x0) * size
        assert pull[0, 0].item() == pytest.approx((2 * other * 2 * mu * sigma**2 / variance).item(), rel=1e-6)
        pulls.append(pull[0, 0].item())
    assert all(pull >= 0 for pull in pulls) and pulls[0] < 0.1 * pulls[2]


# ---------------------------------------------------------------------------------------- levels and schedules


def test_levels_begin_as_mostly_noise_and_end_uniform():
    first, last = (dynamic_times(FLOW, Draws(0, 50_000), progress) for progress in (0.0, 1.0))
    a, b = 4.0, 1.5
    low, high = (FLOW.lowest_time + (1 - FLOW.lowest_time) * edge for edge in MATCHED)
    assert ((first - low) / (high - low)).mean().item() == pytest.approx(a / (a + b), abs=0.005)
    unit = ((last - low) / (high - low)).sort().values
    assert (unit - torch.linspace(0, 1, len(unit))).abs().max() < 0.012  # Kolmogorov-Smirnov, p < 1e-6
    assert torch.equal(dynamic_times(FLOW, Draws(0, 9), 1.0), dynamic_times(FLOW, Draws(0, 9), 7.0))


@pytest.mark.parametrize("name", ["cosine", "flow"])
def test_random_grids_have_every_number_of_steps_and_are_the_same_in_every_process(name):
    seen = set()
    for seed in range(200):
        grid = random_grid(SCHEDULES[name], Draws(seed, 4), 1, 6)
        seen.add(len(grid) - 1)
        assert grid[0] == 1 and grid[-1] == 0 and (grid.diff() < 0).all()
        assert ((grid[1:-1] > 0.249) & (grid[1:-1] < 0.951)).all()
        assert torch.equal(grid, random_grid(SCHEDULES[name], Draws(seed, 4, rank=1, world=2), 1, 6))
        if name == "cosine":
            assert torch.equal((grid * 1000).round() / 1000, grid)
    assert seen == {1, 2, 3, 4, 5, 6}


# ------------------------------------------------------------------------------------------------- other terms


@pytest.mark.parametrize(("name", "kind"), KINDS[:3])
def test_a_first_step_that_lands_where_the_teacher_does_costs_nothing_and_only_there(name, kind):
    """METHODS_2026 19.9: the exact mean velocity from 1 to s lands at s alone."""
    schedule = SCHEDULES[name]
    gaussian = Gaussian(torch.tensor([0.3, -0.2]).double(), 0.7, schedule, kind)
    teacher = teacher_denoiser(gaussian).conditioned({})
    x, one = torch.randn(8, 2, 1, 1, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    steps, of = 4, 8
    landed = x
    ddim = DDIM(schedule, schedule.grid(of))
    for t, s in zip(ddim.times[:steps], ddim.times[1:], strict=False):
        landed = ode_step(teacher(landed, t.expand(8)), schedule, s.expand(8))
    s = ddim.times[steps].expand(8)
    (alpha_1, sigma_1), (alpha_s, sigma_s) = schedule.coefficients(one, x), schedule.coefficients(s, x)
    x0 = (landed - sigma_s / sigma_1 * x) / (alpha_s - sigma_s / sigma_1 * alpha_1)
    first = Visit(x, one, Prediction(x0, (x - alpha_1 * x0) / sigma_1), s)
    assert landing_loss(teacher, schedule, first, steps, of).item() < 1e-12
    torch.testing.assert_close(ode_step(first.prediction, schedule, s), landed)
    assert landing_loss(teacher, schedule, first, steps + 2, of).item() > 1e-3


def test_on_a_flow_the_mean_velocity_of_a_gaussian_is_the_papers():
    """u(1 -> 1/3) = 0.64 and u(1 -> 3/4) = 0.92 for data of width 0.7 and x = 1."""
    gaussian = Gaussian(torch.zeros(2).double(), 0.7, FLOW, "flow")
    x, one = torch.ones(1, 2, 1, 1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for s, expected in ((1 / 3, 0.64), (3 / 4, 0.92)):
        end = torch.tensor([s], dtype=torch.float64)
        assert ((x - gaussian.solve(x, one, end)) / (1 - s)).mean().item() == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize(("name", "kind"), [("cosine", "v_prediction"), ("flow", "flow")])
def test_a_point_off_the_trajectory_leaves_the_path_by_the_square_of_the_distance(name, kind):
    schedule = SCHEDULES[name]
    gaussian = Gaussian(torch.tensor([0.3, -0.2]).double(), 0.7, schedule, kind)
    x, t = torch.randn(4, 2, 1, 1, dtype=torch.float64), torch.full((4,), 0.6, dtype=torch.float64)
    visit = Visit(x, t, teacher_denoiser(gaussian)(x, t, {}), torch.zeros_like(t))
    errors = []
    for distance in (0.08, 0.04, 0.02):
        s = t - distance
        errors.append((off_trajectory(visit, schedule, s) - gaussian.solve(x, t, s)).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.15) and errors[1] / errors[2] == pytest.approx(4, rel=0.1)
    torch.testing.assert_close(off_trajectory(visit, schedule, t), x)


def test_the_weights_of_a_divergence_have_mean_one_and_grow_with_the_ratio():
    logits = torch.linspace(-2, 2, 9)[:, None]
    ratio = logits[:, 0].exp() / logits.exp().mean()
    expected = {"reverse_kl": torch.ones(9), "kl": ratio, "js": ratio / (1 + ratio)}
    for divergence, weight in expected.items():
        torch.testing.assert_close(divergence_weight(logits, divergence), weight / weight.mean())
        assert torch.equal(divergence_weight(torch.zeros(9, 1), divergence), torch.ones(9))  # no opinion: as it was
    assert divergence_weight(torch.tensor([[99.0], [-99.0]]), "kl").isfinite().all()


@both_banks
def test_a_critic_without_an_opinion_leaves_the_gradient_as_it_is(bank):
    torch.manual_seed(0)
    distiller = tiny(bank, divergence="js")
    torch.nn.init.zeros_([m for m in distiller.head.modules() if hasattr(m, "weight")][-1].weight)
    torch.nn.init.zeros_([m for m in distiller.head.modules() if hasattr(m, "weight")][-1].bias)
    batch = batch_of_four()
    weighed = distiller("student", batch, Draws(0, 4)).terms["matching"]
    distiller.config = build(DMD2.Config, {"student_update_interval": 2})
    assert torch.equal(distiller("student", batch, Draws(0, 4)).terms["matching"], weighed)


@both_banks
def test_alignment_moves_the_fake_score_when_the_student_has_moved(bank):
    for keep, expected in ((1.0, "fake"), (0.0, "student"), (0.75, None)):
        distiller = tiny(bank, alignment=keep)
        before = {role: {k: v.clone() for k, v in distiller.bank.state(role).items()} for role in ("student", "fake")}
        distiller.step_in_stage = 0  # the student rests
        distiller.after_step()
        after = list(distiller.bank.state("fake").values())
        assert all(map(torch.equal, after, before["fake"].values()))
        distiller.step_in_stage = 1
        distiller.after_step()
        pairs = zip(*(before[role].values() for role in ("fake", "student")), strict=True)
        for found, (fake, student) in zip(distiller.bank.state("fake").values(), pairs, strict=True):
            if expected:
                assert torch.equal(found, {"fake": fake, "student": student}[expected])
            else:
                torch.testing.assert_close(found, 0.75 * fake + 0.25 * student)


@pytest.mark.parametrize("levels", ["full", "above"])
def test_scores_look_at_a_steps_image_above_the_noise_of_the_next_step(levels, monkeypatch):
    distiller, seen = tiny(levels=levels, gan_weight=0.0), []
    batch, raw = Batch(torch.randn(64, 1, 8, 8), {"class_labels": torch.arange(64) % 3}, 64), Denoiser.raw

    def watched(self, x_t, t, *given, **told):
        seen.extend([t] if self.role == "fake" else [])
        return raw(self, x_t, t, *given, **told)

    monkeypatch.setattr(Denoiser, "raw", watched)
    for turn, floor in (("fake", distiller.schedule.lowest_time), ("student", MATCHED[0])):
        for seed in range(6):
            calls = Draws(seed, 64).shared_integer(0, 4) + 1 if levels == "above" else 4
            low = max(distiller.sampler().times[calls], floor)
            distiller(turn, batch, Draws(seed, 64))
            t = seen.pop()
            assert low <= t.min() < low + 0.3 * (1 - low) and t.max() - t.min() > 0.7 * (1 - low)


# ------------------------------------------------------------------------------------------- scaled adapters


def test_a_teacher_that_leans_has_a_falling_share_of_the_fake_scores_adapter_and_at_last_none():
    """METHODS_2026, 19.2 and 19.9: at scale 0 it is the teacher, bit for bit; the fake score's own scale stays."""
    distiller = tiny("adapter", teacher_adapter=0.75, fake_scale=2.0, dynamic_renoise=10, gan_weight=0.0)
    x, t, real = torch.randn(4, 1, 8, 8), torch.full((4,), 0.5), distiller.matching.teacher
    fake = distiller.fake.raw(x, t, LABELS)
    shares = []
    for step in (0, 5, 10, 20):
        distiller.step_in_stage = step
        shares.append(distiller.leaning())
        with distiller.bank.scaled("fake", shares[-1]):
            expected = distiller.fake.raw(x, t, LABELS)
        assert torch.equal(real.raw(x, t, LABELS), expected)
        assert torch.equal(distiller.fake.raw(x, t, LABELS), fake)
    assert shares == pytest.approx([0.75, 0.375, 0, 0])
    assert torch.equal(expected, distiller.teacher.raw(x, t, LABELS)) and not torch.equal(fake, expected)


def test_an_adapter_that_counts_twice_is_one_of_twice_the_weights():
    once, twice = (tiny("adapter", fake_scale=scale, gan_weight=0.0, apart=False) for scale in (1.0, 2.0))
    random = torch.Generator().manual_seed(0)
    for one, two in zip(once.bank.params("fake"), twice.bank.params("fake"), strict=True):
        one.data = 0.1 * torch.randn(one.shape, generator=random)
        two.data = one.data.clone()
    for name, tensor in once.bank.state("fake").items():
        if ".lora_B." in name:
            tensor.mul_(2)
    x, t = torch.randn(4, 1, 8, 8), torch.full((4,), 0.5)
    torch.testing.assert_close(*(one.fake.raw(x, t, LABELS) for one in (once, twice)), rtol=1e-4, atol=1e-4)
    assert torch.equal(*(one.student.raw(x, t, LABELS) for one in (once, twice)))


def test_copies_cannot_be_scaled():
    for options in ({"fake_scale": 2.0}, {"teacher_adapter": 0.5, "dynamic_renoise": 5}):
        with pytest.raises(ValueError, match=r"bank\.name: expected 'adapter'"):
            tiny("copy", **options)
    with pytest.raises(ValueError, match="dynamic_renoise: expected above 0 with teacher_adapter"):
        build(DMD2.Config, {"teacher_adapter": 0.5})


# ---------------------------------------------------------------------------------------------------- costs


@both_banks
@pytest.mark.parametrize(
    ("options", "student", "fake", "teacher"),
    [
        ({}, 1, 1, 1),
        ({"guidance_scale": 2.0}, 1, 1, 2),
        ({"guidance_scale": 2.0, "guidance_rescale": "token"}, 1, 1, 2),
        ({"guidance_scale": 2.0, "split": True}, 1, 1, 3),
        ({"off_trajectory": 1.0, "guidance_scale": 2.0}, 2, 2, 3),
        ({"dynamic_renoise": 10}, 1, 1, 1),
    ],
)
def test_a_students_step_costs_what_its_terms_need(bank, options, student, fake, teacher):
    """Besides the rollout: METHODS_2026, 23.1."""
    distiller = tiny(bank, gan_weight=0.0, steps=1, **options)
    calls = calls_of(distiller, "student", batch_of_four(), Draws(0, 4))
    assert calls == {"student with gradient": student, "fake": fake, "teacher": teacher}


@both_banks
def test_without_a_critic_images_change_no_bit_and_are_not_needed(bank):
    assert DMD2.trains_on_images(DMD2.Config()) and not DMD2.trains_on_images(DMD2.Config(gan_weight=0.0))
    distiller, with_images = (
        tiny(bank, gan_weight=0.0, steps=2, diversity=0.1, anchor=1, anchor_steps=4),
        batch_of_four(),
    )
    for turn in ("student", "fake"):
        seen = distiller(turn, with_images, Draws(0, 4)).terms
        blind = distiller(turn, Batch(None, LABELS, 4), Draws(0, 4))
        assert seen == blind.terms and "diversity_ratio" not in blind.metrics


@both_banks
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_diversity_costs_the_teachers_steps_and_no_further_call_of_the_student(bank, guidance_scale):
    options = {"diversity": 0.05, "anchor": 2, "anchor_steps": 8, "guidance_scale": guidance_scale}
    distiller = tiny(bank, gan_weight=0.0, steps=2, **options)
    calls = calls_of(distiller, "student", batch_of_four(), Draws(0, 4))
    asked = 1 if guidance_scale == 1 else 2
    assert calls == {"student with gradient": 2, "fake": 1, "teacher": (1 + 2) * asked}


@both_banks
def test_the_first_step_learns_from_diversity_alone(bank):
    distiller = tiny(bank, gan_weight=0.0, steps=2, diversity=1.0, anchor=1, anchor_steps=4)
    for seed in range(4):
        first, last = distiller.simulate(batch_of_four(), Draws(seed, 4))
        assert first.t[0] == 1 and last.t[0] < 1
        assert first.prediction.x0.requires_grad and last.prediction.x0.requires_grad and not last.x_t.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "kl", "gan_weight": 0.0}, "gan_weight: expected above 0"),
        ({"diversity": 0.1, "steps": 1}, "diversity: expected 0 with one step, .* got 0.1"),
        ({"diversity": 0.1, "first_time": 0.4}, "first_time: expected 1"),
        ({"random_steps": 3, "first_time": 0.4}, "first_time: expected 1"),
        ({"levels": "above", "split": True}, "levels: expected 'full' with split .* got 'above'"),
        ({"levels": "above", "off_trajectory": 1.0}, "levels: expected 'full' with off_trajectory"),
        ({"alignment": 0.97, "fake_scale": 2.0}, "fake_scale: expected 1 with alignment"),
        ({"augmentation_levels": "full"}, "augmentation_levels: expected 'below' without split or without guidance"),
        ({"guidance_rescale": "token"}, "guidance_rescale: expected 'none' without guidance"),
        ({"anchor": 31}, "anchor: expected at most anchor_steps = 30, got 31"),
        ({"alignment": 1.5}, "alignment: expected at least 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(DMD2.Config, options)


# -------------------------------------------------------------------------------------------------- the students

ALL = {
    "guidance_scale": 1.5, "guidance_rescale": "token", "split": True, "dynamic_renoise": 3, "divergence": "js",
    "diversity": 0.05, "anchor": 2, "anchor_steps": 4, "off_trajectory": 1.0, "random_steps": 3, "alignment": 0.97,
}  # fmt: skip


@both_banks
def test_all_terms_together_give_finite_gradients_to_the_student_alone(bank):
    distiller = tiny(bank, **ALL)
    for parameter in distiller.turns["fake"].params:
        parameter.requires_grad_(False)
    losses = distiller("student", batch_of_four(), Draws(0, 4))
    assert set(losses.terms) == {"matching", "augmentation", "diversity", "off_trajectory", "gan"}
    sum(losses.terms.values()).backward()
    own = {id(p) for p in distiller.bank.params("student")}
    touched = {id(p): p.grad for p in distiller.parameters() if p.grad is not None}
    assert touched.keys() == own and all(grad.isfinite().all() for grad in touched.values())


@pytest.mark.product
@pytest.mark.parametrize(
    "options",
    [
        {"steps": 2, "diversity": 0.05, "anchor": 4, "anchor_steps": 8},
        {"steps": 1, "divergence": "js", "gan_weight": 0.03, "critic_weight": 0.1},
        {"steps": 2, "off_trajectory": 1.0, "random_steps": 3},
        {"steps": 1, "alignment": 0.97, "dynamic_renoise": 300},
    ],
    ids=lambda options: "-".join(options),
)
def test_students_cover_all_modes_by_their_weights(options):
    options = {"student_update_interval": 3, "gan_weight": 0.0} | options
    distiller = train_adversarially(DMD2, three_clusters(COSINE, "v_prediction"), 600, lr=1e-2, size=128, **options)
    shares, stray = mode_shares(distiller, 4000)
    assert mode_test(shares, 1) < 0.02, shares
    assert stray < 0.3
