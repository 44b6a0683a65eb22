r"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598), plain or as a teacher's own pipeline changes it.

Guidance is linear in predictions of every kind: ``(1 + w) conditional - w unconditional``. It makes outputs larger, and
images contrasty. Pipelines know two remedies:

- *Rescaled guidance* takes the size from the conditional output: its deviation over an image (Lin et al. 2023, arXiv
  2305.08891, Equations 14 to 16; Stable Diffusion and SDXL), or the norm of its velocity, in each token of 2 x 2 pixels
  (Qwen-Image), in each row of pixels (Lumina 2), or over the image by one factor that only shortens (Z-Image).
- *Truncated guidance* guides at some times alone (Kynkäänniemi et al. 2024, arXiv 2404.07724; Lumina 2, Z-Image).
"""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from stepdistill.diffusion.prediction import Prediction, from_x0, to_prediction
from stepdistill.diffusion.schedule import NoiseSchedule, expand

Rescale: TypeAlias = Literal["none", "token", "global"]
"""Rescalings that any teacher can be given."""
PipelineRescale: TypeAlias = Literal["none", "token", "global", "row", "deviation"]
"""Those of pipelines."""
TIE = 1e-6
"""A time so near to the end of an interval is at it."""


@dataclasses.dataclass(frozen=True)
class GuidanceRule:
    """What is done with a guided prediction.

    Attributes:
        rescale: where its size is taken from, see above.
        amount: of ``deviation``: the share of the rescaled output in the result; of ``global``: the largest norm, in
            units of the conditional one.
        output: the prediction type of the output whose ``deviation`` is kept.
        interval: guidance is at times above the first and up to the second of these.
    """

    rescale: PipelineRescale = "none"
    amount: float = 1.0
    output: str = "flow"
    interval: tuple[float, float] = (0.0, 1.0)

    def guides(self, t: Tensor) -> Tensor:
        """Return whether there is guidance at times (B,)."""
        low, high = self.interval
        return (t > low + TIE) & (t <= high + TIE)

    def rescaled(
        self, guided: Prediction, conditional: Prediction, x_t: Tensor, t: Tensor, schedule: NoiseSchedule
    ) -> Prediction:
        """Return a guided prediction with its size changed; arguments as for :func:`guide`."""
        if self.rescale == "none":
            return guided
        if self.rescale == "deviation":
            output = self._output(guided, x_t, t, schedule)
            ratio = _deviation(self._output(conditional, x_t, t, schedule)) / _deviation(output)
            output = self.amount * (output * ratio) + (1 - self.amount) * output
            return to_prediction(output, x_t, t, schedule, self.output)
        velocity = rescaled(guided.flow(), conditional.flow(), self.rescale, self.amount)
        return from_flow(velocity, x_t, t, schedule)

    def _output(self, prediction: Prediction, x_t: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
        if self.output == "epsilon":
            return prediction.eps
        if self.output == "v_prediction":
            return prediction.velocity(*schedule.coefficients(t, x_t))
        return from_x0(prediction.x0, x_t, t, schedule, self.output)


PLAIN = GuidanceRule()
"""Guidance as in the paper."""


def guide(
    conditional: Prediction, null: Prediction, w: Tensor | float, x_t: Tensor, t: Tensor, schedule: NoiseSchedule,
    rule: GuidanceRule = PLAIN,
) -> Prediction:  # fmt: skip
    """Return the guided prediction at states ``x_t`` (B, ...) and times ``t`` (B,).

    Args:
        conditional: the prediction under the condition.
        null: that under the null condition.
        w: guidance weights (B,) or one number; 0 is the conditional prediction, -1 the unconditional one.
        x_t: noisy images.
        t: their times.
        schedule: the schedule of both.
        rule: what is done with it.
    """
    weights = torch.as_tensor(w, dtype=torch.float64) * rule.guides(t)  # one weight is on the CPU: no copy, no sync
    factor = 1 + expand(weights, x_t)
    guided = Prediction(*(torch.lerp(free, given, factor) for free, given in zip(null, conditional, strict=True)))
    if rule.rescale == "none":
        return guided
    sized = rule.rescaled(guided, conditional, x_t, t, schedule)
    x0, eps = (torch.where(factor == 1, given, found) for given, found in zip(conditional, sized, strict=True))
    return Prediction(x0, eps)


def rescaled(velocity: Tensor, like: Tensor, rescale: Literal["token", "global", "row"], amount: float = 1.0) -> Tensor:
    """Return velocities (B, C, H, W) with the norms of ``like``, per token, per row of pixels, or per image.

    Per image only if that shortens them, to ``amount`` of the norm. A clip (B, C, F, H, W) has one norm; its tokens and
    rows are those of its frames.
    """
    if rescale == "global":
        axes = tuple(range(1, velocity.ndim))
        ratio = amount * _norm(like, axes) / _norm(velocity, axes)
        return velocity * ratio.clamp(max=1)
    if velocity.ndim == 5:
        frames, wanted = (clips.transpose(1, 2).flatten(0, 1) for clips in (velocity, like))
        return rescaled(frames, wanted, rescale).unflatten(0, (len(velocity), -1)).transpose(1, 2)
    if rescale == "row":
        return velocity * (_norm(like, (3,)) / _norm(velocity, (3,)))
    side = 2 if velocity.shape[2] % 2 == velocity.shape[3] % 2 == 0 else 1
    tokens, wanted = pixel_unshuffle(velocity, side), pixel_unshuffle(like, side)
    return pixel_shuffle(tokens * (_norm(wanted, (1,)) / _norm(tokens, (1,))), side)


def from_flow(velocity: Tensor, x_t: Tensor, t: Tensor, schedule: NoiseSchedule) -> Prediction:
    """Return the prediction whose :meth:`Prediction.flow` is ``velocity`` (B, ...), on any schedule."""
    alpha, sigma = schedule.coefficients(t, x_t)
    x0 = (x_t - sigma * velocity) / (alpha + sigma)
    return Prediction(x0, x0 + velocity)


def _norm(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return x.square().sum(axes, keepdim=True).sqrt().clamp(min=1e-8)


def _deviation(x: Tensor) -> Tensor:
    return x.std(tuple(range(1, x.ndim)), keepdim=True).clamp(min=1e-8)
