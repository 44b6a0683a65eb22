"""Outputs of a denoiser's blocks, as features for critics and for distances.

Features are ``(B, C, N)`` (tokens) or ``(B, C, H, W)`` (maps). Hooks capture them in the network's own forward pass,
which ends as soon as all are captured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stepdistill.diffusion.schedule import NoiseSchedule
from stepdistill.networks.denoiser import Denoiser
from stepdistill.networks.hooks import capture_outputs

CLEAN = 0.02
"""The lowest time at which a network's features carry much information."""


def clean_time(schedule: NoiseSchedule) -> float:
    """Return the time given to a network on clean images: almost no noise, but no less than it was trained on."""
    return max(CLEAN, schedule.lowest_time)


class BlockFeatures:
    """Features of a denoiser at noisy images; gradients pass through them to the image.

    Args:
        denoiser: the teacher (LADD), or a fake score (DMD2).
        names: sub-modules; by default the family's ``feature_blocks``.
    """

    def __init__(self, denoiser: Denoiser, names: Sequence[str] = ()) -> None:
        self.denoiser = denoiser
        self.names = tuple(names) or denoiser.family.feature_blocks

    def __call__(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> list[Tensor]:
        """Return features of images (B, ...) at times (B,), in float32 for any precision of the network.

        Only the part of the network up to the last of them is run.
        """
        with self.denoiser.bank.using(self.denoiser.role) as network:
            features = capture_outputs(network, self.names, lambda: self.denoiser.family.call(network, x_t, t, cond))
        return [self.denoiser.family.image_tokens(feature, x_t, cond).float() for feature in features]

    def clean(self, x0: Tensor, cond: Mapping[str, Tensor]) -> list[Tensor]:
        """Return features of clean images (B, ...), at a time of almost no noise."""
        return self(x0, torch.full((len(x0),), clean_time(self.denoiser.schedule), device=x0.device), cond)

    @torch.no_grad()
    def shapes(self) -> list[torch.Size]:
        """Return the shapes of the features, without the batch; runs the network once."""
        family = self.denoiser.family
        x = torch.zeros(1, *family.sample_shape)
        return [feature.shape[1:] for feature in self(x, torch.full((1,), 0.5), family.example_cond([0]))]
