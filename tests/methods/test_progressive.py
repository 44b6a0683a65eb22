"""Progressive distillation: the target's algebra, a cascade solved exactly, a mixture learned.

Letters are the invariants of Salimans & Ho's algorithm: the target (a, b, c, d, g), its weights (e, f).
"""

import itertools
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from oracles import (
    SCHEDULES,
    Gaussian,
    Oracle,
    OracleFamily,
    PointNet,
    native_types,
    sliced_wasserstein,
    teacher_denoiser,
    three_clusters,
    time_of,
)
from torch import nn

from stepdistill.batch import Batch
from stepdistill.diffusion.ode import ode_step
from stepdistill.diffusion.prediction import from_x0
from stepdistill.diffusion.reading import read_schedule
from stepdistill.diffusion.samplers import DDIM, sample
from stepdistill.diffusion.schedule import NoiseSchedule, RectifiedFlow, expand
from stepdistill.diffusion.schedulers import to_diffusers
from stepdistill.families.pixel import Pixel
from stepdistill.losses.progressive import CONVERT, two_step_target
from stepdistill.methods.guided import Guided
from stepdistill.methods.lightning import Lightning
from stepdistill.methods.progressive import Progressive
from stepdistill.methods.tract import Tract
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.networks.denoiser import Denoiser
from stepdistill.randomness import Draws, derive_seed

MEAN = torch.tensor([0.3, -0.8], dtype=torch.float64)
T, T_MID, S = torch.tensor([[0.9, 0.6, 0.4], [0.7, 0.5, 0.2], [0.5, 0.4, 0.1]], dtype=torch.float64)
every_type = pytest.mark.parametrize(
    ("schedule", "prediction_type"),
    [
        pytest.param(schedule, prediction_type, id=f"{name}-{prediction_type}")
        for name, schedule in SCHEDULES.items()
        for prediction_type in native_types(schedule)
    ],
)
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def states(size: int = len(T)) -> torch.Tensor:
    return torch.randn(size, 2, 1, 1, dtype=torch.float64)


# ----------------------------------------------------------------------------------- the target, for any mentor


@every_type
def test_one_step_to_the_target_lands_where_two_steps_did(schedule, prediction_type):
    """(a), for a mentor that is anything but perfect."""
    network = PointNet(schedule).double()
    mentor = Denoiser(OracleFamily(network, schedule, prediction_type), CopyBank(network), "teacher").conditioned({})
    x_t = states()
    with torch.no_grad():
        x_mid = ode_step(mentor(x_t, T), schedule, T_MID)
        x_s = ode_step(mentor(x_mid, T_MID), schedule, S)
        target = two_step_target(mentor, x_t, T, T_MID, S, schedule)
    eps = (x_t - expand(schedule(T)[0], x_t) * target) / expand(schedule(T)[1], x_t)
    alpha_s, sigma_s = (expand(coefficient, x_t) for coefficient in schedule(S))
    torch.testing.assert_close(alpha_s * target + sigma_s * eps, x_s, atol=1e-10, rtol=1e-10)


@every_schedule
def test_a_mentor_that_needs_one_step_is_its_own_target(schedule):
    """(b)"""
    point = teacher_denoiser(Gaussian(MEAN, 0.0, schedule, "sample"))
    target = two_step_target(point.conditioned({}), states(), T, T_MID, S, schedule)
    torch.testing.assert_close(target, MEAN[:, None, None].expand_as(target), atol=1e-10, rtol=0)


@pytest.mark.parametrize("weight", [0.5, 0.25])
def test_the_target_of_a_flow_is_the_mean_velocity(weight):
    """(c), weighted by how long each step is."""
    schedule = RectifiedFlow()
    mentor = teacher_denoiser(three_clusters(schedule, "flow")).conditioned({})
    x_t, t_mid = states(), T + weight * (S - T)
    first = mentor(x_t, T)
    second = mentor(ode_step(first, schedule, t_mid), t_mid)
    target = two_step_target(mentor, x_t, T, t_mid, S, schedule)
    velocity = from_x0(target, x_t, T, schedule, "flow")
    torch.testing.assert_close(velocity, weight * first.flow() + (1 - weight) * second.flow(), atol=1e-10, rtol=0)


