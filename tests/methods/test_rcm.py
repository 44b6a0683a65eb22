"""rCM: its parts bit for bit, its known optimum, what a step costs, and a mixture's students in one training."""

import pytest
import torch
from adversarial_students import check_landings, train_adversarially
from contracts.cases import PIXELS, train_student
from contracts.test_latent import check_export
from mixtures import batch_of, make
from network_calls import calls_of
from oracles import SCHEDULES, Gaussian, teacher_denoiser, three_clusters

from stepdistill.batch import Batch
from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.trig import Trig
from stepdistill.families.pixel import Pixel
from stepdistill.files.schema import build
from stepdistill.losses.distribution_matching import denoising_loss
from stepdistill.methods import rcm
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.rcm import RCM
from stepdistill.methods.scm import Scm
from stepdistill.networks.adapter_bank import AdapterBank
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.randomness import Draws

BATCH = Batch(torch.randn(4, 1, 8, 8), {"class_labels": torch.tensor([0, 1, 2, 0])}, 4)
LEVELS = {"sigma_data": 1.0, "log_sigma_mean": 0.7, "log_sigma_std": 1.6, "warmup": 0}
both_banks = pytest.mark.parametrize("bank", ["copy", "adapter"])


def tiny(method, bank="copy", **options):
    """A distiller on the same tiny teacher, whose student and fake score have moved."""
    family = Pixel.tiny()
    banks = {"copy": CopyBank, "adapter": lambda net: AdapterBank(net, rank=2, targets=family.lora_targets)}
    torch.manual_seed(0)
    distiller = method(family, banks[bank](family.network), method.Config(**options))
    for role in ("student", "fake"):
        random = torch.Generator().manual_seed(1)
        for parameter in distiller.bank.params(role) if role in distiller.bank.roles else ():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=random)
    return distiller


# --------------------------------------------------------------------------------------------------- its parts


@both_banks
@pytest.mark.parametrize("tangent", ["jvp", "difference"])
def test_without_matching_it_is_scm_bit_for_bit(tangent, bank):
    options = LEVELS | {"tangent": tangent, "guidance_scale": 2.0}
    whole = tiny(RCM, bank, matching_weight=0.0, consistency_weight=1.0, **options)("student", BATCH, Draws(3, 4))
    part = tiny(Scm, bank, **options)("student", BATCH, Draws(3, 4))
    assert set(whole.terms) == {"consistency"} and torch.equal(whole.terms["consistency"], part.terms["loss"])


@both_banks
def test_without_consistency_it_is_dmd2_bit_for_bit(bank):
    whole = tiny(RCM, bank, consistency_weight=0.0, matching_shift=1.0, guidance_scale=2.0)
    part = tiny(DMD2, bank, gan_weight=0.0, random_steps=4, guidance_scale=2.0)
    for seed in range(3):
        losses = [one("student", BATCH, Draws(seed, 4)).terms for one in (whole, part)]
        assert set(losses[0]) == {"matching"} and torch.equal(losses[0]["matching"], losses[1]["matching"])
        losses = [one("fake", BATCH, Draws(seed, 4)).terms["denoising"] for one in (whole, part)]
        assert torch.equal(*losses)


def test_without_consistency_no_teacher_need_be_differentiated(monkeypatch):
    asked = []
    monkeypatch.setattr(rcm, "check_derivative", lambda config, family: asked.append(config))
    for config in (RCM.Config(), RCM.Config(consistency_weight=0.0)):
        RCM.check(config, Pixel.tiny())
    assert asked == [RCM.Config()]


def test_scores_are_compared_at_uniform_times_moved_towards_noise_by_five():
    """METHODS_2026, 18.1."""
    t = tiny(RCM).level(Draws(0, 20_000))
    raw = t / (5 - 4 * t)
    assert raw.min() < 0.03 and raw.max() > 0.97
    assert raw.mean().item() == pytest.approx(0.5, abs=0.01) and raw.std().item() == pytest.approx(0.277, abs=0.005)


