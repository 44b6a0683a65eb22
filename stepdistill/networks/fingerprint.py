"""Fingerprints of weights."""

from __future__ import annotations

from torch import nn

from stepdistill.config import fingerprint


def fingerprint_weights(network: nn.Module) -> str:
    """Sixteen hex digits of a network's weights: two float64 moments of every tensor, hashed."""
    moments = [(name, *(f"{m:.12e}" for m in (p.double().mean(), p.double().square().mean())))
               for name, p in network.state_dict().items()]  # fmt: skip
    return fingerprint(moments)
