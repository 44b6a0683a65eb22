"""Weights that exist only as pickles, and indexes of weights that name them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stepdistill.files.reading import read_json

PICKLES = (".bin", ".ckpt", ".pt", ".pth")


def permission_hint(key: str) -> str:
    """Return how a user allows what is refused."""
    return f"allow it with teacher.{key}=true, --{key} (generate, evaluate) or {key}=True (load_pipeline)"


def wants_safetensors(trust_pickles: bool) -> bool | None:
    """Return ``use_safetensors`` of ``from_pretrained``: True requires safetensors, None prefers them."""
    return None if trust_pickles else True


def only_pickle(part: Path) -> Path | None:
    """Return a pickle in the folder of a part whose weights exist only as pickles; None for all other parts."""
    pickles = sorted(file for file in part.glob("*") if file.suffix in PICKLES)
    return pickles[0] if pickles and not any(part.glob("*.safetensors")) else None


def pickle_refusal(pickle: Path, permission: str = "") -> str:
    """Return the sentence that refuses a pickle."""
    return (
        f"{pickle} is a pickle, which can run code when it is read; expected .safetensors. If you trust its author, "
        f"{permission or permission_hint('trust_pickles')}"
    )


def refuse_pickles(part: Path, permission: str = "") -> None:
    """Raise ``ValueError`` if the weights of a part exist only as pickles, or its index of shards names others."""
    if (pickle := only_pickle(part)) is not None:
        raise ValueError(pickle_refusal(pickle, permission))
    for path in sorted(part.glob("*.safetensors.index*.json")):
        for shard in read_json(path, dict[str, dict[str, Any]]).get("weight_map", {}).values():
            if not is_plain(shard, ".safetensors"):
                raise ValueError(f"{path}: weight_map: expected .safetensors files in the folder, got {shard!r}")


def is_plain(name: Any, *suffixes: str) -> bool:
    """Return whether ``name`` is that of a file in the folder itself, with one of the suffixes."""
    path = Path(str(name))
    return path.name == str(name) and path.suffix in suffixes