def test_the_two_losses_are_added():
    both = tiny(RCM, consistency_weight=0.25, matching_weight=2.0)("student", BATCH, Draws(3, 4)).terms
    assert set(both) == {"consistency", "matching"}
    alone = tiny(RCM, consistency_weight=1.0, matching_weight=0.0)("student", BATCH, Draws(3, 4)).terms
    assert torch.equal(both["consistency"], 0.25 * alone["consistency"])


@both_banks
@pytest.mark.parametrize(("guidance_scale", "teacher"), [(1.0, 2), (5.0, 4)])
@pytest.mark.parametrize("tangent", ["jvp", "difference"])
def test_a_step_costs_what_the_paper_states(bank, guidance_scale, teacher, tangent):
    """METHODS_2026, 18.1: teacher 2 + 2, student 2 with gradient and a rollout of n - 1, fake score 1.

    The exact derivative is in the pass with gradient, a difference takes another.
    """
    distiller = tiny(RCM, bank, guidance_scale=guidance_scale, tangent=tangent)
    rolled = set()
    for seed in range(6):
        calls = calls_of(distiller, "student", BATCH, Draws(seed, 4))
        rolled.add(calls.pop("student", 0) - (tangent == "difference"))
        assert calls == {"student with gradient": 2, "teacher": teacher, "fake": 1}
        calls = calls_of(distiller, "fake", BATCH, Draws(seed, 4))
        assert 1 <= calls.pop("student") <= 4 and calls == {"fake with gradient": 1}
    assert rolled <= {0, 1, 2, 3} and len(rolled) > 1


def test_the_turns_alternate_after_a_warm_up_of_consistency_alone():
    distiller = tiny(RCM, warmup=3, student_update_interval=2)
    student, fake = (distiller.turns[name].when for name in ("student", "fake"))
    assert [step for step in range(8) if student(step)] == [0, 1, 2, 4, 6]
    assert [step for step in range(8) if fake(step)] == [0, 1, 2, 3, 5, 7]
    assert set(distiller("student", BATCH, Draws(0, 4)).terms) == {"consistency"}
    distiller.step_in_stage = 3
    assert set(distiller("student", BATCH, Draws(0, 4)).terms) == {"consistency", "matching"}


@pytest.mark.parametrize(("name", "kind"), [("flow", "flow"), ("trig", "trigflow"), ("cosine", "v_prediction")])
def test_the_papers_steps_begin_at_its_angles(name, kind):
    """METHODS_2026, 18.3 (d): the first at atan(80), told to pure noise."""
    schedule = SCHEDULES[name]
    family = make(RCM, three_clusters(schedule, kind), three_clusters(schedule, kind)).family
    times = RCM.make_sampler(RCM.Config(grid="paper", tangent="difference"), family).times
    alpha, sigma = schedule(times[:-1])
    sigma_data = schedule.sigma_data if name == "trig" else 1.0
    angles = torch.atan2(sigma / sigma_data, alpha)
    expected = torch.tensor([1.5583, 1.5, 1.4, 1.0], dtype=torch.float64)
    torch.testing.assert_close(angles, expected, atol=2e-3 if name == "cosine" else 1e-4, rtol=0)
    assert times[-1] == 0


def test_a_student_with_the_papers_grid_is_exported_with_it(tmp_path):
    check_export(train_student(tmp_path, PIXELS["pixel-flow"](), "rcm", "copy", options={"grid": "paper", "steps": 2}))


def test_the_papers_grid_is_refused_where_it_cannot_be():
    with pytest.raises(ValueError, match=r"method\.grid: expected 'even'"):
        RCM.make_sampler(RCM.Config(grid="paper"), PIXELS["pixel-edm"]())
    with pytest.raises(ValueError, match="pure noise"):  # where matching begins on any grid
        RCM.check(RCM.Config(grid="paper", steps=2), Pixel.tiny(prediction_type="epsilon"))
    with pytest.raises(ValueError, match="steps: expected at most 4 with grid 'paper', got 5"):
        build(RCM.Config, {"grid": "paper", "steps": 5})


def test_a_configuration_that_cannot_be_meant_is_refused():
    with pytest.raises(ValueError, match="student_update_interval: expected at least 2"):
        build(RCM.Config, {"student_update_interval": 1})
    with pytest.raises(ValueError, match="matching_weight: expected above 0"):
        build(RCM.Config, {"matching_weight": 0.0, "consistency_weight": 0.0})
    with pytest.raises(ValueError, match="warmup"):
        build(RCM.Config, {"warmup": 2, "consistency_weight": 0.0})


