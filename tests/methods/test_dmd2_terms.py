"""DMD2's later terms: who is looked at which level, under which noise, and what a gradient may pass through."""

import pytest
import torch
from adversarial_students import taught_by
from contracts.cases import train_student
from diffusers import DDIMScheduler
from network_calls import calls_of
from oracles import SCHEDULES, Gaussian, teacher_denoiser, three_clusters

from stepdistill.batch import Batch
from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.samplers import DDIM, Visit, rollout
from stepdistill.diffusion.shift import shifted
from stepdistill.families.flux import Flux
from stepdistill.families.pixel import Pixel
from stepdistill.losses.distribution_matching import Matching, divisor
from stepdistill.losses.levels import MATCHED, falling
from stepdistill.losses.student_inputs import landing_loss, off_trajectory
from stepdistill.methods.cdm import CDM
from stepdistill.methods.dmd2 import DMD2
from stepdistill.networks.adapter_bank import AdapterBank
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.networks.denoiser import Denoiser
from stepdistill.randomness import Draws

COSINE, FLOW = SCHEDULES["cosine"], SCHEDULES["flow"]
LABELS = {"class_labels": torch.tensor([0, 1, 2, 0])}
BATCH = Batch(None, LABELS, 4)
both_banks = pytest.mark.parametrize("bank", ["copy", "adapter"])


def tiny(bank="copy", **options):
    family = Pixel.tiny()
    banks = {"copy": CopyBank, "adapter": lambda net: AdapterBank(net, rank=2, targets=family.lora_targets)}
    return DMD2(family, banks[bank](family.network), DMD2.Config(**{"gan_weight": 0.0} | options))


def judged(distiller, monkeypatch, seed=0):
    """The times and states of every call of the teacher and the fake score in a student's turn."""
    seen, raw = [], Denoiser.raw

    def watched(self, x_t, t, *given, **told):
        if self.role in ("teacher", "fake"):
            seen.append((self.role, t[:4], x_t[:4]))
        return raw(self, x_t, t, *given, **told)

    with monkeypatch.context() as patch:
        patch.setattr(Denoiser, "raw", watched)
        distiller("student", BATCH, Draws(seed, 4))
    return seen


# -------------------------------------------------------------------------------------------------------- levels


def test_both_scores_of_a_term_see_one_state_and_every_term_has_its_own(monkeypatch):
    """METHODS_2026, 15.1 and 15.2."""
    distiller = tiny(split=True, guidance_scale=3.0, off_trajectory=1.0, steps=1)
    seen = judged(distiller, monkeypatch)
    fake, teacher, augmentation, *off = seen
    assert [role for role, *_ in seen] == ["fake", "teacher", "teacher", "fake", "teacher"]
    for one, other in ((fake, teacher), off):
        assert torch.equal(one[1], other[1]) and torch.equal(one[2], other[2])
    levels = torch.stack([fake[1], augmentation[1], off[0][1]])
    assert (levels.diff(dim=0).abs() > 1e-4).all() and ((levels[2] - levels[0]).abs() > 1e-4).all()


def test_guidance_is_never_looked_at_above_the_students_input_and_matching_is(monkeypatch):
    """15.6, 4, in a whole step of the student, at every step of its sampler."""
    distiller, above = tiny(split=True, guidance_scale=3.0), 0
    for seed in range(12):
        top = distiller.simulate(BATCH, Draws(seed, 4))[-1].t
        _, (_, matching, _), (_, augmentation, _) = judged(distiller, monkeypatch, seed)
        assert (augmentation <= top).all() and (matching >= MATCHED[0]).all() and (matching <= MATCHED[1]).all()
        above += (matching > top).sum()
    assert above > 10


def test_of_one_step_a_level_may_be_anywhere(monkeypatch):
    """15.2: there the decoupled gradient is DMD's in distribution; with a shift of 3 a quarter is half of the way."""
    distiller = tiny(split=True, guidance_scale=3.0, steps=1)
    levels = torch.cat([judged(distiller, monkeypatch, seed)[2][1] for seed in range(12)])
    assert levels.max() > 0.9 and levels.min() < 0.1
    assert shifted(torch.tensor(0.25), 3.0).item() == pytest.approx(0.5)


