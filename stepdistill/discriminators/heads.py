r"""Heads of critics on frozen features.

A critic tells real images from a student's. Small heads on the features of a frozen network do that better, and train
more stably, than a network of their own (projected GANs; ADD, Sauer et al. 2023, arXiv 2311.17042). With logits ``D_k``
of the heads on features ``F_k`` of real images x and generated images x', a critic minimises

.. math:: \sum_k \max(0, 1 - D_k(F_k(x))) + \max(0, 1 + D_k(F_k(\hat x))) + \gamma \|\nabla_{F_k} D_k\|^2

(hinge, Eq. 2, with R1 on the features of real images) or ``softplus(-D(x)) + softplus(D(x'))``, and a student
minimises ``-D(x')`` or ``softplus(-D(x'))``. Conditions enter by projection: the logit at a position is the inner
product of the head's vector there and the projected condition ``c``, so it is 0 for ``c = 0``.

Two things differ from the StyleGAN-T heads of ADD. Weights are divided by their exact spectral norm, instead of an
estimate that changes with every forward pass; and positions are normalised within a sample, instead of across a part of
the batch. A logit thus depends on the sample and the weights alone: it is the same in any number of processes, and
after resuming.

Features are ``(B, C, N)`` (tokens) or ``(B, C, H, W)`` (maps); logits are ``(B, positions)`` per head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils.parametrize import register_parametrization

from stepdistill.losses.adversarial import Logits

MAX_WIDTH = 256
"""Most channels inside a head."""

PROJECTION = 64
"""Length of the projected condition."""


class SpectralNorm(nn.Module):
    """A weight (out, ...) divided by its largest singular value (Miyato et al. 2018, arXiv 1802.05957), without state.

    Seven squarings of the Gram matrix equal 128 power iterations, here from the column of largest norm.
    """

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with spectral norm 1; its gradient is that of the quotient."""
        with torch.autocast(weight.device.type, enabled=False):
            matrix = weight.float().flatten(1)
            with torch.no_grad():
                gram = matrix @ matrix.T
                for _ in range(7):
                    gram = gram / gram.trace().clamp(min=1e-30)
                    gram = gram @ gram
                u = normalize(gram.index_select(1, gram.diagonal().argmax().view(1)).squeeze(1), dim=0)
                v = normalize(matrix.T @ u, dim=0)
            return weight / (u @ matrix @ v).clamp(min=1e-12)


def grid_shape(shape: Sequence[int], aspect: float) -> tuple[int, ...]:
    """Return (C, H, W) for tokens (C, N) that cover an image of this height over width; else ``shape`` itself.

    >>> grid_shape((64, 32), aspect=0.5), grid_shape((64, 33), aspect=0.5), grid_shape((64, 3, 9), aspect=0.5)
    ((64, 4, 8), (64, 33), (64, 3, 9))
    """
    if len(shape) == 3:
        return tuple(shape)
    rows = round(math.sqrt(shape[1] * aspect))
    columns = round(rows / aspect)
    return (shape[0], rows, columns) if rows * columns == shape[1] else tuple(shape)


def aspect_of(shape: Sequence[int]) -> float:
    """Return height over width of a state (C, H, W); of a clip's (C, F, H, W) with its frames one above the other.

    >>> aspect_of((4, 8, 16)), aspect_of((4, 3, 8, 16))
    (0.5, 1.5)
    """
    return math.prod(shape[1:-1]) / shape[-1]


class Head(nn.Module):
    """One head: a 1x1 and a residual wider convolution, each with spectral norm, then a logit per position.

    The last layer has no spectral norm: behind normalised layers, it alone sets the scale of the logits.

    Args:
        shape: (C, N) of tokens, with a circular kernel of 9, or (C, H, W) of maps, with a kernel of 3, which tokens
            fill row by row; features of other sizes, too, in training on several.
        cond_size: length of the condition; 0 is an unconditional head.
    """

    def __init__(self, shape: Sequence[int], cond_size: int = 0) -> None:
        super().__init__()
        self.shape = tuple(shape)
        width = min(shape[0], MAX_WIDTH)
        self.narrow = _block(shape, shape[0], width, kernel=1)
        self.wide = _block(shape, width, width, kernel=9 if len(shape) == 2 else 3)
        self.last = (nn.Conv2d if len(shape) == 3 else nn.Conv1d)(width, PROJECTION if cond_size else 1, 1)
        self.project = nn.Linear(cond_size, PROJECTION, bias=False) if cond_size else None

    def forward(self, feature: Tensor, cond: Tensor) -> Tensor:
        """Return logits (B, positions) of features of ``shape`` under conditions (B, cond_size)."""
        x = feature.float()
        if x.ndim != 1 + len(self.shape):
            x = x.reshape(len(x), *self.shape)
        x = self.narrow(x)
        x = self.last((x + self.wide(x)) / math.sqrt(2)).flatten(2)
        if self.project is None:
            return x.squeeze(1)
        return (x * self.project(cond.to(x.dtype)).unsqueeze(2)).sum(1) / math.sqrt(PROJECTION)


def _block(shape: Sequence[int], before: int, after: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(_convolution(shape, before, after, kernel), nn.GroupNorm(1, after), nn.LeakyReLU(0.2))


def _convolution(shape: Sequence[int], before: int, after: int, kernel: int) -> nn.Module:
    convolution: Any
    if len(shape) == 3:
        convolution = nn.Conv2d(before, after, kernel, padding=kernel // 2)
    else:
        kernel = kernel if shape[1] >= kernel else 1  # circular padding needs at least as many positions
        convolution = nn.Conv1d(before, after, kernel, padding=kernel // 2, padding_mode="circular")
    register_parametrization(convolution, "weight", SpectralNorm())
    return convolution


class Heads(nn.Module):
    """One head per feature.

    Args:
        shapes: of the features, without the batch.
        cond_size: length of the condition; 0 is an unconditional critic.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], cond_size: int = 0) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(shape, cond_size) for shape in shapes)
        self.cond_size = cond_size

    def forward(self, features: Sequence[Tensor], cond: Tensor) -> Logits:
        """Return logits (B, positions) per head, of features under conditions (B, cond_size)."""
        return [head(feature, cond) for head, feature in zip(self.heads, features, strict=True)]
