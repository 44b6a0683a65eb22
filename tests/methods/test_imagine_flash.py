"""Imagine Flash: backward distillation, the teacher's walk, noise correction here and in diffusers, and all modes."""

import pytest
import torch
from adversarial_students import mode_shares, mode_test, taught_by, train_adversarially
from diffusers import DDIMScheduler
from mixtures import batch_of
from oracles import SCHEDULES, Gaussian, OracleFamily, native_types, three_clusters
from torch import nn

from stepdistill.batch import Batch
from stepdistill.diffusion.prediction import Prediction, from_x0, to_prediction
from stepdistill.diffusion.samplers import DDIM, NoiseCorrected, rollout, sample
from stepdistill.export.contract import Origin
from stepdistill.export.pipeline import export_pipeline, load_pipeline
from stepdistill.families.pixel import Pixel
from stepdistill.features.classifier import SmallConvNet
from stepdistill.files.schema import build
from stepdistill.methods.add import ADD
from stepdistill.methods.imagine_flash import ImagineFlash
from stepdistill.networks.adapter_bank import AdapterBank
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.networks.denoiser import Denoiser
from stepdistill.randomness import Draws

TWO = torch.tensor([0.3, -0.2], dtype=torch.float64)
COSINE = SCHEDULES["cosine"]
ORACLE = three_clusters(COSINE, "v_prediction")
EPSILON = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "epsilon"}


def first_step_at(done, monkeypatch):
    monkeypatch.setattr(Draws, "shared_integer", lambda self, low, high: done)


# ----------------------------------------------------------------------------------------- backward distillation


def test_a_rollout_of_no_steps_is_the_noise(monkeypatch):
    first_step_at(0, monkeypatch)
    distiller = taught_by(ImagineFlash, ORACLE)
    seen = []
    student = lambda x, t, cond: seen.append((x, t)) or ORACLE_ANSWER(x)  # noqa: E731
    monkeypatch.setattr(Denoiser, "__call__", lambda self, *args, **options: student(*args))
    batch = batch_of(ORACLE, 5)
    distiller.generate(batch, Draws(3, 5))
    noise = Draws(3, 5).normal_like(batch.x0)
    assert torch.equal(seen[0][0], distiller.schedule.initial_noise(noise)) and (seen[0][1] == 1).all()


def ORACLE_ANSWER(x):  # noqa: N802
    return Prediction(x, x)


@pytest.mark.parametrize("done", [0, 1, 2])
def test_inputs_are_the_students_own_rollout_whatever_the_data(done, monkeypatch):
    first_step_at(done, monkeypatch)
    distiller = taught_by(ImagineFlash, ORACLE)
    a, b = batch_of(ORACLE, 5), batch_of(ORACLE, 5)
    x0, shown, t = distiller.generate(a, Draws(3, 5))
    assert torch.equal(x0, distiller.generate(b, Draws(3, 5))[0]) and (t == distiller.sampler().times[done]).all()
    start = distiller.schedule.initial_noise(Draws(3, 5).normal_like(a.x0))
    x_t = rollout(distiller.student.conditioned({}), distiller.sampler(), start, done, torch.randn_like)
    assert torch.equal(shown, x_t) and torch.equal(x0, distiller.student(x_t, t, {}).x0)


def test_the_gradient_reaches_the_last_call_only(monkeypatch):
    first_step_at(2, monkeypatch)
    family = Pixel.tiny()
    distiller = ImagineFlash(family, CopyBank(family.network), ImagineFlash.Config())
    calls, original = [], distiller.student.raw

    def raw(*args, **kwargs):
        calls.append(original(*args, **kwargs))
        return calls[-1]

    distiller.student.raw = raw
    distiller.generate(pixel_batch(4), Draws(0, 4))
    assert [call.requires_grad for call in calls] == [False, False, True]


def pixel_batch(size):
    return Batch(torch.randn(size, 1, 8, 8), {"class_labels": torch.arange(size) % 3}, size)


