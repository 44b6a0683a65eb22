r"""Progressive distillation (Salimans & Ho 2022, arXiv 2202.00512).

A student of N steps learns to do in one DDIM step what its mentor does in two; then it becomes the mentor, and N is
halved. With times t > t' > t'' a student step apart, the mentor's two steps lead from ``x_t`` to ``x_{t''}``, and

.. math:: \tilde x = \frac{x_{t''} - (\sigma_{t''} / \sigma_t) x_t}{\alpha_{t''} - (\sigma_{t''} / \sigma_t) \alpha_t}

is the clean image whose single DDIM step from ``x_t`` lands there (Eq. 8): the student's target. The same formula is
the mean velocity for flows and the Euler target for EDM.

Noise prediction does not survive to one step: at pure noise, the clean image is the noise prediction's error divided by
an alpha near zero (Section 4). A student of an epsilon-teacher is therefore given a velocity output, in a first stage
that regresses the teacher's own velocities on the finest grid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stepdistill.denoiser import Cond, Denoiser, Prediction, guided
from stepdistill.families.base import Batch, Family
from stepdistill.losses import Weighting, mean_square, weighted, x0_weight
from stepdistill.methods.base import Distiller, Losses, Stage, Turn
from stepdistill.randomness import Draws
from stepdistill.sampling import DDIM, Sampler, invert_step, ode_step

CONVERT = "convert"


class Progressive(Distiller):
    """One student, one mentor, a stage a halving."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of progressive distillation."""

        steps: int = 4
        """Network calls of the finished student."""
        start: int = 32
        """DDIM steps of the teacher that is the first mentor: ``steps`` times a power of two."""
        weighting: Weighting = "truncated_snr"
        """What an error of the clean image counts for."""
        guidance_scale: float = 1.0
        """Guidance baked into the student; 1 is none."""
        last_stages: float = 2.0
        """How much longer the stages to two and to one step are than the others."""

        def __post_init__(self) -> None:
            ratio, rest = divmod(self.start, self.steps) if self.steps > 0 else (0, 1)
            if rest or ratio < 2 or ratio & (ratio - 1):
                raise ValueError(
                    f"start must be steps times 2, 4, 8, ...; found start {self.start}, steps {self.steps}"
                )

    @classmethod
    def check(cls, config: Any, family: Family) -> None:
        if config.guidance_scale != 1:
            family.null_cond(family.example_cond([0]))
        DDIM(family.schedule, family.schedule.grid(config.steps)).scheduler(family.scheduler_config)

    def build(self) -> Sequence[Turn]:
        self.converts = self.family.prediction_type == "epsilon"
        if self.converts:
            self.family = self.family.with_prediction("v_prediction")
            self.student = Denoiser(self.family, self.bank, "student")
        self.bank.fork("mentor", trainable=False)
        self.mentor = Denoiser(self.family, self.bank, "mentor")
        return [Turn("student", self.bank.params("student"), self.loss)]

    def stages(self, steps: int) -> list[Stage]:
        sizes = [self.config.start // 2]
        while sizes[-1] > self.config.steps:
            sizes.append(sizes[-1] // 2)
        shares = {f"{n}-steps": (n, self.config.last_stages if n <= 2 else 1.0) for n in sizes}
        if self.converts:
            shares = {CONVERT: (self.config.start, 1.0)} | shares
        unit = steps / sum(share for _, share in shares.values())
        ends = torch.tensor([0.0, *(share for _, share in shares.values())]).cumsum(0).mul(unit).round().long().tolist()
        spans = [end - begin for begin, end in zip(ends[:-1], ends[1:], strict=True)]
        return [Stage(name, span, n) for (name, (n, _)), span in zip(shares.items(), spans, strict=True)]

    def begin_stage(self) -> None:
        self.bank.blend("student", self.result_role, keep=0)
        self.bank.blend("mentor", self.result_role, keep=0)

    def sampler(self) -> Sampler:
        return DDIM(self.schedule, self.schedule.grid(self.stage.value))

    def loss(self, batch: Batch, draws: Draws) -> Losses:
        grid = self.schedule.grid(2 * self.stage.value).to(batch.x0.device)
        i = 2 * draws.integers(0, self.stage.value)
        t, t_mid, s = grid[i], grid[i + 1], grid[i + 2]
        x_t = self.schedule.add_noise(batch.x0, draws.normal_like(batch.x0), t)
        with torch.no_grad():
            if self.stage.name == CONVERT:
                target = self.guided_teacher(x_t, t, batch.cond).x0
            else:
                target = self.target(x_t, t, t_mid, s, batch.cond)
        error = mean_square(self.student(x_t, t, batch.cond).x0, target)
        return Losses({"loss": weighted(x0_weight(self.schedule.log_snr(t), self.config.weighting), error)})

    def target(self, x_t: Tensor, t: Tensor, t_mid: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """Two DDIM steps of the mentor, as the clean image of one (Eq. 8), float64."""
        x_mid = ode_step(self.lead(x_t, t, cond), self.schedule, t_mid)
        x_s = ode_step(self.lead(x_mid, t_mid, cond), self.schedule, s)
        return invert_step(x_t, x_s, t, s, self.schedule)

    def lead(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """The mentor of this stage: the (guided) teacher on the first halving, then the last student."""
        first = not self.converts and self.stage.value == self.config.start // 2
        return self.guided_teacher(x_t, t, cond) if first else self.mentor(x_t, t, cond)

    def guided_teacher(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """The teacher under the guidance that is baked in."""
        if self.config.guidance_scale == 1:
            return self.teacher(x_t, t, cond)
        return guided(self.teacher, x_t, t, cond, self.family.null_cond(cond), self.config.guidance_scale - 1)
