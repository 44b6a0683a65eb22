"""Open a feature network by name, file, folder or hub id."""

from __future__ import annotations

from pathlib import Path

from stepdistill.assets import FASHION
from stepdistill.features.base import FeatureExtractor
from stepdistill.features.classifier import SmallConvNet
from stepdistill.files.reading import read_json


def load_features(spec: str, resize: str | None = None) -> FeatureExtractor:
    """Return the feature network that ``spec`` names, frozen and on the CPU.

    Args:
        spec: ``"embedded"`` (the small Fashion-MNIST classifier of this package), ``"inception"`` or the path of its
            ``.pth`` weights, a folder written by ``SmallConvNet.save_pretrained``, a program written by
            ``torch.export.save`` (``.pt2``, see :mod:`stepdistill.features.exported`), or a folder or hub id of a
            ``transformers`` vision model (DINOv2, CLIP, ...).
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
    if spec == "embedded":
        network = SmallConvNet.from_pretrained(FASHION / "features")
        network.name = "embedded"
        return network
    if spec.endswith(".pt2"):
        return ExportedFeatures.from_file(spec)
    if _is_small_convnet(Path(spec)):
        return SmallConvNet.from_pretrained(spec)
    return TransformersFeatures.from_pretrained(spec)


def _is_small_convnet(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and read_json(config).get("_class_name") == SmallConvNet.__name__
