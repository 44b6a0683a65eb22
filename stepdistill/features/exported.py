"""Feature networks as programs that ``torch.export`` wrote: they bring no Python code.

.. code-block:: python

    images = torch.zeros(2, 1, 28, 28)  # (B, C, H, W) in [-1, 1]
    program = torch.export.export(network.eval(), (images,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(program, "critic.pt2")

The network returns a feature or a list of them, shallow to deep: maps (B, C, H, W), tokens (B, N, C) or vectors (B, C).
The mean of the last over its positions is the image's embedding.

A file is checked before torch opens it, see :mod:`stepdistill.features.program`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from stepdistill.features.base import FeatureExtractor
from stepdistill.features.program import load_program
from stepdistill.networks.hooks import as_map


class ExportedFeatures(FeatureExtractor):
    """An exported program, which runs in the mode that it was exported in.

    Args:
        program: maps images (B, C, H, W) float32 in [-1, 1] to their features.
        name: of the network.

    Raises:
        ValueError: if it takes or returns something else, or was exported for one batch size or in training mode.
    """

    def __init__(self, program: ExportedProgram, name: str) -> None:
        super().__init__()
        self.name = name
        self.device = torch.device("cpu")
        self.program = move_to_device_pass(program, self.device)  # it may have been exported elsewhere
        self.network = self.program.module().requires_grad_(False)
        sample = _sample(self.program, name)
        self.in_channels = sample.shape[1]
        self.num_features = self._check_deterministic(sample)[-1].shape[1]

    @classmethod
    def from_file(cls, path: str) -> ExportedFeatures:
        """Load a file (``.pt2``) that ``torch.export.save`` wrote.

        Raises:
            ValueError: if there is no such file, or it holds more than tensors and a graph of known operators.
        """
        return cls(load_program(path), Path(path).name)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return all features of the program."""
        return self.run(images * 2 - 1)

    def run(self, images: Tensor) -> list[Tensor]:
        """Return all features, shallow to deep, (B, C, N) or (B, C, H, W), of images (B, C, H, W) in [-1, 1].

        Raises:
            ValueError: if it was not exported for images of this size.
        """
        try:
            with torch.autocast(images.device.type, enabled=False):  # a graph has the types of its export
                found = self.network(images.float())
        except AssertionError as error:  # of torch's own check of the input
            raise ValueError(f"features {self.name!r}: images of {tuple(images.shape)}: {error}") from error
        if not _are_features(found):
            raise ValueError(
                f"features {self.name!r}: expected a tensor (B, C, H, W), (B, N, C) or (B, C), or a list of them, got "
                f"{_kinds(found)}"
            )
        return [as_map(feature) for feature in _parts(found)]

    def embed(self, images: Tensor) -> Tensor:
        """Return the mean of the last feature over its positions (B, num_features)."""
        return self.run(images.float() / 127.5 - 1)[-1].flatten(2).mean(2)

    def train(self, mode: bool = True) -> ExportedFeatures:
        """Do nothing: a program has one mode."""
        del mode
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExportedFeatures:
        """Move the graph with its weights: it creates tensors of its own, such as positions, on a fixed device."""
        del recurse
        device = fn(torch.empty(0)).device
        if device != self.device:
            self.program, self.device = move_to_device_pass(self.program, device), device
            self.network = self.program.module().requires_grad_(False)
        return self

    def _check_deterministic(self, sample: Tensor) -> list[Tensor]:
        """Return features of noise like ``sample``, after checking that they repeat and change no weights."""
        images, before = torch.randn(sample.shape, generator=torch.Generator().manual_seed(0)), self.sha256
        with torch.no_grad():
            features, again = self.run(images), self.run(images)
        if self.sha256 != before or not all(map(torch.equal, features, again)):
            raise ValueError(
                f"features {self.name!r}: expected a program in evaluation mode; call .eval() before the export"
            )
        return features


def _sample(program: ExportedProgram, name: str) -> Tensor:
    """Return the images that a program was exported with."""
    example: tuple[tuple[Any, ...], dict[str, Any]] = program.example_inputs or ((), {})
    inputs = [*example[0], *example[1].values()]
    if len(inputs) != 1 or _shape(inputs[0]) is None or inputs[0].ndim != 4:
        raise ValueError(f"features {name!r}: expected a program of images (B, C, H, W), got one of {_kinds(inputs)}")
    images: Tensor = inputs[0]
    if images.dtype != torch.float32:
        raise ValueError(f"features {name!r}: expected a program of torch.float32 images, got one of {images.dtype}")
    (name_in_graph,) = program.graph_signature.user_inputs
    nodes = {node.name: node for node in program.graph.nodes}
    if type(nodes[name_in_graph].meta["val"].shape[0]) is int:  # otherwise a symbol
        raise ValueError(
            f"features {name!r}: expected a program of batches of any size, got one of {len(images)} only: export with "
            "dynamic_shapes=({0: torch.export.Dim.AUTO},)"
        )
    return images


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if torch.is_tensor(value) else None


def _are_features(value: Any) -> bool:
    """Return whether ``value`` is a tensor of two to four dimensions, or a list or tuple of them."""
    parts = _parts(value)
    return len(parts) > 0 and all(len(_shape(part) or ()) in (2, 3, 4) for part in parts)


def _kinds(value: Any) -> str:
    return ", ".join(str(_shape(part) or type(part).__name__) for part in _parts(value)) or "nothing"


def _parts(value: Any) -> list[Any]:
    """Return the members of a list or tuple, or ``value`` alone."""
    return list(value) if isinstance(value, (list, tuple)) else [value]