# ---------------------------------------------------------------------------------------- the known optimum


class Solved(Gaussian):
    """The network whose clean image is where the ODE of Gaussian data ends."""

    def predict(self, x_t, t, class_labels=None):
        return self.solve(x_t, t, torch.zeros_like(t))


def solved(schedule, kind, **options):
    """A distiller whose student is the consistency function of Gaussian data, its fake score exact: the teacher's."""
    mean = torch.zeros(2, dtype=torch.float64)
    gaussian = Gaussian(mean, 0.7, schedule, kind)
    distiller = make(RCM, gaussian, gaussian, tangent="jvp", **options)
    distiller.bank.networks["student"] = Solved(mean, 0.7, schedule, kind)
    return distiller, gaussian


@pytest.mark.parametrize(("name", "kind"), [("flow", "flow"), ("cosine", "v_prediction"), ("trig", "trigflow")])
def test_at_the_known_optimum_neither_loss_moves_the_student(name, kind):
    distiller, gaussian = solved(SCHEDULES[name], kind)
    losses = distiller("student", batch_of(gaussian, 16), Draws(0, 16))
    assert losses.metrics["tangent"] < 1e-6 and losses.terms["matching"] == 0


def test_while_the_tangent_warms_up_the_optimum_is_another():
    """METHODS_2026, 18.3 (a): 0.079 at an angle of 0.9, half of the derivative, x = 0.8 and data of width 0.7."""
    trig = Trig(1.0)
    distiller, _ = solved(trig, "trigflow")
    t, x = torch.tensor([0.9]).double() / (torch.pi / 2), torch.full((1, 2, 1, 1), 0.8, dtype=torch.float64)
    point, path = distiller.consistency.point(t, x), distiller.consistency.path(x, t, Prediction(x, x), {})
    for share, expected in ((1.0, 0.0), (0.5, 0.079)):
        found = distiller.consistency.student_and_tangent(x, point, path, {}, share)[1].abs()
        torch.testing.assert_close(found, torch.full_like(found, expected), atol=5e-4, rtol=0)


@pytest.mark.parametrize(("schedule", "kind"), [(Trig(1.0), "trigflow"), (SCHEDULES["flow"], "flow")])
def test_the_fake_scores_loss_is_the_papers_up_to_the_change_of_coordinates(schedule, kind):
    """18.3 (c): the clean image's squared error over sin^2 is TrigFlow's own, and (cos + sin)^-2 times a flow's."""
    fake = teacher_denoiser(Gaussian(torch.zeros(2, dtype=torch.float64), 0.7, schedule, kind))
    x0, noise = torch.randn(2, 5, 2, 1, 1, dtype=torch.float64)
    theta = torch.linspace(0.3, 1.4, 5, dtype=torch.float64)
    t = schedule.inverse(-2 * theta.tan().log())
    error = (fake(schedule.add_noise(x0, noise, t), t, {}).x0 - x0).square().flatten(1).mean(1)
    factor = (theta.cos() + theta.sin()) ** 2 if kind == "flow" else 1.0
    found = denoising_loss(fake, x0, noise, t, {}).double()
    torch.testing.assert_close(found, factor * error / theta.sin() ** 2, rtol=1e-5, atol=1e-9)


# ------------------------------------------------------------------------------------------------- students


@pytest.mark.product
def test_one_training_gives_students_of_1_2_and_4_steps_that_cover_all_modes():
    """Nearer to the data, by sliced Wasserstein, than their perfect teacher in as many calls: 1.1, 0.45 and 0.16."""
    torch.manual_seed(0)
    oracle = three_clusters(SCHEDULES["cosine"], "v_prediction")
    options = {
        "tangent": "difference", "sigma_data": 1.0, "log_sigma_mean": -0.3, "log_sigma_std": 1.2, "warmup": 150,
        "matching_shift": 1.0, "student_update_interval": 3,
    }  # fmt: skip
    distiller = train_adversarially(RCM, oracle, 1200, lr=5e-3, size=256, **options)
    check_landings(distiller, oracle)
