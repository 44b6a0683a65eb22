"""TRACT: the target, its groups, the self-teacher, the phases, and a student of a mixture."""

import pytest
import torch
from diffusers import DDIMScheduler
from mixtures import NEARER, batch_of, landing, loss_of, make, put, train
from oracles import SCHEDULES, Gaussian, Oracle, teacher_denoiser, three_clusters
from torch import nn

from stepdistill.batch import Batch
from stepdistill.diffusion.ode import invert_step, ode_step, solver_step
from stepdistill.diffusion.prediction import from_x0
from stepdistill.diffusion.schedule import Karras
from stepdistill.diffusion.schedulers import to_diffusers
from stepdistill.families.pixel import Pixel
from stepdistill.files.schema import build
from stepdistill.losses.progressive import CONVERT
from stepdistill.losses.regression import mean_square
from stepdistill.methods.tract import Tract
from stepdistill.networks.adapter_bank import AdapterBank
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.randomness import Draws

TWO = torch.tensor([0.3, -0.2], dtype=torch.float64)
KINDS = [("cosine", "v_prediction"), ("zero_snr", "v_prediction"), ("flow", "flow"), ("karras", "edm")]
LADDER = {"start": 24, "via": (6,), "steps": 2}


class Closure(Oracle):
    """The exact student of a phase: from any time of the grid, the teacher's own steps to the end of the group."""

    def __init__(self, teacher, distiller):
        super().__init__(teacher.means, teacher.std, teacher.schedule, teacher.prediction_type)
        self.denoise = teacher_denoiser(teacher).conditioned({})
        self.times = distiller.grid(distiller.teacher_steps)
        self.width = distiller.teacher_steps // distiller.stage.value

    def rollout(self, x, i):
        end = (i // self.width + 1) * self.width
        solver = "heun" if isinstance(self.schedule, Karras) else "euler"
        for k in range(len(self.times) - 1):
            t, s = (time.expand(len(x)) for time in self.times[k : k + 2])
            due = ((i <= k) & (k < end))[:, None, None, None]
            x = torch.where(due, solver_step(self.denoise, x, t, s, self.schedule, solver), x)
        return x, self.times[end]

    def predict(self, x_t, t, class_labels=None):
        i = (self.times[:-1] - t[:, None]).abs().argmin(1)
        x_end, end = self.rollout(x_t, i)
        return invert_step(x_t, x_end, t, end, self.schedule)


def first_phase(network, oracle, **options):
    distiller = make(Tract, network, oracle, **LADDER, **options)
    distiller.stage = next(stage for stage in distiller.stages(10) if stage.name != CONVERT)
    return distiller


def drawn(distiller, oracle, size=64, seed=0):
    t, t_next, t_end = distiller.draw_times(Draws(seed, size))
    x = torch.randn(size, 2, 1, 1, dtype=torch.float64)
    return distiller.schedule.add_noise(oracle.draw(size), x, t), t, t_next, t_end


# ----------------------------------------------------------------------------------------------- the target


def test_the_target_is_the_formula_of_the_papers_code():
    oracle = three_clusters(SCHEDULES["cosine"], "v_prediction")
    distiller = first_phase(oracle, oracle)
    x_t, t, t_next, t_end = drawn(distiller, oracle)
    denoise = distiller.teacher.conditioned({})
    x_next = ode_step(denoise(x_t, t), distiller.schedule, t_next)
    jump = ode_step(denoise(x_next, torch.where(t_next == 0, t, t_next)), distiller.schedule, t_end)
    x_end = torch.where((t_next == t_end)[:, None, None, None], x_next, jump)
    # tc_distill.py of ml-tract, with gamma = alpha^2
    g, g_end = (distiller.schedule(time)[0][:, None, None, None] ** 2 for time in (t, t_end))
    expected = (x_t * (1 - g_end).sqrt() - x_end * (1 - g).sqrt()) / (
        (g * (1 - g_end)).sqrt() - (g_end * (1 - g)).sqrt()
    )
    torch.testing.assert_close(distiller.closure(x_t, t, t_next, t_end, {}), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_an_exact_self_teacher_gives_the_teachers_own_rollout_and_is_the_optimum(name, kind):
    oracle = three_clusters(SCHEDULES[name], kind)
    distiller = first_phase(oracle, oracle)
    closure = Closure(oracle, distiller)
    put(distiller, closure)
    x_t, t, t_next, t_end = drawn(distiller, oracle)
    x_end, _ = closure.rollout(x_t, (closure.times[:-1] - t[:, None]).abs().argmin(1))
    target = distiller.closure(x_t, t, t_next, t_end, {})
    student = distiller.student(x_t, t, {})
    torch.testing.assert_close(target, invert_step(x_t, x_end, t, t_end, oracle.schedule), atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(ode_step(student, oracle.schedule, t_end), x_end, atol=1e-7, rtol=1e-7)
    assert loss_of(distiller, batch_of(oracle, 64)) < 1e-12
    put(distiller, oracle)  # the teacher itself is not the optimum
    assert loss_of(distiller, batch_of(oracle, 64)) > 1e-4


def test_for_a_gaussian_the_fixed_point_is_the_product_of_gains():
    gaussian = Gaussian(TWO, 0.5, SCHEDULES["cosine"], "v_prediction")
    distiller = first_phase(gaussian, gaussian)
    closure, grid = Closure(gaussian, distiller), distiller.grid(24)
    x = torch.randn(1, 2, 1, 1, dtype=torch.float64)
    gains = torch.stack([gaussian.gain(t[None], s[None]) for t, s in zip(grid[1:4], grid[2:5], strict=True)]).prod()
    expected = gaussian.centre(x, grid[4:5]) + gains * (x - gaussian.centre(x, grid[1:2]))
    put(distiller, closure)
    target = distiller.closure(x, grid[1:2], grid[2:3], grid[4:5], {})
    torch.testing.assert_close(target, invert_step(x, expected, grid[1:2], grid[4:5], gaussian.schedule))


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_the_last_step_of_a_group_asks_the_teacher_alone(name, kind):
    class Silent(nn.Module):
        dtype = torch.float64

        def forward(self, sample, timestep, class_labels=None):
            return type("Output", (), {"sample": torch.full_like(sample, torch.nan)})

    oracle = three_clusters(SCHEDULES[name], kind)
    distiller = first_phase(oracle, oracle)
    distiller.bank.networks["self_teacher"] = Silent()
    grid = distiller.grid(24)
    t, s = grid[[3, 23]], grid[[4, 24]]
    x_t = distiller.schedule.add_noise(oracle.draw(2), torch.randn(2, 2, 1, 1, dtype=torch.float64), t)
    target = distiller.closure(x_t, t, s, s, {})
    denoise = distiller.teacher.conditioned({})
    solver = "heun" if name == "karras" else "euler"
    expected = solver_step(denoise, x_t, t, s, distiller.schedule, solver)
    torch.testing.assert_close(target, invert_step(x_t, expected, t, s, distiller.schedule))
    torch.testing.assert_close(target[1], denoise(x_t, t).x0[1])  # to clean data, the teacher's own answer
    assert distiller.closure(x_t, t, grid[[4, 24]], grid[[8, 24]], {})[0].isnan().all()


@pytest.mark.parametrize("phase", [0, 1])
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_times_lie_on_the_grid_and_every_one_is_drawn(name, kind, phase):
    oracle = three_clusters(SCHEDULES[name], kind)
    distiller = make(Tract, oracle, oracle, **LADDER)
    distiller.stage = distiller.stages(10)[phase]
    teacher_steps, width = [(24, 4), (6, 3)][phase]
    grid = distiller.schedule.grid(24)[:: 24 // teacher_steps]
    times = distiller.draw_times(Draws(0, 4000))
    i, i_next, i_end = (torch.searchsorted(-grid, -time) for time in times)
    assert all(torch.equal(grid[index], time) for index, time in zip((i, i_next, i_end), times, strict=True))
    assert sorted(set(i.tolist())) == list(range(teacher_steps))
    assert torch.equal(i_next, i + 1)
    assert torch.equal(i_end, (i // width + 1) * width)


def test_the_weight_of_edm_counts_errors_of_its_own_output():
    schedule = SCHEDULES["karras"]
    distiller = first_phase(three_clusters(schedule, "edm"), three_clusters(schedule, "edm"))
    t = torch.tensor([0.3, 0.6, 1.0], dtype=torch.float64)
    x_t, a, b = torch.randn(3, 3, 2, 1, 1, dtype=torch.float64)
    outputs = [from_x0(x0, x_t, t, schedule, "edm") for x0 in (a, b)]
    torch.testing.assert_close(
        distiller.weight(t) * mean_square(a, b), mean_square(*outputs).double(), rtol=1e-4, atol=0
    )


# ------------------------------------------------------------------------------------- averages and phases


def tiny(bank="copy", **options):
    family = Pixel.tiny(**{key: options.pop(key) for key in ("prediction_type",) if key in options})
    networks = CopyBank(family.network) if bank == "copy" else AdapterBank(family.network, rank=2, targets=["to_q"])
    distiller = Tract(family, networks, Tract.Config(**{"start": 20, "via": (10,), "steps": 1} | options), ema=True)
    distiller.stage = distiller.stages(10)[0]
    return distiller


def set_weights(distiller, role, value):
    for tensor in distiller.bank.state(role).values():
        tensor.fill_(value)


def test_the_self_teacher_is_a_mean_with_weights_that_sum_to_one():
    distiller, decay, students = tiny(self_ema=0.6), 0.6, [3.0, -1.0, 2.0, 5.0]
    set_weights(distiller, "self_teacher", 100.0)
    for n, student in enumerate(students, start=1):
        set_weights(distiller, "student", student)
        distiller.step_in_stage = n - 1
        distiller.after_step()
        shares = torch.tensor([decay ** (n - k) for k in range(1, n + 1)])
        expected = (shares / shares.sum() * torch.tensor(students[:n])).sum().item()
        assert distiller.bank.params("self_teacher")[0].mean().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bank", ["copy", "adapter"])
def test_a_new_phase_takes_the_average_as_its_teacher_and_leaves_the_student_alone(bank):
    distiller = tiny(bank)
    distiller.begin_stage()
    set_weights(distiller, "student", 1.0)
    set_weights(distiller, "self_teacher", 2.0)
    set_weights(distiller, "ema", 3.0)
    distiller.stage = distiller.stages(10)[1]
    distiller.begin_stage()
    found = {role: distiller.bank.params(role)[0].mean().item() for role in ("student", "self_teacher", "mentor")}
    assert found == {"student": 1.0, "self_teacher": 2.0, "mentor": 3.0}
    assert distiller.teacher_steps == 10
    assert distiller.sampler().times.tolist() == [1.0, 0.0]


def test_phases_share_the_steps_and_an_epsilon_teacher_gets_one_more():
    assert [(s.name, s.steps, s.value) for s in tiny().stages(101)] == [("10-steps", 50, 10), ("1-steps", 51, 1)]
    distiller = tiny(prediction_type="epsilon")
    assert [(s.name, s.steps) for s in distiller.stages(99)] == [(CONVERT, 33), ("10-steps", 33), ("1-steps", 33)]
    assert distiller.result.family.prediction_type == "v_prediction"
    batch = Batch(torch.randn(4, 1, 8, 8), {"class_labels": torch.tensor([0, 1, 2, 0])}, 4)
    for stage in distiller.stages(99):
        distiller.stage = stage
        distiller.begin_stage()
        assert loss_of(distiller, batch).isfinite()


def test_both_banks_start_alike_and_train_the_student_only():
    batch = Batch(torch.randn(4, 1, 8, 8), {"class_labels": torch.tensor([0, 1, 2, 0])}, 4)
    losses = []
    for bank in ("copy", "adapter"):
        distiller = tiny(bank, guidance_scale=2.0)
        losses.append(loss_of(distiller, batch))
        losses[-1].backward()
        assert any(p.grad is not None and p.grad.any() for p in distiller.bank.params("student"))
        assert all(p.grad is None for role in ("self_teacher", "mentor", "ema") for p in distiller.bank.params(role))
    torch.testing.assert_close(*losses)


# --------------------------------------------------------------------------------------------- the student


@pytest.mark.parametrize(
    ("name", "kind", "via"),
    [("cosine", "v_prediction", (4,)), pytest.param("karras", "edm", (), marks=pytest.mark.product)],
)
def test_a_student_of_a_mixture_lands_on_it_in_one_call(name, kind, via):
    oracle = three_clusters(SCHEDULES[name], kind)
    student, teacher = landing(train(Tract, oracle, 800, start=16, via=via), oracle, 1)
    assert student < NEARER[1] * teacher, (student, teacher)


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 512, "via": (30,)}, "512 -> 30 -> 1"),
        ({"start": 512, "via": (512,)}, "descend"),
        ({"start": 30, "via": (), "steps": 7}, "multiple of the next"),
        ({"steps": 0, "via": ()}, "steps: expected at least 1"),
        ({"self_ema": 1.0}, "self_ema"),
    ],
)
def test_a_schedule_that_does_not_divide_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(Tract.Config, options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 1024}, "1000 timesteps"),
        ({"start": 30, "via": (), "steps": 3}, "must divide the teacher's 1000 timesteps"),
        ({"guidance_scale": 2.0}, "unconditional"),
    ],
)
def test_a_teacher_that_cannot_be_distilled_so_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Tract.check(Tract.Config(**options), Pixel.tiny(num_classes=None))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_edm_students_are_sampled_on_every_nth_level_of_their_teachers_grid(steps):
    oracle = three_clusters(SCHEDULES["karras"], "edm")
    family = make(Tract, oracle, oracle, start=8, via=()).family
    config = Tract.Config(start=40, via=(), steps=steps)
    Tract.check(config, family)
    sampler = Tract.make_sampler(config, family)
    assert torch.equal(sampler.times, family.schedule.grid(40)[:: 40 // steps])


def test_the_grid_of_a_phase_is_the_one_diffusers_samples_on():
    distiller = tiny(start=512, via=(), steps=8)
    scheduler = to_diffusers(distiller.sampler(), distiller.family.scheduler_config)
    assert isinstance(scheduler, DDIMScheduler)
    scheduler.set_timesteps(8)
    assert scheduler.timesteps.tolist() == distiller.schedule.timestep(distiller.sampler().times[:-1]).tolist()


def test_clean_images_are_cut_in_targets_on_request():
    """Both networks predict 3; the target lies there, and with the cut in [-1, 1]; None is what older runs have."""
    for clip, expected in ((False, 3.0), (True, 1.0), (None, 1.0)):
        family = Pixel.tiny(prediction_type="sample")
        distiller = Tract(family, CopyBank(family.network), Tract.Config(start=4, via=(), clip=clip))
        distiller.stage = distiller.stages(4)[0]
        for role in ("teacher", "self_teacher"):
            last = distiller.bank.networks[role].conv_out
            last.weight.data.zero_()
            last.bias.data.fill_(3.0)
        grid = distiller.grid(4)
        x_t = torch.randn(1, 1, 8, 8, dtype=torch.float64)
        target = distiller.closure(x_t, grid[1:2], grid[2:3], grid[4:5], {"class_labels": torch.tensor([0])})
        torch.testing.assert_close(target, torch.full_like(target, expected), atol=1e-5, rtol=0)
