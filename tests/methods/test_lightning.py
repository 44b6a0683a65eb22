"""Progressive adversarial distillation: stages, what the critic of steps sees, forwards, and a student of a mixture."""

import pytest
import torch
from adversarial_students import mode_shares, mode_test, taught_by, train_adversarially
from mixtures import batch_of, landing
from network_calls import calls_of, features_of
from oracles import SCHEDULES, Gaussian, three_clusters

from stepdistill.batch import Batch
from stepdistill.families.pixel import Pixel
from stepdistill.files.schema import build
from stepdistill.methods.base import Stage
from stepdistill.methods.lightning import Lightning
from stepdistill.methods.progressive import Progressive
from stepdistill.networks.adapter_bank import AdapterBank
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.randomness import Draws

COSINE = SCHEDULES["cosine"]
ORACLE = three_clusters(COSINE, "v_prediction")
both_banks = pytest.mark.parametrize("bank", ["copy", "adapter"])
REGRESS, CONDITIONAL, UNCONDITIONAL = Stage("4-steps", 9, 4), Stage("2-steps-conditional", 9, 2), Stage("2-steps", 9, 2)


def tiny(bank="copy", stage=CONDITIONAL, **options):
    family = Pixel.tiny()
    banks = {"copy": CopyBank, "adapter": lambda net: AdapterBank(net, rank=2, targets=family.lora_targets)}
    config = Lightning.Config(**{"steps": 2, "start": 16, "via": (4,)} | options)
    distiller = Lightning(family, banks[bank](family.network), config)
    distiller.stage = stage
    return distiller


def tiny_batch(size=4):
    return Batch(torch.randn(size, 1, 8, 8), {"class_labels": torch.arange(size) % 3}, size)


def test_every_number_of_steps_but_the_first_has_two_stages():
    distiller = tiny(steps=1, start=32, via=(8, 2))
    found = []
    for stage in distiller.stages(50):
        distiller.stage = stage
        found.append((stage.name, stage.steps, distiller.objective, distiller.teacher_steps, distiller.sampler().steps))
    assert found == [
        ("8-steps", 10, "regress", 32, 8),
        ("2-steps-conditional", 10, "conditional", 8, 2),
        ("2-steps", 10, "unconditional", 8, 2),
        ("1-steps-conditional", 10, "conditional", 2, 1),
        ("1-steps", 10, "unconditional", 2, 1),
    ]


def test_a_student_of_a_teacher_of_noise_first_learns_its_velocities_as_in_progressive_distillation():
    losses, batch = [], tiny_batch()
    for method, options in ((Lightning, {"via": (4,)}), (Progressive, {})):
        family = Pixel.tiny(prediction_type="epsilon")
        distiller = method(family, CopyBank(family.network), method.Config(steps=1, start=16, **options))
        distiller.stage = distiller.stages(40)[0]
        assert distiller.stage.name == "convert" and distiller.sampler().steps == 16
        losses.append(distiller("student", batch, Draws(0, 4)).terms["loss"])
    assert losses[0] > 0
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)


def test_the_teacher_of_both_stages_is_the_student_of_the_one_before():
    distiller = tiny()
    weight = lambda role: distiller.bank.params(role)[0]  # noqa: E731
    with torch.no_grad():
        weight("student").add_(1)
    distiller.begin_stage()
    before = weight("mentor").clone()
    assert torch.equal(weight("student"), before)
    with torch.no_grad():
        weight("student").add_(1)
    distiller.stage = UNCONDITIONAL
    distiller.begin_stage()
    assert torch.equal(weight("mentor"), before) and not torch.equal(weight("student"), before)


def test_two_steps_of_the_teacher_are_regressed_as_in_progressive_distillation():
    """On a flow, whose pure noise has no signal in both; the same draws, the same loss."""
    oracle = three_clusters(SCHEDULES["flow"], "flow")
    batch = batch_of(oracle, 64)
    lightning = taught_by(Lightning, oracle, start=8, via=(4,), steps=1)
    progressive = taught_by(Progressive, oracle, start=8, steps=4)
    lightning.stage = progressive.stage = REGRESS
    losses = [distiller("student", batch, Draws(0, 64)).terms["loss"] for distiller in (lightning, progressive)]
    assert losses[0] > 0
    torch.testing.assert_close(*losses, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("name", "kind"), [("cosine", "v_prediction"), ("flow", "flow")])
def test_of_a_single_point_the_teacher_is_an_optimum_of_the_regression(name, kind):
    """Its DDIM steps are exact, so that one lands where several do."""
    oracle = Gaussian(torch.tensor([0.3, -0.2]).double(), 0.0, SCHEDULES[name], kind)
    distiller = taught_by(Lightning, oracle, start=16, via=(4,), steps=2)
    distiller.stage = REGRESS
    assert distiller("student", batch_of(oracle, 64), Draws(0, 64)).terms["loss"].item() == pytest.approx(0, abs=1e-9)
    wide = Gaussian(torch.tensor([0.3, -0.2]).double(), 0.7, SCHEDULES[name], kind)
    distiller = taught_by(Lightning, wide, start=16, via=(4,), steps=2)
    distiller.stage = REGRESS
    assert distiller("student", batch_of(wide, 64), Draws(0, 64)).terms["loss"] > 1e-6


