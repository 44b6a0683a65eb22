"""Latent consistency models: the guided skip step, the boundary, both banks, the twin, and a student of a mixture."""

from functools import partial

import pytest
import torch
from contracts.cases import CASES, Case, make_run, make_trainer
from mixtures import NEARER, Known, batch_of, landing, loss_of, make, put, train, walked
from oracles import SCHEDULES, PointNet, teacher_denoiser, three_clusters

from stepdistill.batch import Batch
from stepdistill.diffusion.ode import solver_step
from stepdistill.diffusion.samplers import ConsistencySampler, sample
from stepdistill.diffusion.schedulers import to_diffusers
from stepdistill.families.pixel import Pixel
from stepdistill.files.schema import build
from stepdistill.losses.consistency import skip_grid
from stepdistill.methods.cd import CD
from stepdistill.methods.lcm import LCM
from stepdistill.methods.tcd import TCD
from stepdistill.networks.adapter_bank import AdapterBank
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.networks.denoiser import Denoiser
from stepdistill.randomness import Draws
from stepdistill.training.run_state import load_weights, trained_weights

COSINE = SCHEDULES["cosine"]


def conditional():
    return three_clusters(COSINE, "v_prediction", conditional=True)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_skip_step_is_the_ddim_step_of_the_guided_teacher(scale):
    teacher = teacher_denoiser(conditional(), 3)
    x_t, t = torch.randn(3, 2, 1, 1, dtype=torch.float64), torch.full((3,), 0.5, dtype=torch.float64)
    cond, null = {"class_labels": torch.arange(3)}, {"class_labels": torch.full((3,), 3)}
    x_s = solver_step(teacher.guided(cond, scale - 1), x_t, t, t - 0.02, COSINE)
    with_condition, without = teacher(x_t, t, cond), teacher(x_t, t, null)
    x0 = scale * with_condition.x0 + (1 - scale) * without.x0
    eps = scale * with_condition.eps + (1 - scale) * without.eps
    alpha_s, sigma_s = (coefficient[:, None, None, None] for coefficient in COSINE(t - 0.02))
    assert torch.allclose(x_s, alpha_s * x0 + sigma_s * eps, atol=1e-12)
    assert torch.allclose(teacher.guided(cond, scale - 1)(x_t, t).x0, x0, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_loss_is_zero_at_the_guided_teachers_own_solver(scale):
    oracle = conditional()
    distiller = make(LCM, oracle, oracle, 3, guidance_scale=scale, solver_steps=10)
    grid = COSINE.trajectory(10)

    def end(x, t, labels):
        denoise = distiller.teacher.guided({"class_labels": labels}, scale - 1)
        return walked(lambda x, now, then: solver_step(denoise, x, now, then, COSINE), grid, x, t)

    batch = batch_of(oracle, 64, 3)
    before = loss_of(distiller, batch)
    put(distiller, Known(COSINE, "v_prediction", end))
    assert loss_of(distiller, batch) < 1e-6 < 1e-4 < before


def test_on_the_last_interval_the_target_is_where_the_step_ends():
    oracle = conditional()
    distiller = make(LCM, oracle, oracle, 3, guidance_scale=2.0, solver_steps=1, steps=1, distance="l2")
    batch = batch_of(oracle, 8, 3)
    noise = Draws(0, 8)
    noise.integers(0, 1)
    x_t = COSINE.add_noise(batch.x0, noise.normal_like(batch.x0), torch.ones(8))
    x0 = distiller.teacher.guided(batch.cond, 1.0)(x_t, torch.ones(8)).x0
    expected = (distiller.student(x_t, torch.ones(8), batch.cond).x0 - x0).square().mean()
    assert loss_of(distiller, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_copies_and_adapters_agree_before_the_first_step():
    losses = []
    for make_bank in (CopyBank, lambda network: AdapterBank(network, rank=2, targets=Pixel.lora_targets)):
        family = Pixel.tiny()
        distiller = LCM(family, make_bank(family.network), LCM.Config(guidance_scale=2.0))
        torch.manual_seed(0)
        batch = Batch(torch.randn(4, 1, 8, 8), family.example_cond(range(4)), 4)
        losses.append(distiller("student", batch, Draws(0, 4)).terms["loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_target_is_an_average():
    oracle = three_clusters(COSINE, "v_prediction")
    distiller = make(LCM, PointNet(COSINE, oracle), oracle, target_ema=0.9)
    with torch.no_grad():
        for parameter in distiller.bank.params("student"):
            parameter.add_(1.0)
    before = {name: tensor.clone() for name, tensor in distiller.bank.state("target").items()}
    distiller.after_step()
    after, student = distiller.bank.state("target"), distiller.bank.state("student")
    assert all(torch.allclose(after[name], 0.9 * before[name] + 0.1 * student[name]) for name in after)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_the_sampler_is_lcm_schedulers_own_grid(steps):
    family = Pixel.tiny()
    sampler = ConsistencySampler(family.schedule, skip_grid(family.schedule, steps, 50))
    scheduler = to_diffusers(sampler, family.scheduler_config)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == family.schedule.timestep(sampler.times[:-1]).round().tolist()
    pipeline = family.pipeline(family.network, sampler, 1.0)
    pipeline.set_progress_bar_config(disable=True)
    cond = family.example_cond(range(3))
    images = pipeline(**cond, output_type="pt", generator=torch.Generator().manual_seed(1)).images
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(3, *family.sample_shape, generator=generator)

    def noise(x):
        return torch.randn(x.shape, generator=generator)

    with torch.no_grad():
        teacher = Denoiser(family, CopyBank(family.network), "teacher")
        expected = family.decode(sample(teacher.conditioned(cond), sampler, start, noise))
    assert (images - expected).abs().max() < 1e-5


@pytest.mark.product
def test_one_student_of_the_mixture_lands_on_it_in_one_two_and_four_calls():
    oracle = three_clusters(COSINE, "v_prediction")
    distiller = train(LCM, oracle, 800, solver_steps=20, distance="l2", target_ema=0.9)
    for calls, part in NEARER.items():
        student, teacher = landing(distiller, oracle, calls)
        assert student < part * teacher, (calls, student, teacher)


def test_guidance_is_baked_in():
    """A guided student of one class lands where the guided teacher's solver does, not where its data lies."""
    oracle = conditional()
    distiller = train(LCM, oracle, 500, num_classes=3, distance="l2", steps=1, solver_steps=20, guidance_scale=3.0)
    labels = torch.arange(3).repeat(600)
    noise = torch.randn(1800, 2, 1, 1, dtype=torch.float64)
    denoise = distiller.teacher.guided({"class_labels": labels}, 2.0)
    grid, x = COSINE.trajectory(20), noise
    with torch.no_grad():
        for t, s in zip(grid[:-1], grid[1:], strict=True):
            x = solver_step(denoise, x, t.expand(1800), s.expand(1800), COSINE)
        student = sample(distiller.result.conditioned({"class_labels": labels}), distiller.sampler(), noise.float())
    assert (student - x).square().mean().sqrt() < 0.15


def ranged(**options):
    family = Pixel.tiny()
    config = LCM.Config(guidance_scale=2.0, guidance_range=(1.0, 5.0), solver_steps=10, **options)
    LCM.check(config, family)
    family.add_inputs(LCM.extra_inputs(config))
    return LCM(family, CopyBank(family.network), config)


def test_a_student_that_takes_the_scale_starts_as_the_teacher_and_learns_to_heed_it():
    distiller = ranged()
    cond = distiller.family.example_cond(range(4))
    x, t = torch.randn(4, 1, 8, 8), torch.full((4,), 0.7)
    low, high = torch.zeros(4), torch.full((4,), 4.0)
    assert torch.equal(distiller.student.raw(x, t, cond, w=low), distiller.teacher.raw(x, t, cond))
    optimizer = torch.optim.Adam(distiller.bank.params("student"), lr=1e-3)
    batch = Batch(torch.randn(4, 1, 8, 8), cond, 4)
    for seed in range(3):
        optimizer.zero_grad()
        distiller("student", batch, Draws(seed, 4)).terms["loss"].backward()
        optimizer.step()
    assert not torch.equal(distiller.student.raw(x, t, cond, w=low), distiller.student.raw(x, t, cond, w=high))
    by_default = distiller.student.raw(x, t, cond)
    assert torch.equal(by_default, distiller.student.raw(x, t, cond, w=torch.ones(4)))


def test_the_target_of_each_sample_is_guided_by_the_scale_it_is_told(monkeypatch):
    distiller = ranged()
    seen = []
    plain = Denoiser.raw
    monkeypatch.setattr(
        Denoiser, "raw", lambda self, *args, w=None, **kw: seen.append((self.role, w)) or plain(self, *args, w=w, **kw)
    )
    batch = Batch(torch.randn(4, 1, 8, 8), distiller.family.example_cond(range(4)), 4)
    distiller("student", batch, Draws(0, 4))
    told = dict(seen)
    assert told["teacher"] is None and torch.equal(told["student"], told["target"])
    assert ((told["student"] >= 0) & (told["student"] <= 4)).all() and told["student"].unique().numel() == 4


# ------------------------------------------------------------------------------------------ a target without average


@pytest.mark.parametrize("method", [CD, LCM, TCD])
def test_a_target_without_average_is_the_student_and_costs_no_network(method):
    family = Pixel.tiny()
    distiller = method(family, CopyBank(family.network), method.Config(target_ema=0.0))
    assert distiller.bank.roles == ("teacher", "student") and distiller.target is distiller.student


@pytest.mark.parametrize("bank", ["copy", "adapter"])
def test_it_trains_as_a_copy_that_is_renewed_every_step(bank):
    """Which is what it was in older versions. A product's rounding may depend on where its factors are in memory."""
    losses = {}
    for decay in (0.0, 0.5):
        family = Pixel.tiny()
        for module in family.network.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
        torch.manual_seed(0)
        banks = {"copy": CopyBank, "adapter": partial(AdapterBank, rank=2, targets=family.lora_targets)}
        distiller = LCM(family, banks[bank](family.network), LCM.Config(target_ema=decay)).train()
        if decay:
            distiller._averages["target"] = lambda: 0.0
        optimizer = torch.optim.SGD(distiller.bank.params("student"), lr=0.1)
        losses[decay] = []
        for step in range(3):
            torch.manual_seed(step)
            batch = Batch(torch.ones(4, *family.sample_shape), family.example_cond(range(4)), 4)
            loss = distiller("student", batch, Draws(step, 4)).terms["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            distiller.after_step()
            losses[decay].append(loss.item())
    assert losses[0.0] == pytest.approx(losses[0.5], rel=1e-5) and len(set(losses[0.0])) == 3


def test_a_checkpoint_that_holds_such_a_copy_still_resumes(tmp_path, monkeypatch):
    monkeypatch.setitem(CASES, "lcm", Case({"target_ema": 0.0}))
    trainer = make_trainer(make_run(tmp_path / "none", "lcm"))
    student = trainer.distiller.bank.state("student")
    old = {name: tensor + 1 for name, tensor in trained_weights(trainer.distiller).items()}
    copy = {f"target/{name}": tensor.clone() for name, tensor in student.items()}
    load_weights(trainer.distiller, old | copy)
    assert all(torch.equal(tensor, old[f"student/{name}"]) for name, tensor in student.items())
    monkeypatch.setitem(CASES, "lcm", Case({"target_ema": 0.9}))
    with pytest.raises(ValueError, match="target/"):
        load_weights(make_trainer(make_run(tmp_path / "some", "lcm")).distiller, old)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_range": (3.0, 2.0)}, "1 <= low < high"),
        ({"guidance_range": (0.5, 2.0)}, r"guidance_range\[0\]: expected at least 1, got 0.5"),
        ({"guidance_range": (2.0, 4.0), "guidance_scale": 8.0}, "guidance_scale: expected one in"),
        ({"target_ema": 1.0}, "target_ema"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(LCM.Config, options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 3.0}, "unconditional"),
        ({"guidance_range": (1.0, 4.0)}, "unconditional"),
        ({"guidance_scale": 0.0}, "at least 1"),
        ({"steps": 51}, "expected 1 to solver_steps = 50"),
        ({"solver_steps": 2000}, "1000 timesteps"),
    ],
)
def test_what_cannot_work_is_said_before_the_first_step(options, message):
    with pytest.raises(ValueError, match=message):
        LCM.check(LCM.Config(**options), Pixel.tiny(num_classes=None))
