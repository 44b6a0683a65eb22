"""TCD in segments: PCM, which jumps to a segment's end, and Hyper-SD's stages."""

import pytest
import torch
from adversarial_students import mode_shares, mode_test, train_adversarially
from mixtures import Known, batch_of, landing, loss_of, make, put, train
from network_calls import calls_of, features_of
from oracles import SCHEDULES, Gaussian, PointNet, three_clusters

from stepdistill.batch import Batch
from stepdistill.diffusion.schedule import expand
from stepdistill.families.pixel import Pixel
from stepdistill.files.schema import build
from stepdistill.methods.base import Stage
from stepdistill.methods.lcm import LCM
from stepdistill.methods.tcd import TCD
from stepdistill.networks.adapter_bank import AdapterBank
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.randomness import Draws

COSINE = SCHEDULES["cosine"]
TWO = torch.tensor([0.3, -0.2], dtype=torch.float64)
PCM = {"target": "edge", "gamma": 0.0}


def staged(distiller, count):
    distiller.stage = Stage(f"{count}-steps", 100, count)
    return distiller


def pcm(count, oracle, **options):
    return staged(make(TCD, oracle, oracle, steps=count, segments=(count,), **PCM, **options), count)


@pytest.mark.parametrize("name", ["cosine", "karras"])
@pytest.mark.parametrize(("steps", "count"), [(12, 4), (10, 4), (7, 7), (9, 1)])
def test_a_segment_ends_where_a_sampler_of_as_many_steps_begins_the_next(name, steps, count):
    schedule, prediction_type = SCHEDULES[name], "v_prediction" if name == "cosine" else "epsilon"
    distiller = pcm(count, Gaussian(TWO, 0.5, schedule, prediction_type), solver_steps=steps)
    grid, times = schedule.trajectory(steps), distiller.sampler().times
    times = torch.cat([times[:-1], grid[-1:]])  # EDM's trajectory ends at sigma_min
    for i, end in enumerate(distiller.segment_ends(count)):
        below = times[times < grid[i] - 1e-9]  # an end of a segment belongs to the one above it
        assert grid[end] == below[0]


def test_where_segments_end_is_computed_once_a_stage(monkeypatch):
    oracle, counts, plain = three_clusters(COSINE, "v_prediction"), [], TCD.segment_ends
    monkeypatch.setattr(TCD, "segment_ends", lambda self, count: counts.append(count) or plain(self, count))
    distiller = pcm(2, oracle, solver_steps=20)
    for _ in range(2):
        loss_of(distiller, batch_of(oracle, 4))
    assert counts == [2]


def test_of_one_segment_it_is_lcm():
    """The same target and the same input, with the same noise; METHODS_2026, 21.1."""
    oracle = three_clusters(COSINE, "v_prediction")
    phased = pcm(1, oracle, solver_steps=20, distance="l2", target_ema=0.0)
    lcm = make(LCM, oracle, oracle, solver_steps=20, distance="l2", target_ema=0.0)
    batch = batch_of(oracle, 64)
    assert loss_of(phased, batch) > 0 and torch.equal(loss_of(phased, batch), loss_of(lcm, batch))


def test_of_as_many_segments_as_teacher_steps_the_target_is_the_teachers_step():
    oracle = three_clusters(COSINE, "v_prediction")
    distiller = pcm(20, oracle, solver_steps=20, distance="l2")
    assert loss_of(distiller, batch_of(oracle, 64)).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_exact_solution_to_the_segments_end_is_an_optimum(count):
    """Of a Gaussian, in the limit of a fine grid: t implies s, so that a network of one time can be exact."""
    oracle, losses = Gaussian(TWO, 0.5, COSINE, "v_prediction"), []
    for n in (16, 128):
        distiller = pcm(count, oracle, solver_steps=n, distance="l2")
        grid, ends = COSINE.trajectory(n), distiller.segment_ends(count)

        def end(x_t, t, labels, grid=grid, ends=ends):
            """The clean image whose DDIM step lands where the exact path is at the segment's end."""
            s = grid[ends[(grid[:-1] - t[:, None]).abs().argmin(1)]]
            (alpha_t, sigma_t), (alpha_s, sigma_s) = COSINE.coefficients(t, x_t), COSINE.coefficients(s, x_t)
            landed, ratio = oracle.solve(x_t, t, s), sigma_s / sigma_t
            return torch.where(expand(t <= s, x_t) > 0, x_t, (landed - ratio * x_t) / (alpha_s - ratio * alpha_t))

        put(distiller, Known(COSINE, "v_prediction", end))
        losses.append(loss_of(distiller, batch_of(oracle, 512)).item())
    assert losses[1] < losses[0] / 20 and losses[1] < 1e-4