# ---------------------------------------------------------------------------------------- shifted reconstruction


def test_gamma_is_monotone_and_small_for_small_times():
    shifted = {"reconstruction": "shifted", "shift_power": 2.0, "shift_top": 0.9}
    gamma = taught_by(ImagineFlash, ORACLE, **shifted).gamma(torch.tensor([0.0, 0.25, 0.5, 1]))
    assert gamma.tolist() == pytest.approx([0, 0.9 / 16, 0.9 / 4, 0.9])
    straight = taught_by(ImagineFlash, ORACLE, **(shifted | {"shift_power": 1.0, "shift_top": 1.0}))
    assert straight.gamma(torch.tensor([0.3, 1.0])).tolist() == pytest.approx([0.3, 1.0])


@pytest.mark.parametrize("name", ["linear", "cosine", "flow", "karras"])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_teachers_walk_is_a_product_of_gains(name, k):
    schedule = SCHEDULES[name]
    kind = {"flow": "flow", "karras": "edm"}.get(name, "v_prediction")
    oracle = Gaussian(TWO, 0.5, schedule, kind)
    distiller = taught_by(ImagineFlash, oracle, teacher_steps=k, reconstruction="shifted", shift_top=0.8, steps=1)
    x0, noise = torch.randn(2, 4, 2, 1, 1, dtype=torch.float64)
    t = torch.tensor([0.2, 0.5, 0.7, 1.0], dtype=torch.float64)
    grid = [distiller.gamma(t) * i / k for i in range(k, -1, -1)]
    gain = torch.stack([oracle.gain(a, b) for a, b in zip(grid[:-1], grid[1:], strict=True)]).prod(0)
    x, start = distiller.start(x0, torch.zeros_like(x0), t, noise)
    assert torch.equal(x, schedule.add_noise(x0, noise, grid[0])) and torch.equal(start, grid[0])
    expected = oracle.centre(x, grid[-1]) + gain[:, None, None, None] * (x - oracle.centre(x, grid[0]))
    assert torch.allclose(distiller.reconstruction(x, start, {}), expected, atol=1e-9)


def test_one_step_without_shift_is_adds_target():
    flash = taught_by(ImagineFlash, ORACLE, teacher_steps=1, reconstruction="shifted", shift_power=1.0, shift_top=1.0)
    add = taught_by(ADD, ORACLE)
    x0, noise = torch.randn(2, 4, 2, 1, 1, dtype=torch.float64)
    t = torch.tensor([0.2, 0.5, 0.7, 0.9], dtype=torch.float64)
    found = flash.reconstruction(*flash.start(x0, torch.zeros_like(x0), t, noise), {})
    assert torch.allclose(found, add.distillation_target(x0, noise, t, {}), atol=1e-12)


def test_without_a_shift_the_teacher_walks_from_what_the_student_was_shown():
    """In one step, a student that is the teacher is then where it should be; shifted, it is not."""
    losses = {}
    for kind in ("plain", "shifted"):
        distiller = taught_by(ImagineFlash, ORACLE, teacher_steps=1, reconstruction=kind)
        x0, x_t, t = distiller.generate(batch_of(ORACLE, 50), Draws(0, 50))
        target = distiller.reconstruction(*distiller.start(x0, x_t, t, torch.randn_like(x0)), {})
        losses[kind] = (x0 - target).square().mean().item()
    assert losses["plain"] == 0 and losses["shifted"] > 1e-3
    x_t, t = torch.randn(4, 2, 1, 1), torch.full((4,), 0.5)
    plain = taught_by(ImagineFlash, ORACLE, reconstruction="plain")
    assert all(map(torch.equal, plain.start(x_t + 1, x_t, t, x_t + 2), (x_t, t)))


