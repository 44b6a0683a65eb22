"""CDM: its three terms, who moves when, what a step costs, and a mixture's students in one training."""

import pytest
import torch
from adversarial_students import mode_shares, mode_test, taught_by, train_adversarially
from mixtures import landing
from network_calls import calls_of
from oracles import SCHEDULES, three_clusters

from stepdistill.batch import Batch
from stepdistill.families.pixel import Pixel
from stepdistill.methods.cdm import CDM
from stepdistill.networks.adapter_bank import AdapterBank
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.networks.denoiser import Denoiser
from stepdistill.randomness import Draws

COSINE = SCHEDULES["cosine"]
LABELS = {"class_labels": torch.tensor([0, 1, 2, 0])}
BATCH = Batch(None, LABELS, 4)
both_banks = pytest.mark.parametrize("bank", ["copy", "adapter"])


def tiny(bank="copy", **options):
    family = Pixel.tiny()
    banks = {"copy": CopyBank, "adapter": lambda net: AdapterBank(net, rank=2, targets=family.lora_targets)}
    return CDM(family, banks[bank](family.network), CDM.Config(**options))


def test_the_fake_score_moves_always_and_every_second_time_the_student():
    turns = tiny().turns
    assert all(turns["fake"].when(step) for step in range(6))
    assert [step for step in range(6) if turns["student"].when(step)] == [1, 3, 5]
    late = tiny(fake_warmup=2).turns["student"]
    assert [step for step in range(6) if late.when(step)] == [3, 5]


@both_banks
def test_a_student_that_is_the_teacher_with_a_perfect_fake_score_feels_guidance_alone(bank):
    terms = tiny(bank)("student", BATCH, Draws(0, 4)).terms
    assert {name: term.item() for name, term in terms.items()} == {"matching": 0, "off_trajectory": 0}
    terms = tiny(bank, guidance_scale=3.0)("student", BATCH, Draws(0, 4)).terms
    assert terms["matching"].item() == terms["off_trajectory"].item() == 0 and terms["augmentation"].item() > 0


@both_banks
@pytest.mark.parametrize(("guidance_scale", "teacher"), [(1.0, 2), (3.0, 4)])
def test_a_step_costs_what_the_paper_states(bank, guidance_scale, teacher):
    """METHODS_2026, 15.5: student 2 with gradient and the rollout, teacher 4 under guidance, fake score 2."""
    distiller = tiny(bank, most_steps=5, guidance_scale=guidance_scale)
    rolled = set()
    for seed in range(6):
        calls = calls_of(distiller, "student", BATCH, Draws(seed, 4))
        rolled.add(calls.pop("student", 0))
        assert calls == {"student with gradient": 2, "teacher": teacher, "fake": 2}
        calls = calls_of(distiller, "fake", BATCH, Draws(seed, 4))
        assert calls.pop("student") >= 1 and calls == {"fake with gradient": 1}
    assert max(rolled) <= 4 and len(rolled) > 1


def moved(**options):
    """A distiller of the mixture in classes whose fake score is not its teacher."""
    distiller = taught_by(CDM, three_clusters(COSINE, "v_prediction", conditional=True), 3, **options)
    with torch.no_grad():
        distiller.bank.networks["fake"].fc3.bias += 0.1
    return distiller


def test_gradients_are_twice_dmds():
    distiller = moved(most_steps=1)
    visit = distiller.visit(BATCH, draws := Draws(0, 4))
    draws.uniform()  # the level of the first term, which is not there without guidance
    expected, _ = distiller.matching.unguided(visit.prediction.x0, LABELS, draws, distiller.level(draws, visit.end))
    found = distiller("student", BATCH, Draws(0, 4)).terms["matching"]
    torch.testing.assert_close(found, 2 * expected)


def test_guidance_is_looked_at_below_the_students_input_and_matching_anywhere(monkeypatch):
    """METHODS_2026, 15.2 and 15.5: in our clock, in which 0 is clean."""
    distiller, above, raw = moved(most_steps=4, guidance_scale=8.0), 0, Denoiser.raw
    for seed in range(12):
        seen, top = [], distiller.visit(BATCH, Draws(seed, 4)).t
        with monkeypatch.context() as patch:
            patch.setattr(
                Denoiser, "raw",
                lambda self, x_t, t, *given, seen=seen, **told: (
                    seen.append((self.role, t[:4])) or raw(self, x_t, t, *given, **told)
                ),
            )  # fmt: skip
            distiller("student", BATCH, Draws(seed, 4))
        augmentation, *matching = [t for role, t in seen if role == "teacher"]
        assert (augmentation <= top).all()
        above += (torch.cat(matching) > torch.cat([top, top])).sum()
    assert above > 10


