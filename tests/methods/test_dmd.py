"""DMD: the gradient in closed form, the fake score, pairs and their regression, both banks, and a mixture's student."""

import json
import math

import pytest
import torch
from adversarial_students import mode_shares, mode_test, train_adversarially
from diffusers import EDMEulerScheduler, LCMScheduler
from mixtures import make
from oracles import CENTRES, SCHEDULES, Gaussian, Oracle, teacher_denoiser, three_clusters
from safetensors.torch import load_file

from stepdistill.batch import Batch
from stepdistill.data.ode_pairs import Pairs, PairsConfig, make_pairs
from stepdistill.data.shards import shard_path
from stepdistill.diffusion.guidance import GuidanceRule
from stepdistill.diffusion.samplers import DDIM, sample
from stepdistill.diffusion.schedulers import to_diffusers
from stepdistill.families.pixel import Pixel
from stepdistill.families.sd import SD
from stepdistill.files.schema import build
from stepdistill.losses.distribution_matching import (
    MATCHED,
    both_scores,
    denoising_loss,
    descent_loss,
    fake_score_error_ratio,
    matching_gradient,
    sample_times,
    score_gap,
)
from stepdistill.losses.perceptual import check_resemblance, open_distance, open_resemblance
from stepdistill.methods.cd import CD
from stepdistill.methods.ct import CT
from stepdistill.methods.dmd import DMD
from stepdistill.networks.adapter_bank import AdapterBank
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.randomness import Draws

TWO = torch.tensor([0.3, -0.2], dtype=torch.float64)
COSINE = SCHEDULES["cosine"]
KINDS = [("cosine", "v_prediction"), ("linear", "epsilon"), ("zero_snr", "v_prediction"), ("flow", "flow"),
         ("karras", "edm")]  # fmt: skip
LABELS = {"class_labels": torch.tensor([0, 1, 2, 0])}


def images(seed=0, count=4):
    return torch.randn(count, 3, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ the gradient


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_the_losss_gradient_is_the_gradient_by_numel_whatever_the_scale_of_the_images(scale):
    x0 = (scale * images()).float().requires_grad_()
    real, fake = (scale * images(seed).float() for seed in (1, 2))
    gradient = matching_gradient(x0.detach(), real, fake)
    loss = descent_loss(x0, gradient).mean()
    loss.backward()
    torch.testing.assert_close(x0.grad, gradient / x0.numel(), rtol=1e-6, atol=0)
    assert loss.item() == pytest.approx(0.5 * gradient.square().mean().item())


def test_equal_scores_leave_nothing_to_do():
    assert torch.equal(matching_gradient(images(), images(1), images(1)), torch.zeros(4, 3, 2, 2))
    assert matching_gradient(images(), images(), images()).isfinite().all()  # the divisor is 0 as well


def test_the_divisor_is_one_number_a_sample_and_cancels_its_scale():
    x0, real, fake = images(), images(1), images(2)
    c = torch.tensor([1.0, 10.0, 1e-3, 7.0])[:, None, None, None].double()
    torch.testing.assert_close(matching_gradient(c * x0, c * real, c * fake), matching_gradient(x0, real, fake))
    expected = torch.stack([(f - r) / (x - r).abs().mean() for x, r, f in zip(x0, real, fake, strict=True)])
    torch.testing.assert_close(matching_gradient(x0, real, fake), expected)


def test_a_fake_score_that_follows_denoises_the_students_images_better_than_the_teacher_and_one_that_lags_worse():
    """Students N(b, a^2); the perfect denoiser of that is the best there is, an older student's is not."""
    schedule = SCHEDULES["cosine"]
    t = torch.full((2000,), 0.5, dtype=torch.float64)
    x0, noise = 0.5 + 0.3 * torch.randn(2000, 1, 1, 1).double(), torch.randn(2000, 1, 1, 1).double()
    x_t = schedule.add_noise(x0, noise, t)
    seen = [
        teacher_denoiser(Gaussian(torch.tensor([mean]).double(), 0.3, schedule, "v_prediction"))(x_t, t, {}).x0
        for mean in (0.0, 0.5, -1.0)  # the data, the student as it is, the student as it was
    ]
    real, follows, lags = seen
    assert fake_score_error_ratio(x0, real, real).item() == 1
    assert fake_score_error_ratio(x0, real, follows).item() < 1 < fake_score_error_ratio(x0, real, lags).item()


def test_images_move_to_the_real_score_and_away_from_the_fake_one():
    x0, real, fake = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), -torch.ones(1, 1, 1, 1)
    assert -matching_gradient(x0, real, fake).item() == 2.0


