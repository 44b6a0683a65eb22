"""SANA-Sprint: its parts, who moves when, what a step costs, the re-timing of a flow, and a mixture's students."""

import pytest
import torch
from adversarial_students import check_landings, train_adversarially
from contracts.cases import FLOW, pipeline_images, reference_images, scheduler_config, train_student
from network_calls import calls_of
from oracles import SCHEDULES, three_clusters

from stepdistill import load_pipeline
from stepdistill.batch import Batch
from stepdistill.diffusion.prediction import Prediction
from stepdistill.families.lumina2 import Lumina2
from stepdistill.families.pixel import Pixel
from stepdistill.families.wan import Wan
from stepdistill.files.schema import build
from stepdistill.methods.base import Stage
from stepdistill.methods.sana_sprint import RETIME, SanaSprint
from stepdistill.methods.scm import Scm
from stepdistill.networks.adapter_bank import AdapterBank
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.networks.features import BlockFeatures
from stepdistill.randomness import Draws

BATCH = Batch(torch.randn(4, 1, 8, 8), {"class_labels": torch.tensor([0, 1, 2, 0])}, 4)
both_banks = pytest.mark.parametrize("bank", ["copy", "adapter"])


def flow():
    return Pixel.tiny(scheduler=scheduler_config(FLOW))


def tiny(bank="copy", family=None, method=SanaSprint, **options):
    family = family or Pixel.tiny()
    banks = {"copy": CopyBank, "adapter": lambda net: AdapterBank(net, rank=2, targets=family.lora_targets)}
    torch.manual_seed(0)
    return method(family, banks[bank](family.network), method.Config(**options))


# --------------------------------------------------------------------------------------------------- its parts


@pytest.mark.parametrize("tangent", ["jvp", "difference"])
def test_the_consistency_loss_is_scms_bit_for_bit(tangent):
    options = {"tangent": tangent, "log_sigma_mean": 0.2, "log_sigma_std": 1.6, "warmup": 0, "guidance_scale": 2.0}
    whole = tiny(**options)("student", BATCH, Draws(3, 4)).terms["consistency"]
    assert torch.equal(whole, tiny(method=Scm, **options)("student", BATCH, Draws(3, 4)).terms["loss"])


def test_without_a_weight_the_critic_moves_nothing():
    terms = tiny(adversarial_weight=0.0)("student", BATCH, Draws(0, 4)).terms
    assert terms["adversarial"].item() == 0


def feature_passes(monkeypatch):
    """The images that the critic has looked at, and whether with a gradient by them, of every pass."""
    seen, call = [], BlockFeatures.__call__
    monkeypatch.setattr(
        BlockFeatures, "__call__",
        lambda self, x_t, t, cond: seen.append((len(x_t), x_t.requires_grad)) or call(self, x_t, t, cond),
    )  # fmt: skip
    return seen


@both_banks
@pytest.mark.parametrize(("guidance_scale", "teacher"), [(1.0, 1), (4.5, 2)])
@pytest.mark.parametrize(("largest_share", "passes"), [(0.0, 1), (0.5, 2)])
def test_a_step_costs_what_the_paper_states(monkeypatch, bank, guidance_scale, teacher, largest_share, passes):
    """METHODS_2026, 18.2: teacher 2 and once for features with input gradient, student a derivative and 1 or 2.

    The critic's turn: student 1, and the teacher's features of real and generated images.
    """
    distiller = tiny(bank, guidance_scale=guidance_scale, largest_share=largest_share)
    seen = feature_passes(monkeypatch)
    calls = calls_of(distiller, "student", BATCH, Draws(0, 4))
    assert calls == {"student": 1, "student with gradient": passes, "teacher": teacher} and seen == [(4, True)]
    seen.clear()
    assert calls_of(distiller, "critic", BATCH, Draws(0, 4)) == {"student": 1}
    assert seen == [(4, False), (4, False)]


