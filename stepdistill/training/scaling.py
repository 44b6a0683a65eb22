"""Losses that are scaled, so that gradients of half precision do not vanish (Micikevicius et al. 2018, 1710.03740).

Each turn has a scale of its own, torch's ``GradScaler``, which accelerate has too: it starts large, is halved when a
gradient overflows, and grows again. A turn with an overflow, and what would follow it in its step, is left out as under
``nan_policy: skip``, the averages too. The step counts nevertheless, so that data and learning rates stay functions of
its number. Other precisions need none of this, and their scales do nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from stepdistill.training.guards import NonFiniteError, SkippedStepError

SCALE, GROWTH = "scale", "_growth_tracker"
"""What of a scale's state changes: itself, and for how many steps nothing has overflowed."""

GRAD_NORM = "grad_norm"
"""How the names of gradient norms end among the numbers of a turn."""


class LossScaling:
    """The scales of a run's losses.

    Args:
        precision: that in which the networks compute.
        device: where they are.
    """

    def __init__(self, precision: str, device: torch.device) -> None:
        self.half, self.device = precision == "fp16", device
        self.scalers: dict[str, torch.amp.GradScaler] = {}

    def of(self, turn: str) -> torch.amp.GradScaler:
        """Return the scale of a turn."""
        if turn not in self.scalers:
            self.scalers[turn] = torch.amp.GradScaler(self.device.type, enabled=self.half)
        return self.scalers[turn]

    def unscale(self, turn: str, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Divide the gradients of a turn's optimisers by its scale."""
        for optimizer in optimizers:
            self.of(turn).unscale_(optimizer)

    def check(self, turn: str, numbers: Mapping[str, Tensor]) -> None:
        """Adapt the scale to what became of a turn's gradients; the host waits for the device.

        Args:
            turn: its name.
            numbers: its losses, and the norms of its gradients.

        Raises:
            SkippedStepError: if the gradients overflowed though the losses are finite.
            NonFiniteError: if they do so without being scaled up.
        """
        if not self.half:
            return
        scaler = self.of(turn)
        scale = scaler.get_scale()
        scaler.update()
        losses = [value for name, value in numbers.items() if not name.endswith(GRAD_NORM)]
        norms = [value for name, value in numbers.items() if name.endswith(GRAD_NORM)]
        if all_finite(norms) or not all_finite(losses):
            return
        if scale < 1:
            raise NonFiniteError(
                f"turn {turn!r}: the gradient is not finite in fp16 at a scale of {scale:g}, though the loss is; "
                "no weight was changed. Lower optim.*.lr, or set train.precision to bf16 or fp32."
            )
        raise SkippedStepError(f"turn {turn!r}: the gradient overflowed at a scale of {scale:g}")

    def logged(self) -> dict[str, float]:
        """Return what a row of the log says about the scales."""
        if not self.half:
            return {}
        return {f"{turn}/loss_scale": scaler.get_scale() for turn, scaler in self.scalers.items()}

    def state(self) -> dict[str, dict[str, float]]:
        """Return the scales for a checkpoint, by turn."""
        scales: dict[str, dict[str, float]] = {}
        if self.half:
            for turn, scaler in self.scalers.items():
                state = scaler.state_dict()
                scales[turn] = {SCALE: state[SCALE], GROWTH: float(state[GROWTH])}
        return scales

    def resume(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Go on with the scales of a checkpoint."""
        for turn, values in state.items():
            scaler = self.of(turn)
            own = {SCALE: values[SCALE], GROWTH: int(values[GROWTH])}
            scaler.load_state_dict({**scaler.state_dict(), **own})


def all_finite(numbers: list[Tensor]) -> bool:
    """Whether all of these scalars are finite in every process: losses differ among them, and all must do the same."""
    finite = torch.stack([number.float() for number in numbers]).isfinite().all().float()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
    return bool(finite)