def test_half_precision_predictions_are_compared_in_single():
    real = torch.ones(1, 1, 2, 2, dtype=torch.bfloat16)
    assert matching_gradient(torch.zeros(1, 1, 2, 2), real, real + 0.01).dtype == torch.float32


@pytest.mark.parametrize(("name", "kind"), [("cosine", "v_prediction"), ("flow", "flow"), ("karras", "edm")])
def test_of_gaussians_the_scores_difference_is_known_and_gives_the_divergences_gradient(name, kind):
    """A student a z + b of N(mu, s^2) and a perfect fake score: METHODS, 7 (d) and (e)."""
    schedule, a, b, mu, s = SCHEDULES[name], 0.7, 0.1, 0.4, 1.1
    t = schedule.inverse(torch.tensor([0.0], dtype=torch.float64))  # as much signal as noise
    real = teacher_denoiser(Gaussian(torch.tensor([mu], dtype=torch.float64), s, schedule, kind))
    fake = teacher_denoiser(Gaussian(torch.tensor([b], dtype=torch.float64), a, schedule, kind))
    z, noise = torch.randn(2, 400_000, 1, 1, 1, dtype=torch.float64)
    alpha, sigma = (c.item() for c in schedule(t))
    v_a, v_s = alpha**2 * a**2 + sigma**2, alpha**2 * s**2 + sigma**2
    times = t.expand(len(z))
    x_t = schedule.add_noise(a * z + b, noise, times)
    difference = fake(x_t, times, {}).x0 - real(x_t, times, {}).x0
    exact = sigma**2 * (b * (1 / v_a) - mu / v_s) + alpha * (a**2 / v_a - s**2 / v_s) * x_t
    torch.testing.assert_close(difference, exact, atol=1e-9, rtol=1e-9)
    # s_fake - s_real = alpha (fake - real) / sigma^2, and one alpha more since dx_t/dx = alpha
    slope = alpha**2 / sigma**2 * difference
    bound = 4 * slope.std().item() / math.sqrt(len(z))
    assert (slope * z).mean().item() == pytest.approx(alpha**2 * a * (1 / v_s - 1 / v_a), abs=2 * bound)
    assert slope.mean().item() == pytest.approx(alpha**2 * (b - mu) / v_s, abs=bound)


def scores(distiller, x0, noise, t):
    return both_scores(distiller.guided_teacher(LABELS), distiller.fake, x0, noise, t, LABELS)


def test_only_the_student_learns_from_the_scores_and_not_through_them():
    distiller = tiny()
    batch = Batch(None, LABELS, 4)
    x0 = distiller.generate(Draws(0, 4).normal(1, 8, 8), LABELS)
    real, fake = scores(distiller, x0, torch.zeros_like(x0), torch.full((4,), 0.5))
    assert not real.requires_grad and not fake.requires_grad
    torch.testing.assert_close(real, fake)  # the fake score starts as the teacher
    losses = distiller("student", batch, Draws(0, 4))
    assert losses.terms["matching"].item() == 0
    assert set(losses.metrics) == {
        "score_gap_low_noise",
        "score_gap_middle_noise",
        "score_gap_high_noise",
        "fake_score_error_ratio",
    }


def test_guidance_is_the_real_scores_alone():
    distiller = tiny(guidance_scale=3.0)
    x0, t = torch.randn(4, 1, 8, 8), torch.full((4,), 0.5)
    x_t = distiller.schedule.add_noise(x0, torch.ones_like(x0), t)
    real, fake = scores(distiller, x0, torch.ones_like(x0), t)
    with torch.no_grad():
        given = distiller.teacher(x_t, t, LABELS).x0
        free = distiller.teacher(x_t, t, distiller.family.null_cond(LABELS)).x0
    torch.testing.assert_close(real, free + 3.0 * (given - free), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fake, given)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_of_the_fake_score_is_off_while_it_is_asked_and_on_again_after(dropout):
    family = Pixel.tiny()
    for module in family.network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    distiller = DMD(family, CopyBank(family.network), DMD.Config()).train()
    assert distiller("student", Batch(None, LABELS, 4), Draws(0, 4)).terms["matching"].item() == 0  # equal scores
    assert distiller.bank.networks["fake"].training and not distiller.bank.networks["teacher"].training