@pytest.mark.parametrize("stage", [CONDITIONAL, UNCONDITIONAL], ids=lambda stage: stage.name)
def test_a_critic_is_shown_the_same_of_a_student_that_lands_where_its_teacher_does(stage, monkeypatch):
    """Of a single point every DDIM step is exact, so one step of the student ends where two of the teacher do."""
    oracle = Gaussian(torch.tensor([0.3, -0.2]).double(), 0.0, COSINE, "v_prediction")
    distiller = taught_by(Lightning, oracle, start=16, via=(4,), steps=2)
    distiller.stage = stage
    landed = []
    monkeypatch.setattr(
        distiller.critic, "extract", lambda x, context, draws: landed.append(x) or [x.flatten(1)[..., None]]
    )
    monkeypatch.setattr(distiller.critic, "logits", lambda seen, context: [feature.flatten(1) for feature in seen])
    distiller("critic", batch_of(oracle, 8), Draws(0, 8))
    torch.testing.assert_close(*landed, rtol=1e-6, atol=1e-6)


def logits_of(distiller, x_t, landed, t, s):
    cond = tiny_batch(len(x_t)).cond
    context = distiller.step_context(x_t, t, s, cond, Draws(1, len(x_t)))
    return torch.cat(distiller.critic(landed, context, Draws(2, len(x_t))), 1)


def test_only_the_conditional_critic_sees_where_a_step_begins():
    x_t, landed, other = torch.randn(3, 2, 1, 8, 8)
    t, s = (torch.full((2,), time, dtype=torch.float64) for time in (0.9, 0.4))
    for stage, sees in ((CONDITIONAL, True), (UNCONDITIONAL, False)):
        distiller = tiny(stage=stage)
        before = logits_of(distiller, x_t, landed, t, s)
        assert torch.equal(before, logits_of(distiller, other, landed, t + 0.05, s)) != sees
        assert not torch.allclose(before, logits_of(distiller, x_t, other, t, s))


def test_landed_states_are_judged_at_the_levels_asked_for_and_never_below_where_they_landed():
    distiller = tiny(stage=UNCONDITIONAL, levels=(0.1, 0.6))
    s = torch.tensor([0.0, 0.3], dtype=torch.float64).repeat(200)
    context = distiller.step_context(torch.zeros(400, 1, 8, 8), s, s, {}, Draws(0, 400))
    assert set(distiller.critic.level(context).tolist()) == {0.1, 0.3, 0.6}
    assert distiller.critic.level(tiny(stage=UNCONDITIONAL).step_context(s, s, s, {}, Draws(0, 400))).min() == 0.02


@both_banks
def test_a_step_costs_what_the_paper_states(bank):
    """METHODS_2026, 23.1: the teacher's steps once for both turns' worth, student 1 with gradient, critic 1 to 2."""
    batch = tiny_batch()
    regress = tiny(bank, REGRESS, guidance_scale=2.0)
    assert calls_of(regress, "student", batch, Draws(0, 4)) == {"student with gradient": 1, "teacher": 8}
    for stage, begins in ((CONDITIONAL, 1), (UNCONDITIONAL, 0)):
        distiller = tiny(bank, stage)
        assert calls_of(distiller, "student", batch, Draws(0, 4)) == {"student with gradient": 1}
        assert calls_of(distiller, "critic", batch, Draws(0, 4)) == {"student": 1, "mentor": 2}
        assert features_of(distiller, "student", batch, Draws(0, 4)) == 1 + begins
        assert features_of(distiller, "critic", batch, Draws(0, 4)) == 2 + begins


def test_the_critic_comes_first_and_rests_where_the_student_regresses():
    distiller = tiny(student_update_interval=2, critic_warmup=3)
    turns = distiller.turns

    def due(name):
        steps = []
        for step in range(9):
            distiller.step_in_stage = step
            steps += [step] if turns[name].when(1000 + step) else []
        return steps

    assert due("student") == [4, 6, 8] and due("critic") == [*range(9)]
    distiller.stage = REGRESS
    assert due("student") == [*range(9)] and due("critic") == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"via": []}, "via: expected at least the student that regresses"),
        ({"start": 32, "via": [5]}, "via: expected start, via and steps to descend"),
        ({"levels": [0.0]}, "levels.*expected above 0 and at most 1, got 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(Lightning.Config, options)


@pytest.mark.product
def test_a_student_of_a_mixture_covers_all_modes_and_is_nearer_to_the_data_than_its_teacher():
    torch.manual_seed(0)
    options = {"start": 16, "via": (4,), "steps": 2, "critic_warmup": 0}
    distiller = train_adversarially(Lightning, ORACLE, 600, **options)
    shares, stray = mode_shares(distiller, 3000)
    student, teacher = landing(distiller, ORACLE, 2, size=3000)
    assert mode_test(shares, 1) < 0.02 and stray < 0.1, shares
    assert student < 0.5 * teacher
