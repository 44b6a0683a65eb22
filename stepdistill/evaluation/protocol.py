"""Protocols: named files of everything that must be equal before two laboratories' numbers can be compared."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from stepdistill.assets import ASSETS
from stepdistill.config import read_config
from stepdistill.evaluation.metrics.table import METRICS, check_sample
from stepdistill.files.places import Place
from stepdistill.files.precision import Precision
from stepdistill.files.ranges import NonNegativeFloat, PositiveInt, Range, Seed
from stepdistill.files.schema import build
from stepdistill.files.words import nearest
from stepdistill.inference.sampling import ROWS

PRESETS = ASSETS / "protocols"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a pipeline is measured.

    Attributes:
        num_samples: images that are measured.
        seed: of the set.
        features: feature network, see :func:`stepdistill.features.loading.load_features`.
        resize: how Inception's input is made: ``adm``, ``torch-fidelity``, ``torchmetrics``, ``clean``.
        clip: a CLIP for the metrics ``clip`` and ``cmmd``.
        attributes: a network that reads attributes, for the metrics ``adherence`` and ``adherence_unseen``.
        reference: what they are compared with, see :meth:`stepdistill.evaluation.reference.Reference.open`.
        reference_images: reference images that metrics beyond the Fréchet distance use, at most.
        size: samples and reference images are resized (short side) and cropped to a square of this side.
        captions: a file of prompts, see :mod:`stepdistill.data.prompts`, or images with captions.
        guidance_scale: of the pipeline's calls, of a teacher's in the words of its own pipeline; None leaves it to the
            pipeline.
        num_inference_steps: of the pipeline's calls; None leaves it to the pipeline.
        rows: rows that the network sees at a time (a guided image is two): what the memory must hold, and what the last
            digits depend on.
        precision: ``bf16`` runs the network under autocast.
        metrics: names of :data:`stepdistill.evaluation.metrics.table.METRICS`.
        needs: by key, what a user has to give, in words.
    """

    num_samples: Annotated[int, Range(at_least=2)] = 5000
    seed: Seed = 0
    features: Place = "embedded"
    resize: str | None = None
    clip: Place | None = None
    attributes: Place | None = None
    reference: Place | None = None
    reference_images: Annotated[int, Range(at_least=2)] = 10_000
    size: PositiveInt | None = None
    captions: Place | None = None
    guidance_scale: NonNegativeFloat | None = None
    num_inference_steps: PositiveInt | None = None
    rows: PositiveInt = ROWS
    precision: Precision = "fp32"
    metrics: tuple[str, ...] = ("fd",)
    needs: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_sample(self.metrics, self.num_samples)

    def call(self) -> dict[str, Any]:
        """Return the arguments of a call that this protocol fixes."""
        fixed = {"guidance_scale": self.guidance_scale, "num_inference_steps": self.num_inference_steps}
        return {key: value for key, value in fixed.items() if value is not None}


def read_protocol(
    name: str, flags: Mapping[str, Any], *, of_files: bool = False
) -> tuple[Protocol, dict[str, Any]]:  # fmt: skip
    """Read a protocol, with a user's flags on top.

    Args:
        name: of a preset, or the path of a YAML file.
        flags: values by key; None leaves the protocol's.
        of_files: whether it measures images that were made elsewhere, which bring their captions.

    Returns:
        The protocol, and for the result ``{"name": ..., "overridden": {key: [the protocol's value, the flag's]}}``.

    Raises:
        ValueError: if there is no such protocol, something that it needs is not given, or no metric uses a network.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else PRESETS / f"{name}.yaml"
    if not path.is_file():
        presets = [file.stem for file in PRESETS.glob("*.yaml")]
        raise ValueError(f"protocol: {name!r} is unknown{nearest(name, presets)}")
    content = read_config(path)
    given = {key: value for key, value in flags.items() if value is not None}
    protocol = build(Protocol, content | given, "protocol")
    for key, what in protocol.needs.items():
        if getattr(protocol, key) is None and not (of_files and key == "captions"):
            raise ValueError(f"protocol {name!r}: give --{key}: {what}")
    if protocol.reference is None:
        raise ValueError(f"protocol {name!r}: give --reference: images or statistics to compare with")
    _check_used(given, protocol.metrics)
    plain = build(Protocol, content, "protocol")
    overridden = {}
    for key in given:
        before, now = getattr(plain, key), getattr(protocol, key)
        if key not in protocol.needs and before != now:
            overridden[key] = [before, now]
    return protocol, {"name": name, "overridden": json.loads(json.dumps(overridden))}


def _check_used(given: Mapping[str, Any], metrics: Sequence[str]) -> None:
    """Raise ``ValueError`` if a user's flag names a network that none of the metrics uses."""
    users = {
        "clip": [name for name, metric in METRICS.items() if metric.on_clip],
        "attributes": [name for name, metric in METRICS.items() if "attributes" in metric.needs],
    }
    for key, names in users.items():
        if key in given and not set(names) & set(metrics):
            raise ValueError(f"--{key}: expected a metric that uses it ({', '.join(names)}), got {', '.join(metrics)}")