# --------------------------------------------------------------------------------------- levels and metrics


@pytest.mark.parametrize("name", ["cosine", "flow", "karras", "trig"])
def test_times_keep_off_both_ends(name):
    t = sample_times(SCHEDULES[name], Draws(0, 20_000), *MATCHED)
    anywhere = sample_times(SCHEDULES[name], Draws(1, 20_000))
    assert 0.02 <= t.min() < 0.06 and 0.97 < t.max() < 0.981 or name == "karras"
    assert anywhere.max() < 1 and SCHEDULES[name](anywhere)[1].min() > 0
    if name == "karras":  # shares of the noise levels between the least and the most
        lowest = SCHEDULES[name].time_of(torch.tensor(0.002))
        assert lowest <= anywhere.min() < lowest + 0.01
        assert t.min() >= lowest + 0.02 * (1 - lowest)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_the_fakes_loss_is_the_one_its_kind_of_network_is_trained_with(name, kind):
    """An error of x0 counts SNR (epsilon), SNR + 1 (v), 1 / t^2 (flow), 1 / sigma^2 + 1 / sigma_data^2 (EDM)."""
    schedule = SCHEDULES[name]
    denoiser = teacher_denoiser(three_clusters(schedule, kind))
    x0, noise = torch.randn(2, 64, 2, 1, 1, dtype=torch.float64)
    t = sample_times(schedule, Draws(0, 64), 0.1, 0.9)
    error = (denoiser(schedule.add_noise(x0, noise, t), t, {}).x0 - x0).square().flatten(1).mean(1)
    snr, (_, sigma) = schedule.log_snr(t).exp(), schedule(t)
    weight = {"epsilon": snr, "v_prediction": snr + 1, "flow": 1 / t**2, "edm": sigma**-2 + schedule.sigma_data**-2}
    loss = denoising_loss(denoiser, x0, noise, t, {})
    torch.testing.assert_close(loss.double(), weight[kind] * error, rtol=1e-4, atol=1e-6)


