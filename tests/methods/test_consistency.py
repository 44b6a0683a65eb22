"""CD, CT, iCT and ECT: boundary, solver, curricula, optimum, samplers, and a student of a mixture."""

import itertools
import math

import pytest
import torch
from contracts.cases import make_run
from diffusers import CMStochasticIterativeScheduler, LCMScheduler
from mixtures import NEARER, NEARER_FROM_DATA, Known, batch_of, landing, loss_of, make, put, train, walked
from oracles import (
    SCHEDULES,
    Gaussian,
    PointNet,
    native_types,
    teacher_denoiser,
    three_clusters,
)
from safetensors.torch import load_file

from stepdistill import load_pipeline
from stepdistill.config import read_config
from stepdistill.diffusion.ode import solver_step
from stepdistill.diffusion.prediction import Prediction, to_prediction
from stepdistill.diffusion.samplers import DDIM, ConsistencyKarras, sample
from stepdistill.diffusion.schedule import Karras
from stepdistill.diffusion.schedulers import to_diffusers
from stepdistill.export.contract import Origin, read_contract
from stepdistill.export.pipeline import export_pipeline
from stepdistill.families.pixel import Pixel
from stepdistill.files.schema import build
from stepdistill.inference.sampling import class_count, sample_images
from stepdistill.losses.consistency import consistency, skip_grid
from stepdistill.methods.cd import CD
from stepdistill.methods.ct import CT, num_points, target_decay
from stepdistill.methods.ect import ECT, neighbour
from stepdistill.methods.ict import ICT, lognormal_shares, num_intervals
from stepdistill.methods.lcm import LCM
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.modes import shared_dropout
from stepdistill.training.config import resolve
from stepdistill.training.run import Run

EVERY = [(name, kind) for name, schedule in SCHEDULES.items() for kind in native_types(schedule)]
TWO = torch.tensor([0.3, -0.2], dtype=torch.float64)
WIDE_DATA = {"noise_mean": 0.0, "noise_std": 1.6}  # the papers' noise levels are for data of standard deviation 0.5
SOLVED = ["cosine", "flow", "karras", "trig"]


def main_type(name):
    return {"flow": "flow", "karras": "edm", "trig": "trigflow"}.get(name, "v_prediction")


def at(time, size):
    return time.reshape(1).expand(size)


# --------------------------------------------------------------------------------------------- the boundary


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_at_the_end_of_a_trajectory_the_function_is_the_identity_whatever_the_network_says(name, kind):
    schedule = SCHEDULES[name]
    x, output = torch.randn(2, 4, 2, 1, 1, dtype=torch.float64)
    end = at(schedule.trajectory(10)[-1], 4)
    prediction = to_prediction(output, x, end, schedule, kind)
    assert torch.allclose(schedule.end_point(prediction.x0, x, end), x, atol=1e-9)


