r"""A network in a role, seen through its schedule.

Whatever a network was trained to predict, methods see one thing: a :class:`Prediction` of the clean image and of the
noise in ``x_t = alpha_t x_0 + sigma_t eps``. The conversions (all elementary algebra):

================  ==============================  ================================  ================================
prediction type   the network's output            x_0                               eps
================  ==============================  ================================  ================================
``epsilon``       eps                             (x_t - sigma out) / alpha         out
``v_prediction``  alpha eps - sigma x_0 (VP)      alpha x_t - sigma out             sigma x_t + alpha out
``sample``        x_0                             out                               (x_t - alpha out) / sigma
``flow``          eps - x_0 (alpha + sigma = 1)   x_t - sigma out                   x_t + alpha out
``edm``           F, preconditioned (Karras)      c_skip x_t + c_out out            (x_t - x_0) / sigma
``trigflow``      F of TrigFlow                   cos x_t - sigma_d sin out         (sin x_t + cos sigma_d out)/sigma_d
================  ==============================  ================================  ================================

Classifier-free guidance (Ho & Salimans, arXiv 2207.12598) is linear in every one of them, so it is stated once, on
predictions, with the papers' ``w``: ``(1 + w) conditional - w unconditional``. Users' scale is ``g = 1 + w``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from stepdistill.diffusion.schedule import Karras, NoiseSchedule, expand

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow", "edm", "trigflow")


class Prediction(NamedTuple):
    """The clean image and the noise that a network sees in ``x_t``, each (B, ...)."""

    x0: Tensor
    eps: Tensor

    def velocity(self, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """``v = alpha_t eps - sigma_t x_0`` (Salimans & Ho 2022, Section 4), coefficients broadcastable to x0."""
        return alpha_t * self.eps - sigma_t * self.x0

    def flow(self) -> Tensor:
        """The rectified-flow velocity ``eps - x_0``."""
        return self.eps - self.x0

    def to_state(self, alpha_s: Tensor, sigma_s: Tensor) -> Tensor:
        """``alpha_s x_0 + sigma_s eps``: the DDIM step to the noise level of ``(alpha_s, sigma_s)``."""
        return alpha_s * self.x0 + sigma_s * self.eps


def edm_scalings(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor]:
    """``(c_skip, c_out, c_in)`` of EDM (Karras et al. 2022, Table 1)."""
    total = (sigma**2 + sigma_data**2).sqrt()
    return sigma_data**2 / total**2, sigma * sigma_data / total, 1 / total


def to_prediction(output: Tensor, x_t: Tensor, t: Tensor, schedule: NoiseSchedule, prediction_type: str) -> Prediction:
    """Read a network's raw output (B, ...) at states ``x_t`` and times ``t`` (B,) as ``(x0, eps)``."""
    alpha, sigma = (expand(coefficient, x_t) for coefficient in schedule(t))
    output = output.to(x_t.dtype)
    match prediction_type:
        case "epsilon":
            return Prediction((x_t - sigma * output) / alpha, output)
        case "v_prediction":
            return Prediction(alpha * x_t - sigma * output, sigma * x_t + alpha * output)
        case "sample":
            return Prediction(output, (x_t - alpha * output) / sigma)
        case "flow":
            return Prediction(x_t - sigma * output, x_t + alpha * output)
        case "edm":
            c_skip, c_out, _ = edm_scalings(sigma, schedule.sigma_data)
            x0 = c_skip * x_t + c_out * output
            return Prediction(x0, (x_t - x0) / sigma)
        case "trigflow":
            sigma_data = schedule.sigma_data
            x0 = alpha * x_t - sigma * output
            return Prediction(x0, (sigma / sigma_data * x_t + alpha * sigma_data * output) / sigma_data)
        case _:
            raise ValueError(f"prediction type {prediction_type!r}; known: {', '.join(PREDICTION_TYPES)}")


def from_x0(x0: Tensor, x_t: Tensor, t: Tensor, schedule: NoiseSchedule, prediction_type: str) -> Tensor:
    """The output a network would have to give for its prediction to be ``x0``: the inverse of :func:`to_prediction`."""
    alpha, sigma = (expand(coefficient, x_t) for coefficient in schedule(t))
    match prediction_type:
        case "epsilon":
            return (x_t - alpha * x0) / sigma
        case "v_prediction":
            return (alpha * x_t - x0) / sigma
        case "sample":
            return x0
        case "flow":
            return (x_t - x0) / sigma
        case "edm":
            c_skip, c_out, _ = edm_scalings(sigma, schedule.sigma_data)
            return (x0 - c_skip * x_t) / c_out
        case "trigflow":
            return (alpha * x_t - x0) / sigma
        case _:
            raise ValueError(f"prediction type {prediction_type!r}; known: {', '.join(PREDICTION_TYPES)}")


def end_point(prediction: Prediction, x_t: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The consistency function's value (B, ...), its boundary exact, from what a network sees in ``x_t`` at ``t``.

    For EDM, ``c_out F`` is written through the network's clean image: ``(1 - sigma_min / sigma) (x_0 - c_skip x_t)``.
    """
    if not isinstance(schedule, Karras):
        return torch.where(expand(t == 0, x_t) > 0, x_t, prediction.x0)
    _, sigma = schedule(t)
    skip, _, _ = edm_scalings(sigma, schedule.sigma_data)
    shifted_skip, _, _ = edm_scalings(sigma - schedule.sigma_min, schedule.sigma_data)
    rest = prediction.x0 - expand(skip, x_t) * x_t
    return expand(shifted_skip, x_t) * x_t + expand(1 - schedule.sigma_min / sigma, x_t) * rest


Denoise = Callable[..., Prediction]
"""The prediction at states (B, ...) and times (B,), conditioning and guidance already inside; two-time networks also
take the times (B,) they are to jump to."""