def test_gaps_are_means_by_noise_and_finite_where_no_time_fell():
    real = torch.zeros(3, 1, 2, 2)
    fake = torch.tensor([1.0, -2.0, 4.0])[:, None, None, None].expand_as(real)
    found = score_gap(real, fake, torch.tensor([0.1, 0.2, 1.0]))
    assert {name: value.item() for name, value in found.items()} == {
        "score_gap_low_noise": 1.5, "score_gap_middle_noise": 0.0, "score_gap_high_noise": 4.0,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------- both banks


def tiny(bank="copy", family=None, **options):
    family = family or Pixel.tiny()
    banks = {"copy": CopyBank, "adapter": lambda net: AdapterBank(net, rank=2, targets=family.lora_targets)}
    return DMD(family, banks[bank](family.network), DMD.Config(**options))


@pytest.mark.parametrize("bank", ["copy", "adapter"])
def test_each_turn_reaches_its_own_parameters_alone(bank):
    distiller = tiny(bank)
    batch = Batch(torch.randn(4, 1, 8, 8), LABELS, 4)
    with torch.no_grad():
        for parameter in distiller.bank.params("fake"):
            parameter += 0.05 * torch.randn_like(parameter)
    for name, turn in distiller.turns.items():
        losses = distiller(name, batch, Draws(3, 4))
        sum(losses.terms.values()).backward()
        own = {id(parameter) for parameter in turn.params}
        touched = {id(p) for p in distiller.parameters() if p.grad is not None and p.grad.any()}
        assert touched and touched <= own
        distiller.zero_grad(set_to_none=True)


@pytest.mark.parametrize(
    ("family", "twin"),
    [(Pixel.tiny, LCMScheduler), (lambda: Pixel.tiny(scheduler=edm()), EDMEulerScheduler)],
)
def test_the_student_is_sampled_by_a_stock_scheduler_in_one_step(family, twin):
    family = family()
    DMD.check(DMD.Config(), family)
    sampler = tiny(family=family).sampler()
    assert sampler.times.tolist() == [1.0, 0.0]
    assert isinstance(to_diffusers(sampler, family.scheduler_config), twin)


def edm():
    return json.loads(EDMEulerScheduler(sigma_max=20.0).to_json_string())


# -------------------------------------------------------------------------------------------------- pairs


def pairs_config(folder, **options):
    return PairsConfig(
        **{"output_dir": str(folder), "count": 7, "shard_size": 3, "batch_size": 2, "steps": 3} | options
    )


@pytest.mark.parametrize("kind", ["euler", "heun"])
@pytest.mark.parametrize("conditional", [True, False])
def test_a_pair_is_the_noise_and_where_the_teacher_leads_from_it(tmp_path, kind, conditional):
    family = Pixel.tiny(num_classes=3 if conditional else None)
    made = Pairs(make_pairs(family, pairs_config(tmp_path / "p", solver=kind)))
    made.check_teacher(family)
    noise, y, cond = made.rows([6, 0, 3])
    assert len(made) == 7 and noise.shape == y.shape == (3, 1, 8, 8)
    assert (cond["class_labels"].tolist() == [0, 0, 0]) if conditional else cond == {}
    denoiser = tiny(family=family).teacher
    if kind == "euler":
        with torch.no_grad():
            expected = sample(denoiser.conditioned(cond), DDIM(family.schedule, family.schedule.grid(3)), noise)
        torch.testing.assert_close(y, expected, atol=2e-3, rtol=2e-3)


def test_pairs_of_a_teacher_that_is_guided_otherwise_are_others(tmp_path):
    family = Pixel.tiny()
    made = Pairs(make_pairs(family, pairs_config(tmp_path / "p", guidance_scale=2.0)))
    made.check_teacher(family)
    family.guidance_rule = GuidanceRule(interval=(0.2, 1.0))
    with pytest.raises(ValueError, match=r"guided by default, but teacher\.guidance_rescale and .*ask for .*0\.2"):
        made.check_teacher(family)
    with pytest.raises(ValueError, match=r"was made for other pairs(.|\n)*guidance: was None"):
        make_pairs(family, pairs_config(tmp_path / "p", guidance_scale=2.0))


def test_pairs_take_no_more_steps_than_the_teacher_has(tmp_path):
    with pytest.raises(ValueError, match=r"pairs\.steps: expected at most the teacher's 1000 timesteps, got 1001"):
        make_pairs(Pixel.tiny(), pairs_config(tmp_path / "p", steps=1001))
    assert not (tmp_path / "p").exists()


def test_pairs_are_read_under_autocast_as_without(tmp_path):
    made = Pairs(make_pairs(Pixel.tiny(), pairs_config(tmp_path / "p")))
    expected = made.rows([1, 5])
    with torch.autocast("cpu", torch.bfloat16):
        found = made.rows([1, 5])
    assert found[0].dtype == found[1].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(found[:2], expected[:2], strict=True))


def test_heun_reaches_the_exact_solution_of_the_ode_faster(tmp_path):
    gaussian = Gaussian(TWO, 0.5, SCHEDULES["flow"], "flow")
    errors = {}
    for solver in ("euler", "heun"):
        family = make(DMD, gaussian, gaussian).family
        gaussian.register_parameter("device", torch.nn.Parameter(torch.zeros(1)))
        made = Pairs(make_pairs(family, pairs_config(tmp_path / solver, solver=solver, steps=20)))
        noise, y, _ = made.rows(range(7))
        ones = torch.ones(7, dtype=torch.float64)
        errors[solver] = (y - gaussian.solve(noise.double(), ones, 0 * ones)).abs().max().item()
    assert errors["heun"] < 0.3 * errors["euler"] and errors["heun"] < 0.02


def test_a_stopped_run_goes_on_where_it_was_and_batches_do_not_matter(tmp_path):
    family = Pixel.tiny()
    whole, torn = make_pairs(family, pairs_config(tmp_path / "a")), tmp_path / "b"
    make_pairs(family, pairs_config(torn, batch_size=3))
    for name in ("noise", "images", "cond.class_labels"):
        one, other = (load_file(shard_path(folder, 1))[name] for folder in (whole, torn))
        torch.testing.assert_close(one, other, atol=2e-3, rtol=0)
    shard_path(torn, 1).unlink()
    (torn / "shard-00001.safetensors.partial").write_bytes(b"half a file")
    kept = shard_path(torn, 0).stat().st_mtime_ns
    told = []
    make_pairs(family, pairs_config(torn), told.append)
    assert shard_path(torn, 0).stat().st_mtime_ns == kept and told == [3, 6, 7]
    assert shard_path(torn, 1).read_bytes() == shard_path(whole, 1).read_bytes()
    assert not list(torn.glob("*.partial"))


