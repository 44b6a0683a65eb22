"""DMD2: who moves when, the critic on the fake score, backward simulation, both banks, and a mixture's students."""

import math

import pytest
import torch
from adversarial_students import mode_shares, mode_test, train_adversarially
from contracts.cases import make_trainer, sections, teacher_for
from diffusers import LCMScheduler
from oracles import SCHEDULES, Gaussian, three_clusters
from torch import nn

from stepdistill.batch import Batch
from stepdistill.diffusion.samplers import ConsistencySampler, rollout
from stepdistill.diffusion.schedulers import to_diffusers
from stepdistill.families.pixel import Pixel
from stepdistill.files.schema import build
from stepdistill.methods.dmd2 import DMD2
from stepdistill.networks.adapter_bank import AdapterBank
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.randomness import Draws
from stepdistill.training.config import resolve
from stepdistill.training.run import Run

COSINE = SCHEDULES["cosine"]
LABELS = {"class_labels": torch.tensor([0, 1, 2, 0])}


def batch_of_four():
    return Batch(torch.randn(4, 1, 8, 8), LABELS, 4)


def tiny(bank="copy", family=None, **options):
    family = family or Pixel.tiny()
    banks = {"copy": CopyBank, "adapter": lambda net: AdapterBank(net, rank=2, targets=family.lora_targets)}
    distiller = DMD2(family, banks[bank](family.network), DMD2.Config(**options))
    with torch.no_grad():  # apart from the teacher, so that every path carries something
        for role in ("student", "fake"):
            for parameter in distiller.bank.params(role):
                parameter += 0.02 * torch.randn_like(parameter)
    return distiller


# ------------------------------------------------------------------------------------------------ who moves


@pytest.mark.parametrize("every", [1, 5, 10])
def test_the_fake_score_moves_always_and_first_the_student_every_so_often(every):
    turns = tiny(student_update_interval=every).turns
    steps = range(3 * every)
    assert all(turns["fake"].when(step) for step in steps)
    assert [step for step in steps if turns["student"].when(step)] == [i * every - 1 for i in (1, 2, 3)]


def test_the_fake_score_can_learn_alone_first():
    turns = tiny(student_update_interval=2, fake_warmup=3).turns
    assert all(turns["fake"].when(step) for step in range(9))
    assert [step for step in range(9) if turns["student"].when(step)] == [4, 6, 8]


def test_alternating_turns_never_coincide_and_leave_out_no_step():
    turns = tiny(student_update_interval=5, fake_update="alternate").turns
    moves = [(turns["student"].when(step), turns["fake"].when(step)) for step in range(20)]
    assert all(student != fake for student, fake in moves)
    assert sum(student for student, _ in moves) == 4


# ------------------------------------------------------------------------------------------------ the critic


def test_a_critic_without_an_opinion_costs_two_log_two_and_log_two():
    distiller = tiny(gan_weight=3.0, critic_weight=5.0)
    last = [module for module in distiller.head.modules() if isinstance(module, nn.Linear)][-1]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    fake = distiller("fake", batch_of_four(), Draws(0, 4))
    assert fake.terms["critic"].item() == pytest.approx(5.0 * 2 * math.log(2), rel=1e-5)
    student = distiller("student", batch_of_four(), Draws(0, 4))
    assert student.terms["gan"].item() == pytest.approx(3.0 * math.log(2), rel=1e-5)
    assert {"accuracy_real", "accuracy_fake"} <= set(fake.metrics)
    assert {
        "diversity_ratio",
        "fake_score_error_ratio",
        "score_gap_low_noise",
        "score_gap_middle_noise",
        "score_gap_high_noise",
    } == set(student.metrics)


@pytest.mark.parametrize("bank", ["copy", "adapter"])
def test_the_critics_word_reaches_the_student_through_a_fake_score_that_keeps_no_gradient(bank):
    distiller = tiny(bank, steps=1, gan_weight=1.0)
    for parameter in distiller.turns["fake"].params:
        parameter.requires_grad_(False)
    distiller("student", batch_of_four(), Draws(0, 4)).terms["gan"].backward()
    assert any(p.grad is not None and p.grad.any() for p in distiller.bank.params("student"))
    assert all(p.grad is None for p in distiller.turns["fake"].params)


@pytest.mark.parametrize("bank", ["copy", "adapter"])
def test_the_critics_loss_moves_the_fake_score_and_its_head_and_nothing_else(bank):
    distiller = tiny(bank, critic_weight=1.0)
    distiller("fake", batch_of_four(), Draws(0, 4)).terms["critic"].backward()
    touched = {id(p) for p in distiller.parameters() if p.grad is not None and p.grad.any()}
    head, fake = ({id(p) for p in params} for params in (distiller.head.parameters(), distiller.bank.params("fake")))
    assert touched & head and touched & fake and touched <= head | fake


