"""Guided distillation: the target, the jumps, the optimum, and a student of a mixture that is steered by w."""

import itertools

import pytest
import torch
from contracts.cases import BANKS, CASES, Case, make_run, pipeline_images, reference_images
from mixtures import VP_CONFIG, batch_of, loss_of
from oracles import SCHEDULES, Gaussian, OracleFamily, PointNet, sliced_wasserstein, teacher_denoiser, three_clusters
from torch import nn

from stepdistill import load_pipeline
from stepdistill.batch import Batch
from stepdistill.diffusion.ode import invert_step, noise_up, ode_step
from stepdistill.diffusion.prediction import from_x0, to_prediction
from stepdistill.diffusion.samplers import DoubleStep, sample
from stepdistill.diffusion.schedule import expand
from stepdistill.families.pixel import Pixel
from stepdistill.files.schema import ConfigError
from stepdistill.losses.guidance_input import guidance_followed
from stepdistill.losses.progressive import halvings
from stepdistill.methods.base import split_steps
from stepdistill.methods.guided import MATCH, STOCHASTIC, Guided
from stepdistill.methods.progressive import Progressive
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.randomness import Draws, derive_seed
from stepdistill.training.config import resolve

COSINE = SCHEDULES["cosine"]
MEAN = torch.tensor([0.3, -0.2], dtype=torch.float64)


class SteeredFamily(OracleFamily):
    """2-D points, for networks ``network(sample, timestep, class_labels, w)``; the teacher gets no w."""

    def add_inputs(self, inputs):
        self.inputs = inputs

    def call(self, network, x_t, t, cond, *, w=None, s=None):
        labels, timestep = cond.get("class_labels"), self.schedule.timestep(t)
        if w is None:
            return network(x_t.to(network.dtype), timestep, labels).sample
        return network(x_t.to(network.dtype), timestep, labels, w).sample


class SteeredNet(nn.Module):
    """The conditional oracle and a small trainable network that is zero at first and sees w beside x, t and class."""

    def __init__(self, oracle):
        super().__init__()
        self.oracle = oracle
        self.by_w = nn.ModuleList(PointNet(oracle.schedule, num_classes=3) for _ in range(3))
        for net in self.by_w:
            nn.init.zeros_(net.fc3.weight)
            nn.init.zeros_(net.fc3.bias)

    dtype = torch.float32

    def forward(self, sample, timestep, class_labels=None, w=None):
        output = self.oracle(sample, timestep, class_labels)
        if w is not None:
            u = expand(w - 1, sample).float()  # Legendre's polynomials on [0, 2]: no net's share hides another's
            for share, net in zip((torch.ones_like(u), u, (3 * u**2 - 1) / 2), self.by_w, strict=True):
                output.sample = output.sample + share * net(sample, timestep, class_labels).sample
        return output


class GaussianOfWidth(nn.Module):
    """For N(mean, (1/2 + w/4)^2 I): what guidance does to it is a width."""

    dtype = torch.float64

    def __init__(self, see=None):
        super().__init__()
        self.weights = []
        self.see = see or self.width_of

    @staticmethod
    def width_of(x_t, t, w):
        (alpha, sigma), width = COSINE(t), expand(0.5 + 0.25 * w, x_t)
        alpha, sigma, mean = expand(alpha, x_t), expand(sigma, x_t), MEAN[:, None, None]
        return (alpha * width**2 * x_t + sigma**2 * mean) / (alpha**2 * width**2 + sigma**2)

    def forward(self, sample, timestep, class_labels=None, w=None):
        self.weights.append(w)
        t = (timestep.double() + 1) / COSINE.num_timesteps
        output = from_x0(self.see(sample, t, w), sample, t, COSINE, "v_prediction")
        return type("Output", (), {"sample": output.nan_to_num()})


def steered(network, steps, *, ema=False, **options):
    family = SteeredFamily(network, COSINE, "v_prediction", num_classes=3, scheduler_config=VP_CONFIG)
    distiller = Guided(family, CopyBank(network), Guided.Config(steps=steps, **options), ema=ema)
    distiller.stage = distiller.stages(100)[0]
    return distiller


def stage_named(distiller, name):
    (distiller.stage,) = (stage for stage in distiller.stages(100) if stage.name == name)
    return distiller


# ----------------------------------------------------------------------------------------------- the target