def test_the_weight_of_a_divergence_is_asked_where_the_scores_were(monkeypatch):
    """19.3: the critic's ratio is that of the same noised image at the same time."""
    distiller, asked = tiny(gan_weight=1e-3, divergence="js", steps=1), []
    logits = distiller.critic.logits
    monkeypatch.setattr(distiller.critic, "logits", lambda *given: asked.append(given) or logits(*given))
    batch = Batch(torch.randn(4, 1, 8, 8), LABELS, 4)
    seen, raw = [], Denoiser.raw
    monkeypatch.setattr(
        Denoiser, "raw", lambda self, *given, **told: seen.append((self.role, *given[:2])) or raw(self, *given, **told)
    )
    distiller("student", batch, Draws(0, 4))
    (_, x_t, t), (x_asked, t_asked, _) = next(call for call in seen if call[0] == "teacher"), asked[0]
    assert torch.equal(x_t, x_asked) and torch.equal(t, t_asked)


def test_levels_of_dynamic_renoising_fall_along_half_a_cosine():
    """19.2."""
    found = [falling(progress) for progress in (0.0, 0.25, 0.5, 1.0, 3.0)]
    assert found == pytest.approx([1, (1 + 2**-0.5) / 2, 0.5, 0, 0])


# ------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("rescale", ["none", "token", "global"])
@pytest.mark.parametrize(("schedule", "kind"), [(COSINE, "v_prediction"), (FLOW, "flow")])
def test_what_matching_leaves_of_rescaled_guidance_is_in_the_other_term(schedule, kind, rescale):
    """15.6, 1 and 19.7: (f - c) + (c - r) = f - r, each times its own divisor, also where r is not linear in g."""
    oracle = three_clusters(schedule, kind, conditional=True)
    distiller = taught_by(DMD2, oracle, 3, gan_weight=0.0, guidance_scale=3.0)
    with torch.no_grad():
        distiller.bank.networks["fake"].fc3.bias += 0.1
    matching = Matching(distiller.teacher, distiller.fake, 3.0, rescale=rescale)
    x0 = torch.randn(6, 2, 1, 1, dtype=torch.float64).requires_grad_()
    cond, t = {"class_labels": torch.arange(6) % 3}, torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    terms = [
        matching.guided(x0, cond, Draws(3, 6), t)[0],
        matching.unguided(x0, cond, Draws(3, 6), t)[0],
        matching.augmentation(x0, cond, Draws(3, 6), t)["augmentation"],
    ]
    whole, first, second = (torch.autograd.grad(term, x0)[0] for term in terms)
    x_t = schedule.add_noise(x0.detach(), Draws(3, 6).normal_like(x0), t)
    with torch.no_grad():
        guided, conditional = distiller.teacher.guided_and_conditional(x_t, t, cond, 2.0, rescale)
    sizes = [divisor(x0.detach(), real.x0, 1e-6) for real in (guided, conditional)]
    assert second.abs().max() > 0
    torch.testing.assert_close((first + second) * sizes[1], whole * sizes[0], rtol=1e-6, atol=1e-9)


@both_banks
def test_a_state_off_the_trajectory_is_a_constant(bank):
    """15.5: the student learns from its image there, and not from how it got there."""
    distiller = tiny(bank)
    visit = distiller.simulate(BATCH, Draws(0, 4))[-1]
    assert visit.prediction.x0.requires_grad
    assert not off_trajectory(visit, distiller.schedule, torch.full((4,), 0.3)).requires_grad


@both_banks
def test_the_scores_receive_no_gradient_and_pass_none_on(bank):
    """15.1: of all terms at once, what reaches the student is what reaches its images."""
    options = {"split": True, "guidance_scale": 3.0, "off_trajectory": 1.0, "diversity": 0.05, "anchor": 1}
    distiller = tiny(bank, **options | {"anchor_steps": 4, "steps": 2})
    terms = distiller("student", BATCH, Draws(0, 4)).terms
    sum(terms.values()).backward()
    own = {id(p) for p in distiller.bank.params("student")}
    assert {id(p) for p in distiller.parameters() if p.grad is not None} <= own
    assert set(terms) == {"matching", "augmentation", "off_trajectory", "diversity"}