def test_real_and_fake_are_judged_alike():
    """In one batched call, each noised to times and with noise of its own."""
    distiller = tiny()
    x, y = torch.randn(2, 4, 1, 8, 8)
    with torch.no_grad():
        (first,), _ = distiller.critic([x, y], LABELS, Fixed(0, 4))
        _, (second,) = distiller.critic([y, x], LABELS, Fixed(0, 4))
        (alone,), *_ = distiller.critic([x], LABELS, Fixed(0, 4))
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(first, alone, atol=1e-5, rtol=1e-5)


class Fixed(Draws):
    """Numbers that repeat: every call of a kind returns the same."""

    def uniform(self, low=0.0, high=1.0):
        return Draws(1, self.batch_size).uniform(low, high)

    def normal(self, *shape):
        return Draws(2, self.batch_size).normal(*shape)


def test_without_a_weight_there_is_no_critic():
    distiller = tiny(gan_weight=0.0)
    assert list(distiller("fake", batch_of_four(), Draws(0, 4)).terms) == ["denoising"]
    assert list(distiller("student", batch_of_four(), Draws(0, 4)).terms) == ["matching"]
    assert not list(distiller.children())[1:]


def test_a_batch_of_one_class_is_no_accident():
    distiller = tiny()
    labels = {"class_labels": torch.zeros(32, dtype=torch.long)}
    with pytest.raises(ValueError, match="all 32 labels"):
        distiller("fake", Batch(torch.randn(32, 1, 8, 8), labels, 32), Draws(0, 32))


# -------------------------------------------------------------------------------------- backward simulation


@pytest.mark.parametrize(("name", "kind"), [("cosine", "v_prediction"), ("flow", "flow")])
def test_rollouts_of_a_perfect_student_keep_the_marginals(name, kind):
    """A student that answers with fresh data, whatever it is asked, leaves alpha_t mu, alpha_t^2 s^2 + sigma_t^2."""
    schedule, mu, s, size = SCHEDULES[name], torch.tensor([0.8, -0.4]).double(), 0.5, 100_000
    gaussian = Gaussian(mu, s, schedule, kind)
    sampler = ConsistencySampler(schedule, schedule.grid(4))

    def perfect(x_t, t):
        del t
        prediction = gaussian.draw(len(x_t))
        return type("Answer", (), {"x0": prediction})

    start = torch.randn(size, 2, 1, 1, dtype=torch.float64)
    for n in range(4):
        x = rollout(perfect, sampler, start, n, torch.randn_like).flatten(1)
        if n == 0:
            assert torch.equal(x, start.flatten(1))
            continue
        alpha, sigma = (c.item() for c in schedule(sampler.times[n]))
        std = math.sqrt(alpha**2 * s**2 + sigma**2)
        torch.testing.assert_close(x.mean(0), alpha * mu, atol=5 * std / math.sqrt(size), rtol=0)
        torch.testing.assert_close(x.std(0), torch.tensor([std, std]).double(), rtol=0.015, atol=0)


@pytest.mark.parametrize("bank", ["copy", "adapter"])
def test_the_students_input_is_its_own_rollout_and_carries_no_gradient_and_no_data(bank):
    distiller = tiny(bank, steps=4)
    seen = {}
    for seed in range(16):
        batch = batch_of_four()
        x_t, t, *_ = distiller.simulate(batch, Draws(seed, 4))[-1]
        shifted = Batch(batch.x0 + 9, LABELS, 4)
        other = distiller.simulate(shifted, Draws(seed, 4))[-1]
        assert torch.equal(other.prediction.x0, distiller.student(x_t, t, LABELS).x0)
        assert not x_t.requires_grad and torch.equal(x_t, other.x_t) and len(t.unique()) == 1
        draws = Draws(seed, 4)
        start, done = draws.normal_like(batch.x0), draws.shared_integer(0, 4)
        with torch.no_grad():
            expected = rollout(
                distiller.student.conditioned(LABELS), distiller.sampler(), start, done, draws.normal_like
            )
        assert torch.equal(x_t, expected)
        seen[round(distiller.schedule.timestep(t[:1]).item())] = seed
    assert set(seen) == {999, 749, 499, 249}


def test_processes_agree_on_the_step():
    steps = [Draws(5, 4, rank=rank, world=3).shared_integer(0, 4) for rank in range(3)]
    assert len(set(steps)) == 1


@pytest.mark.parametrize(("steps", "timesteps"), [(1, [999]), (2, [999, 499]), (4, [999, 749, 499, 249])])
def test_the_export_samples_at_the_papers_timesteps_with_a_stock_scheduler(steps, timesteps):
    distiller = tiny(steps=steps)
    scheduler = to_diffusers(distiller.sampler(), distiller.family.scheduler_config)
    scheduler.set_timesteps(steps)
    assert isinstance(scheduler, LCMScheduler)
    assert scheduler.timesteps.tolist() == timesteps