def test_the_target_is_linear_in_w_conditional_at_zero_and_unconditional_at_minus_one():
    oracle = three_clusters(COSINE, "v_prediction", conditional=True)
    teacher = teacher_denoiser(oracle, 3)
    cond = {"class_labels": torch.tensor([0, 1, 2, 0])}
    null = teacher.family.null_cond(cond)
    x, t = torch.randn(4, 2, 1, 1, dtype=torch.float64), torch.tensor([1.0, 0.7, 0.4, 0.1], dtype=torch.float64)
    conditional, unconditional = teacher(x, t, cond).x0, teacher(x, t, null).x0
    for w in (torch.zeros(4), -torch.ones(4), torch.tensor([0.5, 1.0, 3.0, 7.0])):
        expected = conditional + expand(w, x) * (conditional - unconditional)
        assert torch.allclose(teacher.guided(cond, w)(x, t).x0, expected, atol=1e-12)
    centre = oracle.means[cond["class_labels"]][..., None, None]  # a class alone is a Gaussian
    alpha, sigma = (expand(coefficient, x) for coefficient in COSINE(t))
    closed = (alpha * 0.2**2 * x + sigma**2 * centre) / (alpha**2 * 0.2**2 + sigma**2)
    assert torch.allclose(conditional, closed, atol=1e-12)


def test_stage_one_is_lossless_only_for_the_student_that_sees_what_the_guided_teacher_sees():
    oracle = three_clusters(COSINE, "v_prediction", conditional=True)

    class Perfect(nn.Module):
        dtype, off = torch.float64, 0.0

        def forward(self, x_t, timestep, class_labels=None, w=None):
            if w is None:
                return oracle(x_t, timestep, class_labels)
            c, u = (oracle(x_t, timestep, y).sample for y in (class_labels, torch.full_like(class_labels, 3)))
            return type("Output", (), {"sample": c + expand(w + self.off, x_t) * (c - u)})

    distiller = steered(Perfect(), 2, start=8)
    batch = batch_of(oracle, 64, 3)
    assert loss_of(distiller, batch) < 1e-12
    distiller.bank.networks["student"].off = 0.1
    assert loss_of(distiller, batch) > 1e-5


# ------------------------------------------------------------------------------------------------- stage two


def known_student(distiller):
    """What the student of this stage has to see: the mentor's two steps, each in closed form, as one."""

    def see(x_t, t, w):
        grid = COSINE.grid(2 * distiller.stage.value if distiller.stage.name != STOCHASTIC else distiller.stage.value)
        i = (grid - t[:, None]).abs().argmin(1)
        t_mid, s = grid[i + 1], grid[(i + 2).clamp(max=len(grid) - 1)]
        x_mid = step(x_t, t, t_mid, w)
        x_s = torch.where(expand(t_mid == s, x_t) > 0, x_mid, step(x_mid, t_mid, s, w))
        return invert_step(x_t, x_s, t, s, COSINE)

    def step(x, t, s, w):
        output = from_x0(GaussianOfWidth.width_of(x, t, w), x, t, COSINE, "v_prediction").nan_to_num()
        return ode_step(to_prediction(output, x, t, COSINE, "v_prediction"), COSINE, s)

    return GaussianOfWidth(see)


def test_the_log_says_how_far_a_student_follows_its_guidance_input():
    conditional, direction, w = torch.randn(16, 2, 3, 3), torch.randn(16, 2, 3, 3), torch.linspace(0, 2, 16)
    guided = conditional + expand(w, conditional) * direction
    for shown, follows in ((w, 1.0), (torch.zeros(16), 0.0), (torch.full((16,), 1.2), 0.0), (0.5 + 0.3 * w, 0.3)):
        found = conditional + expand(shown, conditional) * direction
        assert guidance_followed(found, guided, conditional, w).item() == pytest.approx(follows, abs=1e-5)
    for one in (0.0, 0.15, 1.0):
        w = torch.full((16,), one)
        guided = conditional + one * direction
        assert guidance_followed(guided, guided, conditional, w).item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("stage", ["4-steps", "2-steps", STOCHASTIC])
