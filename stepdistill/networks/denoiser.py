"""Denoisers: networks in a role, called through their family and read as predictions."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stepdistill.batch import Cond
from stepdistill.diffusion.guidance import Rescale, guide
from stepdistill.diffusion.prediction import Denoise, Prediction, to_prediction
from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.families.base import Family
from stepdistill.networks.bank import TEACHER, NetworkBank
from stepdistill.networks.compilation import uncompiled
from stepdistill.networks.modes import in_one_pass, shared_dropout
from stepdistill.networks.tangents import dual, tangent_of, value_of


class Denoiser:
    """The network that plays ``role`` in a bank, called through its family and its schedule.

    Args:
        family: the family of the networks.
        bank: the networks.
        role: the role of this one.
        w: the default guidance weight of a call, for networks that take one as an input.
    """

    def __init__(self, family: Family, bank: NetworkBank, role: str, *, w: float | None = None) -> None:
        self.family = family
        self.bank = bank
        self.role = role
        self.w = w
        self.watch: Callable[[Tensor, Tensor], object] = lambda x_t, output: None
        """Called with the input and the output of every call."""

    @property
    def schedule(self) -> NoiseSchedule:
        """The schedule of the family's networks."""
        return self.family.schedule

    def raw(
        self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor], *, w: Tensor | None = None, s: Tensor | None = None
    ) -> Tensor:
        """Return the network's own output (B, ...) at states ``x_t`` (B, ...) and times ``t`` (B,).

        With a widened head, that of the teacher is one prediction, and that of others has all of them.
        """
        if w is None and self.w is not None:
            w = torch.full((len(x_t),), self.w, device=x_t.device)
        with self.bank.using(self.role) as network:
            output = self.family.call(network, x_t, t, cond, w=w, s=s)
        if self.role == TEACHER:
            output = output[:, : x_t.shape[1]]  # with a widened head, all its predictions are the same
        self.watch(x_t, output)
        return output

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor], *, w: Tensor | None = None, s: Tensor | None = None
    ) -> Prediction:
        """Return the clean image and the noise that the network predicts in ``x_t``; of a widened head, several.

        Args:
            x_t: noisy images (B, ...) of the family's schedule.
            t: times (B,) in (0, 1].
            cond: conditioning of the batch.
            w: guidance weights (B,), for networks that take them as an input.
            s: target times (B,), for networks that take a second time.
        """
        output = self.raw(x_t, t, cond, w=w, s=s)
        beside = output.shape[1] // x_t.shape[1]
        x_t = x_t if beside == 1 else x_t.repeat(1, beside, 1, 1)
        return to_prediction(output, x_t, t, self.schedule, self.family.prediction_type)

    def conditioned(self, cond: Mapping[str, Tensor], w: Tensor | None = None) -> Denoise:
        """Return the denoiser with its conditioning (and guidance input ``w``) fixed."""
        return lambda x_t, t, s=None: self(x_t, t, cond, w=w, s=s)

    def guided(self, cond: Cond, w: Tensor | float, rescale: Rescale = "none") -> Denoise:
        """Return the denoiser under guidance weight ``w``, its conditioning fixed; 0 is none, at half the cost."""
        if not torch.is_tensor(w) and w == 0:
            return self.conditioned(cond)
        return lambda x_t, t: self.guided_and_conditional(x_t, t, cond, w, rescale)[0]

    def guided_and_conditional(
        self, x_t: Tensor, t: Tensor, cond: Cond, w: Tensor | float, rescale: Rescale = "none"
    ) -> tuple[Prediction, Prediction]:
        """Return the prediction under guidance weight ``w`` and the conditional one, of one call of twice the batch."""
        conditional, null = conditional_and_null(self, x_t, t, cond, self.family.null_cond(cond))
        rule = self.family.guidance_rule
        if rescale != "none":
            rule = dataclasses.replace(rule, rescale=rescale, amount=1.0)
        return guide(conditional, null, w, x_t, t, self.schedule, rule), conditional

    def leaning(self, share: Callable[[], float]) -> LeaningTeacher:
        """Return the teacher with a share of this role's adapter, as it is at every call."""
        return LeaningTeacher(self.family, self.bank, self.role, share)

    @torch.no_grad()
    def jvp(
        self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor], dx: Tensor, dt: Tensor, *,
        w: Tensor | None = None, s: Tensor | None = None,
    ) -> tuple[Prediction, Prediction]:  # fmt: skip
        """Return the prediction, and its derivative along ``(dx, dt)``, without autocast and without a gradient.

        Both are computed in the precision of the network's weights: of adapters, in that of their base. The derivative
        is at fixed ``w`` and ``s``, also for a network that is told the difference of both times.

        Args:
            x_t: noisy images (B, ...).
            t: times (B,).
            cond: conditioning of the batch.
            dx: direction of the images, (B, ...).
            dt: direction of the times, (B,).
            w: guidance weights (B,), for networks that take them as an input.
            s: target times (B,), for networks that take a second time.

        Raises:
            NotImplementedError, RuntimeError: from torch, for an operation that has no forward derivative.
        """
        return self._carried(x_t, t, cond, dx, dt, w, s)

    def with_derivative(
        self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor], dx: Tensor, dt: Tensor, *,
        w: Tensor | None = None, s: Tensor | None = None,
    ) -> tuple[Prediction, Prediction, Prediction]:  # fmt: skip
        """Return the prediction as a call does, and what :meth:`jvp` returns, with the same dropout masks.

        It is one pass where the network computes in float32, its blocks are neither compiled nor recomputed, and its
        weights are not divided; else two.
        """
        if in_one_pass(self.bank, self.role, x_t.device):
            prediction, derivative = self._carried(x_t, t, cond, dx, dt, w, s)
            return prediction, Prediction(prediction.x0.detach(), prediction.eps.detach()), derivative
        with shared_dropout(self.bank, self.role):
            exact, derivative = self.jvp(x_t, t, cond, dx, dt, w=w, s=s)
        return self(x_t, t, cond, w=w, s=s), exact, derivative

    @torch.no_grad()
    def jvp_by_torch(
        self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor], dx: Tensor, dt: Tensor
    ) -> tuple[Prediction, Prediction]:
        """Return what :meth:`jvp` does, by ``torch.func.jvp`` at greater cost: it knows every operation or raises."""
        with self.bank.using(self.role) as network, forward_mode(x_t.device), differentiable(network):
            return torch.func.jvp(self.conditioned(cond), (x_t, t), (dx, dt))[:2]

    def _carried(
        self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor], dx: Tensor, dt: Tensor, w: Tensor | None,
        s: Tensor | None,
    ) -> tuple[Prediction, Prediction]:  # fmt: skip
        with forward_mode(x_t.device):
            found = self(dual(x_t, dx), dual(t, dt), cond, w=w, s=s)
        return Prediction(*map(value_of, found)), Prediction(*map(tangent_of, found))


