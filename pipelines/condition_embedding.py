"""What a ``UNet2DModel`` student sees besides image and time: class, guidance weight, target time.

Self-contained: it is copied into an export as ``condition_embedding/condition_embedding.py``. The UNet itself stays
stock (``class_embed_type="identity"``) and adds the vector made here to its time embedding.
"""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import nn


class ConditionEmbedding(ModelMixin, ConfigMixin):
    """The sum of a label's embedding and of branches over Fourier features that start at zero.

    Args:
        embed_dim: width of the UNet's time embedding.
        num_class_embeds: how many labels there are; None for an unconditional network.
        w_range: lowest and highest guidance weight ``guidance_scale - 1`` of the training; None without that input.
        takes_s: whether the timestep that a step leads to is an input.
        num_features: sines and cosines a branch sees.
    """

    @register_to_config
    def __init__(
        self,
        embed_dim: int,
        num_class_embeds: int | None = None,
        w_range: list[float] | None = None,
        takes_s: bool = False,
        num_features: int = 256,
    ) -> None:
        super().__init__()
        self.class_embedding = None if num_class_embeds is None else nn.Embedding(num_class_embeds, embed_dim)
        self.w_embedding = None if w_range is None else zero_branch(num_features, embed_dim)
        self.s_embedding = zero_branch(num_features, embed_dim) if takes_s else None

    def forward(
        self, class_labels: torch.Tensor | None, w: torch.Tensor | None = None, s: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The vector (B, embed_dim), or (1, embed_dim) where nothing is given.

        Args:
            class_labels: labels (B,).
            w: guidance weights (B,), embedded as diffusers does, 1000 times over; None leaves the branch out.
            s: timesteps (B,); None leaves the branch out.
        """
        vector = torch.zeros(1, self.config.embed_dim, dtype=self.dtype, device=self.device)
        if self.class_embedding is not None:
            vector = vector + self.class_embedding(class_labels)
        if w is not None:
            vector = vector + self.branch(self.w_embedding, 1000 * w)
        if s is not None:
            vector = vector + self.branch(self.s_embedding, s)
        return vector

    def branch(self, embedding: TimestepEmbedding | None, numbers: torch.Tensor) -> torch.Tensor:
        """A branch at the numbers (B,), seen as sines, then cosines, of frequencies from 1 down to 1e-4."""
        assert embedding is not None, "this network was not extended by that input"
        features = get_timestep_embedding(numbers.to(self.device, torch.float32), self.config.num_features)
        return embedding(features.to(self.dtype))


def zero_branch(num_features: int, embed_dim: int) -> TimestepEmbedding:
    """Two linear layers, the last of them zero."""
    branch = TimestepEmbedding(num_features, embed_dim)
    nn.init.zeros_(branch.linear_2.weight)
    nn.init.zeros_(branch.linear_2.bias)
    return branch