def test_edm_scalings_are_those_of_the_paper():
    schedule = Karras(sigma_max=80.0)
    x, output = torch.randn(2, 6, 2, 1, 1, dtype=torch.float64)
    t = schedule.time_of(torch.tensor([0.002, 0.01, 0.5, 3.0, 20.0, 80.0]))
    c_skip, c_out = CMStochasticIterativeScheduler().get_scalings_for_boundary_condition(schedule(t)[1])
    expected = c_skip[:, None, None, None] * x + c_out[:, None, None, None] * output
    assert torch.allclose(
        schedule.end_point(to_prediction(output, x, t, schedule, "edm").x0, x, t), expected, atol=1e-12
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_gaussian_oracles_optimum_is_the_closed_form(name):
    """EDM: mu + (x - mu) sqrt((s^2 + sigma_min^2) / (s^2 + sigma^2)); else mu + (x - alpha mu) s / sqrt(...)."""
    schedule = SCHEDULES[name]
    oracle = Gaussian(TWO, 0.5, schedule, main_type(name))
    grid = schedule.trajectory(200)
    x = torch.randn(5, 2, 1, 1, dtype=torch.float64) * max(1.0, schedule(grid[:1])[1].item())
    start, denoise = x, teacher_denoiser(oracle).conditioned({})
    for t, s in zip(grid[:-1], grid[1:], strict=True):
        x = solver_step(denoise, x, at(t, 5), at(s, 5), schedule)
    assert torch.allclose(x, oracle.solve(start, at(grid[0], 5), at(grid[-1], 5)), atol=0.05)


@pytest.mark.parametrize("timestep", [19, 499, 999])
def test_lcms_own_boundary_scalings_change_next_to_nothing(timestep):
    """They are the identity at timestep 0 alone: elsewhere the student's clean image is the function, as it is here."""
    c_skip, c_out = LCMScheduler().get_scalings_for_boundary_condition_discrete(timestep)
    assert c_skip < 1e-5 and abs(c_out - 1) < 1e-5
    assert LCMScheduler().get_scalings_for_boundary_condition_discrete(0) == (1, 0)


# ------------------------------------------------------------------------------------------ solver and grids


@pytest.mark.parametrize("name", SOLVED)
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_solvers_have_their_order(name, solver, order):
    schedule = SCHEDULES[name]
    oracle = Gaussian(TWO, 0.3, schedule, main_type(name))  # of TrigFlow's own width, one step would be exact
    start, end = (schedule.inverse(torch.tensor([-2 * math.log(level)])) for level in (3.0, 0.3))
    x_t = torch.randn(5, 2, 1, 1, dtype=torch.float64)
    exact = oracle.solve(x_t, start.expand(5), end.expand(5))

    def error(steps):
        x, times = x_t, torch.linspace(start.item(), end.item(), steps + 1, dtype=torch.float64)
        for t, s in zip(times[:-1], times[1:], strict=True):
            x = solver_step(teacher_denoiser(oracle).conditioned({}), x, at(t, 5), at(s, 5), schedule, solver)
        return (x - exact).abs().max().item()

    assert math.log2(error(32) / error(64)) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize(
    ("steps", "timesteps"), [(1, [999]), (2, [999, 499]), (4, [999, 759, 499, 259]),
                             (8, [999, 879, 759, 639, 499, 379, 259, 139])]
)  # fmt: skip
def test_lcm_timesteps(steps, timesteps):
    schedule = SCHEDULES["scaled_linear"]
    assert schedule.timestep(skip_grid(schedule, steps, 50)[:-1]).round().tolist() == timesteps


def test_curricula_are_those_of_the_papers():
    assert (num_points(0, 800, 2, 150), num_points(800, 800, 2, 150)) == (2, 151)
    assert [num_points(k, 800, 2, 150) for k in range(800)] == sorted(num_points(k, 800, 2, 150) for k in range(800))
    assert target_decay(2, 2, 0.9) == pytest.approx(0.9) and target_decay(151, 2, 0.9) > 0.998
    assert sorted({num_intervals(k, 800, 10, 1280) + 1 for k in range(800)}) == [11, 21, 41, 81, 161, 321, 641, 1281]


def test_ict_noise_levels_follow_the_lognormal():
    sigma = torch.logspace(4, -4, 200, dtype=torch.float64)
    shares = lognormal_shares(sigma, -1.1, 2.0)
    assert shares.sum().item() == pytest.approx(1) and shares.min() >= 0
    mean = (shares * (sigma[:-1] * sigma[1:]).sqrt().log()).sum().item()
    assert mean == pytest.approx(-1.1, abs=0.01)


def test_ect_neighbours_start_at_clean_data_and_close_in():
    sigma = torch.logspace(-3, 2, 50, dtype=torch.float64)
    stages = torch.stack([neighbour(sigma, stage, q=2.0) for stage in range(12)])
    assert (stages >= 0).all() and (stages < sigma).all() and (stages.diff(dim=0) >= 0).all()
    assert (stages[0][sigma < 2] == 0).all()
    assert stages[7][-1].item() == pytest.approx(0.996 * sigma[-1].item(), rel=1e-3)


# -------------------------------------------------------------------------------------- pairs made from the data


def test_a_pair_on_one_image_and_noise_is_an_euler_step_of_the_image_as_teacher():
    """x_t + (s - t) (x_t - x_0) / t = x_0 + s z: CT's neighbour needs no network."""
    schedule = SCHEDULES["karras"]
    x0, z = torch.randn(2, 6, 2, 1, 1, dtype=torch.float64)
    t, s = schedule.trajectory(12)[:6], schedule.trajectory(12)[1:7]
    (_, sigma_t), (_, sigma_s) = ([c[:, None, None, None] for c in schedule(time)] for time in (t, s))
    x_t = schedule.add_noise(x0, z, t)
    stepped = solver_step(lambda x, time: Prediction(x0, (x - x0) / sigma_t), x_t, t, s, schedule)
    torch.testing.assert_close(stepped, x_t + (sigma_s - sigma_t) * (x_t - x0) / sigma_t)
    torch.testing.assert_close(stepped, schedule.add_noise(x0, z, s))


def fixed_pairs(method, **options):
    """A distiller of EDM points, what it trains on (x_t, sigma, r, batch) at draws of seed 3, and its loss there."""
    oracle = three_clusters(SCHEDULES["karras"], "edm")
    distiller = make(method, PointNet(oracle.schedule, oracle).double(), oracle, **options)
    distiller.step_in_stage = 5
    called, original = [], distiller.schedule.add_noise
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distiller.schedule, "add_noise", lambda *args: called.append(args) or original(*args))
        batch = batch_of(oracle, 32)
        loss = loss_of(distiller, batch, seed=3)
    (_, noise, t), (_, _, s) = called
    return distiller, batch.x0, noise, t, s, loss


