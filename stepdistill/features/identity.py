"""Detect whether two feature networks are the same: the network that measures a student must not train it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from stepdistill.features.base import FeatureExtractor

OTHERS = (
    "'teacher' (its own features), a folder of a transformers vision model, or a network of your own "
    "(exported to a .pt2, or by python scripts/train_features.py --seed 1)"
)
"""Feature networks that a critic may use."""


def refuse_same_weights(networks: Mapping[str, nn.Module], metric: FeatureExtractor) -> None:
    """Raise ``ValueError`` if a network that trains a student, by its configuration key, also measures it."""
    for key, network in networks.items():
        if same_weights(network, metric):
            raise ValueError(
                f"{key}: this network has the weights of {metric.name!r}, which measures the student; a student "
                f"trained on its features would score too well; expected {OTHERS}"
            )


def same_weights(network: nn.Module, other: nn.Module) -> bool:
    """Return whether most weight matrices of the smaller network are in the larger one, under whatever names.

    This finds copies in half precision, links, and the image half of a CLIP in the whole of it.
    """
    few, many = sorted((_matrices(network), _matrices(other)), key=len)
    found = 0
    for matrix in few:
        found += any(_alike(matrix, candidate) for candidate in many)
    return 2 * found > len(few)


def _matrices(network: nn.Module) -> list[Tensor]:
    return [parameter.detach() for parameter in network.parameters() if parameter.ndim > 1]


def _alike(a: Tensor, b: Tensor) -> bool:
    """Return whether two matrices are equal up to rounding, by their first few thousand numbers."""
    if a.shape != b.shape:
        return False
    x, y = a.flatten()[:4096].cpu().float(), b.flatten()[:4096].cpu().float()
    return bool((x - y).norm() < 0.01 * y.norm())
