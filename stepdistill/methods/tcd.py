r"""Trajectory consistency distillation (Zheng et al. 2024, arXiv 2402.19159).

A trajectory consistency function ``f(x_t, t -> s)`` predicts not only the end of a trajectory but every point on it.
It is an exponential integrator of the network's clean image,

.. math:: f(x_t, t \to s) = \frac{\sigma_s}{\sigma_t} x_t + \left(\alpha_s - \frac{\sigma_s}{\sigma_t} \alpha_t\right)
    \hat x_0.

The integrator of order one takes ``x_0(x_t, t)`` and is the DDIM step. That of order two takes ``x_0(x_u, u)`` at the
midpoint u in log-SNR, which a step of order one reaches. The boundary condition ``f(x, t -> t) = x`` holds by
construction.

As in LCM, one DDIM step of the guided teacher leads from ``x_t`` to a next state. From both states, the student must
arrive at the same ``x_s``, for any s between there and clean data. Errors stay small because no jump has to go all the
way. A *two-time* student (the paper's S+) is given s as an input, and predicts the mean clean image over the jump
instead of the one at its start.

*Segments* bound the jumps. The time axis is cut where a sampler of M steps begins its steps, and no jump leaves its
segment. If it always goes to the segment's end, t implies s, and the student needs no second time (phased consistency
models, PCM, Wang et al. 2024, 2405.18407); with M = 1 that is LCM. Hyper-SD (Ren et al. 2024, 2404.13686) jumps
anywhere in the segment, in stages of 8, 4, 2 and 1 segments.

An adversarial term, which both papers have in a form of their own, adds a critic of landed states: whether the student
jumped to ``x_s`` or, from a step of the teacher nearer, the target. Here it sees them noised up to a random time of the
jump, by heads on the frozen teacher's features. One training step moves student and heads, which share its calls.

Sampling is strategic stochastic (:class:`~stepdistill.diffusion.samplers.StrategicStochasticSampler`): jump below the
next time by the fraction gamma, then add noise to return to it.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from stepdistill.batch import Batch, Cond
from stepdistill.diffusion.ode import ode_step, solver_step
from stepdistill.diffusion.prediction import Denoise, Prediction
from stepdistill.diffusion.samplers import Sampler, StrategicStochasticSampler
from stepdistill.diffusion.schedule import DiscreteVP, NoiseSchedule, expand
from stepdistill.discriminators.pairs import PairCritic
from stepdistill.families.base import Family, Inputs
from stepdistill.files.ranges import Decay, GuidanceScale, NonNegativeFloat, PositiveInt, Share
from stepdistill.files.schema import refuse_unread
from stepdistill.losses.adversarial import AdversarialLoss
from stepdistill.losses.consistency import check_intervals, skip_grid, skip_places
from stepdistill.losses.regression import Distance, distance
from stepdistill.methods.base import HEAD, STUDENT, Distiller, Losses, Stage, split_steps
from stepdistill.networks.denoiser import Denoiser
from stepdistill.randomness import Draws

USUAL_GAMMA = 0.2
"""The paper's choice for few steps."""

MIDPOINT_RANGE = 10.0
"""Log-SNRs are clamped to +- this before a midpoint is taken: at clean data and at pure noise they are infinite."""