def test_halving_is_lossless_for_the_known_optimum_and_carries_w_along(stage):
    sampler = "stochastic" if stage == STOCHASTIC else "deterministic"
    distiller = stage_named(steered(GaussianOfWidth(), 2, start=8, sampler=sampler), stage)
    distiller.bank.networks["student"] = known_student(distiller)
    x0 = Gaussian(MEAN, 0.5, COSINE, "v_prediction").draw(128)
    batch = Batch(x0, {"class_labels": torch.zeros(128, dtype=torch.long)}, 128)
    distiller.bank.networks["mentor"].weights.clear()
    assert loss_of(distiller, batch) < 1e-12
    first, second = distiller.bank.networks["mentor"].weights
    (mine,) = distiller.bank.networks["student"].weights
    assert torch.equal(first, second) and torch.equal(first, mine) and len(mine.unique()) == 128
    assert mine.min() >= 0 and mine.max() <= 4

    distiller.bank.networks["student"] = GaussianOfWidth()
    assert loss_of(distiller, batch) > 1e-6  # a single step of the mentor is not two


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_the_last_edge_of_the_stochastic_student_is_one_step_of_the_mentor(prediction):
    oracle = three_clusters(COSINE, prediction, conditional=True)
    distiller = stage_named(steered(SteeredNet(oracle), 4, start=16, sampler="stochastic"), STOCHASTIC)
    distiller.family.prediction_type = prediction
    last = COSINE.grid(4)[3:4].expand(8)
    distiller.draw_times = lambda draws: (last, torch.zeros(8).double(), torch.zeros(8).double())
    batch = batch_of(oracle, 8, 3)
    assert loss_of(distiller, Batch(batch.x0.float(), batch.cond, 8)) < 1e-8


def test_the_stages_are_guidance_then_halvings_then_the_stochastic_student():
    names = [(stage.name, stage.value) for stage in steered(GaussianOfWidth(), 4, start=32).stages(100)]
    assert names == [(MATCH, 32), ("16-steps", 16), ("8-steps", 8), ("4-steps", 4)]
    stages = steered(GaussianOfWidth(), 4, start=32, sampler="stochastic").stages(101)
    assert (stages[-1].name, stages[-1].value) == (STOCHASTIC, 4)
    assert sum(stage.steps for stage in stages) == 101


@pytest.mark.parametrize("steps", [4, 7, 100, 4001])
def test_stages_share_the_steps_out_exactly(steps):
    stages = split_steps(steps, {"a": (8, 1.0), "b": (4, 1.0), "c": (2, 2.0)})
    assert sum(stage.steps for stage in stages) == steps
    assert all(abs(stage.steps - steps * part) <= 1 for stage, part in zip(stages, (0.25, 0.25, 0.5), strict=True))


def test_halvings_end_at_the_steps_wanted():
    assert halvings(64, 1) == [32, 16, 8, 4, 2, 1] and halvings(6, 3) == [3]


def test_an_epsilon_teacher_gets_a_student_of_velocities_with_the_same_inputs():
    family = Pixel.tiny(prediction_type="epsilon")
    family.add_inputs(Guided.extra_inputs(Guided.Config()))
    distiller = Guided(family, CopyBank(family.network), Guided.Config())
    assert distiller.teacher.family.prediction_type == "epsilon"
    assert {distiller.student.family.prediction_type, distiller.result.family.prediction_type} == {"v_prediction"}
    assert distiller.result.family.inputs.w == (0.0, 4.0) and distiller.result.w == 1.0


# --------------------------------------------------------------------------------------- the stochastic sampler


@pytest.mark.parametrize("name", SCHEDULES)
def test_noising_up_keeps_the_marginals(name):
    """ratio^2 sigma_s^2 + fresh^2 = sigma_t^2 and ratio alpha_s = alpha_t."""
    schedule = SCHEDULES[name]
    s, t = (torch.tensor(times, dtype=torch.float64) for times in ([0.0, 0.2, 0.5, 0.7], [0.3, 0.2, 0.9, 1.0]))
    (alpha_s, sigma_s), (alpha_t, sigma_t) = schedule(s), schedule(t)
    one, zero = torch.ones(4, 1, 1, 1, dtype=torch.float64), torch.zeros(4, 1, 1, 1, dtype=torch.float64)
    ratio = noise_up(one, s, t, schedule, torch.zeros_like).flatten()
    fresh = noise_up(zero, s, t, schedule, torch.ones_like).flatten()
    assert torch.allclose(ratio * alpha_s, alpha_t, atol=1e-12)
    assert torch.allclose((ratio * sigma_s) ** 2 + fresh**2, sigma_t**2, rtol=1e-9, atol=1e-12)
    assert fresh[1] == 0 or schedule(t)[1][1] < 1e-3 or fresh[1] < 1e-6  # nowhere to go, nothing to add


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_sampler_asks_for_the_jumps_that_were_trained_and_no_others(steps):
    sampler = DoubleStep(COSINE, COSINE.grid(steps))
    asked = {
        (t, sampler.landing(s[None]).item()) for t, s in zip(sampler.times.tolist(), sampler.times[1:], strict=False)
    }
    if steps == 1:
        assert asked == {(1.0, 0.0)}
        return
    distiller = stage_named(steered(GaussianOfWidth(), steps, start=2 * steps, sampler="stochastic"), STOCHASTIC)
    t, _, s = distiller.draw_times(Draws(0, 500))
    assert set(zip(t.tolist(), s.tolist(), strict=True)) == asked