def test_real_and_generated_images_share_the_level_and_not_the_noise(monkeypatch):
    """METHODS_2026, 18.2."""
    distiller, seen, call = tiny(), [], BlockFeatures.__call__
    monkeypatch.setattr(
        BlockFeatures, "__call__", lambda self, x, t, cond: seen.append((x, t)) or call(self, x, t, cond)
    )
    distiller.generate = lambda batch, draws, w=None: (batch.x0, torch.ones(4))  # a student of perfect copies
    distiller("critic", BATCH, Draws(0, 4))
    (real, t_real), (fake, t_fake) = seen
    assert torch.equal(t_real, t_fake) and len(t_real.unique()) == 4
    assert ((real - fake).flatten(1).abs().amax(1) > 1e-3).all()


def test_without_a_second_pass_the_images_of_the_consistency_loss_are_judged(monkeypatch):
    distiller, judged = tiny(largest_share=0.0), []
    consistency, see = distiller.consistency, distiller.critic.see
    monkeypatch.setattr(distiller, "consistency", lambda *given: judged.append(consistency(*given)) or judged[0])
    monkeypatch.setattr(distiller.critic, "see", lambda x0: judged.append(x0) or see(x0))
    distiller("student", BATCH, Draws(0, 4))
    assert judged[1] is judged[0].student.x0


def test_student_and_critic_take_turns():
    turns = tiny().turns
    assert [step for step in range(6) if turns["student"].when(step)] == [1, 3, 5]
    assert [step for step in range(6) if turns["critic"].when(step)] == [0, 2, 4]
    with pytest.raises(ValueError, match="student_update_interval: expected at least 2"):
        build(SanaSprint.Config, {"student_update_interval": 1})


def test_a_share_of_the_judged_images_is_made_of_pure_noise_and_knows_no_data():
    distiller, size = tiny(largest_share=0.25), 64
    labels = {"class_labels": torch.zeros(size, dtype=torch.long)}
    first, second = (Batch(torch.randn(size, 1, 8, 8), labels, size) for _ in range(2))
    with torch.no_grad():
        (x0, t), (other, _) = (distiller.generate(batch, Draws(1, size)) for batch in (first, second))
    largest = t == 1
    assert 0.1 < largest.float().mean() < 0.4
    torch.testing.assert_close(x0[largest], other[largest])
    assert (x0[~largest] != other[~largest]).flatten(1).any(1).all()


@pytest.mark.parametrize("tangent", ["jvp", "difference"])
@pytest.mark.parametrize("family", [Pixel.tiny, flow])
def test_a_student_that_is_told_the_scale_follows_the_teacher_of_that_scale(monkeypatch, tangent, family):
    options = {"guidance_range": (1.0, 5.0), "guidance_scale": 2.0, "tangent": tangent}
    family = family()
    family.add_inputs(SanaSprint.extra_inputs(SanaSprint.Config(**options)))
    distiller, told = tiny(family=family, **options), []
    call = Pixel.call
    monkeypatch.setattr(
        Pixel, "call",
        lambda self, network, *given, w=None, s=None: told.append(w) or call(self, network, *given, w=w, s=s),
    )  # fmt: skip
    for turn, calls in (("student", 2 + (tangent == "difference")), ("critic", 1)):
        told.clear()
        distiller(turn, BATCH, Draws(0, 4))
        w = [one for one in told if one is not None]
        assert len(told) > len(w) == calls and all(torch.equal(part, w[0][:4]) for one in w for part in one.split(4))
        assert ((w[0] >= 0) & (w[0] <= 4)).all() and len(w[0].unique()) == 4
    t = torch.full((4,), 0.4, dtype=torch.float64)
    found = distiller.consistency.path(BATCH.x0, t, Prediction(BATCH.x0, BATCH.x0), BATCH.cond, w[0])
    torch.testing.assert_close(found.x0, distiller.teacher.guided(BATCH.cond, w[0])(BATCH.x0, t).x0)
    assert distiller.contract() == {"guidance_range": [1.0, 5.0]} and distiller.result.w == 1.0