# ---------------------------------------------------------------------------------------------- both banks


def test_under_adapters_a_checkpointed_turn_has_the_gradients_of_a_plain_one():
    """Two roles and the teacher pass through one network between a forward and its backward."""
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        distiller = tiny("adapter", Pixel.tiny(), steps=2, gan_weight=1.0)
        if checkpointed:
            distiller.bank.enable_checkpointing()
        torch.manual_seed(4)
        sum(distiller("student", batch_of_four(), Draws(1, 4)).terms.values()).backward()
        gradients.append([p.grad.clone() for p in distiller.bank.params("student")])
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)


def test_under_adapters_all_roles_share_one_base():
    family = Pixel.tiny()
    base = sum(p.numel() for p in family.network.parameters())
    distiller = tiny("adapter", family)
    for role in ("student", "fake"):
        assert sum(p.numel() for p in distiller.bank.params(role)) < base
    named = [name for name, _ in distiller.bank.named_parameters() if "lora_" not in name]
    assert sum(distiller.bank.get_parameter(name).numel() for name in named) == base


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("bank", ["copy", "adapter"])
def test_a_student_that_is_the_teacher_with_a_perfect_fake_score_feels_nothing(bank, guidance_scale):
    family = Pixel.tiny()
    banks = {"copy": CopyBank, "adapter": lambda net: AdapterBank(net, rank=2, targets=family.lora_targets)}
    options = {"gan_weight": 0.0, "guidance_scale": guidance_scale}
    distiller = DMD2(family, banks[bank](family.network), DMD2.Config(**options))
    loss = distiller("student", batch_of_four(), Draws(0, 4)).terms["matching"].item()
    assert loss == 0 if guidance_scale == 1 else loss > 0


# --------------------------------------------------------------------------------------------- the students


@pytest.mark.parametrize(
    ("steps", "gan_weight"), [(1, 0.03), *(pytest.param(steps, 0.0, marks=pytest.mark.product) for steps in (1, 2))]
)
def test_students_cover_all_modes_by_their_weights(steps, gan_weight):
    """Bound: chi-square over the modes of at most 0.02 a sample, which is shares within 6 % or so of a third."""
    options = {"steps": steps, "student_update_interval": 3, "gan_weight": gan_weight}
    options |= {"critic_weight": 0.1} if gan_weight else {}
    distiller = train_adversarially(DMD2, three_clusters(COSINE, "v_prediction"), 600, lr=1e-2, size=128, **options)
    shares, stray = mode_shares(distiller, 4000)
    assert mode_test(shares, 1) < 0.02, shares
    assert stray < 0.3


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1"),
        ({"student_update_interval": 0}, "student_update_interval: expected at least 1"),
        ({"student_update_interval": 1, "fake_update": "alternate"}, "no step"),
        ({"gan_weight": -1.0}, "gan_weight: expected at least 0"),
        ({"critic_weight": 0.0}, "critic_weight: expected above 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(DMD2.Config, options)


@pytest.mark.parametrize(
    ("options", "family", "message"),
    [
        ({"guidance_scale": 2.0}, lambda: Pixel.tiny(num_classes=None), "unconditional"),
        ({}, lambda: Pixel.tiny(prediction_type="epsilon"), "epsilon"),
    ],
)
def test_a_teacher_that_cannot_be_distilled_so_is_refused(options, family, message):
    with pytest.raises(ValueError, match=message):
        DMD2.check(DMD2.Config(**options), family())


def test_the_head_of_the_critic_has_a_rate_of_its_own(tmp_path):
    """Both are stepped in the fake score's turn; what is not given is the fake score's."""
    wanted = sections(tmp_path, teacher_for("dmd2"), "dmd2")
    wanted["optim"] = {"fake": {"lr": 1e-5, "clip": 3.0}, "head": {"lr": 1e-2}}
    run = Run(resolve(wanted))
    assert (run.config.optim["head"].lr, run.config.optim["head"].clip) == (1e-2, 3.0)
    trainer = make_trainer(run)
    before = {name: tensor.clone() for name, tensor in run.distiller.state_dict().items()}
    logs = trainer._move(run.distiller.turns["fake"], 0, [next(trainer._batches())])
    assert {"fake/grad_norm", "head/grad_norm"} <= logs.keys()
    moved = {}
    for name, tensor in run.distiller.state_dict().items():
        moved[name] = (tensor - before[name]).abs().max().item()
    head = max(value for name, value in moved.items() if name.startswith("head."))
    fake = max(value for name, value in moved.items() if ".fake." in name)
    assert head == pytest.approx(1e-2, rel=0.05) and fake == pytest.approx(1e-5, rel=0.05)  # Adam's first step