class LeaningTeacher(Denoiser):
    """The teacher with a share of another role's adapter; its calls are that role's, and have no gradient.

    Args:
        family: the family of the networks.
        bank: the networks, as adapters.
        role: whose adapter it has a share of.
        share: returns the share; at 0 it is the teacher, bit for bit.
    """

    def __init__(self, family: Family, bank: NetworkBank, role: str, share: Callable[[], float]) -> None:
        super().__init__(family, bank, role)
        self.share = share

    def raw(
        self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor], *, w: Tensor | None = None, s: Tensor | None = None
    ) -> Tensor:
        with torch.no_grad(), self.bank.scaled(self.role, self.share()):
            return super().raw(x_t, t, cond, w=w, s=s)


@contextlib.contextmanager
def forward_mode(device: torch.device) -> Iterator[None]:
    """Make networks differentiable in forward mode: uncompiled, without autocast, in the precision of their weights."""
    with torch.autocast(device.type, enabled=False), uncompiled():
        yield


@contextlib.contextmanager
def differentiable(network: nn.Module) -> Iterator[None]:
    """Let torch differentiate ``network`` forward: plain attention, contiguous norm inputs.

    Torch's fused attention kernels have no forward derivative, and its group norm cannot view the tangent of a
    transposed input, as in diffusers' attention blocks.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    hooks = [norm.register_forward_pre_hook(_contiguous) for norm in norms]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _contiguous(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    del module
    return tuple(tensor.contiguous() for tensor in inputs)


def conditional_and_null(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor], null: Mapping[str, Tensor]
) -> tuple[Prediction, Prediction]:
    """Return the predictions under a condition and under the null condition, both in one batched call.

    Args:
        denoiser: any conditional denoiser.
        x_t: noisy images (B, ...).
        t: times (B,).
        cond: conditioning of the batch.
        null: the null conditioning, of the same shapes.
    """
    both = {name: torch.cat([cond[name], null[name]]) for name in cond}
    x0, eps = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
    (x0_cond, x0_null), (eps_cond, eps_null) = x0.chunk(2), eps.chunk(2)
    return Prediction(x0_cond, eps_cond), Prediction(x0_null, eps_null)
