"""Training and evaluation mode of single roles, for the length of a block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from stepdistill.networks.bank import STUDENT, NetworkBank


@contextlib.contextmanager
def in_mode(bank: NetworkBank, role: str, *, training: bool) -> Iterator[None]:
    """Put the network of ``role`` into training or evaluation mode, and back afterwards."""
    with bank.using(role) as network:
        before = network.training
    network.train(training)
    try:
        yield
    finally:
        network.train(before)


@contextlib.contextmanager
def shared_dropout(bank: NetworkBank, role: str) -> Iterator[None]:
    """Let ``role`` draw the dropout masks that the student draws next, so that the two passes differ in time alone.

    Song et al. 2023 and Geng et al. 2024 do so in their code. If the student has no dropout, ``role`` has none.
    """
    with bank.using(STUDENT) as student:
        training = student.training
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices), in_mode(bank, role, training=training):
        yield