@every_schedule
def test_the_target_of_a_gaussian_is_linear_with_a_known_factor(schedule):
    """(d)"""
    oracle = Gaussian(MEAN, 0.5, schedule, "sample")
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(T), schedule(S)
    ratio = sigma_s / sigma_t
    factor = (oracle.gain(T, T_MID) * oracle.gain(T_MID, S) - ratio) / (alpha_s - alpha_t * ratio)
    x_t = states()
    target = two_step_target(teacher_denoiser(oracle).conditioned({}), x_t, T, T_MID, S, schedule)
    expected = MEAN[:, None, None] + expand(factor, x_t) * (x_t - oracle.centre(x_t, T))
    torch.testing.assert_close(target, expected, atol=1e-9, rtol=0)


@every_type
def test_the_last_target_is_the_second_prediction(schedule, prediction_type):
    """(g): at clean data the noise does not count."""
    mentor = teacher_denoiser(three_clusters(schedule, prediction_type)).conditioned({})
    x_t, clean = states(), torch.zeros_like(T)
    second = mentor(ode_step(mentor(x_t, T), schedule, T_MID), T_MID)
    target = two_step_target(mentor, x_t, T, T_MID, clean, schedule)
    torch.testing.assert_close(target, second.x0, atol=1e-10, rtol=0)


# ------------------------------------------------------------------------------------------------ the distiller


def vp_config(process: str = "cosine", prediction_type: str = "v_prediction") -> dict:
    process = {"cosine": {"beta_schedule": "squaredcos_cap_v2"}, "linear": {"beta_schedule": "linear"},
               "zero_snr": {"beta_schedule": "linear", "rescale_betas_zero_snr": True}}[process]  # fmt: skip
    return dict(DDIMScheduler(**process, prediction_type=prediction_type).config)


FLOW_CONFIG = {**FlowMatchEulerDiscreteScheduler(shift=3.0).config, "_class_name": "FlowMatchEulerDiscreteScheduler"}


def make(network: nn.Module, config: dict, *, num_classes: int | None = None, ema: bool = False, **options):
    """A distiller whose teacher is ``network``."""
    schedule, prediction_type = read_schedule(config)
    family = OracleFamily(network, schedule, prediction_type, num_classes=num_classes, scheduler_config=config)
    return Progressive(family, CopyBank(network), Progressive.Config(**options), ema=ema)


def small(config: dict, **options):
    """A distiller of a small random network."""
    return make(PointNet(read_schedule(config)[0]), config, **options)


class Linear(nn.Module):
    """A network for Gaussian data that has one number a timestep to learn: x_0 = mean + slope (x_t - alpha mean)."""

    dtype = torch.float64

    def __init__(self, oracle: Gaussian) -> None:
        super().__init__()
        self.oracle = oracle
        t = torch.arange(1, 1001).double() / 1000
        alpha, sigma = oracle.schedule(t)
        self.slopes = nn.Parameter(alpha * oracle.std**2 / (alpha**2 * oracle.std**2 + sigma**2))

    def forward(self, sample, timestep, class_labels=None):
        t, x_t = time_of(self.oracle.schedule, timestep), sample.double()
        slope = self.slopes[timestep.round().long()][:, None, None, None]
        x0 = MEAN[:, None, None] + slope * (x_t - self.oracle.centre(x_t, t))
        return SimpleNamespace(sample=from_x0(x0, x_t, t, self.oracle.schedule, self.oracle.prediction_type))


