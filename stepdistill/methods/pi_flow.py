r"""pi-Flow: policy-based few-step generation by imitation (Chen et al. 2025, arXiv 2510.14974).

A student of few steps has to jump far, and a jump is hard to learn. This student does not jump: one call emits a
*policy*, clean images at several times of the segment ahead (:mod:`stepdistill.diffusion.policy`), and the sampler
follows the velocity that they define in many steps without the network. It is trained by imitation on its own way: the
policy is followed without gradient, and at random states ``x_a`` of it the velocity must be the teacher's,

.. math:: L = E_a \| \pi(x_a, \tau_a) - u_T(x_a, \tau_a) \|^2,

with the policy's velocity a mean over a few of its steps, and the state fixed. There is no critic, no second network
and no derivative, and the loss is a plain regression on the teacher's own velocities.

The head of the network is widened: at the start all its clean images are the teacher's, so that a segment is one DDIM
step. Of the paper this has the DX policy with linear interpolation. It has no Gaussian-mixture policy, does not mix the
teacher's steps into the way at the beginning, and guides the teacher at all times.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from stepdistill.batch import Batch
from stepdistill.diffusion.policy import Policy, PolicySampler, emitted
from stepdistill.diffusion.samplers import Sampler, states
from stepdistill.diffusion.schedule import expand
from stepdistill.diffusion.shift import shifted, unshifted
from stepdistill.families.base import Family
from stepdistill.files.ranges import GuidanceScale, PositiveInt, PositiveShare
from stepdistill.losses.regression import mean_square
from stepdistill.losses.student_inputs import student_input
from stepdistill.methods.base import Distiller, Losses
from stepdistill.randomness import Draws


class PiFlow(Distiller):
    """A student that emits policies, and the teacher that corrects them on their own way."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of pi-Flow."""

        steps: PositiveInt = 4
        """Sampling steps, each one network call and one segment of the time axis."""
        points: PositiveInt = 10
        """Clean images of a policy."""
        substeps: PositiveInt = 32
        """Network-free steps of a segment; the paper has 128 from noise to data."""
        last_segment: PositiveShare = 0.5
        """Length of the last segment, relative to the others; the paper has 1 for classes."""
        states: PositiveInt = 4
        """Calls of the teacher, at random states of a policy's way; the paper has 2 for classes."""
        window: PositiveInt = 3
        """Steps over which the policy's velocity is averaged."""
        start: Literal["data", "rollout"] = "data"
        """Where a segment begins: in noised data, or where the student itself gets from noise. Then images are needed
        all the same, for their sizes and conditions alone."""
        guidance_scale: GuidanceScale = 1.0
        """Guidance baked into the student; 1 is none."""

        def __post_init__(self) -> None:
            if self.window > self.substeps:
                raise ValueError(f"window: expected at most substeps = {self.substeps}, got {self.window}")

    @classmethod
    def make_sampler(cls, config: Config, family: Family) -> Sampler:
        return PolicySampler(family.schedule, config.steps, config.last_segment, config.points, config.substeps)

    @classmethod
    def head_points(cls, config: Config) -> int:
        return config.points

    def build(self) -> None:
        self.add_turn("student", self.loss)

    def loss(self, batch: Batch, draws: Draws) -> Losses:
        times = self.sampler().times_on(draws.device)
        i = draws.integers(0, self.config.steps)
        t, s = times[i], times[i + 1]
        x_t = self.begin(batch, i, t, draws)
        start, end = unshifted(t, self.schedule.shift), unshifted(s, self.schedule.shift)
        policy = emitted(self.student(x_t, t, batch.cond), self.config.points, start, end)
        with torch.no_grad():
            way = torch.stack(policy.detach().follow(x_t, self.config.substeps, self.schedule), 1)
        errors = []
        for _ in range(self.config.states):
            place = draws.integers(0, self.config.substeps - self.config.window + 1)
            x = way[torch.arange(batch.size, device=place.device), place]
            tau = shifted(self.raw(policy, place), self.schedule.shift)
            with torch.no_grad():
                wanted = self.guided_teacher(batch.cond)(x, tau).flow()
            errors.append(mean_square(self.velocity(policy, x, place), wanted))
        return Losses({"loss": torch.stack(errors).mean()})

    def begin(self, batch: Batch, i: Tensor, t: Tensor, draws: Draws) -> Tensor:
        """Return the states (B, ...) at times ``t`` (B,), where the segments ``i`` (B,) begin."""
        noise = draws.normal_like(batch.x0)
        if self.config.start == "data":
            return student_input(self.schedule, batch.x0, noise, t)
        with torch.no_grad():
            noise, calls = self.schedule.initial_noise(noise), self.config.steps - 1
            visited = states(self.student.conditioned(batch.cond), self.sampler(), noise, calls, draws.normal_like)
            return torch.stack(list(visited), 1)[torch.arange(batch.size, device=i.device), i]

    def raw(self, policy: Policy, place: Tensor) -> Tensor:
        """Return the raw times (B,) of the places (B,) on a policy's way."""
        return torch.lerp(policy.start, policy.end, place.double() / self.config.substeps)

    def velocity(self, policy: Policy, x: Tensor, place: Tensor) -> Tensor:
        """Return the policy's mean velocity (B, ...) from states at places (B,) of its way, in a flow's coordinates.

        There, ``x / (alpha + sigma)`` moves by ``eps - x_0`` as the time ``sigma / (alpha + sigma)`` does.
        """
        begin, time = self.flow_coordinates(x, self.raw(policy, place))
        for step in range(self.config.window):
            x = policy.advance(x, self.raw(policy, place + step), self.raw(policy, place + step + 1), self.schedule)
        end, then = self.flow_coordinates(x, self.raw(policy, place + self.config.window))
        return (begin - end) / expand(time - then, x)

    def flow_coordinates(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Return states (B, ...) and raw times (B,) as those of a flow."""
        alpha, sigma = self.schedule(shifted(raw, self.schedule.shift))
        return x / expand(alpha + sigma, x), sigma / (alpha + sigma)
