"""Whether two feature networks are the same: the network that judges never trains."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from stepdistill.features.base import FeatureExtractor

OTHERS = (
    "'teacher' (its own features), a folder of a transformers vision model, or a network of your own "
    "(exported to a .pt2, or by python scripts/train_features.py --seed 1)"
)
"""What a critic may see through instead of the judge."""


def refuse_judge(networks: Mapping[str, nn.Module], judge: FeatureExtractor) -> None:
    """Raise ``ValueError`` if one of these networks, by the name of its key, is the one that judges."""
    for key, network in networks.items():
        if same_weights(network, judge):
            raise ValueError(
                f"{key}: this network is the judge {judge.name!r} (it has the same weights), and a student trained on "
                f"its features would be measured by them; wanted {OTHERS}"
            )


def same_weights(network: nn.Module, other: nn.Module) -> bool:
    """Whether most weight matrices of the smaller network are the larger one's, whatever their names and precision.

    So a copy in half precision is found out as well as a link, and CLIP's image half beside the whole of it.
    """
    few, many = sorted((_matrices(network), _matrices(other)), key=len)
    found = [any(_alike(a, b) for b in many) for a in few]
    return 2 * sum(found) > len(found)


def _matrices(network: nn.Module) -> list[Tensor]:
    return [parameter.detach() for parameter in network.parameters() if parameter.ndim > 1]


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether two matrices are the same but for rounding; their first few thousand numbers tell."""
    if a.shape != b.shape:
        return False
    x, y = (matrix.flatten()[:4096].cpu().float() for matrix in (a, b))
    return bool((x - y).norm() < 0.01 * y.norm())