@pytest.mark.parametrize("process", ["cosine", "zero_snr"])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_a_cascade_of_perfect_students_is_the_teachers_product_of_gains(process, prediction_type):
    """(d): 16 -> 8 -> 4 -> 2 -> 1, every student solved exactly: no loss is left, and nothing is lost on the way."""
    config = vp_config(process, prediction_type)
    oracle = Gaussian(MEAN, 0.5, read_schedule(config)[0], prediction_type)
    distiller = make(Linear(oracle), config, start=16, steps=1, weighting="constant")
    batch = Batch(oracle.draw(64), {}, 64)
    for stage in distiller.stages(40):
        distiller.stage = stage
        distiller.begin_stage()
        assert distiller("student", batch, Draws(0, 64)).terms["loss"] > 1e-6  # the mentor is not yet the student
        solve(distiller, oracle)
        assert distiller("student", batch, Draws(1, 64)).terms["loss"] < 1e-12
    assert distiller.sampler().steps == 1
    x = states(16)
    grid = oracle.schedule.grid(16)
    gain = oracle.gain(grid[:-1], grid[1:]).prod()
    with torch.no_grad():
        found = sample(distiller.result.conditioned({}), distiller.sampler(), x)
    torch.testing.assert_close(found, MEAN[:, None, None] + gain * (x - oracle.centre(x, grid[:1])), atol=1e-9, rtol=0)


@torch.no_grad()
def solve(distiller: Progressive, oracle: Gaussian) -> None:
    """Give the student the slopes that its mentor's targets have."""
    fine = oracle.schedule.grid(2 * distiller.stage.value)
    t, t_mid, s = fine[:-1:2], fine[1::2], fine[2::2]
    probe = torch.ones(len(t), 2, 1, 1, dtype=torch.float64)
    target = two_step_target(distiller.stage_teacher({}), oracle.centre(probe, t) + probe, t, t_mid, s, oracle.schedule)
    timesteps = oracle.schedule.timestep(t).round().long()
    distiller.bank.state("student")["slopes"][timesteps] = (target - MEAN[:, None, None])[:, 0, 0, 0]


@pytest.mark.parametrize("config", [vp_config(), vp_config("linear"), FLOW_CONFIG], ids=["cosine", "linear", "flow"])
def test_students_are_trained_at_the_times_they_are_sampled_at(config):
    assert trained_times(config, start=16, steps=2) == {8: True, 4: True, 2: True}


class Watched(Denoiser):
    """Remembers the times it was called at."""

    def __call__(self, x_t, t, cond, **extra):
        self.times = set(t.tolist())
        return super().__call__(x_t, t, cond, **extra)


def trained_times(config: dict, **options) -> dict[int, bool]:
    """For the student of every stage, whether it was trained at exactly the times of its sampler."""
    found = {}
    distiller = small(config, **options)
    for stage in distiller.stages(10):
        distiller.stage = stage
        distiller.student = Watched(distiller.family, distiller.bank, "student")
        distiller("student", Batch(torch.randn(512, 2, 1, 1), {}, 512), Draws(0, 512))
        found[stage.value] = distiller.student.times == set(distiller.sampler().times[:-1].tolist())
    return found


