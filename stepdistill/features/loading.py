"""Open a feature network by name, file, folder or hub id."""

from __future__ import annotations

from pathlib import Path

from stepdistill.assets import FEATURES, READERS
from stepdistill.features.attributes import AttributeReader
from stepdistill.features.base import FeatureExtractor
from stepdistill.features.classifier import SmallConvNet
from stepdistill.features.efficientnet import EfficientNetFeatures
from stepdistill.files.reading import read_json

SMALL = {network.__name__: network for network in (SmallConvNet, AttributeReader)}
"""Networks of this package that are opened from a folder, by the name in its ``config.json``."""


def load_features(spec: str, resize: str | None = None) -> FeatureExtractor:
    """Return the feature network that ``spec`` names, frozen and on the CPU.

    Args:
        spec: ``"embedded"`` (the small Fashion-MNIST classifier of this package), ``"faces"`` (the image half of its
            small CLIP), ``"efficientnet"`` (ImageNet's features, the extra ``judge``), ``"inception"`` or the path of
            its ``.pth`` weights, a folder of one of :data:`SMALL`, a program written by ``torch.export.save``
            (``.pt2``, see :mod:`stepdistill.features.exported`), or a folder or hub id of a ``transformers`` vision
            model (DINOv2, CLIP, ...).
        resize: Inception only, how images become 299 x 299: ``"adm"``, ``"torch-fidelity"`` (the default; the same),
            ``"torchmetrics"`` or ``"clean"``.

    Raises:
        ValueError: if there is no such network, or something is missing to load it; says what to do.
    """
    from stepdistill.features.exported import ExportedFeatures
    from stepdistill.features.inception import InceptionFeatures  # slow to import
    from stepdistill.features.transformers import TransformersFeatures  # slow to import

    if spec == "inception" or spec.endswith(".pth"):
        return InceptionFeatures.from_pretrained(None if spec == "inception" else spec, resize or "torch-fidelity")
    if resize is not None:
        raise ValueError(f"resize: {resize!r} is for Inception only; features {spec!r} have their own preprocessing")
    if spec in FEATURES:
        network = load_features(str(FEATURES[spec]))
        network.name = spec
        return network
    if spec == "efficientnet":
        return EfficientNetFeatures.from_package()
    if spec.endswith(".pt2"):
        return ExportedFeatures.from_file(spec)
    if _class_name(Path(spec)) in SMALL:
        return _open_small(Path(spec))
    return TransformersFeatures.from_pretrained(spec)


def load_reader(spec: str) -> FeatureExtractor:
    """Return the network that ``spec`` names and that reads attributes: ``"faces"``, or the folder of one.

    Raises:
        ValueError: if it is none; names it.
    """
    network = load_features(str(READERS.get(spec, spec)))
    if network.vocabulary is None:
        raise ValueError(f"attributes: expected 'faces' or the folder of an attribute reader, got {spec!r}")
    return network


def _open_small(folder: Path) -> FeatureExtractor:
    network: FeatureExtractor = SMALL[_class_name(folder)].from_pretrained(folder)
    return network


def _class_name(folder: Path) -> str:
    config = folder / "config.json"
    return str(read_json(config).get("_class_name")) if config.is_file() else ""