# --------------------------------------------------------------------------------------------------- re-timing


def test_only_a_flow_can_be_retimed():
    with pytest.raises(ValueError, match=r"method\.retime: expected 0.*DiscreteVP"):
        SanaSprint.check(SanaSprint.Config(retime=0.5), Pixel.tiny())
    SanaSprint.check(SanaSprint.Config(retime=0.5), flow())


def test_a_pipeline_that_takes_no_times_is_retimed_for_one_step_only():
    SanaSprint.check(SanaSprint.Config(retime=0.5, steps=1), Wan.tiny())
    with pytest.raises(ValueError, match=r"method\.retime: expected 0, got 0.5: .*takes no times"):
        SanaSprint.check(SanaSprint.Config(retime=0.5, steps=2), Wan.tiny())


def test_a_retimed_student_is_told_unit_times_and_differentiated_exactly():
    plain, retimed = (tiny(family=flow(), retime=share) for share in (0.0, 0.25))
    assert not plain.converts and not plain.consistency.is_exact and len(plain.stages(8)) == 1
    assert retimed.converts and retimed.consistency.is_exact
    assert [(stage.name, stage.steps) for stage in retimed.stages(8)] == [(RETIME, 2), ("train", 6)]
    t = torch.tensor([0.25, 1.0], dtype=torch.float64)
    assert torch.equal(retimed.student.schedule.timestep(t), t)
    assert torch.equal(retimed.teacher.schedule.timestep(t), 1000 * t)


def test_the_first_stage_teaches_the_student_its_new_times_and_leaves_the_critic_alone():
    distiller = tiny(family=flow(), retime=0.5)
    distiller.stage = Stage(RETIME, 40)
    assert all(distiller.turns["student"].when(step) and not distiller.turns["critic"].when(step) for step in range(4))
    optimizer, losses = torch.optim.Adam(distiller.bank.params("student"), lr=3e-3), []
    for _ in range(40):
        optimizer.zero_grad()
        loss = distiller("student", BATCH, Draws(0, 4)).terms["retiming"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert 0 < losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("family", "bank"),
    [(flow, "copy"), (flow, "adapter"), (Lumina2.tiny, "adapter")],
    ids=["sd3", "sd3-lora", "lumina2"],
)
def test_a_retimed_student_is_exported_with_its_own_timesteps(tmp_path, family, bank):
    """Lumina 2's pipeline tells the network ``1 - t / num_train_timesteps``."""
    run = train_student(tmp_path, family(), "sana_sprint", bank, options={"retime": 0.5})
    pipeline = load_pipeline(run.folder / "pipeline")
    assert pipeline.scheduler.config.num_train_timesteps == 1
    images = pipeline_images(pipeline, run.distiller.family, 3, seed=7)
    assert (images - reference_images(run, 3, seed=7)).abs().max() < 1e-5
    assert images.std() > 0.01


# ------------------------------------------------------------------------------------------------- students


@pytest.mark.product
def test_one_training_gives_students_of_1_2_and_4_steps_that_cover_all_modes():
    """Nearer to the data, by sliced Wasserstein, than their perfect teacher in as many calls: 1.1, 0.45 and 0.16."""
    torch.manual_seed(0)
    oracle = three_clusters(SCHEDULES["cosine"], "v_prediction")
    options = {
        "tangent": "difference", "sigma_data": 1.0, "log_sigma_mean": -0.3, "log_sigma_std": 1.2, "warmup": 150,
        "norm_floor": 0.35, "adversarial_weight": 0.1,
    }  # fmt: skip
    distiller = train_adversarially(SanaSprint, oracle, 1500, lr=3e-3, size=256, **options)
    check_landings(distiller, oracle)