@pytest.mark.parametrize("method", [ICT, ECT])
def test_an_error_counts_by_how_close_the_noise_levels_are(method):
    """sqrt(||f(x_t) - f(x_r)||^2 + c^2) - c over sigma - r, c = 0.00054 sqrt(D); with r = 0 the image is the target."""
    distiller, x0, noise, t, s, loss = fixed_pairs(method)
    schedule, (_, sigma), (_, r) = distiller.schedule, distiller.schedule(t), distiller.schedule(s)
    see = consistency if method is ICT else lambda denoiser, x, time, cond: denoiser(x, time, cond).x0
    found, target = (see(distiller.student, schedule.add_noise(x0, noise, time), time, {}) for time in (t, s))
    clean = (r == 0)[:, None, None, None]
    assert method is ICT or (clean.any() and not clean.all())
    target = torch.where(clean, x0, target)
    c = 0.00054 * math.sqrt(2)
    error = ((found - target).square().flatten(1).sum(1) + c**2).sqrt() - c
    assert loss.item() == pytest.approx((error / (sigma - r)).mean().item(), rel=1e-4)


# ---------------------------------------------------------------------------------------------- the optimum


@pytest.mark.parametrize("name", SOLVED)
def test_cd_is_zero_at_the_product_of_the_teachers_gains(name):
    schedule = SCHEDULES[name]
    oracle = Gaussian(TWO, 0.5, schedule, main_type(name))
    distiller = make(CD, oracle, oracle, intervals=10, steps=2, solver="euler")
    grid = schedule.trajectory(10)
    gains = torch.cat([oracle.gain(grid[:-1], grid[1:]), torch.ones(1)]).flip(0).cumprod(0).flip(0)

    def end(x_t, t, labels):
        i = (grid[None] - t[:, None]).abs().argmin(1)
        return oracle.centre(x_t, at(grid[-1], len(x_t))) + gains[i, None, None, None] * (x_t - oracle.centre(x_t, t))

    batch = batch_of(oracle, 64)
    before = loss_of(distiller, batch)
    put(distiller, Known(schedule, oracle.prediction_type, end))
    assert loss_of(distiller, batch) < 1e-9 < 1e-4 < before