def test_on_a_flow_the_landing_loss_is_the_velocitys():
    """19.1: MSE(v(x_1, 1), (x_1 - z_k) / (1 - t_k)), whose target has no gradient."""
    gaussian = Gaussian(torch.tensor([0.3, -0.2]).double(), 0.7, FLOW, "flow")
    teacher = teacher_denoiser(gaussian).conditioned({})
    x, one = torch.randn(8, 2, 1, 1, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    velocity = torch.randn_like(x).requires_grad_()
    first = Visit(x, one, Prediction(x - velocity, x), torch.full_like(one, 0.5))
    found = landing_loss(teacher, FLOW, first, 10, 30)
    ddim = DDIM(FLOW, FLOW.grid(30))
    z = rollout(teacher, ddim, x, 10, torch.zeros_like)
    expected = (velocity - (x - z) / (1 - ddim.times[10])).square().mean()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    found, wanted = (torch.autograd.grad(loss, velocity)[0] for loss in (found, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------------------- costs and roles


@both_banks
@pytest.mark.parametrize("options", [{"split": True, "guidance_scale": 2.0}, {"diversity": 0.1, "anchor": 1}, {}])
def test_a_fake_scores_step_costs_a_rollout_and_itself(bank, options):
    """23.1: fake turn k + f1, whatever the student's terms are; the teacher is not asked."""
    distiller, rolled = tiny(bank, **options), set()
    for seed in range(5):
        calls = calls_of(distiller, "fake", BATCH, Draws(seed, 4))
        rolled.add(calls.pop("student"))
        assert calls == {"fake with gradient": 1}
    assert rolled <= {1, 2, 3, 4} and len(rolled) > 1


def test_of_adapters_the_factors_are_blended_and_not_their_products():
    """15.4: of A = B = 1 and A = B = -1, half and half, nothing is left; of the products it would be 1."""
    distiller = tiny("adapter")
    for role, sign in (("student", 1.0), ("fake", -1.0)):
        for tensor in distiller.bank.state(role).values():
            tensor.fill_(sign)
    x, t = torch.randn(4, 1, 8, 8), torch.full((4,), 0.5)
    same = [getattr(distiller, role).raw(x, t, LABELS) for role in ("student", "fake")]
    torch.testing.assert_close(*same)
    distiller.bank.blend("fake", "student", keep=0.5)
    assert all(not tensor.any() for tensor in distiller.bank.state("fake").values())
    assert torch.equal(distiller.fake.raw(x, t, LABELS), distiller.teacher.raw(x, t, LABELS))


def test_diversity_is_the_first_steps_and_matching_the_last_ones(monkeypatch):
    """19.1: of the same way from noise."""
    distiller, given = tiny(diversity=0.05, anchor=2, anchor_steps=8, steps=4), []
    monkeypatch.setattr(distiller, "matching_terms", lambda visit, *rest: given.append(visit) or ({}, {}))
    found = distiller("student", BATCH, Draws(3, 4)).terms["diversity"]
    first, *between, last = distiller.simulate(BATCH, Draws(3, 4))
    expected = landing_loss(distiller.teacher.conditioned(LABELS), distiller.schedule, first, 2, 8)
    torch.testing.assert_close(found, 0.05 * expected)
    assert between and torch.equal(given[0].x_t, last.x_t) and last.t[0] < 1


@pytest.mark.parametrize(("method", "options"), [(DMD2, {"split": True}), (CDM, {})])
def test_a_teacher_that_is_guidance_distilled_has_no_guidance_to_split_off(method, options):
    """15.3."""
    teacher = Flux.tiny()
    method.check(method.Config(**options), teacher)
    with pytest.raises(ValueError, match="guidance"):
        method.check(method.Config(guidance_scale=3.0, **options), teacher)


def few_timesteps():
    """A teacher of twenty timesteps."""
    options = {"beta_schedule": "linear", "beta_start": 1e-3, "beta_end": 0.4, "prediction_type": "epsilon"}
    return Pixel.tiny(prediction_type="epsilon", scheduler=DDIMScheduler(num_train_timesteps=20, **options).config)


def test_an_anchor_of_more_steps_than_the_teacher_has_is_refused():
    with pytest.raises(ValueError, match=r"method.anchor_steps: expected at most the teacher's 20 timesteps, got 30"):
        DMD2.check(DMD2.Config(diversity=0.1), few_timesteps())


def test_a_teacher_of_few_timesteps_is_drawn_with_all_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr("stepdistill.inference.student.TEACHER_STEPS", 50)
    assert train_student(tmp_path, few_timesteps(), "cdm", "copy").folder.joinpath("pipeline").is_dir()
