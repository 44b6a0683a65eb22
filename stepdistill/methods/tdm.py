r"""Trajectory distribution matching (TDM, arXiv 2503.06674).

The student's way from noise has K steps, and cuts the time axis into K segments. Its sampler is the teacher's own, a
deterministic ODE step. Not its clean images are matched to the teacher's, but its trajectory: the state that its step
from ``t`` lands at, the segment's lower edge ``m``, is noised again, to a time ``tau`` of the same segment,

.. math:: x_m = \alpha_m \hat x_0 + \sigma_m \hat\epsilon, \qquad
    x_\tau = \frac{\alpha_\tau}{\alpha_m} x_m + \beta n, \quad
    \beta^2 = \sigma_\tau^2 - \Bigl(\frac{\alpha_\tau}{\alpha_m} \sigma_m\Bigr)^2,

and there the scores are compared. The gradient reaches the student through ``x_0`` alone. With the guided teacher's
denoising ``r`` and the fake score's ``f``,

.. math:: L = \frac{\|\hat x_0 - \mathrm{sg}(\hat x_0 + r - f)\|^2}{\mathrm{mean}|\hat x_0 - r|}.

The fake score learns to find ``x_0`` in such ``x_tau``, with the weight ``min(SNR, 5)``. The noise in ``x_tau`` mixes
the student's with fresh noise, so that it is not Gaussian given ``x_0``; an importance weight, the ratio of both
Gaussian densities to the power of one over the number of pixels, corrects for that.

A step trains all segments, each image in one of them, or with ``all_segments`` in all. No image is needed; with
adapters it is the cheapest of the recipes of distribution matching. Under one segment it is DMD without a regression.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from stepdistill.batch import Batch
from stepdistill.diffusion.ode import noise_up, ode_step
from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.samplers import DDIM, Sampler, states, visits
from stepdistill.families.base import Family
from stepdistill.files.ranges import GuidanceScale, PositiveFloat, PositiveInt, PositiveShare
from stepdistill.losses.distribution_matching import SMALLEST_DIVISOR, diagnostics, divisor
from stepdistill.losses.levels import MATCHED
from stepdistill.losses.regression import distance, mean_square, weighted
from stepdistill.losses.student_inputs import diversity_ratio, unit_noise
from stepdistill.methods.base import Distiller, Losses, last_of
from stepdistill.randomness import Draws

MARGIN = 0.01
"""Images are noised to at least this much below the upper edge of an interval."""


class Landing(NamedTuple):
    """The student's step through a segment, noised again."""

    student: Prediction
    """What it predicts at the segment's upper edge, (B, ...)."""
    x: Tensor
    """The state (B, ...) that its step lands at, noised up; without gradient."""
    t: Tensor
    """The time (B,) of that state."""
    noise: Tensor
    """The fresh noise (B, ...) in it."""