def test_a_student_whose_jumps_are_exact_samples_the_data_from_any_number_of_calls():
    data = Gaussian(MEAN, 0.5, COSINE, "v_prediction")
    for steps in (1, 2, 4, 8):
        sampler = DoubleStep(COSINE, COSINE.grid(steps))

        def see(x, t, sampler=sampler):
            s = sampler.landing(sampler.times[(sampler.times - t[:, None]).abs().argmin(1) + 1])
            x0 = invert_step(x, data.solve(x, t, s), t, s, COSINE)
            alpha, sigma = (expand(coefficient, x) for coefficient in COSINE(t))
            return type(to_prediction(x, x, t, COSINE, "sample"))(x0, (x - alpha * x0) / sigma)

        drawn = sample(see, sampler, torch.randn(20_000, 2, 1, 1, dtype=torch.float64)).flatten(1)
        assert torch.allclose(drawn.mean(0), MEAN, atol=5 * 0.5 / 20_000**0.5)
        assert torch.allclose(drawn.std(0), torch.full((2,), 0.5).double(), atol=5 * 0.5 / 40_000**0.5)


# -------------------------------------------------------------------------------------------------- trainings


def train_all(oracle, steps, budget, seed=0, lr=1e-2, first=None, **options):
    """A steered student after all its stages, or the first few, the average of every stage its result."""
    torch.manual_seed(seed)
    distiller = steered(SteeredNet(oracle), steps, ema=True, guidance_max=3.0, **options)
    for stage in distiller.stages(budget)[:first]:
        distiller.stage = stage
        distiller.begin_stage()
        optimizer = torch.optim.Adam(distiller.bank.params("student"), lr=lr, betas=(0.9, 0.99))
        for step in range(stage.steps):
            batch = batch_of(oracle, 256, 3)
            loss = loss_of(distiller, Batch(batch.x0.float(), batch.cond, 256), derive_seed(seed, stage.name, step))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(distiller.bank.params("student"), 1.0)
            optimizer.param_groups[0]["lr"] = lr * (1 - step / stage.steps)
            optimizer.step()
            distiller.bank.blend("ema", "student", keep=min(0.98, (1 + step) / (10 + step)))
    return distiller


def walk(denoise, sampler, x, substeps):
    """``sampler``'s own rule with each of its jumps walked in ``substeps`` DDIM steps."""
    for t, s in itertools.pairwise(sampler.times):
        end = sampler.landing(s[None])[0] if isinstance(sampler, DoubleStep) else s
        for now, then in itertools.pairwise(torch.linspace(t.item(), end.item(), substeps + 1, dtype=torch.float64)):
            x = ode_step(denoise(x, now.expand(len(x))), COSINE, then.expand(len(x)))
        x = noise_up(x, end.expand(len(x)), s.expand(len(x)), COSINE, torch.randn_like) if end < s else x
    return x


@torch.no_grad()
def from_the_guided_teacher(student, w, size=6000):
    """Sliced Wasserstein, of the worst class, to the guided teacher under the student's sampler, every jump exact: of
    the student, and of the teacher that makes a jump in one step.

    A guided path has not the marginals of any noise process, so noising up moves it: at w = 2 the stochastic sampler
    with exact jumps is farther from the deterministic one than the teacher's four steps are. Each has its own limit.
    """
    labels = {"class_labels": torch.arange(size) % 3}

    def teacher(substeps):
        denoise = student.teacher.guided(labels, w)
        return walk(denoise, student.sampler(), torch.randn(size, 2, 1, 1), substeps)

    denoise = student.result.conditioned(labels, torch.full((size,), w))
    found = sample(denoise, student.sampler(), torch.randn(size, 2, 1, 1))
    exact = teacher(25)
    return tuple(max(sliced_wasserstein(a[k::3], exact[k::3]) for k in range(3)) for a in (found, teacher(1)))


@pytest.mark.parametrize("sampler", ["deterministic", "stochastic"])
@pytest.mark.product
def test_one_student_of_four_calls_is_steered_by_w_like_its_teacher_of_many(sampler):
    oracle = three_clusters(COSINE, "v_prediction", conditional=True)
    student = train_all(oracle, 4, 1200, start=16, sampler=sampler)
    for w in (0.0, 1.0, 2.0):
        distance, teacher = from_the_guided_teacher(student, w)
        assert distance < 0.75 * teacher, (w, distance, teacher)