def test_pairs_of_another_teacher_or_sampler_are_refused(tmp_path):
    make_pairs(Pixel.tiny(0), pairs_config(tmp_path / "p"))
    DMD.check(DMD.Config(pairs=str(tmp_path / "p")), Pixel.tiny(0))
    with pytest.raises(ValueError, match=r"method\.pairs: .* was made by the teacher"):
        DMD.check(DMD.Config(pairs=str(tmp_path / "p")), Pixel.tiny(1))
    with pytest.raises(ValueError, match=r"steps: was 3, is 4"):
        make_pairs(Pixel.tiny(0), pairs_config(tmp_path / "p", steps=4))


def test_pairs_that_are_not_whole_are_refused_by_the_files_name(tmp_path):
    with pytest.raises(ValueError, match=r"no pairs\.json in .*make_pairs\.py"):
        Pairs(tmp_path)
    folder = make_pairs(Pixel.tiny(), pairs_config(tmp_path / "p"))
    shard_path(folder, 2).write_bytes(b"not tensors")
    with pytest.raises(ValueError, match=r"shard-00002\.safetensors cannot be read"):
        Pairs(folder)
    shard_path(folder, 2).write_bytes(shard_path(folder, 1).read_bytes())
    with pytest.raises(ValueError, match=r"shard-00002\.safetensors: expected 1 pairs, got 3"):
        Pairs(folder)
    shard_path(folder, 2).unlink()
    with pytest.raises(ValueError, match=r"shard-00002\.safetensors is missing"):
        Pairs(folder)


def test_prompts_for_a_teacher_without_text_are_refused(tmp_path):
    config = PairsConfig(output_dir=str(tmp_path / "pairs"), count=2, prompts="prompts.txt")
    with pytest.raises(ValueError, match=r"pairs\.prompts: expected none, because the teacher takes no text"):
        make_pairs(Pixel.tiny(), config)
    assert not (tmp_path / "pairs").exists()