def test_cd_is_zero_at_the_teachers_own_guided_heun_solver():
    schedule = SCHEDULES["cosine"]
    oracle = three_clusters(schedule, "v_prediction", conditional=True)
    distiller = make(CD, oracle, oracle, 3, intervals=8, guidance_scale=2.5)
    grid = schedule.trajectory(8)

    def end(x, t, labels):
        denoise = distiller.teacher.guided({"class_labels": labels}, 1.5)
        return walked(lambda x, now, then: solver_step(denoise, x, now, then, schedule, "heun"), grid, x, t)

    batch = batch_of(oracle, 64, 3)
    before = loss_of(distiller, batch)
    put(distiller, Known(schedule, "v_prediction", end))
    assert loss_of(distiller, batch) < 1e-9 < 1e-4 < before


@pytest.mark.parametrize("name", SOLVED)
@pytest.mark.parametrize("method", [CT, ICT, ECT])
@pytest.mark.parametrize("done", [0, 50, 99])
def test_training_from_data_is_zero_where_the_data_is_one_point(name, method, done):
    """The only data whose pairs lie on one trajectory exactly; the oracle's own clean image is then the end."""
    schedule = SCHEDULES[name]
    oracle = Gaussian(TWO, 0.0, schedule, main_type(name))
    distiller = make(method, oracle, oracle)
    distiller.step_in_stage = done
    end = schedule.trajectory(10)[-1] if method is not ECT else torch.zeros(1)
    if method is not ECT:
        put(distiller, Known(schedule, oracle.prediction_type, lambda x, t, _: oracle.solve(x, t, at(end, len(x)))))
    assert loss_of(distiller, batch_of(oracle, 64)) < 1e-6


@pytest.mark.parametrize("method", [CD, CT])
def test_the_target_is_an_average_and_gets_no_gradient(method):
    oracle = three_clusters(SCHEDULES["cosine"], "v_prediction")
    distiller = train(method, oracle, 3)
    student, target = (distiller.bank.state(role) for role in ("student", "target"))
    assert any(not torch.equal(student[name], target[name]) for name in student)
    assert not any(p.requires_grad for p in distiller.bank.params("target"))


# ----------------------------------------------------------------------------------------------- sampling


EDM = {
    "EDMEulerScheduler": "EDMConsistencyScheduler",  # a network that embeds ln(sigma) / 4
    "CMStochasticIterativeScheduler": "CMStochasticIterativeScheduler",  # 250 ln(sigma)
}


@pytest.mark.parametrize(
    ("teacher", "steps"),
    [*itertools.product(EDM, [2]), ("CMStochasticIterativeScheduler", 1), ("EDMEulerScheduler", 4)],
)
def test_the_exported_edm_pipeline_samples_as_the_student_was_trained(tmp_path, teacher, steps):
    family = Pixel.tiny(scheduler={"_class_name": teacher, "sigma_max": 20.0})
    sampler = ConsistencyKarras(family.schedule, steps, points=41)
    export_pipeline(family, family.network, sampler, tmp_path / "pipeline", origin=Origin(method="cd"))
    pipeline = load_pipeline(tmp_path / "pipeline")
    assert type(pipeline).__name__ == "ConsistencyModelPipeline" and type(pipeline.scheduler).__name__ == EDM[teacher]
    check_samples(pipeline, family, sampler, batch_size=3)


