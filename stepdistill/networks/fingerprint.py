"""Fingerprints of weights."""

from __future__ import annotations

from torch import nn

from stepdistill.config import fingerprint


def fingerprint_weights(network: nn.Module) -> str:
    """Return sixteen hex digits that identify a network's weights: two float64 moments of every tensor, hashed."""
    moments = []
    for name, parameter in network.state_dict().items():
        values = parameter.double()
        moments.append((name, f"{values.mean():.12e}", f"{values.square().mean():.12e}"))
    return fingerprint(moments)
