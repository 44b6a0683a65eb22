"""What must agree between a run and its resumption."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Mapping
from typing import Any

from accelerate.logging import get_logger

from stepdistill.config import differences, flatten
from stepdistill.data.inventory import Inventory
from stepdistill.methods.base import Distiller
from stepdistill.training.checkpoint import Checkpoint, CheckpointError
from stepdistill.training.config import FREE_KEYS, RENAMED, RunConfig

logger = get_logger(__name__)

DATA_FILES = "data (files)"
INVENTORY = "data.txt.gz"
"""File of a run's folder that holds the inventory of its data."""


@dataclasses.dataclass(frozen=True)
class RunIdentity:
    """What must agree for a checkpoint to be resumed."""

    values: dict[str, Any]
    """Flat: ``{"section.key": value}``, and the versions of teacher and data."""
    defaults: Mapping[str, Any]
    """What a checkpoint of an older version, which lacks a key, is taken to have had."""
    data: Inventory
    """What the data consists of, to tell what has changed; its digest is one of the values."""
    free: Collection[str] = ()
    """Keys that may change; a checkpoint of an older version may hold them."""

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise ``CheckpointError`` naming every key in which the run of a checkpoint differs, and changed data."""
        before = dict(self.defaults)
        for key, value in checkpoint.state.config.items():
            if key not in self.free:
                before[RENAMED.get(key, key)] = value
        if start := before.get("bank.init_from"):  # older versions kept a ~
            before["bank.init_from"] = os.path.expanduser(start)
        unknown = sorted(key for key in self.values.keys() - before.keys() if key.endswith(")"))  # as of versions
        if unknown:
            logger.warning(f"{checkpoint.path} does not record its {', '.join(unknown)}; assumed to be as now")
            before |= {key: self.values[key] for key in unknown}
        if changed := differences(before, json.loads(json.dumps(self.values))):
            changed += self.data.changes_since(checkpoint.path.parent / INVENTORY)
            raise CheckpointError(
                f"{checkpoint.path} was made by another configuration; restore these keys or choose another "
                "train.output_dir:\n  - " + "\n  - ".join(changed)
            )


def identify(config: RunConfig, method: type[Distiller], versions: Mapping[str, str], data: Inventory) -> RunIdentity:
    """Return the identity of a run.

    Args:
        config: the run's.
        method: its class; options that only its sampler reads may change.
        versions: what else must agree, such as the fingerprint of the teacher's weights.
        data: what the data consists of, if anything.
    """
    free = {*FREE_KEYS}
    for option in method.sampling_options:
        free.add(f"method.{option}")
    values = flatten(config.as_sections())
    for key in free & values.keys():
        del values[key]
    values |= versions
    if data.parts:
        values[DATA_FILES] = data.digest
    defaults = {}
    for key, value in _declared_defaults(config).items():
        if key in values:
            defaults[key] = value
    for head, owner in method.heads.items():  # a run without a head's optimiser is taken to have had its owner's
        defaults |= flatten({f"optim.{head}": config.optim[owner]})
    return RunIdentity(values, defaults, data, free)


def _declared_defaults(config: RunConfig) -> dict[str, Any]:
    """Return the default of every key that has one, flat."""
    sections: dict[str, Any] = {}
    for name in ("teacher", "method", "bank", "data", "train"):
        sections[name] = getattr(config, name)
    for turn, optim in config.optim.items():
        sections[f"optim.{turn}"] = optim
    defaults: dict[str, Any] = {}
    for name, section in sections.items():
        for field in dataclasses.fields(section):
            if field.default is not dataclasses.MISSING:
                defaults[f"{name}.{field.name}"] = field.default
    return flatten(defaults)