class TDM(Distiller):
    """A student of a few deterministic steps, and a fake score of the states between them."""

    turn_names = ("fake", "student")
    serves_as_dmd2 = True
    optim_defaults: ClassVar = {
        "fake": {"lr": 1e-4, "betas": (0.0, 0.95), "weight_decay": 0.01},
        "student": {"lr": 2e-5, "betas": (0.0, 0.95), "weight_decay": 0.01},
    }
    needs_images = False

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of trajectory distribution matching."""

        steps: PositiveInt = 4
        """Sampling steps, and segments of the trajectory (K)."""
        guidance_scale: GuidanceScale = 1.0
        """Guidance baked into the student; 1 is none."""
        first_time: PositiveShare = 1.0
        """Time of the first step, whose input is pure noise; later times are lowered in proportion. The authors have
        0.8 for Stable Diffusion and PixArt."""
        interval: Literal["within", "above"] = "within"
        """Where a landed state is noised to: its own segment, or all noise levels above it."""
        all_segments: bool = False
        """Whether a step of the student trains every segment of its rollout, by as many calls with gradient, or one an
        image."""
        distance: Literal["l2", "huber"] = "l2"
        """``l2`` is divided by the mean error of the teacher's denoising; ``huber`` has c = 0.001."""
        snr_clamp: PositiveFloat = 5.0
        """Largest weight of the fake score's error, which is the signal-to-noise ratio."""
        importance_clip: PositiveFloat = 20.0
        """Largest importance weight of the fake score's error."""
        student_update_interval: PositiveInt = 1
        """The student is updated on every n-th step, the fake score on each."""

    @classmethod
    def make_sampler(cls, config: Config, family: Family) -> Sampler:
        grid = family.schedule.student_grid(config.steps)
        if config.first_time < 1:
            _, begins = family.schedule.shortened(config.first_time * grid[:-1], 1.0)
            grid = torch.cat([begins, grid[-1:]])
        return DDIM(family.schedule, grid)

    def build(self) -> None:
        self.fake = self.add_role("fake")
        self.add_turn("fake", self.fake_loss)
        self.add_turn("student", self.student_loss, when=last_of(self.config.student_update_interval))

    def land(self, batch: Batch, draws: Draws) -> Landing:
        """Return the student's steps through one segment an image, from its own rollout, noised again."""
        sampler = self.sampler()
        start = self.schedule.initial_noise(unit_noise(batch, self.family, draws))
        i, rows = draws.integers(0, sampler.steps), torch.arange(batch.size, device=draws.device)
        student = self.student.conditioned(batch.cond)
        with torch.no_grad():
            way = torch.stack([*states(student, sampler, start, sampler.steps - 1, draws.normal_like)])
        times = sampler.times_on(draws.device)
        t, m = times[i], times[i + 1]
        return self.noised_up(student(way[i, rows], t), m, t, draws)

    def land_everywhere(self, batch: Batch, draws: Draws) -> Landing:
        """Return the student's steps through all segments of one rollout, a batch (B, ...) after another, noised again.

        Every call of the rollout has a gradient, so that none is made twice.
        """
        sampler = self.sampler()
        start = self.schedule.initial_noise(unit_noise(batch, self.family, draws))
        student, every = self.student.conditioned(batch.cond), range(sampler.steps)
        visited = visits(student, sampler, start, sampler.steps, draws.normal_like, learns_at=every)
        landed = []
        for visit in visited:
            landed.append(self.noised_up(visit.prediction, visit.end, visit.t, draws))
        x0, eps = torch.cat([one.student.x0 for one in landed]), torch.cat([one.student.eps for one in landed])
        x, t = torch.cat([one.x for one in landed]), torch.cat([one.t for one in landed])
        return Landing(Prediction(x0, eps), x, t, torch.cat([one.noise for one in landed]))

    def noised_up(self, prediction: Prediction, m: Tensor, t: Tensor, draws: Draws) -> Landing:
        """Return a step from times ``t`` to ``m``, each (B,), noised again."""
        tau, noise = self.level(m, t, draws), draws.normal_like(prediction.x0)
        with torch.no_grad():
            x_tau = noise_up(ode_step(prediction, self.schedule, m), m, tau, self.schedule, lambda x: noise)
        return Landing(prediction, x_tau, tau, noise)

    def level(self, m: Tensor, t: Tensor, draws: Draws) -> Tensor:
        """Return uniform times (B,) above ``m``: up to the segment's upper edge ``t``, or up to the first time."""
        low = m.clamp(min=max(MATCHED[0], self.schedule.lowest_time))
        top = t if self.config.interval == "within" else torch.full_like(t, self.config.first_time)
        high = (top - MARGIN).clamp(max=MATCHED[1])
        return low + (high - low).clamp(min=0) * draws.uniform()

    def student_loss(self, batch: Batch, draws: Draws) -> Losses:
        land = self.land_everywhere if self.config.all_segments else self.land
        (x0, _), x_tau, tau, _ = land(batch, draws)
        cond = {name: torch.cat([part] * (len(tau) // batch.size)) for name, part in batch.cond.items()}
        with torch.no_grad():
            fake = self.fake(x_tau, tau, cond).x0
            real = self.guided_teacher(cond)(x_tau, tau).x0
        target = x0.detach() + (real - fake)
        if self.config.distance == "huber":
            loss = distance(x0, target, "huber")
        else:
            loss = mean_square(x0, target) / divisor(x0.detach(), real, SMALLEST_DIVISOR).flatten()
        metrics = diagnostics(x0, real, fake, tau)
        if batch.images is not None:
            metrics["diversity_ratio"] = diversity_ratio(x0, batch.images)
        return Losses({"matching": loss.mean()}, metrics)

    def fake_loss(self, batch: Batch, draws: Draws) -> Losses:
        with torch.no_grad():
            (x0, _), x_tau, tau, noise = self.land(batch, draws)
        weight = self.schedule.log_snr(tau).exp().clamp(max=self.config.snr_clamp)
        weight = weight * self.importance(x0, x_tau, tau, noise)
        error = mean_square(self.fake(x_tau, tau, batch.cond).x0, x0)
        return Losses({"denoising": weighted(weight, error)})

    def importance(self, x0: Tensor, x_tau: Tensor, tau: Tensor, noise: Tensor) -> Tensor:
        """Return the ratio (B,) of the Gaussian densities of the noise that is in ``x_tau`` and of fresh ``noise``.

        Both are to the power of one over the number of pixels.
        """
        alpha, sigma = self.schedule.coefficients(tau, x0)
        mixed = (x_tau - alpha * x0) / sigma
        excess = (mixed.square() - noise.square()).flatten(1).mean(1)
        return (-0.5 * excess).exp().clamp(max=self.config.importance_clip)
