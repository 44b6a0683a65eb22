r"""Policies: a field that a student emits in one call, and that is then followed without it.

In pi-Flow (Chen et al. 2025, arXiv 2510.14974) one call at ``(x_t, t)`` gives clean images ``x_0^{(1)}, ...,
x_0^{(N)}`` at N times, evenly from ``t`` to the end ``s`` of a segment. Between them the clean image is interpolated
(the paper's DX policy), so there is a velocity at every state ``x`` and time ``tau`` of the segment,

.. math:: \pi(x, \tau) = \frac{x - \hat x_0(\tau)}{\sigma_\tau}

on a flow. A sampler follows it in many steps that cost no call; each is a DDIM step. With N = 1 the clean image is the
same everywhere, and all of them together are one DDIM step.

Times are even where a flow's grid is not yet shifted towards noise: these are *raw* times here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stepdistill.diffusion.ode import Noise, ode_step
from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.samplers import Sampler
from stepdistill.diffusion.schedule import DiscreteVP, NoiseSchedule, expand
from stepdistill.diffusion.shift import shifted, unshifted


def segment_times(schedule: NoiseSchedule, steps: int, last: float) -> Tensor:
    """Return the ``steps + 1`` descending times at which segments of equal raw length meet, float64.

    Args:
        schedule: the networks' schedule; of a discrete process the times are whole timesteps.
        steps: number of segments.
        last: length of the last segment, relative to the others.
    """
    lengths = torch.arange(steps, dtype=torch.float64) / (steps - 1 + last)
    raw = torch.cat([1 - lengths, torch.zeros(1, dtype=torch.float64)])
    match schedule:
        case DiscreteVP():
            return (raw * schedule.num_timesteps).round() / schedule.num_timesteps
    return shifted(raw, schedule.shift)


class Policy(NamedTuple):
    """What a student emits for a segment."""

    x0: Tensor
    """Clean images (B, N, C, H, W) at even raw times, the first at ``start``, the last at ``end``."""
    start: Tensor
    """Raw times (B,) at which the segments begin."""
    end: Tensor
    """Raw times (B,) at which they end."""

    def at(self, raw: Tensor) -> Tensor:
        """Return the clean images (B, C, H, W) at raw times (B,) of the segments."""
        last = self.x0.shape[1] - 1
        if last == 0:
            return self.x0[:, 0]
        position = ((self.start - raw) / (self.start - self.end) * last).clamp(0, last)
        left = position.floor().long().clamp(max=last - 1)
        row = torch.arange(len(left), device=left.device)
        before, after = self.x0[row, left], self.x0[row, left + 1]
        return torch.lerp(before, after, expand(position - left, before))

    def advance(self, x: Tensor, raw: Tensor, to: Tensor, schedule: NoiseSchedule) -> Tensor:
        """Return where one DDIM step from states (B, ...) at raw times (B,) > 0 leads at raw times ``to`` (B,)."""
        alpha, sigma = schedule.coefficients(shifted(raw, schedule.shift), x)
        x0 = self.at(raw)
        return ode_step(Prediction(x0, (x - alpha * x0) / sigma), schedule, shifted(to, schedule.shift))

    def follow(self, x: Tensor, steps: int, schedule: NoiseSchedule) -> list[Tensor]:
        """Return the ``steps + 1`` states (B, ...) on the way from ``x`` to the segments' ends, at even raw times."""
        states = [x]
        for step in range(steps):
            raw, to = (torch.lerp(self.start, self.end, place / steps) for place in (step, step + 1))
            states.append(self.advance(states[-1], raw, to, schedule))
        return states

    def detach(self) -> Policy:
        """Return the policy without gradient."""
        return self._replace(x0=self.x0.detach())


def emitted(prediction: Prediction, points: int, start: Tensor, end: Tensor) -> Policy:
    """Return the policy in a prediction of ``points`` clean images beside each other, (B, points C, H, W).

    Args:
        prediction: of a network with a widened head.
        points: how many clean images.
        start: raw times (B,) at which the segments begin.
        end: raw times (B,) at which they end.
    """
    return Policy(prediction.x0.unflatten(1, (points, -1)), start, end)


class PolicySampler(Sampler):
    """A call a segment, and network-free steps to its end.

    Args:
        schedule: the networks' schedule.
        steps: segments, each one network call.
        last: length of the last segment, relative to the others.
        points: clean images that a call gives.
        substeps: network-free steps of a segment.
    """

    name = "Policy"
    adds_noise = False

    def __init__(self, schedule: NoiseSchedule, steps: int, last: float, points: int, substeps: int) -> None:
        super().__init__(schedule, segment_times(schedule, steps, last))
        self.last = last
        self.points = points
        self.substeps = substeps

    def step(self, prediction: Prediction, t: Tensor, s: Tensor, noise: Noise) -> Tensor:
        del noise
        start, end = unshifted(t, self.schedule.shift), unshifted(s, self.schedule.shift)
        policy = emitted(prediction, self.points, start, end)
        eps = prediction.eps.unflatten(1, (self.points, -1))[:, 0]
        x_t = Prediction(policy.x0[:, 0], eps).to_state(*self.schedule.coefficients(t, eps))
        return policy.follow(x_t, self.substeps, self.schedule)[-1]
