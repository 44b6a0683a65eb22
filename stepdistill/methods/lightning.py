r"""Progressive adversarial distillation (SDXL-Lightning, Lin et al. 2024, arXiv 2402.13929).

Students of fewer and fewer steps, each of which learns to do in one DDIM step what the one before does in several. The
first, of many steps, regresses the teacher, under guidance. The next ones are too few for that: where a student has not
the capacity to follow, the mean of a squared error is a blurred image. A critic of steps tells it instead whether the
teacher could have taken its step (:mod:`stepdistill.discriminators.pairs`), with

.. math:: L_D = \mathrm{softplus}(-D(x_s)) + \mathrm{softplus}(D(\hat x_s)), \qquad
    L_G = \mathrm{softplus}(-D(\hat x_s)).

Every number of steps has two stages. In the *conditional* one the critic sees where the step begins: the student keeps
to the teacher's path and its modes. Then the objective is relaxed: the critic sees only the landed state, and the
artefacts of a path that cannot be followed disappear.

Here only the critic's heads are trained, on the frozen teacher; the paper describes training the critic's backbone,
too. A student of a noise-predicting teacher predicts the velocity, as in ``progressive``.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor

from stepdistill.batch import Batch, Cond
from stepdistill.diffusion.ode import invert_step, ode_step
from stepdistill.diffusion.prediction import Denoise
from stepdistill.diffusion.samplers import DDIM, Sampler
from stepdistill.discriminators.feature_sources import MAX_BLOCKS
from stepdistill.discriminators.pairs import PairCritic, StepContext
from stepdistill.families.base import Family
from stepdistill.files.ranges import GuidanceScale, NonNegativeInt, PositiveFloat, PositiveInt, PositiveShare
from stepdistill.losses.adversarial import AdversarialLoss
from stepdistill.losses.progressive import CONVERT, ladder, needs_velocity, stage_grid, walk
from stepdistill.losses.regression import Weighting, mean_square, weighted, x0_weight
from stepdistill.losses.student_inputs import student_input
from stepdistill.methods.base import Distiller, Losses, Stage, last_of, split_steps
from stepdistill.randomness import Draws

Objective = Literal["convert", "regress", "conditional", "unconditional"]


class Lightning(Distiller):
    """One student, the student of the last stage as its teacher, and a critic of steps."""

    turn_names = ("student", "critic")
    optim_defaults: ClassVar = {
        "student": {"lr": 5e-5, "betas": (0.0, 0.99), "schedule": "linear"},
        "critic": {"betas": (0.0, 0.99), "schedule": "linear"},
    }

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of progressive adversarial distillation."""

        steps: PositiveInt = 1
        """Sampling steps of the finished student."""
        start: PositiveInt = 128
        """DDIM steps of the teacher."""
        via: tuple[PositiveInt, ...] = (32, 8, 4, 2)
        """Steps of the students in between; each divides the one before, and the first regresses the teacher."""
        guidance_scale: GuidanceScale = 1.0
        """Guidance baked into the student; 1 is none."""
        weighting: Weighting = "truncated_snr"
        """Weight of an error of the clean image, where the student regresses."""
        adversarial: AdversarialLoss = "softplus"
        levels: tuple[PositiveShare, ...] = ()
        """Times that landed states are noised up to before they are judged, one drawn a sample; by default none."""
        max_blocks: PositiveInt = MAX_BLOCKS
        """Most blocks of the teacher that the critic has a head on, evenly spaced."""
        student_update_interval: PositiveInt = 1
        """The student is updated on every n-th step of an adversarial stage, the critic on each."""
        critic_warmup: NonNegativeInt = 50
        """Training steps of the critic alone at the start of an adversarial stage."""
        last_stages: PositiveFloat = 1.0
        """Length of the stages to two and to one step, relative to the others."""

        def __post_init__(self) -> None:
            if not self.via:
                raise ValueError("via: expected at least the student that regresses the teacher, got none")
            ladder(self.start, self.via, self.steps)

        @property
        def ladder(self) -> tuple[int, ...]:
            """The numbers of steps of the teacher and of all students."""
            return (self.start, *self.via, self.steps)

    @classmethod
    def needs_velocity(cls, config: Config, family: Family) -> bool:
        return needs_velocity(family, config.steps)

    @classmethod
    def make_sampler(cls, config: Config, family: Family, steps: int | None = None) -> Sampler:
        return DDIM(family.schedule, stage_grid(family.schedule, config.start, steps or config.steps))

    def stage_sampler(self) -> Sampler:
        return self.make_sampler(self.config, self.family, self.stage.value)

    def build(self) -> None:
        config = self.config
        self.last_student = self.add_role("mentor", trainable=False)
        self.add_turn("student", self.student_loss, when=lambda step: self.updates_student())
        self.critic = PairCritic(self.teacher, loss=config.adversarial, max_blocks=config.max_blocks)
        self.conditional_critic = True
        self.add_turn("critic", self.critic_loss, self.critic, when=lambda step: self.is_adversarial)

    # ------------------------------------------------------------------------------------------------- stages

    def stages(self, steps: int) -> list[Stage]:
        first, *rest = self.config.ladder[1:]
        shares = {CONVERT: (self.config.start, 1.0)} if self.converts else {}
        shares[f"{first}-steps"] = (first, 1.0)
        for n in rest:
            share = self.config.last_stages if n <= 2 else 1.0
            shares |= {f"{n}-steps-conditional": (n, share), f"{n}-steps": (n, share)}
        return split_steps(steps, shares)

    def begin_stage(self) -> None:
        self.bank.blend("student", self.result_role, keep=0)
        if self.objective != "unconditional":  # else the teacher of the conditional stage goes on
            self.bank.blend("mentor", self.result_role, keep=0)

    @property
    def objective(self) -> Objective:
        """What the student of the present stage is trained for."""
        if self.stage.name == CONVERT:
            return "convert"
        if self.stage.value == self.config.via[0]:
            return "regress"
        return "conditional" if self.stage.name.endswith("-conditional") else "unconditional"

    @property
    def is_adversarial(self) -> bool:
        """Whether the present stage has a critic."""
        return self.objective in ("conditional", "unconditional")

    def updates_student(self) -> bool:
        """Return whether the student has a turn on the present step: where it regresses, on every one."""
        due = last_of(self.config.student_update_interval, self.config.critic_warmup)
        return not self.is_adversarial or due(self.step_in_stage)

    # ------------------------------------------------------------------------------------------------- turns

    def student_loss(self, batch: Batch, draws: Draws) -> Losses:
        x_t, times = self.begin(batch, draws)
        t, s = times[0], times[-1]
        prediction = self.student(x_t, t, batch.cond)
        if self.is_adversarial:
            context = self.step_context(x_t, t, s, batch.cond, draws)
            return Losses({"loss": self.critic.student_loss(ode_step(prediction, self.schedule, s), context, draws)})
        error = mean_square(prediction.x0, self.target(x_t, times, batch.cond))
        return Losses({"loss": weighted(x0_weight(self.schedule.log_snr(t), self.config.weighting), error)})

    def critic_loss(self, batch: Batch, draws: Draws) -> Losses:
        x_t, times = self.begin(batch, draws)
        t, s = times[0], times[-1]
        with torch.no_grad():
            real = walk(self.stage_teacher(batch.cond), x_t, times, self.schedule)
            fake = ode_step(self.student(x_t, t, batch.cond), self.schedule, s)
        loss, metrics = self.critic.critic_loss(real, fake, self.step_context(x_t, t, s, batch.cond, draws), draws)
        return Losses({"loss": loss}, metrics)

    # ------------------------------------------------------------------------------------------------- parts

    def begin(self, batch: Batch, draws: Draws) -> tuple[Tensor, list[Tensor]]:
        """Return states (B, ...), and the times (B,) of the teacher's steps from there to the end of the student's."""
        grid, width = self.times(self.schedule.grid, self.config.start, draws.device), self.stride(self.stage.value)
        i = width * draws.integers(0, self.stage.value)
        times = [grid[i + step] for step in range(0, width + 1, self.stride(self.teacher_steps))]
        return student_input(self.schedule, batch.x0, draws.normal_like(batch.x0), times[0]), times

    @torch.no_grad()
    def target(self, x_t: Tensor, times: list[Tensor], cond: Cond) -> Tensor:
        """Return the clean image (B, ...) whose step lands where the teacher's steps do."""
        teacher = self.stage_teacher(cond)
        if self.objective == "convert":
            return teacher(x_t, times[0]).x0
        return invert_step(x_t, walk(teacher, x_t, times, self.schedule), times[0], times[-1], self.schedule)

    def step_context(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond, draws: Draws) -> StepContext:
        """Return what the critic judges steps from ``t`` to ``s``, both (B,), with; the level is drawn."""
        levels = torch.tensor(self.config.levels or (0.0,), dtype=torch.float64, device=s.device)
        level = levels[draws.integers(0, len(levels))]
        if self.objective == "unconditional":
            return self.critic.alone(s, level, cond)
        return self.critic.pair(x_t, t, s, level, cond)

    def stage_teacher(self, cond: Cond) -> Denoise:
        """Return the teacher of this stage: the (guided) teacher at first, later the last student."""
        if self.objective == "convert" or (self.objective == "regress" and not self.converts):
            return self.guided_teacher(cond)
        return self.last_student.conditioned(cond)

    @property
    def teacher_steps(self) -> int:
        """Steps of this stage's teacher."""
        return self.config.ladder[max(0, self.config.ladder.index(self.stage.value) - 1)]

    def stride(self, steps: int) -> int:
        """Return how many steps of the finest grid one of ``steps`` crosses."""
        return self.config.start // steps
