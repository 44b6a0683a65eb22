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

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stepdistill.schedule import Karras, NoiseSchedule, expand

if TYPE_CHECKING:
    from stepdistill.families.base import Family
    from stepdistill.networks import NetworkBank

Cond = dict[str, Tensor]
"""What a network is conditioned on, by the argument's name; every tensor's first axis is the batch."""

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


class Denoiser:
    """The network that plays ``role`` in a bank, called through its family and its schedule.

    Args:
        family: how its networks are called.
        bank: the networks.
        role: which of them this is.
        w: the guidance weight of a call that names none, for networks that take one.
    """

    def __init__(self, family: Family, bank: NetworkBank, role: str, *, w: float | None = None) -> None:
        self.family = family
        self.bank = bank
        self.role = role
        self.w = w

    @property
    def schedule(self) -> NoiseSchedule:
        """The schedule of the family's networks."""
        return self.family.schedule

    def raw(
        self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor], *, w: Tensor | None = None, s: Tensor | None = None
    ) -> Tensor:
        """The network's own output (B, ...) at states ``x_t`` (B, ...) and times ``t`` (B,)."""
        if w is None and self.w is not None:
            w = torch.full((len(x_t),), self.w, device=x_t.device)
        with self.bank.using(self.role) as network:
            return self.family.call(network, x_t, t, cond, w=w, s=s)

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor], *, w: Tensor | None = None, s: Tensor | None = None
    ) -> Prediction:
        """What the network sees in ``x_t``.

        Args:
            x_t: noisy images (B, ...) of the family's schedule.
            t: times (B,) in (0, 1].
            cond: conditioning of the batch.
            w: guidance weights (B,), for networks that take them as an input.
            s: target times (B,), for networks that take a second time.
        """
        return to_prediction(self.raw(x_t, t, cond, w=w, s=s), x_t, t, self.schedule, self.family.prediction_type)

    @torch.no_grad()
    def jvp(
        self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor], dx: Tensor, dt: Tensor
    ) -> tuple[Prediction, Prediction]:
        """The prediction, and its derivative along ``(dx, dt)``, by forward-mode differentiation in float32.

        Args:
            x_t: noisy images (B, ...).
            t: times (B,).
            cond: conditioning of the batch.
            dx: the direction of the images, (B, ...).
            dt: the direction of the times, (B,).

        Raises:
            NotImplementedError, RuntimeError: torch's own, for a network with an operation that has no forward
                derivative, for example a fused attention kernel that was chosen by hand.
        """
        with self.bank.using(self.role) as network, forward_mode(network, x_t.device):
            prediction, derivative, *_ = torch.func.jvp(lambda x_t, t: self(x_t, t, cond), (x_t, t), (dx, dt))
            return prediction, derivative


@contextlib.contextmanager
def forward_mode(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Make ``network`` differentiable forward for a while: full precision, plain attention, contiguous norm inputs.

    Torch's fused attention kernels have no forward derivative (pytorch#128971, #165530), and its group norm cannot
    view the tangent of a transposed input, which diffusers' attention blocks give it.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    hooks = [norm.register_forward_pre_hook(_contiguous) for norm in norms]
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _contiguous(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    del module
    return tuple(tensor.contiguous() for tensor in inputs)


def guided(
    denoiser: Denoiser,
    x_t: Tensor,
    t: Tensor,
    cond: Mapping[str, Tensor],
    null: Mapping[str, Tensor],
    w: Tensor | float,
) -> Prediction:
    """Classifier-free guidance ``(1 + w) conditional - w unconditional``, both halves in one batched call.

    Args:
        denoiser: any conditional denoiser.
        x_t: noisy images (B, ...).
        t: times (B,).
        cond: conditioning of the batch.
        null: the conditioning that means "none", same shapes.
        w: guidance weights (B,) or one number; 0 is the conditional prediction, -1 the unconditional one.
    """
    both = {name: torch.cat([cond[name], null[name]]) for name in cond}
    x0, eps = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
    w = expand(torch.as_tensor(w, dtype=torch.float64).expand(len(x_t)), x_t)
    (x0_cond, x0_null), (eps_cond, eps_null) = x0.chunk(2), eps.chunk(2)
    return Prediction(torch.lerp(x0_null, x0_cond, 1 + w), torch.lerp(eps_null, eps_cond, 1 + w))
