r"""TRACT: transitive closure time-distillation (Berthelot et al. 2023, arXiv 2303.04248).

The teacher's steps are cut into groups, one a step of the student, and the student learns to jump from *anywhere* in a
group to the group's end. Its target needs no rollout: the teacher goes one step from t to t', and an average of the
student itself, the self-teacher, jumps on from t' to the end t_e,

.. math:: \tilde x = \frac{x_{t_e} - (\sigma_{t_e} / \sigma_t) x_t}{\alpha_{t_e} - (\sigma_{t_e} / \sigma_t) \alpha_t},

the clean image whose single DDIM step leads from ``x_t`` there: progressive distillation's target over many steps at
once. On the last step of a group t' is t_e, the self-teacher has nothing to add, and from there truth spreads upwards.
The student needs no second time: t_e is a function of t.

Errors of the self-teacher add up within a group, so two phases beat one (Table 5: 1024 -> 1 gives FID 14.4,
1024 -> 32 -> 1 gives 5.2). Every phase takes the average of the last one's student as its teacher. EDM teachers take
Heun steps in the first phase; later mentors are students, which were trained to take Euler steps.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stepdistill.batch import Batch, Cond
from stepdistill.diffusion.ode import Solver, invert_step, ode_step, solver_step
from stepdistill.diffusion.prediction import Denoise
from stepdistill.diffusion.samplers import DDIM, Sampler
from stepdistill.diffusion.schedule import Karras, expand
from stepdistill.diffusion.schedulers import to_diffusers
from stepdistill.families.base import Family
from stepdistill.losses.consistency import check_intervals
from stepdistill.losses.regression import mean_square, weighted
from stepdistill.methods.base import Distiller, Losses, Stage, Turn
from stepdistill.networks.bank import STUDENT
from stepdistill.networks.denoiser import Denoiser
from stepdistill.randomness import Draws

CONVERT = "convert"


class Tract(Distiller):
    """One student, its self-teacher, a mentor; a stage a phase."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of TRACT."""

        steps: int = 1
        """Network calls of the finished student."""
        start: int = 512
        """Steps of the teacher."""
        via: tuple[int, ...] = (32,)
        """Steps of the students of the phases in between; every phase's divide the one's before."""
        self_ema: float = 0.5
        """Decay of the self-teacher, an average with bias correction: its first update copies the student."""
        guidance_scale: float = 1.0
        """Guidance baked into the student; 1 is none."""

        def __post_init__(self) -> None:
            ladder = self.ladder
            if self.steps < 1 or any(b < 1 or a <= b or a % b for a, b in itertools.pairwise(ladder)):
                raise ValueError(
                    "start, via and steps must descend, each a multiple of the next, for example start 512, via [32], "
                    f"steps 1; found {' -> '.join(map(str, ladder))}"
                )
            if not 0 <= self.self_ema < 1:
                raise ValueError(f"self_ema: found {self.self_ema}, wanted 0 <= self_ema < 1")

        @property
        def ladder(self) -> tuple[int, ...]:
            """The step counts of the teacher and of the student after every phase."""
            return (self.start, *self.via, self.steps)

    @classmethod
    def check(cls, config: Any, family: Family) -> None:
        schedule = family.schedule
        check_intervals(schedule, config.steps, config.start, "start")
        family.check_guidance(config.guidance_scale)
        grid = schedule.grid(config.start)[:: config.start // config.steps]
        to_diffusers(DDIM(schedule, grid), family.scheduler_config)

    def build(self) -> Sequence[Turn]:
        self.converts = self.family.prediction_type == "epsilon"
        if self.converts:  # at pure noise an epsilon-network cannot tell the clean image
            self.family = self.family.with_prediction("v_prediction")
            self.student = Denoiser(self.family, self.bank, STUDENT)
        self.bank.fork("mentor", trainable=False)
        self.mentor = Denoiser(self.family, self.bank, "mentor")
        self.bank.fork("self_teacher", STUDENT, trainable=False)
        self.self_teacher = Denoiser(self.family, self.bank, "self_teacher")
        return [Turn(STUDENT, self.bank.params(STUDENT), self.loss)]

    # ------------------------------------------------------------------------------------------------- phases

    def stages(self, steps: int) -> list[Stage]:
        phases = {f"{n}-steps": n for n in self.config.ladder[1:]}
        if self.converts:
            phases = {CONVERT: self.config.start} | phases
        ends = [round(steps * i / len(phases)) for i in range(len(phases) + 1)]
        spans = [end - begin for begin, end in itertools.pairwise(ends)]
        return [Stage(name, span, n) for (name, n), span in zip(phases.items(), spans, strict=True)]

    def begin_stage(self) -> None:
        self.bank.blend("mentor", self.result_role, keep=0)

    def after_step(self) -> None:
        """Move the self-teacher: a phase's n-th student enters with weight ``(1 - m) / (1 - m^n)``."""
        decay = self.config.self_ema
        self.bank.blend("self_teacher", STUDENT, keep=1 - (1 - decay) / (1 - decay ** (self.step_in_stage + 1)))

    def sampler(self) -> Sampler:
        return DDIM(self.schedule, self.grid(self.stage.value))

    def grid(self, steps: int) -> Tensor:
        """The times of the student of ``steps`` steps: every so many of the teacher's, whose grid all share."""
        return self.schedule.grid(self.config.start)[:: self.config.start // steps]

    # --------------------------------------------------------------------------------------------------- loss

    def loss(self, batch: Batch, draws: Draws) -> Losses:
        t, t_next, t_end = self.draw_times(draws)
        x_0 = batch.x0.double()
        x_t = self.schedule.add_noise(x_0, draws.normal_like(x_0), t)
        with torch.no_grad():
            if self.stage.name == CONVERT:
                target = self.stage_teacher(batch.cond)(x_t, t).x0
            else:
                target = self.target(x_t, t, t_next, t_end, batch.cond)
        error = mean_square(self.student(x_t, t, batch.cond).x0, target)
        return Losses({"loss": weighted(self.weight(t), error)})

    def draw_times(self, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """A time on the mentor's grid, the next one, and the end of its group; each (B,)."""
        if self.stage.name == CONVERT:
            t = self.grid(self.config.start).to(draws.device)[draws.integers(0, self.config.start)]
            return t, t, t
        groups = self.stage.value
        grid, width = self.grid(self.mentor_steps).to(draws.device), self.mentor_steps // groups
        top, j = width * draws.integers(0, groups), draws.integers(0, width)
        return grid[top + j], grid[top + j + 1], grid[top + width]

    def target(self, x_t: Tensor, t: Tensor, t_next: Tensor, t_end: Tensor, cond: Cond) -> Tensor:
        """One step of the mentor, one jump of the self-teacher, as the clean image of one step; float64."""
        solver: Solver = "heun" if self.is_first and isinstance(self.schedule, Karras) else "euler"
        x_next = solver_step(self.stage_teacher(cond), x_t, t, t_next, self.schedule, solver)
        last = t_next == t_end
        # where nothing is left to jump the answer is not used, and the network not asked about clean data
        jump = ode_step(self.self_teacher(x_next, torch.where(last, t, t_next), cond), self.schedule, t_end)
        x_end = torch.where(expand(last, x_t) > 0, x_next, jump)
        return invert_step(x_t, x_end, t, t_end, self.schedule)

    def stage_teacher(self, cond: Cond) -> Denoise:
        """The mentor of this phase: the (guided) teacher, then the last phase's student."""
        if self.is_first or self.stage.name == CONVERT:
            return self.teacher.guided(cond, self.config.guidance_scale - 1)
        return self.mentor.conditioned(cond)

    @property
    def mentor_steps(self) -> int:
        """Steps of this phase's mentor."""
        return self.config.ladder[self.config.ladder.index(self.stage.value) - 1]

    @property
    def is_first(self) -> bool:
        """Whether this phase's mentor is the teacher."""
        return self.stage.value == self.config.ladder[1]

    def weight(self, t: Tensor) -> Tensor:
        """What an error of the clean image counts for: max(SNR, 1), for EDM an error of the network's own output."""
        snr = self.schedule.log_snr(t).exp()
        return snr + self.schedule.sigma_data**-2 if isinstance(self.schedule, Karras) else snr.clamp(min=1)
