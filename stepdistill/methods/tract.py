r"""TRACT: transitive closure time-distillation (Berthelot et al. 2023, arXiv 2303.04248).

The teacher's steps are divided into groups, one per step of the student. The student learns to jump from *any* time in
a group to the group's end. Its target needs no rollout: the teacher takes one step from t to t', and the self-teacher,
an average of the student, jumps from t' to the end t_e,

.. math:: \tilde x = \frac{x_{t_e} - (\sigma_{t_e} / \sigma_t) x_t}{\alpha_{t_e} - (\sigma_{t_e} / \sigma_t) \alpha_t}.

This is the clean image whose single DDIM step from ``x_t`` ends there: progressive distillation's target, over many
steps at once. On the last step of a group, t' is t_e and the target is the teacher's alone; from there it propagates
to earlier times. The end t_e is a function of t, so the student needs no second time as an input.

Errors of the self-teacher accumulate within a group. Two phases are therefore better than one (Table 5: 1024 -> 1 has
FID 14.4, 1024 -> 32 -> 1 has 5.2). Every phase is taught by the average of the last phase's student. EDM teachers take
Heun steps in the first phase; later teachers are students that were trained for Euler steps.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from stepdistill.batch import Batch, Cond
from stepdistill.diffusion.ode import clipped, invert_step, ode_step, solver_step
from stepdistill.diffusion.prediction import Denoise
from stepdistill.diffusion.samplers import DDIM, Sampler
from stepdistill.diffusion.schedule import Karras, expand
from stepdistill.families.base import Family
from stepdistill.files.ranges import Decay, GuidanceScale, PositiveInt
from stepdistill.losses.progressive import CONVERT, ladder, needs_velocity, stage_grid
from stepdistill.losses.regression import mean_square, weighted
from stepdistill.methods.base import Distiller, Losses, Stage, split_steps
from stepdistill.randomness import Draws


class Tract(Distiller):
    """One student, its self-teacher, and the student of the last phase; a stage per phase."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of TRACT."""

        steps: PositiveInt = 1
        """Sampling steps of the finished student."""
        start: PositiveInt = 512
        """Steps of the teacher."""
        via: tuple[PositiveInt, ...] = (32,)
        """Steps of the students of the phases in between; each divides the one before."""
        self_ema: Decay = 0.5
        """Decay of the self-teacher, an average with bias correction: its first update copies the student."""
        guidance_scale: GuidanceScale = 1.0
        """Guidance baked into the student; 1 is none."""
        clip: bool | None = False
        """Whether clean images in targets are cut to [-1, 1], as in the authors' code. Off by default: where images lie
        at a bound, as a black ground does, errors are cut on one side only, and their mean adds up along a group. None,
        which older runs have, is true for pixels."""

        def __post_init__(self) -> None:
            ladder(self.start, self.via, self.steps)

        @property
        def ladder(self) -> tuple[int, ...]:
            """The numbers of steps of the teacher and of the student after every phase."""
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
        self.clips = self.family.predicts_pixels if self.config.clip is None else self.config.clip
        self.last_student = self.add_role("mentor", trainable=False)
        self.self_teacher = self.add_average("self_teacher", self.self_decay)
        self.add_turn("student", self.loss)

    def self_decay(self) -> float:
        """Return the bias-corrected decay: a phase's n-th student enters with weight ``(1 - m) / (1 - m^n)``."""
        decay = self.config.self_ema
        return 1 - (1 - decay) / (1 - decay ** (self.step_in_stage + 1))

    # ------------------------------------------------------------------------------------------------- phases

    def stages(self, steps: int) -> list[Stage]:
        shares = {CONVERT: (self.config.start, 1)} if self.converts else {}
        for n in self.config.ladder[1:]:
            shares[f"{n}-steps"] = (n, 1)
        return split_steps(steps, shares)

    def begin_stage(self) -> None:
        self.bank.blend("mentor", self.result_role, keep=0)

    def grid(self, steps: int, device: torch.device | str = "cpu") -> Tensor:
        """Return the times of a student of ``steps`` steps, every (start / steps)-th of the teacher's."""
        return self.times(self.schedule.grid, self.config.start, device)[:: self.config.start // steps]

    # --------------------------------------------------------------------------------------------------- loss

    def loss(self, batch: Batch, draws: Draws) -> Losses:
        t, t_next, t_end = self.draw_times(draws)
        x_0 = batch.x0.double()
        x_t = self.schedule.add_noise(x_0, draws.normal_like(x_0), t)
        with torch.no_grad():
            if self.stage.name == CONVERT:
                target = self.guided_teacher(batch.cond)(x_t, t).x0
            else:
                target = self.closure(x_t, t, t_next, t_end, batch.cond)
        error = mean_square(self.student(x_t, t, batch.cond).x0, target)
        return Losses({"loss": weighted(self.weight(t), error)})

    def draw_times(self, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """Return a time on the teacher's grid, the next one, and the end of its group; each (B,)."""
        if self.stage.name == CONVERT:
            t = self.grid(self.config.start, draws.device)[draws.integers(0, self.config.start)]
            return t, t, t
        groups = self.stage.value
        grid, width = self.grid(self.teacher_steps, draws.device), self.teacher_steps // groups
        top, j = width * draws.integers(0, groups), draws.integers(0, width)
        return grid[top + j], grid[top + j + 1], grid[top + width]

    def closure(self, x_t: Tensor, t: Tensor, t_next: Tensor, t_end: Tensor, cond: Cond) -> Tensor:
        """Return one step of the teacher and one jump of the self-teacher, as a clean image in float64."""
        teacher = self.stage_teacher(cond)
        if self.is_first and isinstance(self.schedule, Karras):
            x_next = solver_step(teacher, x_t, t, t_next, self.schedule, "heun")
        else:
            x_next = solver_step(self.bounded(teacher), x_t, t, t_next, self.schedule)
        last = t_next == t_end
        # where no jump is left its result is unused, and the network must not be called at clean data
        self_teacher = self.bounded(self.self_teacher.conditioned(cond))
        jump = ode_step(self_teacher(x_next, torch.where(last, t, t_next)), self.schedule, t_end)
        x_end = torch.where(expand(last, x_t) > 0, x_next, jump)
        return invert_step(x_t, x_end, t, t_end, self.schedule)

    def bounded(self, denoise: Denoise) -> Denoise:
        """Return ``denoise``, cut to [-1, 1] where ``clip`` holds; the authors leave EDM's Heun steps as they are."""
        if not self.clips:
            return denoise
        return lambda x_t, t: clipped(denoise(x_t, t), x_t, t, self.schedule)

    def stage_teacher(self, cond: Cond) -> Denoise:
        """Return the teacher of this phase: the (guided) teacher, then the last phase's student."""
        return self.guided_teacher(cond) if self.is_first else self.last_student.conditioned(cond)

    @property
    def teacher_steps(self) -> int:
        """Steps of this phase's teacher."""
        return self.config.ladder[self.config.ladder.index(self.stage.value) - 1]

    @property
    def is_first(self) -> bool:
        """Whether this phase is taught by the teacher itself."""
        return self.stage.value == self.config.ladder[1]

    def weight(self, t: Tensor) -> Tensor:
        """Return the weight of an error of the clean image: max(SNR, 1); for EDM that of the network's own output."""
        snr = self.schedule.log_snr(t).exp()
        return snr + self.schedule.sigma_data**-2 if isinstance(self.schedule, Karras) else snr.clamp(min=1)