def test_the_student_that_has_learnt_guidance_sees_what_the_guided_teacher_sees():
    oracle = three_clusters(COSINE, "v_prediction", conditional=True)
    student = train_all(oracle, 8, 900, first=1, start=16, first_stage=2.0)  # 600 on guidance
    batch = batch_of(oracle, 900, 3)
    w, t = torch.linspace(0, 2, 900), COSINE.grid(16)[torch.arange(900) % 16]
    x_t = COSINE.add_noise(batch.x0.float(), torch.randn(900, 2, 1, 1), t)
    with torch.no_grad():
        target = student.teacher.guided(batch.cond, w)(x_t, t).x0
        before, after = (
            (prediction.x0 - target).square().mean()
            for prediction in (student.teacher(x_t, t, batch.cond), student.result(x_t, t, batch.cond, w=w))
        )
        guided, conditional = student.teacher.guided_and_conditional(x_t, t, batch.cond, w)
        found = student.result(x_t, t, batch.cond, w=w).x0
    assert after < 0.02 * before, (after, before)
    assert guidance_followed(found, guided.x0, conditional.x0, w) > 0.9


# ----------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("bank", BANKS)
def test_a_stochastic_student_is_exported_with_its_sampler_and_its_range(tmp_path, monkeypatch, bank):
    options = {"steps": 2, "start": 4, "sampler": "stochastic", "guidance_max": 3.0, "guidance_scale": 2.5}
    monkeypatch.setitem(CASES, "guided", Case(options))
    run = make_run(tmp_path, "guided", bank)
    run.train()
    pipeline = load_pipeline(run.folder / "pipeline")
    assert type(pipeline.scheduler).__name__ == "DoubleStepScheduler"
    images = pipeline_images(pipeline, run.distiller.family, 5, seed=7)
    assert (images - reference_images(run, 5, seed=7)).abs().max() < 1e-5
    run.distiller.result.w = 0.0
    steered = pipeline_images(pipeline, run.distiller.family, 5, seed=7, guidance_scale=1.0)
    assert (steered - reference_images(run, 5, seed=7)).abs().max() < 1e-5
    with pytest.raises(ValueError, match="trained for 1 to 3"):
        pipeline(class_labels=[0], guidance_scale=3.5)


@pytest.mark.parametrize("bank", BANKS)
def test_before_training_the_student_is_the_conditional_teacher_for_every_w(tmp_path, bank):
    distiller = make_run(tmp_path, "guided", bank).distiller
    cond = distiller.family.example_cond(range(4))
    x, t = torch.randn(4, *distiller.family.sample_shape), torch.full((4,), 0.6)
    with torch.no_grad():
        expected = distiller.teacher.raw(x, t, cond)
        for w in (0.0, 1.0, 4.0):
            assert torch.equal(distiller.student.raw(x, t, cond, w=torch.full((4,), w)), expected)


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_min": 2.0, "guidance_max": 1.5}, "expected guidance_min = 2.0 to guidance_max = 1.5"),
        ({"guidance_scale": 9.0}, "expected guidance_min = 1.0 to guidance_max = 5.0, got 9.0"),
        ({"steps": 3, "start": 8}, "start: expected steps times 2, 4, 8"),
        ({"steps": 1, "sampler": "stochastic"}, "expected at least 2 with the stochastic sampler"),
        ({"sampler": "random"}, "expected 'deterministic' or 'stochastic', got 'random'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        resolve({"method": {"name": "guided", **options}})


def test_an_unconditional_teacher_cannot_be_guided():
    with pytest.raises(ValueError, match="unconditional"):
        Guided.check(Guided.Config(), Pixel.tiny(num_classes=None))


def test_a_grid_that_no_scheduler_samples_is_refused_before_training():
    for sampler in ("deterministic", "stochastic"):
        with pytest.raises(ValueError, match="steps must divide"):
            Guided.check(Guided.Config(steps=3, start=12, sampler=sampler), Pixel.tiny())


def test_the_stochastic_sampler_is_refused_for_flows():
    from contracts.cases import FLOW, scheduler_config

    family = Pixel.tiny(scheduler=scheduler_config(FLOW))
    Guided.check(Guided.Config(), family)
    with pytest.raises(ValueError, match="VP teachers only"):
        Guided.check(Guided.Config(sampler="stochastic"), family)


def test_progressive_still_spends_its_steps_as_guided_does():
    family = Pixel.tiny()
    progressive = Progressive(family, CopyBank(family.network), Progressive.Config(steps=1, start=8))
    spans = [stage.steps for stage in progressive.stages(100)]
    assert [stage.value for stage in progressive.stages(100)] == [4, 2, 1] and spans == [20, 40, 40]
    assert list(itertools.accumulate(spans))[-1] == 100
