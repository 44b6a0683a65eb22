"""The condition of an image as a vector, for projection discriminators."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, one_hot

MASK = "encoder_attention_mask"
"""What families call the mask of their prompts' tokens."""


# ------------------------------------------------------------------------------------------- conditions


def condition_vector(cond: Mapping[str, Tensor], size: int, num_classes: int | None) -> Tensor:
    """What a batch is conditioned on as vectors (B, D), D = 0 where on nothing.

    A class becomes one of ``num_classes`` unit vectors ("no class" the zero vector); an embedding (B, d), or the mean
    of one (B, n, d) over the tokens that its mask does not hide, is normalised to mean 0 and variance 1.
    """
    parts = [torch.zeros(size, 0)]
    for name, value in sorted(cond.items()):
        if name == "class_labels" and num_classes is not None:
            parts.append(one_hot(value, num_classes + 1)[:, :num_classes].float())
        elif value.is_floating_point() and name != MASK:
            pooled = value.float() if value.ndim == 2 else _mean_token(value.float(), cond.get(MASK))
            parts.append(layer_norm(pooled, pooled.shape[1:]))
    return torch.cat([part.to(parts[-1].device) for part in parts], 1)


def _mean_token(embedding: Tensor, mask: Tensor | None) -> Tensor:
    """The mean (B, d) of tokens (B, n, d), of those where the mask (B, n) is 1."""
    if mask is None:
        return embedding.mean(1)
    kept = mask.to(embedding)[..., None]
    return (embedding * kept).sum(1) / kept.sum(1).clamp(min=1)


def check_classes(cond: Mapping[str, Tensor], num_classes: int | None) -> None:
    """Raise ``ValueError`` for a batch of one class that cannot be an accident; waits for the device.

    A critic conditioned on classes would see one of them only, and a student of the others would learn from noise.
    """
    labels = cond.get("class_labels")
    if labels is None or num_classes is None or num_classes ** (1 - len(labels)) > 1e-6:
        return
    if bool((labels == labels[0]).all()):
        raise ValueError(
            f"data: all {len(labels)} labels of the first batch are {int(labels[0])}, but the teacher knows "
            f"{num_classes} classes, and a conditional critic needs them all; look at the labels (of methods with a "
            "key 'conditioning', 'none' does without them)"
        )
