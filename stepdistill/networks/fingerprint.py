"""Fingerprints of weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn

from stepdistill.config import fingerprint_json


def fingerprint_weights(network: nn.Module) -> str:
    """Return twelve hex digits of a network's weights: a hash of two float64 moments of every tensor."""
    moments = []
    for name, tensor in network.state_dict().items():
        mean, square = tensor.double().mean(), tensor.double().square().mean()
        moments.append((name, f"{mean:.12e}", f"{square:.12e}"))
    return fingerprint_json(moments)


def sha256_of_weights(network: nn.Module) -> str:
    """Return the SHA-256 of a network's weights and their names, 64 hex digits; copies one tensor at a time."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def fingerprint_pipeline(folder: str | Path) -> str:
    """Return sixteen hex digits of the weight files of an exported pipeline."""
    digest = hashlib.sha256()
    for file in sorted(Path(folder).rglob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
