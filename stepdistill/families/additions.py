"""What a user adds to a teacher before it is distilled: LoRAs, fused into its weights, and words with embeddings.

Both are read by diffusers from safetensors. A fused teacher is a teacher like any other, with weights of its own: its
fingerprint, the caches of its text encoders and its student's export follow from them. The adapter of a student is the
difference to the *fused* network, so that it needs the same LoRAs beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from stepdistill.families.config import TeacherConfig
from stepdistill.families.hub import expand_home, is_path, nearest_place, snapshot
from stepdistill.files.reading import parse_json
from stepdistill.files.weights import LIBRARY_ERRORS, READING, first_names, naming, weight_names

DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
TRIGGER = "modelspec.trigger_phrase"
"""Key of a LoRA's header that names the words which it listens to."""
SETTINGS = "lora_adapter_metadata"
"""Key of a LoRA's header that holds PEFT's settings as JSON."""
ENCODERS = {"clip_l": ("text_encoder", "tokenizer"), "clip_g": ("text_encoder_2", "tokenizer_2")}
"""The names of embeddings in files for SDXL, and the parts that they are for."""


def add_to_teacher(pipe: Any, config: TeacherConfig) -> None:
    """Fuse ``teacher.lora`` into an opened pipeline and teach it the words of ``teacher.embeddings``, in place.

    Raises:
        ValueError: if a file is missing, holds something else, or is for another model.
    """
    for path, weight in config.added_loras():
        fuse(pipe, only_file(path, "teacher.lora"), weight)
    for word, path in (config.embeddings or {}).items():
        add_word(pipe, word, only_file(path, "teacher.embeddings"))


# ------------------------------------------------------------------------------------------------------ LoRA


def fuse(pipe: Any, file: Path, weight: float) -> None:
    """Add ``weight`` times the LoRA in a file to the weights of a pipeline's network and text encoders."""
    kind = type(pipe).__name__
    if not hasattr(pipe, "load_lora_weights"):
        raise ValueError(f"teacher.lora: expected none, because diffusers loads no LoRA into a {kind}, got {file}")
    refuse_code(file)
    try:
        with READING:
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="teacher")
            adapted = sorted(pipe.get_list_adapters())
            if adapted:
                pipe.fuse_lora(components=adapted, lora_scale=weight, safe_fusing=True)
                pipe.unload_lora_weights()
    except LIBRARY_ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"teacher.lora: {file}: expected a LoRA for a {kind}, got one that fails: {reason}") from error
    if not adapted:
        names = first_names(weight_names(file))
        raise ValueError(f"teacher.lora: {file}: expected a LoRA for a {kind}, got no layer of it, but {names}")


def refuse_code(file: Path) -> None:
    """Raise ``ValueError`` if the settings in a LoRA's header make PEFT import a module that they name."""
    settings = parse_json(read_header(file).get(SETTINGS, "{}"), f"teacher.lora: {file}: {SETTINGS}")
    for name, value in settings.items():
        if name.endswith("megatron_config") and value:
            raise ValueError(f"teacher.lora: {file}: {SETTINGS}: expected settings that name no code, got {name}")


def read_header(file: Path) -> dict[str, str]:
    """Return the texts in the header of a safetensors file."""
    with naming(file), safe_open(file, framework="pt") as weights:
        return weights.metadata() or {}


def touches_encoders(config: TeacherConfig) -> bool:
    """Return whether what is added changes tokenizers or text encoders."""
    names = set[str]()
    for path, _ in config.added_loras():
        names |= weight_names(only_file(path, "teacher.lora"))
    return bool(config.embeddings) or any("text_encoder" in name or name.startswith("lora_te") for name in names)


def triggers(config: TeacherConfig) -> list[str]:
    """Return the words that call what was added: those with embeddings, and what the LoRAs' headers name."""
    found = list(config.embeddings or ())
    for path, _ in config.added_loras():
        phrase = read_header(only_file(path, "teacher.lora")).get(TRIGGER)
        found += [phrase] if phrase else []
    return found


# ------------------------------------------------------------------------------------------------ embeddings


def add_word(pipe: Any, word: str, file: Path) -> None:
    """Give a word the embeddings in a file, one or several vectors, in every text encoder of a pipeline."""
    key, kind = f"teacher.embeddings: {word}", type(pipe).__name__
    encoders = [part for part in (pipe.components.get(encoder) for encoder, _ in ENCODERS.values()) if part is not None]
    if not hasattr(pipe, "load_textual_inversion") or not all("CLIP" in type(part).__name__ for part in encoders):
        raise ValueError(f"{key}: expected none, because words are added to CLIP alone, got {file} for a {kind}")
    with naming(file):
        found = load_file(file)
    for name, vectors in named_vectors(pipe, found, f"{key}: {file}").items():
        encoder, tokenizer = (getattr(pipe, part) for part in ENCODERS[name])
        try:
            pipe.load_textual_inversion(vectors, token=word, text_encoder=encoder, tokenizer=tokenizer)
        except LIBRARY_ERRORS as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{key}: {file}: expected embeddings for a {kind}: {reason}") from error


def named_vectors(pipe: Any, found: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
    """Return the embeddings in a file by the encoder that they are for; a file for one encoder may name them anyhow."""
    wanted = {name for name, (encoder, _) in ENCODERS.items() if getattr(pipe, encoder, None) is not None}
    if len(found) == 1 and wanted == {"clip_l"}:
        return {"clip_l": next(iter(found.values()))}
    if found.keys() != wanted:
        expected = " and ".join(sorted(wanted)) if len(wanted) > 1 else "one tensor"
        raise ValueError(f"{place}: expected {expected}, got {first_names(found) or 'none'}")
    return dict(found)


# ------------------------------------------------------------------------------------------------ which file


def only_file(path: str, key: str) -> Path:
    """Return a safetensors file: itself, the only one of a folder, or the only one of a repository on the hub.

    Raises:
        ValueError: if there is none, it cannot be read, or there are several and none has diffusers' own name.
    """
    place = expand_home(path)
    if not place.exists():
        if is_path(path):
            raise ValueError(f"{key}: no folder or file {str(place)!r}{nearest_place(place)}")
        place = snapshot(path, None, ["*.safetensors"], key=key, top_only=True)
    if place.is_dir():
        files = sorted(place.glob("*.safetensors"))
        own = [file for file in files if file.name == DIFFUSERS_NAME]
        if len(own or files) != 1:
            names = ", ".join(file.name for file in files) or "none"
            raise ValueError(f"{key}: {place}: expected a folder with one .safetensors file, or a file, got {names}")
        place = (own or files)[0]
    if place.suffix != ".safetensors":
        raise ValueError(f"{key}: {place}: expected a .safetensors file, got {place.suffix or 'no ending'}")
    try:
        weight_names(place)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    return place