def test_an_answer_that_is_the_data_costs_nothing():
    point = Gaussian(TWO, 0.0, COSINE, "v_prediction")
    distiller = taught_by(ImagineFlash, point)
    answer = TWO[:, None, None].expand(5, -1, -1, -1)
    noise, t = torch.randn_like(answer), torch.full((5,), 0.5).double()
    target = distiller.reconstruction(*distiller.start(answer, noise, t, noise), {})
    assert torch.allclose(target, answer, atol=1e-9)


# ---------------------------------------------------------------------------------------------- noise correction


@pytest.mark.parametrize(
    ("name", "kind"), [("zero_snr", "v_prediction"), ("zero_snr", "sample"), ("flow", "flow"), ("trig", "trigflow")]
)
def test_where_the_network_knows_the_noise_the_correction_is_ddim(name, kind):
    assert kind in native_types(SCHEDULES[name])
    schedule, grid = SCHEDULES[name], torch.tensor([1.0, 0.5, 0.25, 0.0])
    x = schedule.initial_noise(torch.randn(4, 2, 1, 1, dtype=torch.float64))
    output = torch.randn(4, 2, 1, 1, dtype=torch.float64)
    for t, s in ((1.0, 0.5), (0.5, 0.25)):
        t, s = torch.full((4,), t).double(), torch.full((4,), s).double()
        prediction = to_prediction(output, x, t, schedule, kind)
        steps = [rule(schedule, grid).step(prediction, t, s, torch.randn_like) for rule in (DDIM, NoiseCorrected)]
        assert torch.allclose(*steps, atol=1e-12)


@pytest.mark.parametrize("name", ["scaled_linear", "karras"])
def test_the_corrected_step_keeps_the_noise(name):
    schedule = SCHEDULES[name]
    grid = schedule.grid(3)
    z = torch.randn(4, 2, 1, 1, dtype=torch.float64)
    x, t, s = schedule.initial_noise(z), grid[:1].expand(4), grid[1:2].expand(4)
    prediction = to_prediction(torch.randn_like(z), x, t, schedule, "epsilon")
    alpha, sigma = schedule(s[:1])
    corrected = NoiseCorrected(schedule, grid).step(prediction, t, s, torch.randn_like)
    assert torch.allclose(corrected, alpha * prediction.x0 + sigma * z, atol=1e-6)


def test_the_corrected_step_keeps_the_marginals_of_a_student_that_answers_with_data():
    schedule, size, std = SCHEDULES["scaled_linear"], 100_000, 0.5
    x = schedule.initial_noise(torch.randn(size, 1, 1, 1, dtype=torch.float64))
    grid, data = schedule.grid(3), std * torch.randn_like(x)
    t, s = grid[:1].expand(size), grid[1:2].expand(size)
    state = from_x0(data, x, t, schedule, "epsilon")
    corrected = NoiseCorrected(schedule, grid).step(
        to_prediction(state, x, t, schedule, "epsilon"), t, s, torch.randn_like
    )
    alpha, sigma = (c[0].item() for c in schedule(s))
    assert corrected.std().item() == pytest.approx((alpha**2 * std**2 + sigma**2) ** 0.5, rel=0.01)


def sampler_of(family, steps):
    return ImagineFlash.make_sampler(ImagineFlash.Config(steps=steps), family)


