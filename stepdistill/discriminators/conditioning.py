"""The condition of an image as a vector, for projection discriminators."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, one_hot


def condition_vector(cond: Mapping[str, Tensor], size: int, num_classes: int | None) -> Tensor:
    """Return the conditions of a batch as vectors (B, D); without conditions, D = 0.

    A class becomes one of ``num_classes`` unit vectors, and "no class" the zero vector. An embedding (B, d), or the
    mean of one (B, n, d) over its unmasked tokens, is normalised to mean 0 and variance 1.
    """
    masks = [value for name, value in cond.items() if is_mask(name)]
    parts = [torch.zeros(size, 0)]
    for name, value in sorted(cond.items()):
        if name == "class_labels" and num_classes is not None:
            parts.append(one_hot(value, num_classes + 1)[:, :num_classes].float())
        elif value.is_floating_point() and not is_mask(name):
            pooled = value.float() if value.ndim == 2 else _mean_token(value.float(), masks)
            parts.append(layer_norm(pooled, pooled.shape[1:]))
    return torch.cat([part.to(parts[-1].device) for part in parts], 1)


def is_mask(name: str) -> bool:
    """Return whether a condition is the mask of a prompt's tokens, such as ``encoder_attention_mask``; of any type."""
    return name.rpartition("_")[2] == "mask"


def _mean_token(embedding: Tensor, masks: Iterable[Tensor]) -> Tensor:
    """Return the mean (B, d) of the tokens (B, n, d) at which the mask of their number (B, n), if any, is 1."""
    for mask in masks:
        if mask.shape == embedding.shape[:2]:
            kept = mask.to(embedding)[..., None]
            return (embedding * kept).sum(1) / kept.sum(1).clamp(min=1)
    return embedding.mean(1)


def check_classes(cond: Mapping[str, Tensor], num_classes: int | None) -> None:
    """Raise ``ValueError`` for a batch of a single class that is no coincidence; synchronises with the device.

    A critic conditioned on classes would only ever see this one, and its logits of all others would be noise.
    """
    labels = cond.get("class_labels")
    if labels is None or num_classes is None or num_classes ** (1 - len(labels)) > 1e-6:
        return
    if bool((labels == labels[0]).all()):
        raise ValueError(
            f"data: all {len(labels)} labels of the first batch are {int(labels[0])}, expected the teacher's "
            f"{num_classes} classes, which a conditional critic needs; check the labels, or set conditioning: none (a "
            "key of some methods)"
        )