def test_pairs_of_a_text_teacher_are_of_prompts_in_turn(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n", encoding="utf-8")
    config = pairs_config(tmp_path / "p", count=3, prompts=str(tmp_path / "prompts.txt"))
    family = SD.tiny()
    _, images, cond = Pairs(make_pairs(family, config)).rows(range(3))
    assert images.shape == (3, *family.sample_shape)
    wanted = family.embed(["a cat", "a dog", "a cat"])["encoder_hidden_states"]
    torch.testing.assert_close(cond["encoder_hidden_states"], wanted)
    (tmp_path / "prompts.txt").write_text("a cat\na bird\n", encoding="utf-8")
    with pytest.raises(ValueError, match="prompts: was"):
        make_pairs(family, config)
    with pytest.raises(ValueError, match=r"pairs\.prompts: expected a file of prompts, .* got None"):
        make_pairs(SD.tiny(), pairs_config(tmp_path / "q"))


def test_pairs_are_of_the_teachers_encoders_too(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n", encoding="utf-8")
    config = pairs_config(tmp_path / "p", count=1, shard_size=1, steps=1, prompts=str(tmp_path / "prompts.txt"))
    family = SD.tiny()
    folder = make_pairs(family, config)
    Pairs(folder).check_teacher(family)
    with torch.no_grad():
        next(family.pipe.text_encoder.parameters()).add_(1)
    with pytest.raises(ValueError, match="expected pairs of this teacher's text_encoder, got those of another; make"):
        Pairs(folder).check_teacher(family)
    with pytest.raises(ValueError, match="encoders: was"):
        make_pairs(family, config)
    older = json.loads((folder / "pairs.json").read_text())
    del older["encoders"]
    (folder / "pairs.json").write_text(json.dumps(older))
    with pytest.raises(ValueError, match="vae, got an older folder, which does not tell"):
        Pairs(folder).check_teacher(family)


@pytest.mark.parametrize("distance", ["pixels", "features"])
@pytest.mark.parametrize("bank", ["copy", "adapter"])
def test_regression_vanishes_at_the_teachers_own_images_and_trains_the_student_alone(tmp_path, bank, distance):
    family = Pixel.tiny()
    folder = make_pairs(family, pairs_config(tmp_path / "p"))
    distiller = tiny(bank, family, pairs=str(folder), distance=distance, regression_weight=2.0)
    losses = distiller("student", Batch(None, LABELS, 4), Draws(0, 4))
    assert losses.terms["regression"] > 0
    losses.terms["regression"].backward()
    own = {id(parameter) for parameter in distiller.bank.params("student")}
    touched = {id(p) for p in distiller.parameters() if p.grad is not None and p.grad.any()}
    assert touched and touched <= own
    _, y, cond = distiller.pairs.rows([1, 2])
    assert distiller.resemblance(y, y, cond).tolist() == [0.0, 0.0]
    assert (distiller.resemblance(y + 0.3, y, cond) > 0).all()


def test_lpips_is_called_with_colour_images_of_its_size_or_asked_for_by_name(monkeypatch):
    class Stub(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()

        def forward(self, a, b):
            assert a.shape == b.shape == (2, 3, 224, 224)
            return (a - b).abs().mean((1, 2, 3), keepdim=True)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'stepdistill\[lpips\]'"):
        check_resemblance("lpips")
    for method in (CD, CT):
        with pytest.raises(ValueError, match=r"pip install 'stepdistill\[lpips\]'"):
            method.check(method.Config(distance="lpips"), Pixel.tiny())
    monkeypatch.setitem(__import__("sys").modules, "lpips", type("lpips", (), {"LPIPS": Stub}))
    compare = open_resemblance("lpips", tiny().teacher)
    a = torch.zeros(2, 1, 8, 8)
    torch.testing.assert_close(compare(a + 0.5, a, {}), torch.tensor([0.5, 0.5]))
    beyond = (a + 1.5).requires_grad_()  # whiter than white
    open_distance("lpips", tiny().teacher)(beyond, a, {}).sum().backward()
    assert (beyond.grad > 0).all()


# -------------------------------------------------------------------------------------------- the student


@pytest.mark.product
def test_a_student_of_one_step_covers_all_modes_by_their_weights():
    """Bound: chi-square over the modes of at most 0.02 a sample, which is shares within 6 % or so of a third."""
    distiller = train_adversarially(DMD, three_clusters(COSINE, "v_prediction"), 600, lr=1e-2, size=128)
    shares, stray = mode_shares(distiller, 4000)
    assert mode_test(shares, 1) < 0.02, shares
    assert stray < 0.3


def test_with_pairs_too(tmp_path):
    oracle = Oracle(CENTRES, 0.2, COSINE, "v_prediction")
    oracle.register_parameter("device", torch.nn.Parameter(torch.zeros(1), requires_grad=False))
    family = make(DMD, oracle, oracle).family
    folder = make_pairs(family, pairs_config(tmp_path / "p", count=1000, shard_size=500, batch_size=500, steps=10))
    options = {"pairs": str(folder), "distance": "pixels", "regression_weight": 1.0}
    distiller = train_adversarially(DMD, oracle, 200, lr=1e-2, size=64, **options)
    shares, stray = mode_shares(distiller, 4000)
    assert mode_test(shares, 1) < 0.02, shares
    assert stray < 0.3


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [({"steps": 2}, "name: dmd2"), ({"regression_weight": 0.0}, "leave out pairs")],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DMD.Config(**options)


def without_blocks():
    """A teacher whose blocks are not known, as those of observed pipelines are not."""
    family = Pixel.tiny()
    family.feature_blocks = ()
    return family


@pytest.mark.parametrize(
    ("options", "family", "message"),
    [
        ({"guidance_scale": 2.0}, lambda: Pixel.tiny(num_classes=None), "unconditional"),
        ({"guidance_scale": 0.5}, Pixel.tiny, "at least 1"),
        ({}, lambda: Pixel.tiny(prediction_type="epsilon"), "epsilon"),
        ({"pairs": "nowhere"}, Pixel.tiny, r"pairs\.json"),
        ({"pairs": "nowhere"}, without_blocks, r"method\.distance: expected 'pixels' or 'lpips'"),
    ],
)
def test_a_teacher_that_cannot_be_distilled_so_is_refused(options, family, message):
    with pytest.raises(ValueError, match=message):
        DMD.check(DMD.Config(**options), family())


@pytest.mark.parametrize("name", ["count", "steps", "batch_size", "shard_size"])
def test_counts_of_pairs_are_positive(name):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        build(PairsConfig, {"output_dir": "x", name: 0})
