r"""Predictions: a network's output as a clean image and noise.

Networks are trained to predict different things. Methods see only a :class:`Prediction`: the clean image and the noise
in ``x_t = alpha_t x_0 + sigma_t eps``. The conversions are elementary algebra:

================  ==============================  ================================  ================================
prediction type   the network's output            x_0                               eps
================  ==============================  ================================  ================================
``epsilon``       eps                             (x_t - sigma out) / alpha         out
``v_prediction``  alpha eps - sigma x_0 (VP)      alpha x_t - sigma out             sigma x_t + alpha out
``sample``        x_0                             out                               (x_t - alpha out) / sigma
``flow``          eps - x_0 (alpha + sigma = 1)   x_t - sigma out                   x_t + alpha out
``edm``           F, preconditioned (Karras)      c_skip x_t + c_out out            (x_t - x_0) / sigma
``edm_v``         -F (EDM's ``v_prediction``)     c_skip x_t - c_out out            (x_t - x_0) / sigma
``trigflow``      F of TrigFlow                   cos x_t - sigma_d sin out         (sin x_t + cos sigma_d out)/sigma_d
================  ==============================  ================================  ================================

Classifier-free guidance (Ho & Salimans, arXiv 2207.12598) is linear in every one of them, so it is implemented once, on
predictions, with the papers' ``w``: ``(1 + w) conditional - w unconditional``. The users' scale is ``g = 1 + w``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from stepdistill.diffusion.schedule import NoiseSchedule, edm_scalings

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow", "edm", "edm_v", "trigflow")


class Prediction(NamedTuple):
    """The clean image and the noise that a network predicts in ``x_t``, each (B, ...)."""

    x0: Tensor
    eps: Tensor

    def velocity(self, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Return ``v = alpha_t eps - sigma_t x_0`` (Salimans & Ho 2022, Section 4)."""
        return alpha_t * self.eps - sigma_t * self.x0

    def flow(self) -> Tensor:
        """Return the rectified-flow velocity ``eps - x_0``."""
        return self.eps - self.x0

    def to_state(self, alpha_s: Tensor, sigma_s: Tensor) -> Tensor:
        """Return ``alpha_s x_0 + sigma_s eps``: the DDIM step to the noise level of ``(alpha_s, sigma_s)``."""
        return alpha_s * self.x0 + sigma_s * self.eps


def to_prediction(output: Tensor, x_t: Tensor, t: Tensor, schedule: NoiseSchedule, prediction_type: str) -> Prediction:
    """Convert a network's output (B, ...) at states ``x_t`` (B, ...) and times ``t`` (B,) to ``(x0, eps)``."""
    alpha, sigma = schedule.coefficients(t, x_t)
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
        case "edm" | "edm_v":
            c_skip, c_out, _ = edm_scalings(sigma, schedule.sigma_data)
            x0 = c_skip * x_t + (c_out if prediction_type == "edm" else -c_out) * output
            return Prediction(x0, (x_t - x0) / sigma)
        case "trigflow":
            sigma_data = schedule.sigma_data
            x0 = alpha * x_t - sigma * output
            return Prediction(x0, (sigma / sigma_data * x_t + alpha * sigma_data * output) / sigma_data)
        case _:
            raise ValueError(f"prediction type: expected one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}")


def from_x0(x0: Tensor, x_t: Tensor, t: Tensor, schedule: NoiseSchedule, prediction_type: str) -> Tensor:
    """Return the network output (B, ...) whose clean image is ``x0``: the inverse of :func:`to_prediction`."""
    alpha, sigma = schedule.coefficients(t, x_t)
    match prediction_type:
        case "epsilon":
            return (x_t - alpha * x0) / sigma
        case "v_prediction":
            return (alpha * x_t - x0) / sigma
        case "sample":
            return x0
        case "flow":
            return (x_t - x0) / sigma
        case "edm" | "edm_v":
            c_skip, c_out, _ = edm_scalings(sigma, schedule.sigma_data)
            return (x0 - c_skip * x_t) / (c_out if prediction_type == "edm" else -c_out)
        case "trigflow":
            return (alpha * x_t - x0) / sigma
        case _:
            raise ValueError(f"prediction type: expected one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}")


Denoise = Callable[..., Prediction]
"""A function of states (B, ...) and times (B,), with condition and guidance already applied. Two-time networks also
take the target times (B,)."""
