"""Networks read from a folder of weights, complete: no weight is missing, left over, or of another shape.

diffusers and transformers go on with random numbers for weights that a file lacks, and without those that a network
does not know. Both are refused here, by name. A folder that has its weights in one precision only (``.fp16``) is read
in that one.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from stepdistill.files.reading import read_json

LIBRARY_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, NameError, OSError,
    RuntimeError, SafetensorError, StrictDataclassError, TypeError, UnpicklingError, ValueError,
)  # fmt: skip
"""What diffusers, transformers and torch raise for files that they cannot read or settings that do not fit."""

WEIGHTS = re.compile(
    r"(diffusion_pytorch_model|pytorch_model|model)(\.(?P<variant>[^.]+?))?(-\d{5}-of-\d{5}(\.(?P<old>[^.]+))?)?"
    r"(?P<suffix>\.safetensors|\.bin)"
)
"""Names of files of weights: ``model.safetensors``, ``model.fp16.safetensors``, ``model-00001-of-00002.safetensors``,
``model.fp16-00001-of-00002.safetensors``, and the older ``model-00001-of-00002.fp16.safetensors``."""
VARIANTS = ("fp16", "bf16")
"""The variants that are preferred where a folder has nothing but variants."""
SHOWN = 5
KEY = re.compile(r"\w+\.\w+: ")
"""The beginning of an error that names the key of a configuration."""

READING = threading.RLock()
"""Held while networks are read. Meanwhile accelerate's ``init_empty_weights`` replaces a method of ``nn.Module`` for
the whole process; of two threads at once, the second would put the replacement back for good."""

log = logging.getLogger(__name__)


class naming(contextlib.AbstractContextManager):  # noqa: N801  # used as a function
    """Turn what libraries raise inside the context into a ``ValueError`` that names a place.

    Args:
        place: the file or folder that they read.
        what: what is wrong with it.
    """

    def __init__(self, place: Path, what: str = "diffusers cannot open it") -> None:
        self.place, self.what = place, what

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        text, place = " ".join(str(error).split()), str(self.place)
        if kind is None or (issubclass(kind, ValueError) and (place in text or KEY.match(text))):
            return
        if kind is Exception or issubclass(kind, LIBRARY_ERRORS):  # tokenizers raises nothing more specific
            label = "" if kind is ValueError else f"{kind.__name__}: "
            raise ValueError(f"{place}: {self.what}: {label}{text[:300] or 'no reason given'}") from error


# ------------------------------------------------------------------------------------------------ which files


def chosen_weights(names: Iterable[str], *, pickles: bool, wanted: str | None = None) -> tuple[str | None, list[str]]:
    """Return the variant (None: the plain files) and the files of weights to read, out of the names in a folder.

    Safetensors come before pickles, and the variant ``wanted`` before plain files, those before other variants. No
    files if there are none to choose from.

    >>> chosen_weights(["config.json", "model.fp16.safetensors", "model.non_ema.safetensors"], pickles=False)
    ('fp16', ['model.fp16.safetensors'])
    """
    found = by_format(names)
    by_variant = found[".safetensors"] or (found[".bin"] if pickles else {})
    if not by_variant:
        return None, []
    variant = next((name for name in (wanted or "", "", *VARIANTS) if name in by_variant), min(by_variant))
    return variant or None, by_variant[variant]


def by_format(names: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """Return the names of files of weights, in order, by suffix and variant (``""``: the plain files)."""
    found: dict[str, dict[str, list[str]]] = {".safetensors": {}, ".bin": {}}
    for name in sorted(names):
        if match := WEIGHTS.fullmatch(name):
            found[match["suffix"]].setdefault(match["variant"] or match["old"] or "", []).append(name)
    return found


def variants(names: Iterable[str]) -> set[str]:
    """Return the variants of the files of weights among the names in a folder, ``""`` being the plain files."""
    return set[str]().union(*by_format(names).values())


def check_shards(folder: Path, variant: str | None) -> None:
    """Raise ``ValueError`` if shards of weights do not hold what their index says.

    diffusers and transformers believe the index, and take what a module computes for a buffer that no shard has.
    """
    for path in sorted(folder.glob(f"*.safetensors.index.{variant}.json" if variant else "*.safetensors.index.json")):
        places: dict[str, str] = read_json(path, dict[str, Any]).get("weight_map", {})
        for shard in sorted(set(map(str, places.values()))):
            if not (folder / shard).is_file():
                raise ValueError(f"{path}: names the file {shard!r}, which is not in the folder")
            lacking = {name for name, place in places.items() if place == shard} - weight_names(folder / shard)
            if lacking:
                raise ValueError(f"{folder / shard}: lacks weights that {path.name} names: {first_names(lacking)}")


def weight_names(file: Path) -> set[str]:
    """Return the names of the weights in a safetensors file."""
    with naming(file), safe_open(file, framework="pt") as weights:
        return set(weights.keys())


# -------------------------------------------------------------------------------------------------- reading


def read_network(folder: Path, cls: Any, *, pickles: bool, variant: str | None = None, **options: Any) -> Any:
    """Return the network of class ``cls`` in a folder, with every one of its weights read from there.

    Args:
        folder: with ``config.json`` and weights.
        cls: a model class of diffusers or transformers.
        pickles: whether weights that exist only as pickles may be read.
        variant: the variant to read where the folder has it.
        options: of ``from_pretrained``.

    Raises:
        ValueError: if a file is missing or damaged, or weights are missing, left over, or of another shape.
    """
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found, files = chosen_weights(names, pickles=pickles, wanted=variant)
    if found is not None:
        options["variant"] = found
    if found not in (None, variant):
        log.warning("%s: has no other weights than the variant %r, which is read", folder, found)
    if len(files) > 1:
        check_shards(folder, found)
    if hasattr(cls, "base_model_prefix"):
        options["ignore_mismatched_sizes"] = True  # so that transformers names the weights; diffusers does anyway
    options["use_safetensors"] = None if pickles else True
    with READING, naming(folder):
        network, info = cls.from_pretrained(folder, output_loading_info=True, **options)
    refuse_incomplete(network, info, str(folder))
    return network


def refuse_incomplete(network: Any, info: Mapping[str, Any], name: str, heads: bool = False) -> None:
    """Raise ``ValueError`` if a network was not read whole.

    Args:
        network: what ``from_pretrained`` returned.
        info: what it returned with ``output_loading_info``.
        name: of the folder, for the error.
        heads: whether modules that the network does not have, such as a classifier on top of it, may be left over.
    """
    kind, own = type(network).__name__, set()
    missing = set(info["missing_keys"])
    for key, tensor in network.state_dict().items():
        own.add(key.partition(".")[0])
        if tensor.is_meta:  # also what a list of shards names and no shard has
            missing.add(key)
    left_over = {key for key in info["unexpected_keys"] if not heads or key.partition(".")[0] in own}
    if missing:
        raise ValueError(
            f"{name}: {kind} needs weights that the file lacks, they would be random: {first_names(missing)}"
        )
    if left_over:
        raise ValueError(f"{name}: has weights that {kind} does not know and would drop: {first_names(left_over)}")
    for key, found, expected in sorted(info["mismatched_keys"]):
        raise ValueError(f"{name}: {key}: expected the shape {tuple(expected)} of {kind}, got {tuple(found)}")


def first_names(names: Iterable[str]) -> str:
    """Return the first few names, in order, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