def midpoint(t: Tensor, s: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Return the times (B,) whose log-SNR is the mean of those of ``t`` and ``s``."""
    t_end = schedule.log_snr(t).clamp(-MIDPOINT_RANGE, MIDPOINT_RANGE)
    s_end = schedule.log_snr(s).clamp(-MIDPOINT_RANGE, MIDPOINT_RANGE)
    return schedule.inverse((t_end + s_end) / 2).clamp(s, t)


def jump(denoise: Denoise, x_t: Tensor, t: Tensor, s: Tensor, schedule: NoiseSchedule, order: Literal[1, 2]) -> Tensor:
    """Return ``f(x_t, t -> s)`` for times ``s <= t``, both (B,); where they are equal, ``x_t`` itself."""
    prediction = denoise(x_t, t)
    if order == 2:
        u = midpoint(t, s, schedule)
        x0 = denoise(ode_step(prediction, schedule, u), u).x0
        alpha_t, sigma_t = schedule.coefficients(t, x_t)
        prediction = Prediction(x0, (x_t - alpha_t * x0) / sigma_t)
    return torch.where(expand(s == t, x_t) > 0, x_t, ode_step(prediction, schedule, s))


def default_gamma(schedule: NoiseSchedule) -> float:
    """Return the paper's gamma, or 0 for flows and EDM, whose stock schedulers add no noise back."""
    return USUAL_GAMMA if isinstance(schedule, DiscreteVP) else 0.0


class TCD(Distiller):
    """A student that jumps to any point of the teacher's trajectory, and its slowly moving target."""

    sampling_options = frozenset({"steps", "gamma"})
    heads: ClassVar = {HEAD: STUDENT}

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of trajectory consistency distillation."""

        steps: PositiveInt = 4
        """Sampling steps."""
        solver_steps: PositiveInt = 50
        """DDIM steps of the teacher from noise to data: the grid that the student is trained on."""
        order: Literal[1, 2] = 1
        """Order of the exponential integrator in training; a sampling step costs one call in either case."""
        two_time: bool = False
        """Whether the time of the jump is an input; stock diffusers then needs the export's own pipeline file."""
        guidance_scale: GuidanceScale = 1.0
        """Guidance baked into the student; 1 is none."""
        gamma: Share | None = None
        """Share of fresh noise in sampling, from 0 (none) to 1 (all, as in LCM); more steps need more. By default 0.2,
        or 0 with several segments in the last stage, or for flows and EDM, whose stock schedulers add no noise back."""
        segments: tuple[PositiveInt, ...] = ()
        """Stages of training by their number of segments: [4] for PCM, [8, 4, 2, 1] for Hyper-SD; by default one."""
        target: Literal["random", "edge"] = "random"
        """Where a jump ends: at any time of its segment, or at the segment's end (PCM)."""
        distance: Distance = "huber"
        target_ema: Decay = 0.95
        """Decay of the target's average; at 0 the target is the student itself."""
        adversarial_weight: NonNegativeFloat = 0.0
        """Weight of the loss by a critic of landed states (0.1 in PCM); at 0 there is none."""
        adversarial: AdversarialLoss = "hinge"

        def __post_init__(self) -> None:
            if self.two_time and self.order != 1:
                raise ValueError(f"order: expected 1 with two_time, which replaces a second call, got {self.order}")
            last = self.last_segments
            if self.steps != last and (last > 1 or self.target == "edge"):
                raise ValueError(f"steps: expected the last number of segments, {last}, got {self.steps}")
            falling = (self.solver_steps + 1, *self.segments)
            if any(later >= earlier for earlier, later in itertools.pairwise(falling)):
                limit, given = self.solver_steps, list(self.segments)
                raise ValueError(f"segments: expected falling numbers, at most solver_steps = {limit}, got {given}")
            if self.gamma and last > 1:
                raise ValueError(f"gamma: expected 0 with segments, which no jump leaves, got {self.gamma}")
            refuse_unread(self, ["adversarial"], not self.adversarial_weight, "without adversarial_weight")

        @property
        def last_segments(self) -> int:
            """The number of segments of the finished student."""
            return self.segments[-1] if self.segments else 1

    @classmethod
    def make_sampler(cls, config: Config, family: Family) -> Sampler:
        check_intervals(family.schedule, config.steps, config.solver_steps, "solver_steps")
        times = skip_grid(family.schedule, config.steps, config.solver_steps)
        usual = default_gamma(family.schedule) if config.last_segments == 1 else 0.0
        gamma = usual if config.gamma is None else config.gamma
        return StrategicStochasticSampler(family.schedule, times, gamma, two_time=config.two_time)

    @classmethod
    def extra_inputs(cls, config: Config) -> Inputs:
        return Inputs(s=config.two_time)

    def stages(self, steps: int) -> list[Stage]:
        if not self.config.segments:
            return super().stages(steps)
        return split_steps(steps, {f"{count}-steps": (count, 1.0) for count in self.config.segments})

    def stage_sampler(self) -> Sampler:
        """Return the sampler whose steps cross one segment each; of the finished student its own."""
        if self.stage.value in (None, *self.config.segments[-1:]):
            return self.make_sampler(self.config, self.family)
        times = skip_grid(self.schedule, self.stage.value, self.config.solver_steps)
        return StrategicStochasticSampler(self.schedule, times, 0.0, two_time=self.config.two_time)

    def segment_ends(self, count: int) -> Tensor:
        """Return the index (solver_steps,) at which the segment, of ``count``, of every grid time but the last ends."""
        steps = self.config.solver_steps
        ends = torch.tensor([*skip_places(self.schedule, count, steps)[1:], steps])
        return ends[torch.searchsorted(ends, torch.arange(steps), right=True)]

    def build(self) -> None:
        self.target = self.add_target(self.config.target_ema)
        head: list[nn.Parameter] = []
        if self.config.adversarial_weight:
            self.conditional_critic = True
            self.critic = PairCritic(self.teacher, loss=self.config.adversarial)
            head = list(self.critic.parameters())
        self.add_turn("student", self.loss, head=head)

    def loss(self, batch: Batch, draws: Draws) -> Losses:
        steps = self.config.solver_steps
        grid = self.times(self.schedule.trajectory, steps, draws.device)
        i = draws.integers(0, steps)
        j = self.times(self.segment_ends, self.stage.value or 1, draws.device)[i]
        if self.config.target == "random":
            j = i + 1 + (draws.uniform() * (j - i)).long()  # uniform over the segment's grid points below t
        t, t_next, s = grid[i], grid[i + 1], grid[j]
        x_t = self.schedule.add_noise(batch.x0, draws.normal_like(batch.x0), t)
        with self.computing_target(self.target):
            x_next = solver_step(self.guided_teacher(batch.cond), x_t, t, t_next, self.schedule)
            target = self.jump(self.target, x_next, t_next, s, batch.cond)
        landed = self.jump(self.student, x_t, t, s, batch.cond)
        terms = {"loss": distance(landed, target, self.config.distance).mean()}
        if not self.config.adversarial_weight:
            return Losses(terms)
        context = self.critic.alone(s, torch.lerp(s, t, draws.uniform()), batch.cond)
        student, critic, metrics = self.critic.both_losses(target, landed, context, draws)
        return Losses(terms | {"adversarial": self.config.adversarial_weight * student, "critic": critic}, metrics)

    def jump(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """Return where the trajectory consistency function of ``denoiser`` leads from ``x_t`` at ``s``."""
        target_time = s if self.config.two_time else None
        return jump(lambda x, u: denoiser(x, u, cond, s=target_time), x_t, t, s, self.schedule, self.config.order)