def test_a_loaded_consistency_pipeline_is_asked_as_every_other_and_can_be_evaluated(tmp_path):
    """Stock, it takes one noise for all labels unless it is told their number, and counts "no class" as a class."""
    family = Pixel.tiny(scheduler={"_class_name": "EDMEulerScheduler", "sigma_max": 20.0}, num_classes=3)
    sampler = ConsistencyKarras(family.schedule, 2, points=41)
    export_pipeline(family, family.network, sampler, tmp_path / "pipeline", origin=Origin(method="ect"))
    pipeline = load_pipeline(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert class_count(pipeline) == 3
    assert "class_labels=[0, 1, 2], batch_size=3" in (tmp_path / "pipeline/README.md").read_text()
    bare, told = (
        pipeline(class_labels=[1, 1, 2], output_type="pt", generator=torch.Generator().manual_seed(0), **size).images
        for size in ({}, {"batch_size": 3})
    )
    assert bare.shape == (3, 1, 8, 8) and torch.equal(bare, told) and not torch.equal(bare[0], bare[1])
    images = sample_images(pipeline, 5, batch_size=2, num_classes=class_count(pipeline), rows=4)
    alone = sample_images(pipeline, 1, first=3, batch_size=1, num_classes=3, rows=4)
    assert images.labels.tolist() == [0, 1, 2, 0, 1] and images.calls == 2
    assert torch.equal(images.pixels[3], alone.pixels[0])


@pytest.mark.parametrize("teacher", EDM)
def test_an_edm_student_of_one_euler_step_keeps_its_teachers_embedding(tmp_path, teacher):
    family = Pixel.tiny(scheduler={"_class_name": teacher, "sigma_max": 20.0})
    sampler = DDIM(family.schedule, family.schedule.grid(1))
    export_pipeline(family, family.network, sampler, tmp_path / "pipeline", origin=Origin(method="dmd"))
    check_samples(load_pipeline(tmp_path / "pipeline"), family, sampler)


def check_samples(pipeline, family, sampler, **call):
    pipeline.set_progress_bar_config(disable=True)
    cond = family.example_cond(range(3))
    generator = torch.Generator().manual_seed(1)
    images = pipeline(
        class_labels=cond["class_labels"], num_inference_steps=sampler.steps, output_type="pt", generator=generator,
        **call,
    ).images  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    start = family.schedule.initial_noise(torch.randn(3, *family.sample_shape, generator=generator))

    def noise(x):
        return torch.randn(x.shape, generator=generator)

    with torch.no_grad():
        expected = family.decode(sample(teacher_of(family).conditioned(cond), sampler, start, noise))
    assert (images - expected).abs().max() < 1e-5


def teacher_of(family):
    return Denoiser(family, CopyBank(family.network), "teacher")


def test_two_calls_are_at_the_papers_noise_levels():
    """Index 22 of 40 is ImageNet-64's; every other point of a grid of ours is diffusers' own point of that grid."""
    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=40)
    scheduler.set_timesteps(timesteps=[22, 0])
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([80.0, 1.382, 0.002]), atol=1e-3, rtol=0)
    assert Karras().grid(40)[22].pow(7).item() * 80 == pytest.approx(1.382, abs=1e-3)
    sampler = ConsistencyKarras(Karras(noise_scale=1000.0), 2, points=40)
    own = to_diffusers(sampler, {})
    own.set_timesteps(2)
    levels = sampler.schedule(sampler.times)[1]
    torch.testing.assert_close(own.sigmas[:-1].double(), levels[:-1], rtol=1e-4, atol=0)


def test_one_consistency_step_is_the_consistency_function():
    schedule = Karras()
    oracle = three_clusters(schedule, "edm")
    x = schedule.initial_noise(torch.randn(5, 2, 1, 1, dtype=torch.float64))
    teacher = teacher_denoiser(oracle)
    sampled = sample(teacher.conditioned({}), ConsistencyKarras(schedule, 1, 41), x)
    assert torch.allclose(sampled, consistency(teacher, x, torch.ones(5), {}), atol=1e-12)


# ------------------------------------------------------------------------------------------- a trained student


def product(*values):
    """A case that runs with ``-m product`` only."""
    return pytest.param(*values, marks=pytest.mark.product)


@pytest.mark.parametrize(
    ("method", "options", "train_steps", "nearer"),
    [
        (CD, {"intervals": 20, "target_ema": 0.9}, 1200, NEARER),
        # Not with the default distance: huber's best answer is nearly the geometric median of the targets. In many
        # dimensions that is nearly their mean, the consistency function; in two it is not (0.43, 0.76, 1.78 here).
        product(CT, {"first_points": 5, "last_points": 20, "distance": "l2"}, 800, NEARER_FROM_DATA),
        product(ICT, {"first_intervals": 5, "last_intervals": 40, **WIDE_DATA}, 800, NEARER_FROM_DATA),
        product(ECT, {"num_stages": 5, **WIDE_DATA}, 800, NEARER_FROM_DATA),
    ],
)
def test_one_student_of_the_mixture_lands_on_it_in_one_two_and_four_calls(method, options, train_steps, nearer):
    oracle = three_clusters(SCHEDULES["cosine"], "v_prediction")
    distiller = train(method, oracle, train_steps, **options)
    for calls, part in nearer.items():
        student, teacher = landing(distiller, oracle, calls)
        assert student < part * teacher, (calls, student, teacher)