def test_an_edm_student_of_several_steps_is_sampled_on_the_times_it_was_trained_at():
    """Karras' grids of n and 2 n steps are not nested; nested ones are Karras' grids that end at a higher noise."""
    config = {"_class_name": "EDMEulerScheduler"}
    assert trained_times(config, start=8, steps=2) == {4: True, 2: True}
    family = small(config, start=8, steps=2).family
    for steps in (1, 2, 4):
        options = Progressive.Config(start=8, steps=steps)
        Progressive.check(options, family)
        sampler = Progressive.make_sampler(options, family)
        scheduler = to_diffusers(sampler, config)
        scheduler.set_timesteps(steps)
        _, sigma = sampler.schedule(sampler.times)
        torch.testing.assert_close(scheduler.sigmas.double(), sigma, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weighting", ["constant", "snr", "truncated_snr", "snr_plus_one"])
def test_the_loss_is_the_weighted_error_of_the_algorithm_box(weighting):
    """(e), written a second time, from the paper: per-sample errors of the clean image and of the noise."""
    distiller = small(vp_config(), start=8, steps=4, weighting=weighting)
    distiller.stage = distiller.stages(10)[0]
    nn.init.normal_(distiller.bank.networks["student"].fc3.weight)
    x0 = torch.randn(32, 2, 1, 1)
    found = distiller("student", Batch(x0, {}, 32), Draws(3, 32)).terms["loss"]
    draws = Draws(3, 32)
    i = draws.integers(0, 4).double()
    t, t_mid, s = 1 - i / 4, 1 - (i + 0.5) / 4, 1 - (i + 1) / 4
    x_t = distiller.schedule.add_noise(x0, draws.normal_like(x0), t)
    with torch.no_grad():
        target = two_step_target(distiller.teacher.conditioned({}), x_t, t, t_mid, s, distiller.schedule)
        student = distiller.student(x_t, t, {})
    alpha, sigma = (expand(coefficient, target) for coefficient in distiller.schedule(t))
    target_eps = (x_t - alpha * target) / sigma
    e_x, e_eps, e_v = (
        (a - b).square().flatten(1).mean(1)
        for a, b in (
            (student.x0, target),
            (student.eps, target_eps),
            (student.velocity(alpha, sigma), alpha * target_eps - sigma * target),
        )
    )
    expected = {"constant": e_x, "snr": e_eps, "truncated_snr": torch.maximum(e_x, e_eps), "snr_plus_one": e_v}
    assert found.item() == pytest.approx(expected[weighting].mean().item(), rel=1e-3)


@pytest.mark.parametrize(("weighting", "counts"), [("snr", False), ("truncated_snr", True), ("snr_plus_one", True)])
def test_a_student_of_one_step_learns_from_pure_noise(weighting, counts):
    """(f): an error of the noise alone would teach it nothing."""
    distiller = small(vp_config("zero_snr"), start=2, steps=1, weighting=weighting)
    distiller.stage = distiller.stages(10)[0]
    loss = distiller("student", Batch(torch.randn(8, 2, 1, 1), {}, 8), Draws(0, 8)).terms["loss"]
    assert (loss.item() > 0) is counts


def test_gradients_reach_the_student_alone():
    distiller = small(vp_config(), start=4, steps=1)
    for stage in distiller.stages(10):
        distiller.stage = stage
        distiller("student", Batch(torch.randn(8, 2, 1, 1), {}, 8), Draws(0, 8)).terms["loss"].backward()
    mine = {id(parameter) for parameter in distiller.turns["student"].params}
    assert {id(p) for p in distiller.parameters() if p.grad is not None} == mine


# ----------------------------------------------------------------------------------------------------- stages


def test_stages_halve_and_the_last_ones_are_longer():
    stages = small(vp_config(), start=32, steps=1).stages(700)
    assert [(stage.name, stage.value, stage.steps) for stage in stages] == [
        ("16-steps", 16, 100), ("8-steps", 8, 100), ("4-steps", 4, 100), ("2-steps", 2, 200), ("1-steps", 1, 200),
    ]  # fmt: skip


@pytest.mark.parametrize("method", [Progressive, Guided, Lightning, Tract])
def test_no_method_starts_from_more_steps_than_the_teacher_has(method):
    family = Pixel.tiny()
    method.make_sampler(method.Config(start=512), family)
    with pytest.raises(ValueError, match=r"method\.start: expected at most the teacher's 1000 timesteps, got 1024"):
        method.make_sampler(method.Config(start=1024), family)


@pytest.mark.parametrize("total", [12, 100, 1001])
@pytest.mark.parametrize("start", [2, 8, 1024])
def test_stages_spend_every_step(start, total):
    assert sum(stage.steps for stage in small(vp_config(), start=start, steps=1).stages(total)) == total


def test_only_a_teacher_of_the_noise_is_converted_first():
    distiller = small(vp_config("cosine", "epsilon"), start=8, steps=2)
    names = [(stage.name, stage.value) for stage in distiller.stages(100)]
    assert names == [(CONVERT, 8), ("4-steps", 4), ("2-steps", 2)]
    assert distiller.teacher.family.prediction_type == "epsilon"
    for denoiser in (distiller.student, distiller.last_student, distiller.result):
        assert denoiser.family.prediction_type == "v_prediction"
        assert denoiser.family.scheduler_config["prediction_type"] == "v_prediction"
    for config in (vp_config(), vp_config("linear", "sample"), FLOW_CONFIG):
        assert CONVERT not in [stage.name for stage in small(config, start=8, steps=2).stages(100)]


@pytest.mark.parametrize(("steps", "converts"), [(2, False), (1, True)])
@pytest.mark.parametrize("betas", [("scaled_linear", 0.00085, 0.012), ("linear", 0.0001, 0.02)])
def test_noise_is_kept_where_signal_is_left_unless_one_step_hangs_on_it(steps, converts, betas):
    config = DDIMScheduler(beta_schedule=betas[0], beta_start=betas[1], beta_end=betas[2]).config
    assert small({**config, "_class_name": "DDIMScheduler"}, start=8, steps=steps).converts is converts


@pytest.mark.parametrize("ema", [False, True])
def test_a_stage_begins_with_the_weights_that_were_evaluated(ema):
    distiller = small(vp_config(), start=4, steps=1, ema=ema)
    for seed, role in enumerate(distiller.bank.roles[1:]):
        for tensor in distiller.bank.state(role).values():
            tensor.add_(seed + 1)
    kept = {name: tensor.clone() for name, tensor in distiller.bank.state("ema" if ema else "student").items()}
    distiller.begin_stage()
    for role in ("student", "mentor"):
        assert all(torch.equal(tensor, kept[name]) for name, tensor in distiller.bank.state(role).items())


@pytest.mark.parametrize(("start", "steps"), [(12, 4), (4, 4), (2, 4), (8, 0), (8, -1), (10, 4)])
def test_a_start_that_does_not_halve_to_the_end_is_refused(start, steps):
    with pytest.raises(ValueError, match=f"got start {start}, steps {steps}"):
        Progressive.Config(start=start, steps=steps)


# --------------------------------------------------------------------------------------------------- guidance


class Guided(nn.Module):
    """A network that is the guided oracle in one call, in any prediction type."""

    dtype = torch.float64

    def __init__(self, oracle: Oracle, scale: float, prediction_type: str) -> None:
        super().__init__()
        self.oracle, self.scale, self.prediction_type = oracle, scale, prediction_type

    def forward(self, sample, timestep, class_labels=None):
        t, x_t = time_of(self.oracle.schedule, timestep), sample.double()
        conditional, unconditional = self.oracle.predict(x_t, t, class_labels), self.oracle.predict(x_t, t)
        x0 = unconditional + self.scale * (conditional - unconditional)
        return SimpleNamespace(sample=from_x0(x0, x_t, t, self.oracle.schedule, self.prediction_type))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_guidance_is_baked_in_once(prediction_type):
    """The first student's perfect network is the guided teacher; the next one's mentor is that student, unguided."""
    config = vp_config("cosine", prediction_type)
    oracle = three_clusters(read_schedule(config)[0], prediction_type, conditional=True)
    distiller = make(oracle, config, num_classes=3, start=4, steps=1, guidance_scale=3.0)
    perfect = Guided(oracle, 3.0, "v_prediction")
    labels = torch.arange(64) % 3
    batch = Batch(oracle.draw(64, labels), {"class_labels": labels}, 64)
    x_t, t = states(64), torch.full((64,), 0.75, dtype=torch.float64)
    first, second = distiller.stages(10)[:2]

    distiller.stage = first
    wanted = oracle.predict(x_t, t) + 3 * (oracle.predict(x_t, t, labels) - oracle.predict(x_t, t))
    torch.testing.assert_close(distiller.guided_teacher(batch.cond)(x_t, t).x0, wanted, atol=1e-9, rtol=0)
    if prediction_type == "epsilon":
        distiller.bank.networks["student"] = perfect
        assert distiller("student", batch, Draws(0, 64)).terms["loss"] < 1e-9
    else:
        torch.testing.assert_close(distiller.stage_teacher(batch.cond)(x_t, t).x0, wanted, atol=1e-9, rtol=0)

    distiller.stage = second
    distiller.bank.networks["mentor"] = perfect
    torch.testing.assert_close(distiller.stage_teacher(batch.cond)(x_t, t).x0, wanted, atol=1e-9, rtol=0)


def test_an_unguidable_teacher_is_refused_before_anything_is_copied():
    family = small(vp_config(), start=4, steps=1).family
    with pytest.raises(ValueError, match="cannot be guided"):
        Progressive.check(Progressive.Config(start=4, steps=1, guidance_scale=2.0), family)


# ------------------------------------------------------------------------------------- the mixture is learned


def run(distiller: Progressive, oracle: Oracle, steps: int, lr: float = 5e-3) -> None:
    """The trainer's loop without everything around it: stages, fresh optimisers, rates that fall to zero."""
    count = itertools.count()
    for stage in distiller.stages(steps):
        distiller.stage = stage
        distiller.begin_stage()
        turn = distiller.turns["student"]
        optimizer = torch.optim.Adam(turn.params, lr=lr, betas=(0.9, 0.99))
        for step in range(stage.steps):
            batch = Batch(oracle.draw(256).float(), {}, 256)
            optimizer.param_groups[0]["lr"] = lr * (1 - step / stage.steps)
            distiller("student", batch, Draws(derive_seed(next(count)), 256)).terms["loss"].backward()
            nn.utils.clip_grad_norm_(turn.params, 1.0)
            optimizer.step()
            optimizer.zero_grad()


@torch.no_grad()
def draw(denoiser: Denoiser, schedule: NoiseSchedule, steps: int, x: torch.Tensor) -> torch.Tensor:
    return sample(denoiser.conditioned({}), DDIM(schedule, schedule.grid(steps)), x)


@pytest.mark.parametrize(
    ("config", "start", "steps", "bound"),
    [
        pytest.param(vp_config(), 16, 1600, 0.25, id="v"),
        pytest.param(vp_config("linear", "epsilon"), 8, 2400, 0.45, id="epsilon"),
        pytest.param(FLOW_CONFIG, 8, 1200, 0.4, id="flow"),
    ],
)
@pytest.mark.product
def test_a_mixture_distilled_to_one_step_lands_on_its_distribution(config, start, steps, bound):
    """Distances to exact samples, where the clusters lie 1.5 from the origin and are 0.2 wide.

    ============================  ====  =======  ====
    measured                      v     epsilon  flow
    ============================  ====  =======  ====
    student, 1 step               0.15  0.29     0.28
    teacher, as many as at first  0.05  0.13     0.12
    teacher, 2 steps              0.45  0.79     0.76
    teacher, 1 step               1.08  1.07     1.08
    ============================  ====  =======  ====
    """
    schedule, prediction_type = read_schedule(config)
    oracle = three_clusters(schedule, prediction_type)
    distiller = make(PointNet(schedule, oracle, width=96), config, start=start, steps=1)
    before = {name: tensor.clone() for name, tensor in distiller.bank.state("teacher").items()}
    run(distiller, oracle, steps)
    real, x = oracle.draw(20_000), torch.randn(20_000, 2, 1, 1)
    student = sliced_wasserstein(draw(distiller.result, schedule, 1, x), real)
    teacher = {n: sliced_wasserstein(draw(distiller.teacher, schedule, n, x), real) for n in (1, 2)}
    assert student < bound
    assert teacher[2] > 1.5 * bound and teacher[1] > 1  # what the same calls give without distillation
    assert all(torch.equal(tensor, before[name]) for name, tensor in distiller.bank.state("teacher").items())
