"""Networks that are told two times: of the state they see, and of the state that their step leads to.

Self-contained: it is copied into an export beside the network's weights, as ``transformer/two_times.py``. Each class is
a stock one whose embedding of the time has a second branch. It takes timesteps of shape (B, 2), or (B,) without a
second time, when it is the stock network.
"""

import functools
from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import nn

EMBEDDINGS = ("time_embedding", "timestep_embedder")
"""Names of the modules that embed the time of a network."""


class TwoTimesteps(Timesteps):
    """The features of timesteps (B,), or those of both times of (B, 2) beside each other."""

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Features (B, n) or (B, 2 n)."""
        if timesteps.ndim == 1:
            return super().forward(timesteps)
        return torch.cat([super(TwoTimesteps, self).forward(times) for times in timesteps.unbind(1)], 1)


class TwoTimeEmbedding(TimestepEmbedding):
    """The embedding of a time, plus a branch over the features of a second one if they are there."""

    second: TimestepEmbedding

    def forward(self, sample: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        """The embedding (B, d) of features (B, n) or (B, 2 n)."""
        size = self.second.linear_1.in_features
        embedded = super().forward(sample[:, :size], condition)
        return embedded if sample.shape[1] == size else embedded + self.second(sample[:, size:])


def add_second_time(network: nn.Module) -> None:
    """Give a network's embeddings of the time a second branch, which ends in zeros, in place."""
    for name, module in list(network.named_modules()):
        if isinstance(module, Timesteps):
            module.__class__ = TwoTimesteps
        elif name.rpartition(".")[2] in EMBEDDINGS:
            first, last = module.linear_1, module.linear_2
            branch = TimestepEmbedding(first.in_features, first.out_features, out_dim=last.out_features)
            nn.init.zeros_(branch.linear_2.weight)
            nn.init.zeros_(branch.linear_2.bias)
            module.second = branch.to(last.weight.device, last.weight.dtype)
            module.__class__ = TwoTimeEmbedding


def two_times(network: Any) -> Any:
    """A class of networks whose instances take two times."""
    plain = network.__init__

    @functools.wraps(plain)
    def extended(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        add_second_time(self)

    network.__init__ = extended
    return network


@two_times
class TwoTimeUNet2DConditionModel(UNet2DConditionModel):
    """Stable Diffusion's and SDXL's network."""

    def get_time_embed(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor | None:
        """Features of the times, as the stock network makes them of one."""
        if not torch.is_tensor(timestep) or timestep.ndim < 2:
            return super().get_time_embed(sample, timestep)
        return self.time_proj(timestep).to(sample.dtype)


@two_times
class TwoTimeDiTTransformer2DModel(DiTTransformer2DModel):
    """DiT's network."""


@two_times
class TwoTimePixArtTransformer2DModel(PixArtTransformer2DModel):
    """PixArt's network."""


@two_times
class TwoTimeSD3Transformer2DModel(SD3Transformer2DModel):
    """Stable Diffusion 3's network."""


@two_times
class TwoTimeSanaTransformer2DModel(SanaTransformer2DModel):
    """Sana's network."""


@two_times
class TwoTimeFluxTransformer2DModel(FluxTransformer2DModel):
    """FLUX.1's network."""
