"""What the base does for every method: samplers and grids made once, averages, modes of networks, checks, stages."""

import dataclasses

import pytest
import torch
from torch import Tensor

from stepdistill.batch import Batch
from stepdistill.diffusion.samplers import DDIM, Sampler, sample
from stepdistill.families.base import Family
from stepdistill.families.pixel import Pixel
from stepdistill.losses.regression import mean_square
from stepdistill.methods import find_method, method_names
from stepdistill.methods.base import Distiller, Losses, Stage, split_steps
from stepdistill.methods.dmd import DMD
from stepdistill.methods.progressive import Progressive
from stepdistill.networks.copy_bank import CopyBank
from stepdistill.networks.modes import in_mode
from stepdistill.randomness import Draws


class Regression(Distiller):
    """A student of one step that regresses the teacher's own samples, and an average of it."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        steps: int = 1
        teacher_steps: int = 4
        guidance_scale: float = 1.0

    @classmethod
    def make_sampler(cls, config: Config, family: Family) -> Sampler:
        return DDIM(family.schedule, family.schedule.grid(config.steps))

    def build(self) -> None:
        self.average = self.add_average("average", lambda: 0.5)
        self.add_turn("student", self.loss)

    def loss(self, batch: Batch, draws: Draws) -> Losses:
        noise, t = self.schedule.initial_noise(draws.normal_like(batch.x0)), torch.ones(batch.size)
        ddim = DDIM(self.schedule, self.times(self.schedule.grid, self.config.teacher_steps))
        with torch.no_grad():
            target = sample(self.guided_teacher(batch.cond), ddim, noise)
        return Losses({"loss": mean_square(self.student(noise, t, batch.cond).x0, target).mean()})


def distiller_of(method: type[Distiller], **options: object) -> Distiller:
    family = Pixel.tiny()
    return method(family, CopyBank(family.network), method.Config(**options))


def batch_of(size: int = 4) -> Batch:
    family = Pixel.tiny()
    return Batch(torch.zeros(size, *family.sample_shape), family.example_cond(range(size)), size)


def test_a_method_of_a_few_lines_is_complete() -> None:
    distiller = distiller_of(Regression)
    Regression.check(distiller.config, distiller.family)
    turn = distiller.turns["student"]
    optimizer = torch.optim.Adam(turn.params, lr=1e-3)
    losses = []
    for _ in range(12):
        loss = distiller("student", batch_of(), Draws(0, 4)).terms["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        distiller.after_step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_guidance_below_one_and_samplers_without_a_scheduler_are_refused_for_every_method() -> None:
    with pytest.raises(ValueError, match="guidance_scale: expected at least 1"):
        Regression.check(Regression.Config(guidance_scale=0.5), Pixel.tiny())
    with pytest.raises(ValueError, match="no stock scheduler"):
        Regression.check(Regression.Config(steps=3), Pixel.tiny())


@pytest.mark.parametrize("name", method_names())
def test_the_finished_student_has_the_sampler_that_was_checked(name: str) -> None:
    method = find_method(name)
    distiller = distiller_of(method)
    distiller.stage = distiller.stages(1000)[-1]
    made, checked = distiller.sampler(), method.make_sampler(distiller.config, distiller.family)
    assert type(made) is type(checked) and torch.equal(made.times, checked.times)
    assert made.pipeline_kwargs == checked.pipeline_kwargs and made.contract() == checked.contract()


def test_a_sampler_is_made_once_for_a_stage_and_a_configuration() -> None:
    distiller = distiller_of(Progressive, steps=2, start=8)
    first, second = distiller.stages(100)[-2:]
    distiller.stage = first
    sampler = distiller.sampler()
    assert sampler is distiller.sampler() and sampler.steps == 4
    distiller.stage = second
    assert distiller.sampler().steps == 2
    distiller = distiller_of(Regression)
    assert distiller.sampler().steps == 1
    distiller.config = dataclasses.replace(distiller.config, steps=2)
    assert distiller.sampler().steps == 2


def test_a_grid_is_computed_once() -> None:
    distiller, calls = distiller_of(Regression), []

    def grid(intervals: int) -> Tensor:
        calls.append(intervals)
        return torch.linspace(1, 0, intervals + 1)

    assert distiller.times(grid, 4) is distiller.times(grid, 4)
    assert len(distiller.times(grid, 8)) == 9 and calls == [4, 8]


def test_an_average_moves_after_every_step() -> None:
    distiller = distiller_of(Regression)
    before = distiller.bank.state("average")["conv_in.weight"].clone()
    distiller.bank.state("student")["conv_in.weight"].add_(2)
    distiller.after_step()
    torch.testing.assert_close(distiller.bank.state("average")["conv_in.weight"], before + 1)


def test_in_another_turn_the_fake_score_has_no_dropout() -> None:
    distiller = distiller_of(DMD).train()
    modes = {}
    for name, turn in distiller.turns.items():

        def loss(batch: Batch, draws: Draws, name: str = name) -> Losses:
            modes[name] = tuple(distiller.bank.networks[role].training for role in ("student", "fake"))
            return Losses({})

        distiller.turns[name] = dataclasses.replace(turn, loss=loss)
        distiller(name, batch_of(), Draws(0, 4))
    assert modes == {"student": (True, False), "fake": (True, True)}
    assert distiller.bank.networks["fake"].training


def test_a_mode_is_restored_after_an_error() -> None:
    distiller = distiller_of(Regression).train()
    with pytest.raises(RuntimeError), in_mode(distiller.bank, "student", training=False):
        assert not distiller.bank.networks["student"].training
        raise RuntimeError
    assert distiller.bank.networks["student"].training


def test_steps_are_split_without_a_remainder() -> None:
    assert split_steps(10, {"a": (4, 1.0), "b": (2, 1.0), "c": (1, 2.0)}) == [
        Stage("a", 2, 4), Stage("b", 3, 2), Stage("c", 5, 1),
    ]  # fmt: skip