def test_the_three_terms_written_out_with_their_gradient(monkeypatch):
    """METHODS_2026, 15.5: mean squares without a half, targets and the state off the trajectory constants, m >= 0.1."""
    distiller, seen, raw = moved(most_steps=4, guidance_scale=8.0), [], Denoiser.raw
    with monkeypatch.context() as patch:
        patch.setattr(
            Denoiser, "raw",
            lambda self, *given, **told: seen.append((self.role, *given[:2])) or raw(self, *given, **told),
        )  # fmt: skip
        losses = distiller("student", BATCH, Draws(1, 4)).terms
    params = list(distiller.bank.params("student"))
    found = torch.autograd.grad(sum(losses.values()), params)
    visit = distiller.visit(BATCH, Draws(1, 4))
    x0, asked = (
        visit.prediction.x0,
        {role: [at for name, *at in seen if name == role] for role in ("teacher", "student")},
    )
    x_s, s = asked["student"][-1]
    torch.testing.assert_close(x_s, COSINE.add_noise(x0.detach(), visit.prediction.eps.detach(), s))
    x0_off = distiller.student(x_s.detach(), s, LABELS).x0
    pulls = []
    with torch.no_grad():
        (x_ca, t_ca), (x_dm, t_dm), (x_off, t_off) = asked["teacher"]
        assert (t_ca[:4] <= visit.t).all() and len({t_ca[0].item(), t_dm[0].item(), t_off[0].item()}) == 3
        guided, given = distiller.teacher.guided_and_conditional(x_ca[:4], t_ca[:4], LABELS, 7.0)
        pulls.append((x0, given.x0 - guided.x0, given.x0))
        for image, x_t, t in ((x0, x_dm, t_dm), (x0_off, x_off, t_off)):
            given = distiller.teacher(x_t, t, LABELS).x0
            pulls.append((image, distiller.fake(x_t, t, LABELS).x0 - given, given))
    expected = 0
    for image, gradient, given in pulls:
        size = (image - given).abs().mean((1, 2, 3), keepdim=True).clamp(min=0.1)
        expected = expected + (image - (image - gradient / size).detach()).square().mean()
    torch.testing.assert_close(sum(losses.values()).double(), expected.double(), rtol=1e-5, atol=1e-8)
    for one, other in zip(found, torch.autograd.grad(expected, params), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("levels", ["full", "above"])
@pytest.mark.parametrize("turn", ["student", "fake"])
def test_scores_look_at_a_steps_image_above_the_noise_of_the_next_step(levels, turn, monkeypatch):
    distiller, seen, raw = tiny(levels=levels), [], Denoiser.raw

    def watched(self, x_t, t, *given, **told):
        seen.extend([t] if self.role == "fake" else [])
        return raw(self, x_t, t, *given, **told)

    monkeypatch.setattr(Denoiser, "raw", watched)
    below = 0
    for seed in range(12):
        end = distiller.visit(BATCH, Draws(seed, 4)).end
        distiller(turn, BATCH, Draws(seed, 4))
        below += (seen[0] < end).sum()  # of the images of the step; the student's second are off its trajectory
        seen.clear()
    assert below == 0 if levels == "above" else below > 10


@both_banks
def test_the_fake_score_stays_near_the_student(bank):
    distiller = tiny(bank, alignment=0.75)
    with torch.no_grad():
        for tensor in distiller.bank.state("student").values():
            tensor += torch.randn_like(tensor)
    roles = [[tensor.clone() for tensor in distiller.bank.state(role).values()] for role in ("fake", "student")]
    distiller.after_step()
    for found, fake, student in zip(distiller.bank.state("fake").values(), *roles, strict=True):
        torch.testing.assert_close(found, 0.75 * fake + 0.25 * student)


def test_the_students_input_depends_on_no_data_and_carries_no_gradient():
    distiller = tiny(most_steps=4)
    visit = distiller.visit(Batch(torch.randn(4, 1, 8, 8), LABELS, 4), Draws(2, 4))
    assert torch.equal(visit.x_t, distiller.visit(BATCH, Draws(2, 4)).x_t)
    assert not visit.x_t.requires_grad and visit.prediction.x0.requires_grad


NEAR = 0.25
"""Sliced Wasserstein distance of a trained student's points to the data; DDIM of the perfect teacher has 1.1, 0.45 and
0.14 with 1, 2 and 4 calls."""


@pytest.mark.product
def test_one_training_gives_students_of_1_2_and_4_steps_that_cover_all_modes():
    torch.manual_seed(0)
    oracle = three_clusters(COSINE, "v_prediction")
    options = {"most_steps": 4, "student_update_interval": 3}
    distiller = train_adversarially(CDM, oracle, 1500, lr=5e-3, size=256, **options)
    for steps in (1, 2, 4):
        student, teacher = landing(distiller, oracle, steps, size=6000)
        shares, stray = mode_shares(distiller, 3000)
        assert mode_test(shares, 1) < 0.02 and stray < 0.2, (steps, shares, stray)
        assert student < NEAR and (steps == 4 or student < 0.5 * teacher)