def test_the_sampler_is_stock_wherever_it_can_be():
    def family(name, kind):
        return OracleFamily(nn.Identity(), SCHEDULES[name], kind)

    assert isinstance(sampler_of(family("zero_snr", "v_prediction"), 2), DDIM)
    assert isinstance(sampler_of(family("zero_snr", "v_prediction"), 3), NoiseCorrected)  # 3 does not divide 1000
    assert isinstance(sampler_of(family("scaled_linear", "v_prediction"), 2), NoiseCorrected)  # a signal at the end
    assert isinstance(sampler_of(family("flow", "flow"), 3), DDIM)
    assert isinstance(sampler_of(family("scaled_linear", "epsilon"), 1), DDIM)
    assert isinstance(sampler_of(family("scaled_linear", "epsilon"), 2), NoiseCorrected)
    assert isinstance(sampler_of(family("karras", "edm"), 2), DDIM)  # its noise errs by a part in sigma_max


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("num_classes", [3, None])
def test_the_exported_scheduler_corrects_the_noise_as_the_sampler_does(tmp_path, num_classes, steps):
    config = dict(DDIMScheduler(**EPSILON).config)
    family = Pixel.tiny(scheduler=config, num_classes=num_classes)
    sampler = sampler_of(family, steps)
    export_pipeline(family, family.network, sampler, tmp_path / "pipeline", origin=Origin(method="imagine_flash"))
    pipeline = load_pipeline(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    cond = family.example_cond(range(4))
    images = pipeline(
        **(cond or {"batch_size": 4}), generator=torch.Generator().manual_seed(1), output_type="pt"
    ).images
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, stock = (
            family.decode(sample(lambda x, t: denoise(family, x, t, cond), rule, noise))
            for rule in (sampler, DDIM(family.schedule, family.schedule.grid(steps)))
        )
    assert (images - expected).abs().max() < 1e-5
    assert (expected - stock).abs().max() > 1e-3  # else this tested nothing


def denoise(family, x, t, cond):
    return to_prediction(family.call(family.network, x, t, cond), x, t, family.schedule, family.prediction_type)


# --------------------------------------------------------------------------------------------------- the turns


@pytest.fixture
def critics(tmp_path):
    """What a critic can see through, by name: the value of ``features``."""
    SmallConvNet(width=4, num_features=6).save_pretrained(tmp_path)
    return {"teacher": "teacher", "network": str(tmp_path)}


@pytest.mark.parametrize(("bank", "eyes"), [("copy", "teacher"), ("adapter", "teacher"), ("copy", "network")])
def test_each_turn_moves_its_own_and_nothing_reaches_the_teacher(bank, eyes, critics):
    family = Pixel.tiny()
    banks = {"copy": CopyBank, "adapter": lambda n: AdapterBank(n, rank=2, targets=family.lora_targets)}
    config = ImagineFlash.Config(guidance_scale=2.0, features=critics[eyes])
    distiller = ImagineFlash(family, banks[bank](family.network), config)
    assert set(distiller.feature_networks()) == (set() if eyes == "teacher" else {"method.features"})
    for name, turn in distiller.turns.items():
        for other in distiller.turns.values():
            for parameter in other.params:
                parameter.requires_grad_(other is turn)
        sum(distiller(name, pixel_batch(4), Draws(0, 4)).terms.values()).backward()
        touched = {id(p) for p in distiller.parameters() if p.grad is not None}
        assert touched and touched <= {id(p) for p in turn.params}
        distiller.zero_grad(set_to_none=True)


def test_bad_options_and_teachers_are_refused():
    with pytest.raises(ValueError, match="steps: expected at least 1"):
        build(ImagineFlash.Config, {"steps": 0})
    with pytest.raises(ValueError, match="shift_top"):
        build(ImagineFlash.Config, {"shift_top": 0.0})
    with pytest.raises(ValueError, match="shift_top: expected 0.95 without reconstruction 'shifted', got 0.5"):
        build(ImagineFlash.Config, {"shift_top": 0.5})
    with pytest.raises(ValueError, match="'epsilon' with alpha_T"):
        ImagineFlash.check(ImagineFlash.Config(), Pixel.tiny(prediction_type="epsilon"))


@pytest.mark.product
@pytest.mark.parametrize("steps", [1, 2])
def test_a_student_of_a_mixture_covers_all_modes(steps):
    """Bound: chi-square over the modes of at most 0.02 a sample, which is shares within 6 % or so of a third."""
    options = {"location": -1.0, "adversarial_weight": 1.0, "teacher_steps": 2}
    distiller = train_adversarially(ImagineFlash, ORACLE, 300, steps=steps, **options)
    shares, stray = mode_shares(distiller, 4000)
    assert mode_test(shares, 1) < 0.02, shares
    assert stray < 0.3
