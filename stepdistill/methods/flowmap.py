r"""Flow maps: students that predict the average velocity between any two times, in one loss with five targets.

The network is told its time t and the time r at which its step ends, and predicts the average velocity u in between
(:mod:`stepdistill.losses.average_velocity`). With the path's velocity v at ``x_t``, which is the guided teacher's or,
without a teacher, that of the image and noise that ``x_t`` is made of, it regresses

==============  ================================================================================  ==================
``difference``  ``v - (t - r) du/dt``, the derivative by two calls (as AnyFlow's)                 two calls
``jvp``         the same, the derivative exact (MeanFlow, arXiv 2505.13447)                       a forward derivative
``alpha``       ``a v + (1 - a) u(x_s, s, r)``, s a share a of the way; a falls from 1 to 0       one call
                (alpha-Flow, 2510.20771)
``shortcut``    two steps of half the length, by an average of the student (Frans et al. 2024,    two calls
                2410.12557)
``split``       two steps that part at a random time (SplitMeanFlow, 2507.16884)                  two calls
==============  ================================================================================  ==================

in

.. math:: L = \|u_\theta(x_t, t, r) - \mathrm{sg}(target)\|^2 / \mathrm{sg}(\|\cdot\|^2 + c)^p.

Where r = t, the target is v. The last two targets learn of v from those pairs alone. The derivative is taken along the
same velocity that stands in the target: with guidance, any other would be wrong.

A student is sampled by Euler (DDIM) steps, over any grid. Guidance is folded into v, so sampling takes one call a step.
The scale is fixed or an input of the network. Without a teacher, the guided v is made of data and the student itself,

.. math:: \omega v + (1 - \omega - \kappa) u_\theta(x_t, t, t, \varnothing) + \kappa u_\theta(x_t, t, t, c), \qquad
    \omega = g (1 - \kappa),

whose fixed point is guided by the scale g (MeanFlow); a share of the batch has no condition and g = 1.

**Two slices** (FACM, Peng et al. 2025, 2507.03738) need no second time. Of all r, only 0 and t are trained: the average
velocity to clean data under the network's own time, and the velocity v, which anchors it, under the negative time.
That student is sampled as a consistency model.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor

from stepdistill.batch import Batch, Cond
from stepdistill.diffusion.prediction import Prediction, to_prediction
from stepdistill.diffusion.samplers import ConsistencySampler, Sampler, TwoTimeDDIM
from stepdistill.diffusion.schedule import expand
from stepdistill.families.base import Family, Inputs
from stepdistill.files import ranges
from stepdistill.files.schema import refuse_unread
from stepdistill.losses import average_velocity, guidance_input, intervals
from stepdistill.losses.average_velocity import SMALLEST_ALPHA, Average, Interval
from stepdistill.losses.regression import mean_square
from stepdistill.losses.self_consistency import check_forward_mode
from stepdistill.losses.student_inputs import student_input
from stepdistill.methods.base import Distiller, Losses
from stepdistill.networks.modes import in_mode, shared_dropout, single_precision
from stepdistill.randomness import Draws

SHORTCUT_DECAY = 0.999
"""Of the average that makes the targets of shortcut models."""


class FlowMap(Distiller):
    """A student that is told where its step ends; for some targets, also an average of it."""

    optim_defaults: ClassVar = {"student": {"lr": 1e-4, "betas": (0.9, 0.95)}}
    sampling_options = frozenset({"steps"})

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of flow maps."""

        steps: ranges.PositiveInt = 4
        """Sampling steps; one training serves all values."""
        target: Literal["difference", "jvp", "alpha", "shortcut", "split"] = "difference"
        """What the average velocity regresses, see above."""
        velocity: Literal["teacher", "data"] = "teacher"
        """Source of the path's velocity: distillation, or training on data alone."""
        slices: Literal["free", "two"] = "free"
        """Any two times, or clean data and the present one, without a second input; for ``difference`` and ``jvp``."""
        guidance_scale: ranges.GuidanceScale = 1.0
        """Guidance baked into the student, or its default where the scale is an input; 1 is none."""
        guidance_range: tuple[ranges.GuidanceScale, ...] = ()
        """Lowest and highest scale of a student that takes it as an input; by default the scale is fixed."""
        guidance_until: ranges.PositiveShare = 1.0
        """Flow time above which the velocity is not guided; 0.75 to 0.8 for MeanFlow's largest networks."""
        guidance_mix: ranges.Decay = 0.0
        """Share of the student's own guided velocity in that of data (kappa); 0.5 and 0.92 in MeanFlow."""
        condition_dropout: ranges.Share = 0.1
        """Share of the batch without its condition, where data and the student itself make the guidance."""
        step: ranges.PositiveFloat = 0.005
        """How far above and below its time the calls of ``difference`` lie, in flow time; 0.005 to 0.02."""
        warmup: ranges.NonNegativeInt = 0
        """Training steps until the derivative counts in full, of ``difference`` and ``jvp``."""
        alpha_least: ranges.Share = 0.0
        """Where ``alpha`` ends; at values below 0.005 the target is that of ``jvp``, and the derivative is needed."""
        alpha_begin: ranges.Share = 0.0
        """Share of the training at which ``alpha`` begins to fall from 1."""
        alpha_end: ranges.PositiveShare = 0.4
        """Share of the training at which it has fallen."""
        log_sigma_mean: ranges.FiniteFloat = -0.4
        """Mean of the log noise level ``log(sigma / alpha)`` of both times; a flow's shift is added."""
        log_sigma_std: ranges.PositiveFloat = 1.0
        """Its standard deviation."""
        equal: ranges.Share = 0.5
        """Share of pairs with r = t; shortcut models have 0.875."""
        to_clean: ranges.Share = 0.2
        """Share of the other pairs that end at clean data."""
        from_noise: ranges.Share = 0.1
        """Share of the other pairs that begin at pure noise, as samplers do."""
        power: ranges.NonNegativeFloat = 0.5
        """Exponent p of the error that divides the loss; at 0.5 all errors make gradients of one length."""
        floor: ranges.PositiveFloat = 1e-3
        """What is added to that error, a mean over pixels (c)."""
        target_ema: ranges.Decay | None = None
        """Decay of the average that makes the targets; 0 is the student itself, the default except for ``shortcut``."""

        def __post_init__(self) -> None:
            guidance_input.check_range(self.guidance_range, self.guidance_scale)
            if self.guides_itself and self.slices == "two":
                raise ValueError("guidance_scale: expected 1 with velocity 'data' and slices 'two', got guidance")
            if self.composes and self.equal == 0:
                raise ValueError(f"equal: expected above 0 with target {self.target!r}, which learns of no velocity")
            if self.slices == "two" and self.target not in ("difference", "jvp"):
                raise ValueError(f"target: expected 'difference' or 'jvp' with slices 'two', got {self.target!r}")
            if self.alpha_begin >= self.alpha_end:
                raise ValueError(f"alpha_end: expected above alpha_begin = {self.alpha_begin}, got {self.alpha_end}")
            alphas, own = ("alpha_least", "alpha_begin", "alpha_end"), ("guidance_mix", "condition_dropout")
            refuse_unread(self, alphas, self.target != "alpha", "without target 'alpha'")
            refuse_unread(self, own, not self.guides_itself, "without velocity 'data' and guidance")
            unguided = self.guidance_scale == 1 and not self.guidance_range
            refuse_unread(self, ["guidance_until"], unguided, "without guidance")
            refuse_unread(self, ["step"], self.target != "difference", "without target 'difference'")
            refuse_unread(self, ["to_clean", "from_noise"], self.target == "shortcut", "with target 'shortcut'")
            refuse_unread(self, ["to_clean", "power", "floor"], self.slices == "two", "with slices 'two'")
            refuse_unread(self, ["warmup"], self.composes, f"with target {self.target!r}, which has no derivative")

        @property
        def guides_itself(self) -> bool:
            """Whether guidance is made of data and the student, without a teacher."""
            return self.velocity == "data" and (self.guidance_scale != 1 or len(self.guidance_range) > 0)

        @property
        def composes(self) -> bool:
            """Whether the target is made of two steps of the student, without the path's velocity."""
            return self.target in ("shortcut", "split")

        @property
        def differentiates(self) -> bool:
            """Whether the student is ever differentiated exactly."""
            return self.target == "jvp" or (self.target == "alpha" and self.alpha_least < SMALLEST_ALPHA)

    @classmethod
    def make_sampler(cls, config: Config, family: Family) -> Sampler:
        schedule = family.schedule
        if config.slices == "two":
            return ConsistencySampler(schedule, schedule.grid(config.steps))
        return TwoTimeDDIM(schedule, schedule.student_grid(config.steps))

    @classmethod
    def check(cls, config: Config, family: Family) -> None:
        negative, clean = family.schedule.timestep(torch.tensor([-1.0, 0.0]))
        if config.slices == "two" and not negative < clean:  # a logarithm has none
            raise ValueError("method.slices: expected 'free' for an EDM teacher, whose network knows no negative time")
        super().check(config, family)
        family.check_guidance(max(config.guidance_range, default=1.0))
        if config.differentiates:
            check_forward_mode(family, "target")

    @classmethod
    def extra_inputs(cls, config: Config) -> Inputs:
        return Inputs(w=guidance_input.weights(config.guidance_range), s=config.slices == "free")

    def build(self) -> None:
        self.student.w = self.config.guidance_scale - 1 if self.inputs.w else None
        usual = SHORTCUT_DECAY if self.config.target == "shortcut" else 0.0
        self.target = self.add_target(usual if self.config.target_ema is None else self.config.target_ema)
        self.add_turn("student", self.loss if self.config.slices == "free" else self.two_slice_loss)

    # --------------------------------------------------------------------------------------------------- losses

    def loss(self, batch: Batch, draws: Draws) -> Losses:
        noise = draws.normal_like(batch.x0)
        t, s, r = self.draw_times(draws)
        interval = Interval(self.state(batch.x0, noise, t), t, r)
        cond, w = self.guidance(batch.cond, draws)
        error = mean_square(*self.student_and_target(interval, s, Prediction(batch.x0, noise), cond, w))
        weight = average_velocity.alpha_weight(interval, self.alpha(), self.config.power)
        loss = average_velocity.normalised(error, self.config.power, self.config.floor)
        return Losses({"loss": (weight * loss).mean()}, {"error": error.detach().mean()})

    def two_slice_loss(self, batch: Batch, draws: Draws) -> Losses:
        """Return FACM's losses: of the step to clean data, and of the velocity, told apart by the sign of the time."""
        noise = draws.normal_like(batch.x0)
        t, _, _ = self.draw_times(draws)
        interval = Interval(self.state(batch.x0, noise, t), t, torch.zeros_like(t))
        cond, w = self.guidance(batch.cond, draws)
        path = self.path(interval, Prediction(batch.x0, noise), cond, w)
        with shared_dropout(self.bank, self.student.role):
            output = self.student.raw(interval.x_t, -t, cond, w=w)
        velocity, mean = self.student_along_path(interval, path, cond, w)
        anchor = to_prediction(output, interval.x_t, t, self.schedule, self.family.prediction_type).flow()
        tau = average_velocity.flow_time(self.schedule, t)
        terms, error = average_velocity.flow_anchored(velocity, mean, anchor, path.flow(), tau)
        return Losses(terms, {"error": error.detach().mean()})

    def draw_times(self, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """Return times ``t >= s >= r``, each (B,); s is where two steps part, if the target has two."""
        config = self.config
        levels = config.log_sigma_mean, config.log_sigma_std
        t, r = intervals.free_interval(self.schedule, draws, levels, config.from_noise, config.to_clean)
        s = average_velocity.time_within(self.schedule, t, r, draws.uniform())
        equal = draws.uniform() < config.equal
        at = intervals.shifted_log_normal_times(self.schedule, draws, *levels)
        if config.target == "shortcut":
            t, s, r = intervals.dyadic_interval(self.schedule, draws)
        return torch.where(equal, at, t), torch.where(equal, at, s), torch.where(equal, at, r)

    def state(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return ``x_t``; under a teacher, at t = 1, a sampler's initial state."""
        if self.config.velocity == "data":
            return self.schedule.add_noise(x0, noise, t)
        return student_input(self.schedule, x0, noise, t)

    def guidance(self, cond: Cond, draws: Draws) -> tuple[Cond, Tensor | None]:
        """Return the condition and guidance weights (B,); none where the teacher guides by a fixed scale.

        Where the student guides itself, a share of the batch has the null condition, and is not guided.
        """
        if not self.inputs.w and not self.config.guides_itself:
            return cond, None
        fixed = self.config.guidance_scale - 1
        w = draws.uniform(*(self.inputs.w or (fixed, fixed)))
        if not self.config.guides_itself:
            return cond, w
        dropped = draws.uniform() < self.config.condition_dropout
        return guidance_input.without_condition(self.family, cond, dropped), torch.where(dropped, 0, w)

    @torch.no_grad()
    def path(self, interval: Interval, data: Prediction, cond: Cond, w: Tensor | None = None) -> Prediction:
        """Return clean image and noise (B, ...) of the path's velocity, in the precision of the states."""
        x_t, t, _ = interval
        if self.config.velocity == "teacher":
            weight = self.config.guidance_scale - 1 if w is None else w
            x0, eps = self.teacher.guided(cond, self.where_guided(weight, t))(x_t, t)
            return Prediction(x0.to(x_t.dtype), eps.to(x_t.dtype))
        if w is None:
            return data
        with in_mode(self.bank, self.target.role, training=False):  # a velocity has no dropout
            free = self.target(x_t, t, self.family.null_cond(cond), **self.conditioning(torch.zeros_like(w), t))
            own = self.target(x_t, t, cond, **self.conditioning(w, t)) if self.config.guidance_mix else free
        return average_velocity.guided_by_itself(data, free, own, self.where_guided(w, t), self.config.guidance_mix)

    def where_guided(self, w: Tensor | float, t: Tensor) -> Tensor | float:
        """Return guidance weights, (B,) or one, that are 0 where times (B,) are above ``guidance_until``."""
        if self.config.guidance_until == 1:
            return w
        return (average_velocity.flow_time(self.schedule, t) < self.config.guidance_until) * w

    # -------------------------------------------------------------------------------------------------- targets

    def student_and_target(
        self, interval: Interval, s: Tensor, data: Prediction, cond: Cond, w: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the student's average velocity with its gradient, and its target; two steps part at times ``s``."""
        if not self.config.composes:
            return self.student_along_path(interval, self.path(interval, data, cond, w), cond, w)
        target = self.composition(interval, s, data, cond, w)
        return self.student_velocity(interval, cond, w), target

    def student_along_path(
        self, interval: Interval, path: Prediction, cond: Cond, w: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the student's average velocity, and the target by the path, whose derivative may be that student's."""
        if self.target is not self.student or self.config.target == "difference" or self.alpha():
            target = self.along_path(interval, path, cond, w)
            return self.student_velocity(interval, cond, w), target
        x_t, t, r = interval
        t, dx, dt = average_velocity.direction(self.schedule, path, t)
        student, _, derivative = self.student.with_derivative(x_t, t, cond, dx, dt, **self.conditioning(w, r))
        return student.flow(), self.corrected(interval, path, derivative.flow())

    def student_velocity(self, interval: Interval, cond: Cond, w: Tensor | None = None) -> Tensor:
        """Return the student's average velocity (B, ...)."""
        x_t, t, r = interval
        return self.student(x_t, t, cond, **self.conditioning(w, r)).flow()

    def average(self, cond: Cond, w: Tensor | None = None) -> Average:
        """Return the target network without gradient, each call with the dropout that the student draws next."""

        def call(x_t: Tensor, t: Tensor, r: Tensor) -> Prediction:
            with self.computing_target(self.target):
                return self.target(x_t, t, cond, **self.conditioning(w, r))

        return call

    def conditioning(self, w: Tensor | None, r: Tensor) -> dict[str, Tensor | None]:
        """Return the guidance weights and the second time, each None where the network has no such input."""
        return {"w": w if self.inputs.w else None, "s": r if self.config.slices == "free" else None}

    def along_path(self, interval: Interval, path: Prediction, cond: Cond, w: Tensor | None = None) -> Tensor:
        """Return the target (B, ...) that follows the path from ``x_t``; v where r = t."""
        if not (alpha := self.alpha()):
            return self.corrected(interval, path, self.derivative(interval, path, cond, w))
        s = average_velocity.time_within(self.schedule, interval.t, interval.r, alpha)
        target = average_velocity.interpolated(self.average(cond, w), path, interval, s, self.schedule)
        return average_velocity.where_empty(interval, path, target)

    def corrected(self, interval: Interval, path: Prediction, derivative: Tensor) -> Tensor:
        """Return the target that a derivative (B, ...) by flow time makes."""
        grown = min(1.0, self.step_in_stage / self.config.warmup) if self.config.warmup else 1.0
        target = path.flow() - grown * average_velocity.gap(self.schedule, interval) * derivative
        return average_velocity.where_empty(interval, path, target)

    def derivative(self, interval: Interval, path: Prediction, cond: Cond, w: Tensor | None = None) -> Tensor:
        """Return the derivative (B, ...) of the average velocity by flow time along the path, at fixed r."""
        x_t, t, r = interval
        if self.config.target == "difference":  # in float32: rounding would be as large as the difference
            average, step = self.average(cond, w), self.config.step
            with single_precision(self.bank, self.target.role, x_t.device):
                return average_velocity.central_difference(average, path, interval, step, self.schedule)
        t, dx, dt = average_velocity.direction(self.schedule, path, t)
        with self.computing_target(self.target):
            return self.target.jvp(x_t, t, cond, dx, dt, **self.conditioning(w, r))[1].flow()

    def composition(
        self, interval: Interval, s: Tensor, data: Prediction, cond: Cond, w: Tensor | None = None
    ) -> Tensor:
        """Return the target (B, ...) of two steps that part at ``s``; v where r = t, which alone asks the teacher."""
        two_steps = average_velocity.composed(self.average(cond, w), interval, s, self.schedule)
        equal = interval.t == interval.r
        rows = equal.nonzero().flatten()
        rows = rows if len(rows) else torch.zeros_like(equal[:1], dtype=torch.long)  # all processes call the network
        here, data = Interval(*(part[rows] for part in interval)), Prediction(*(part[rows] for part in data))
        path = self.path(here, data, {name: c[rows] for name, c in cond.items()}, None if w is None else w[rows])
        velocity = torch.zeros_like(two_steps).index_copy(0, rows, path.flow().to(two_steps.dtype))
        return torch.where(expand(equal, velocity) > 0, velocity, two_steps)

    def contract(self) -> dict[str, object]:
        return {"guidance_range": list(self.config.guidance_range)}

    def alpha(self) -> float:
        """Return the present share of the path's own velocity: from 1 to its end along a sigmoid; 0 is none."""
        if self.config.target != "alpha":
            return 0.0
        begin, end, least = self.config.alpha_begin, self.config.alpha_end, self.config.alpha_least
        progress = (self.step_in_stage / max(self.stage.steps, 1) - begin) / (end - begin)
        return average_velocity.falling_alpha(progress, least)