@pytest.mark.parametrize(
    ("method", "options"),
    [(CD, {"steps": 3, "intervals": 48}), (CT, {"steps": 4}), (LCM, {"steps": 3, "solver_steps": 30})],
)
def test_a_call_names_timesteps_that_no_scheduler_picks(method, options):
    family, config = Pixel.tiny(), method.Config(**options)
    method.check(config, family)
    assert len(method.make_sampler(config, family).pipeline_kwargs["timesteps"]) == config.steps


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (CD, {"steps": 3, "intervals": 40}, "multiple of steps = 3"),
        (CD, {"guidance_scale": 0.5}, "at least 1"),
        (CD, {"steps": 0}, "expected 1 to"),
        (CD, {"steps": 50, "intervals": 50, "guidance_scale": 2.0}, "unconditional"),
        (CT, {"last_points": 2000}, "1000 timesteps"),
        (ECT, {"steps": 0}, "expected at least 1"),
        (ECT, {"sigma_max": 0.5}, "sigma_max: 0.5 is below the second of 2 steps"),
    ],
)
def test_what_cannot_work_is_said_before_the_first_step(method, options, message):
    with pytest.raises(ValueError, match=message):
        method.check(method.Config(**options), Pixel.tiny(num_classes=None))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (CD, {"target_ema": 1.0}, "target_ema"),
        (CT, {"first_points": 1}, "first_points"),
        (ICT, {"first_intervals": 800}, "first_intervals"),
        (ECT, {"q": 1.0}, "q: expected"),
    ],
)
def test_options_out_of_range_are_refused(method, options, message):
    with pytest.raises(ValueError, match=message):
        build(method.Config, options)


# ------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("role", ["student", "target"])
def test_the_target_drops_the_units_that_the_student_drops(role):
    family = Pixel.tiny()
    for module in family.network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    distiller = CT(family, CopyBank(family.network), CT.Config())
    x, t, cond = torch.randn(3, *family.sample_shape), torch.full((3,), 0.5), family.example_cond(range(3))

    @torch.no_grad()
    def both_ends():
        with shared_dropout(distiller.bank, role):
            target = Denoiser(family, distiller.bank, role)(x, t, cond).x0
        return target, distiller.student(x, t, cond).x0

    still, student = both_ends()
    assert torch.equal(still, student)
    distiller.bank.train()
    target, student = both_ends()
    assert torch.equal(target, student) and not torch.allclose(target, still)
    assert not torch.equal(both_ends()[0], target)
    assert distiller.bank.networks["student"].training and not distiller.bank.networks["target"].training


# --------------------------------------------------------------------------- one training, any number of calls


@pytest.mark.parametrize("method", ["cd", "tcd"])
def test_one_training_is_exported_for_every_number_of_calls_it_serves(tmp_path, method):
    run = make_run(tmp_path, method)
    run.train()
    mapping = read_config(run.folder / "config.yaml", ["method.steps=1"])
    folder = Run(resolve(mapping)).export_checkpoint(tmp_path / "one")
    assert read_contract(folder).steps == 1
    before, after = (load_file(path / "unet/diffusion_pytorch_model.safetensors") for path in
                     (run.folder / "pipeline", folder))  # fmt: skip
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_student_of_its_number_of_calls_alone_is_exported_for_no_other(tmp_path):
    run = make_run(tmp_path, "progressive")
    run.train()
    mapping = read_config(run.folder / "config.yaml", ["method.steps=4"])
    with pytest.raises(ValueError, match=r"method\.steps: was 2, is 4"):
        Run(resolve(mapping)).export_checkpoint(tmp_path / "four")
