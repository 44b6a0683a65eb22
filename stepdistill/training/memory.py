"""What a run will hold in memory, before it does."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from stepdistill.methods.base import Distiller
from stepdistill.networks.bank import TEACHER

HEADER = ("role", "parameters", "trainable", "weights MB", "gradients MB", "optimizer MB")


def memory_plan(distiller: Distiller, *, encoded: bool = False) -> str:
    """A table: parameters and bytes of weights, gradients and optimiser states by role, on each device.

    Args:
        distiller: what is trained.
        encoded: whether the data comes as latents and embeddings; what encodes is then on the device to sample only.
    """
    bank = distiller.bank
    held = {role: bank.params(role) for role in bank.roles}
    if own := [p for name, p in distiller.named_parameters() if not name.startswith("bank.")]:
        held["(critic)"] = own
    rows = [_row(role, params, bank.trainable.get(role, True)) for role, params in held.items()]
    beside = [
        _row(f"({type(module).__name__})", module.parameters(), False) for module in distiller.family.frozen_modules
    ]
    total = sum(megabytes for _, megabytes in rows) + (0.0 if encoded else sum(megabytes for _, megabytes in beside))
    lines = _aligned([HEADER, *(row for row, _ in rows), *(row for row, _ in beside)])
    if encoded and beside:
        lines.append(f"the last {len(beside)} stay on the CPU, but for sampling: they are not in the total")
    base, networks = (sum(p.numel() for role in roles for p in held[role]) for roles in ((TEACHER,), bank.roles))
    share = f"networks: {networks / base:.2f}x the teacher's parameters; as full copies {len(bank.roles)}.00x"
    return "\n".join(["memory, activations not counted:", *lines, f"total: {total:.1f} MB", share])


def _row(name: str, parameters: Iterable[nn.Parameter], trains: bool) -> tuple[tuple[str, ...], float]:
    """The cells of one row, and its megabytes."""
    params = list(parameters)
    count = sum(p.numel() for p in params)
    weights = sum(p.numel() * p.element_size() for p in params) / 1e6
    trained = 4 * count / 1e6 if trains else 0.0
    cells = (name, f"{count:,}", str(trains), f"{weights:.1f}", f"{trained:.1f}", f"{2 * trained:.1f}")
    return cells, weights + 3 * trained


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