def test_jumps_anywhere_in_a_segment_never_leave_it(monkeypatch):
    oracle = Gaussian(TWO, 0.5, COSINE, "v_prediction")
    distiller = staged(make(TCD, oracle, oracle, steps=4, segments=(4,), gamma=0.0, solver_steps=12), 4)
    jumps = []
    monkeypatch.setattr(distiller, "jump", lambda d, x, t, s, cond: jumps.append((t, s)) or x)
    distiller("student", batch_of(oracle, 500), Draws(0, 500))
    (_, s), (t, _) = jumps
    times = distiller.sampler().times
    segment = lambda time: torch.searchsorted(times.flip(0), time)  # noqa: E731
    assert ((segment(t) == segment(s)) | (segment(t) == segment(s) + 1)).all() and (s < t).all()
    assert len(set(zip(t.tolist(), s.tolist(), strict=True))) == 4 * (3 + 2 + 1)


def test_without_segments_it_is_tcd_to_the_bit():
    oracle = three_clusters(COSINE, "v_prediction")
    batch = batch_of(oracle, 32)
    plain, one = make(TCD, oracle, oracle), staged(make(TCD, oracle, oracle, segments=(1,)), 1)
    assert torch.equal(loss_of(plain, batch), loss_of(one, batch))


def test_stages_have_the_samplers_of_their_students():
    oracle = Gaussian(TWO, 0.5, COSINE, "v_prediction")
    distiller = make(TCD, oracle, oracle, steps=2, segments=(8, 4, 2, 1), solver_steps=40)
    stages = distiller.stages(80)
    assert [(stage.value, stage.steps) for stage in stages] == [(8, 20), (4, 20), (2, 20), (1, 20)]
    for stage, steps in zip(stages, (8, 4, 2, 2), strict=True):
        distiller.stage = stage
        assert distiller.sampler().steps == steps
    assert distiller.sampler().gamma == 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segments": [4], "steps": 2, "gamma": 0.0}, "steps: expected the last number of segments, 4, got 2"),
        ({"segments": [4], "gamma": 0.2}, "gamma: expected 0 with segments"),
        ({"target": "edge", "steps": 4}, "steps: expected the last number of segments, 1, got 4"),
        ({"segments": [0]}, "expected at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(TCD.Config, options)


@pytest.mark.product
def test_a_phased_student_of_two_clusters_steps_is_nearer_to_the_data_than_its_teacher():
    """0.37 to 0.46 of the teacher's distance under three seeds; after half as many steps, 0.47 to 0.50."""
    oracle = three_clusters(COSINE, "v_prediction")
    distiller = train(TCD, oracle, 2400, steps=2, segments=(2,), solver_steps=20, **PCM)
    student, teacher = landing(distiller, oracle, 2, size=6000)
    assert student < 0.5 * teacher


# ----------------------------------------------------------------------------------- the critic of landed states


def judged_by_a_critic(**options):
    return staged(taught(steps=2, segments=(2,), **options), 2)


def taught(**options):
    """A student of a network with blocks that a critic can watch."""
    oracle = three_clusters(COSINE, "v_prediction")
    return make(TCD, PointNet(COSINE, oracle), oracle, **PCM, **options)


def test_without_weight_there_is_no_critic_and_with_one_the_distance_stays_the_same_to_the_bit():
    batch = batch_of(three_clusters(COSINE, "v_prediction"), 32)
    torch.manual_seed(0)
    plain = judged_by_a_critic()
    torch.manual_seed(0)
    critic = judged_by_a_critic(adversarial_weight=0.1)
    assert not hasattr(plain, "critic") and plain.turns["student"].head == []
    terms = critic("student", batch, Draws(0, 32)).terms
    assert torch.equal(terms["loss"], plain("student", batch, Draws(0, 32)).terms["loss"])
    assert terms.keys() == {"loss", "adversarial", "critic"}


def test_the_students_term_moves_the_student_and_the_critics_term_the_critic():
    distiller = judged_by_a_critic(adversarial_weight=0.1)
    batch = batch_of(three_clusters(COSINE, "v_prediction"), 32)
    groups = {"adversarial": distiller.bank.params("student"), "critic": list(distiller.critic.parameters())}
    for name, own in groups.items():
        distiller("student", batch, Draws(0, 32)).terms[name].backward()
        touched = {id(p) for p in distiller.parameters() if p.grad is not None and p.grad.abs().max() > 0}
        assert touched and touched <= set(map(id, own)), name
        distiller.zero_grad(set_to_none=True)
    assert all(parameter.requires_grad for parameter in groups["critic"])


def test_of_as_many_segments_as_teacher_steps_student_and_target_look_the_same_to_the_critic():
    """The student's jump is then the teacher's step: both sides are told what an undecided critic tells."""
    oracle = three_clusters(COSINE, "v_prediction")
    options = {"steps": 20, "segments": (20,), "solver_steps": 20, "adversarial_weight": 0.1}
    distiller = staged(taught(**options), 20)
    judged = []
    look = distiller.critic.features
    distiller.critic.features = lambda x, t, cond: judged.append((x, t)) or look(x, t, cond)
    distiller.critic.level = lambda judged: judged.s.clamp(min=1e-6)  # without noise added
    distiller("student", batch_of(oracle, 64), Draws(0, 64))
    (real, _), (fake, _) = judged
    torch.testing.assert_close(real, fake, rtol=1e-3, atol=1e-3)


def test_a_step_shares_its_calls_with_the_critic():
    """The teacher's and the target's call, the student's with gradient, and one pass of the critic a side."""
    distiller = judged_by_a_critic(adversarial_weight=0.1)
    batch = batch_of(three_clusters(COSINE, "v_prediction"), 16)
    found = calls_of(distiller, "student", batch, Draws(0, 16))
    assert found == {"teacher": 1, "target": 1, "student with gradient": 1}
    assert features_of(distiller, "student", batch, Draws(0, 16)) == 2


def test_landed_states_are_judged_at_levels_between_where_a_jump_ends_and_where_it_begins(monkeypatch):
    """21.1: the critic sees pairs at a level of s to t."""
    distiller, jumps, levels = judged_by_a_critic(adversarial_weight=0.1), [], []
    jump, alone = distiller.jump, distiller.critic.alone
    monkeypatch.setattr(distiller, "jump", lambda d, x, t, s, cond: jumps.append(t) or jump(d, x, t, s, cond))
    monkeypatch.setattr(distiller.critic, "alone", lambda *given: levels.append(given[:2]) or alone(*given))
    distiller("student", batch_of(three_clusters(COSINE, "v_prediction"), 400), Draws(0, 400))
    ((s, level),), t = levels, jumps[-1]
    assert (s <= level).all() and (level <= t).all()
    share = (level - s) / (t - s)
    assert share.mean().item() == pytest.approx(0.5, abs=0.05) and share.std().item() == pytest.approx(0.29, abs=0.03)


@pytest.mark.parametrize("bank", ["copy", "adapter"])
@pytest.mark.parametrize("options", [PCM, {"gamma": 0.0}], ids=["edge", "random"])
@pytest.mark.parametrize(("guidance_scale", "teacher"), [(1.0, 1), (3.0, 2)])
def test_a_step_costs_what_the_papers_state(bank, options, guidance_scale, teacher):
    """METHODS_2026, 23.1: the teacher's step, guided twice, the target and the student with gradient, once each."""
    family, config = Pixel.tiny(), TCD.Config(steps=2, segments=(4, 2), guidance_scale=guidance_scale, **options)
    banks = {"copy": CopyBank, "adapter": lambda net: AdapterBank(net, rank=2, targets=family.lora_targets)}
    distiller = staged(TCD(family, banks[bank](family.network), config), 4)
    batch = Batch(torch.randn(4, 1, 8, 8), {"class_labels": torch.tensor([0, 1, 2, 0])}, 4)
    found = calls_of(distiller, "student", batch, Draws(0, 4))
    assert found == {"teacher": teacher, "target": 1, "student with gradient": 1}


@pytest.mark.product
def test_a_phased_student_with_a_critic_covers_all_modes():
    torch.manual_seed(0)
    oracle = three_clusters(COSINE, "v_prediction")
    options = {"steps": 2, "segments": (2,), "solver_steps": 20, "adversarial_weight": 0.1} | PCM
    distiller = train_adversarially(TCD, oracle, 600, **options)
    shares, stray = mode_shares(distiller, 3000)
    student, teacher = landing(distiller, oracle, 2, size=3000)
    assert mode_test(shares, 1) < 0.02 and stray < 0.1, shares
    assert student < 0.6 * teacher


@pytest.mark.parametrize("segments", [[8, 4, 4], [4, 8], [64, 4], [4, 4]])
def test_segments_fall_and_no_more_of_them_than_the_solver_has_steps(segments):
    with pytest.raises(ValueError, match="segments: expected falling numbers, at most solver_steps = 50, got"):
        build(TCD.Config, {"segments": segments, "solver_steps": 50, "steps": segments[-1]})
