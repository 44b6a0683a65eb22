"""A feature network of one's own, as a program that ``torch.export`` wrote: no line of Python travels with it.

.. code-block:: python

    images = torch.zeros(2, 1, 28, 28)  # (B, C, H, W) in [-1, 1]
    program = torch.export.export(network.eval(), (images,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(program, "critic.pt2")

The network returns a feature or a list of them, shallow to deep: maps (B, C, H, W), tokens (B, N, C) or vectors (B, C).
The mean of the last over its positions is the image's embedding.

``torch.export.load`` unpickles what it finds and evaluates text of the file as Python. A file is therefore looked
through first, and refused if it holds more than tensors and a graph whose sizes are arithmetic. This keeps pickles
out and is no sandbox: take a program from those whose code you would run.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from stepdistill.features.base import FeatureExtractor
from stepdistill.networks.hooks import as_map

SAMPLE = "data/sample_inputs/model.pt"


GRAPH = "models/model.json"


CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")


MEMBERS = re.compile(
    r"archive_format|archive_version|byteorder|\.data/\w+|data/weights/weight_\d+|data/constants/tensor_\d+|"
    + "|".join(re.escape(name) for name in (SAMPLE, GRAPH, *CONFIGS))
)


ARITHMETIC = re.compile(
    r"(L\['\w+'\]\.size\(\)\[\d\]|Symbol|Integer|Add|Mul|Pow|Max|Min|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv|"
    r"ModularIndexing|Eq|Ne|positive|nonnegative|integer|True|False|and|or|not|[-+*/%(),=<>!' \dsu])*"
)


class ExportedFeatures(FeatureExtractor):
    """An exported program on images in [-1, 1], in the one mode that it was exported in.

    Args:
        program: takes images (B, C, H, W) float32, and returns their features.
        name: of the network.

    Raises:
        ValueError: it takes or returns something else, is of a fixed batch size, or of training mode.
    """

    def __init__(self, program: ExportedProgram, name: str) -> None:
        super().__init__()
        self.name = name
        self.device = torch.device("cpu")
        self.program = move_to_device_pass(program, self.device)  # it may have been exported elsewhere
        self.network = self.program.module().requires_grad_(False)
        sample = _sample(self.program, name)
        self.in_channels = sample.shape[1]
        self.num_features = self._check_still(sample)[-1].shape[1]

    @classmethod
    def from_file(cls, path: str) -> ExportedFeatures:
        """Load what ``torch.export.save`` wrote at ``path`` (``.pt2``).

        Raises:
            ValueError: no such file, or one that holds more than tensors and their graph.
        """
        try:
            check_contents(path)
        except OSError as error:
            raise ValueError(f"features {path!r}: {error.strerror or error}") from error
        except (zipfile.BadZipFile, KeyError) as error:
            raise ValueError(f"features {path!r}: no program of torch.export.save: {error}") from error
        return cls(torch.export.load(path), Path(path).name)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Features, shallow to deep, (B, C, N) or (B, C, H, W), of images (B, C, H, W) in [-1, 1]; differentiable.

        Raises:
            ValueError: images of a size that it was not exported for.
        """
        try:
            with torch.autocast(images.device.type, enabled=False):  # the graph insists on the types of its export
                found = self.network(images.float())
        except AssertionError as error:  # of torch's own check of the input
            raise ValueError(f"features {self.name!r}: images of {tuple(images.shape)}: {error}") from error
        features = list(found) if isinstance(found, (list, tuple)) else [found]
        if not features or not all(isinstance(x, Tensor) and x.ndim in (2, 3, 4) for x in features):
            raise ValueError(
                f"features {self.name!r}: returns {_kinds(found)}; wanted a tensor (B, C, H, W), (B, N, C) or (B, C), "
                "or a list of them"
            )
        return [as_map(feature) for feature in features]

    def embed(self, images: Tensor) -> Tensor:
        """The last feature's mean over its positions (B, num_features)."""
        return self.maps(images.float() / 127.5 - 1)[-1].flatten(2).mean(2)

    def train(self, mode: bool = True) -> ExportedFeatures:
        """Nothing: a program has no other mode."""
        del mode
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExportedFeatures:
        """Move the graph with its weights: it holds the device of what it makes itself, as positions are."""
        del recurse
        device = fn(torch.empty(0)).device
        if device != self.device:
            self.program, self.device = move_to_device_pass(self.program, device), device
            self.network = self.program.module().requires_grad_(False)
        return self

    def _check_still(self, sample: Tensor) -> list[Tensor]:
        """The features of noise like ``sample``, which are the same every time and leave the weights alone."""
        images, before = torch.randn(sample.shape, generator=torch.Generator().manual_seed(0)), self.sha256
        with torch.no_grad():
            features, again = self.maps(images), self.maps(images)
        if self.sha256 != before or not all(map(torch.equal, features, again)):
            raise ValueError(f"features {self.name!r}: exported in training mode; call .eval() before the export")
        return features


def _sample(program: ExportedProgram, name: str) -> Tensor:
    """The images that a program was exported with."""
    example: tuple[tuple[Any, ...], dict[str, Any]] = program.example_inputs or ((), {})
    given = (*example[0], *example[1].values())
    if len(given) != 1 or not isinstance(given[0], Tensor) or given[0].ndim != 4:
        raise ValueError(f"features {name!r}: takes {_kinds(given)}; wanted images (B, C, H, W)")
    images = given[0]
    if images.dtype != torch.float32:
        raise ValueError(f"features {name!r}: takes {images.dtype} images; wanted torch.float32")
    (name_in_graph,) = program.graph_signature.user_inputs
    (node,) = (node for node in program.graph.nodes if node.name == name_in_graph)
    if isinstance(node.meta["val"].shape[0], int):
        raise ValueError(
            f"features {name!r}: takes batches of {len(images)} only; wanted any: export with "
            "dynamic_shapes=({0: torch.export.Dim.AUTO},)"
        )
    return images


def _kinds(value: Any) -> str:
    parts = value if isinstance(value, (list, tuple)) else [value]
    return ", ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in parts) or "nothing"


def check_contents(path: str) -> None:
    """Raise ``ValueError`` if the file of an exported program holds more than tensors and a graph.

    That is: pickled objects, compiled libraries, and sizes and guards that are no arithmetic.
    """
    with zipfile.ZipFile(path) as file:
        members = {name.partition("/")[2]: name for name in file.namelist()}
        strange = [name for inside, name in members.items() if not MEMBERS.fullmatch(inside)]
        if strange or len(members) < len(file.namelist()):
            first = strange[0] if strange else "two members of one name"
            raise ValueError(
                f"features {path!r}: holds {first}; wanted tensors and a graph, as a newer torch writes them"
            )
        try:
            torch.load(io.BytesIO(file.read(members[SAMPLE])), weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(f"features {path!r}: holds pickled objects in {SAMPLE}; wanted tensors") from error
        for config in members.keys() & set(CONFIGS):
            if any(key == "use_pickle" and value for key, value in _facts(json.loads(file.read(members[config])))):
                raise ValueError(f"features {path!r}: holds pickled tensors by {config}; wanted plain ones")
        for key, text in _facts(json.loads(file.read(members[GRAPH]))):
            if key in ("expr_str", "guards_code") and not ARITHMETIC.fullmatch(text):
                raise ValueError(f"features {path!r}: {key} {text[:80]!r} in {GRAPH}; wanted arithmetic")


def _facts(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every number and text of a JSON value, with the key that it stands under."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _facts(part, name)
    elif isinstance(value, list):
        for part in value:
            yield from _facts(part, key)
    else:
        yield key, value
