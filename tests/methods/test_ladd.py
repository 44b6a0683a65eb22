"""LADD: when the student is asked where, what the critic sees, both banks, and a student that covers all modes."""

import pytest
import torch
from adversarial_students import mode_shares, mode_test, taught_by, train_adversarially
from mixtures import batch_of
from oracles import SCHEDULES, three_clusters

from stepdistill.batch import Batch
from stepdistill.families.pixel import Pixel
from stepdistill.files.schema import build
from stepdistill.methods.ladd import LADD
from stepdistill.networks.adapter_bank import AdapterBank
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.networks.denoiser import Denoiser
from stepdistill.randomness import Draws

ORACLE = three_clusters(SCHEDULES["cosine"], "v_prediction")


def pixel_distiller(bank="copy", **options):
    family = Pixel.tiny()
    banks = {"copy": CopyBank, "adapter": lambda n: AdapterBank(n, rank=2, targets=family.lora_targets)}
    return LADD(family, banks[bank](family.network), LADD.Config(**options))


def pixel_batch(size):
    return Batch(torch.randn(size, 1, 8, 8), {"class_labels": torch.arange(size) % 3}, size)


def test_the_student_is_first_asked_late_and_then_mostly_at_pure_noise():
    distiller = taught_by(LADD, ORACLE, steps=4, warmup=500)
    distiller.step_in_stage = 499
    assert distiller.shares().tolist() == [0, 0, 0.5, 0.5]
    distiller.step_in_stage = 500
    assert distiller.shares().tolist() == pytest.approx([0.7, 0.1, 0.1, 0.1])
    assert taught_by(LADD, ORACLE, steps=1).shares().tolist() == [1]


def test_the_times_come_as_often_as_they_should(monkeypatch):
    distiller = taught_by(LADD, ORACLE, steps=4, warmup=0)
    asked = []
    monkeypatch.setattr(Denoiser, "__call__", lambda self, x, t, cond: asked.append(t) or ORACLE_ANSWER(x))
    distiller.generate(batch_of(ORACLE, 4000), Draws(0, 4000))
    times, counts = asked[0].unique(return_counts=True)
    assert times.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert (counts / 4000).tolist() == pytest.approx([0.1, 0.1, 0.1, 0.7], abs=0.03)


class ORACLE_ANSWER:  # noqa: N801
    def __init__(self, x):
        self.x0 = x


def test_the_critic_comes_first_and_the_student_moves_on_every_nth_step_only():
    turns = taught_by(LADD, ORACLE, student_update_interval=5, critic_warmup=3).turns
    assert [step for step in range(20) if turns["student"].when(step)] == [7, 12, 17]
    assert all(turns["critic"].when(step) for step in range(20))


def test_what_the_critic_sees_depends_on_image_level_and_class():
    distiller = pixel_distiller()
    batch, t = pixel_batch(3), torch.full((3,), 0.5, dtype=torch.float64)
    logits = distiller.critic(batch.x0, batch.cond, t, Draws(0, 3))
    assert all(x.shape[0] == 3 for x in logits)
    for changed in (
        distiller.critic(batch.x0 + 1, batch.cond, t, Draws(0, 3)),
        distiller.critic(batch.x0, batch.cond, t / 2, Draws(0, 3)),
        distiller.critic(batch.x0, {"class_labels": torch.tensor([1, 2, 0])}, t, Draws(0, 3)),
        distiller.critic(batch.x0, batch.cond, t, Draws(1, 3)),
    ):
        assert not torch.allclose(torch.cat(changed, 1), torch.cat(logits, 1), atol=1e-6)


@pytest.mark.parametrize("bank", ["copy", "adapter"])
@pytest.mark.parametrize("r1", [0.0, 10.0])
def test_each_turn_moves_its_own_and_nothing_reaches_the_teacher(bank, r1):
    distiller = pixel_distiller(bank, r1=r1, warmup=0)
    for name, turn in distiller.turns.items():
        for other in distiller.turns.values():
            for parameter in other.params:
                parameter.requires_grad_(other is turn)
        terms = distiller(name, pixel_batch(4), Draws(0, 4)).terms
        assert ("r1" in terms) == (name == "critic" and r1 > 0)
        sum(terms.values()).backward()
        touched = {id(p) for p in distiller.parameters() if p.grad is not None}
        assert touched and touched <= {id(p) for p in turn.params}
        distiller.zero_grad(set_to_none=True)


@pytest.mark.parametrize("weight", [1.0, 10.0])
def test_r1_counts_as_much_as_it_should(weight):
    torch.manual_seed(0)
    distiller, batch = pixel_distiller(r1=weight), pixel_batch(4)
    term = distiller("critic", batch, Draws(0, 4)).terms["r1"]
    draws = Draws(0, 4)
    with torch.no_grad():
        distiller.generate(batch, draws)
        t = distiller.critic.view(batch, lambda: batch.x0, torch.ones(4), draws)
        for _ in range(2):  # real images and fake ones
            distiller.critic(batch.x0, batch.cond, t, draws)
        expected = weight * distiller.critic.r1(batch.x0, [], batch.cond, t, draws)
    torch.testing.assert_close(term.detach(), expected)


def test_bad_options_and_teachers_are_refused():
    with pytest.raises(ValueError, match="'epsilon' with alpha_T"):
        LADD.check(LADD.Config(), Pixel.tiny(prediction_type="epsilon"))
    with pytest.raises(ValueError, match="first_share: expected above 0 and at most 1, got 0"):
        build(LADD.Config, {"first_share": 0.0})
    with pytest.raises(ValueError, match="all 16 labels"):
        batch = pixel_batch(16)
        batch.cond["class_labels"][:] = 2
        pixel_distiller()("critic", batch, Draws(0, 16))


@pytest.mark.product
def test_a_one_step_student_of_a_mixture_covers_all_modes():
    """Bound: chi-square over the modes of at most 0.02 a sample, which is shares within 6 % or so of a third."""
    distiller = train_adversarially(LADD, ORACLE, 400, steps=1, location=-1.0, student_update_interval=1)
    shares, stray = mode_shares(distiller, 4000)
    assert mode_test(shares, 1) < 0.02, shares
    assert stray < 0.3
