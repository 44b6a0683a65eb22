"""Where a teacher is: a local folder or file, or a repository on the hub, of which only what is needed is fetched."""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepdistill.assets import TEACHERS
from stepdistill.files.weights import chosen_weights
from stepdistill.files.words import closest, nearest
from stepdistill.loading import parts

if TYPE_CHECKING:
    from stepdistill.families.config import TeacherConfig

KEY = "teacher.path"
SETTINGS = (".json", ".txt", ".model")
"""Endings of configurations and tokenizers."""
CHECKPOINTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".sft", ".gguf")
"""Endings of files that hold weights."""
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)
BARE_PARTS = ["unet", "transformer", "scheduler"]
"""Folders of a teacher without a ``model_index.json``."""


def locate(config: TeacherConfig) -> Path:
    """Return the local place of ``config.path``: itself, an embedded teacher's folder, or a downloaded snapshot.

    Raises:
        ValueError: if there is none, or the hub does not give it.
    """
    place = embedded(config.path) if config.path in TEACHERS else expand_home(config.path)
    if place.exists():
        if config.revision is not None:
            raise ValueError(
                f"teacher.revision: expected none, because {config.path} is on this machine, got {config.revision!r}"
            )
        return place
    if is_path(config.path):
        near = closest(config.path, TEACHERS) or nearest_place(place)
        raise ValueError(f"teacher.path: no folder or file {str(place)!r}{near}")
    return fetch(config)


def embedded(name: str) -> Path:
    """Return the folder of a teacher that comes with the package; raise ``ValueError`` if it is not there."""
    folder = TEACHERS[name]
    if not folder.is_dir():
        raise ValueError(f"teacher.path: {name}: expected the teacher in {folder}, got no such folder")
    return folder


def expand_home(path: str) -> Path:
    """Return a path with a leading ``~`` replaced by the user's home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # there is no such user
        return Path(path)


def is_path(text: str) -> bool:
    """Return whether ``text`` can only be a path: it looks like one, or its first folder exists.

    >>> [is_path(text) for text in ("./sd", "~/sd", "sd.ckpt", "my/runs/sd", "stabilityai/sdxl-1.0")]
    [True, True, True, True, False]
    """
    looks = text.startswith((".", "/", "~")) or text.lower().endswith(CHECKPOINTS)
    return looks or HUB_ID.fullmatch(text) is None or Path(text).parent.is_dir()


def nearest_place(place: Path) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest name beside a place that is missing."""
    siblings = [entry.name for entry in place.parent.iterdir()] if place.parent.is_dir() else []
    return nearest(place.name, siblings)


# --------------------------------------------------------------------------------------------- fetching


def fetch(config: TeacherConfig, *, without: Collection[str] = (), key: str = KEY) -> Path:
    """Return the snapshot of a repository with all that opening the teacher needs, or what is cached of it.

    Args:
        config: names the repository.
        without: parts whose weights are not needed.
        key: of the configuration that names it, for errors.

    Raises:
        ValueError: if the hub cannot be reached and nothing is cached, or refuses.
    """
    from huggingface_hub import HfApi

    try:
        names = HfApi().list_repo_files(config.path, revision=config.revision)
    except unreachable():
        return snapshot(config.path, config.revision, ["model_index.json"], key=key, cached_only=True)
    except (OSError, ValueError) as error:  # the second for a name that no repository can have
        raise refused(config.path, error, key) from error
    asked = BARE_PARTS
    if "model_index.json" in names:
        asked = parts(snapshot(config.path, config.revision, ["model_index.json"], key=key))
    wanted = wanted_files(
        names, asked, pickles=config.trust_pickles, code=config.trust_remote_code, variant=config.variant
    )
    wanted = [name for name in wanted if name.endswith(SETTINGS) or name.partition("/")[0] not in without]
    return snapshot(config.path, config.revision, wanted, key=key)


def wanted_files(
    names: Iterable[str], parts: Collection[str], *, pickles: bool, code: bool, variant: str | None = None
) -> list[str]:
    """Return the files of a repository that opening a teacher needs, and its card, without duplicates of weights.

    Args:
        names: all files of the repository.
        parts: the folders of its pipeline's parts.
        pickles: whether weights that exist only as pickles are wanted.
        code: whether Python files are.
        variant: which weights are preferred.
    """
    wanted, weights = [], dict[str, list[str]]()
    for name in sorted(names):
        folder, _, file = name.rpartition("/")
        is_setting = file.endswith(SETTINGS) and folder.partition("/")[0] in {"", *parts}
        if is_setting or name == "README.md" or code and name.endswith(".py"):  # the card names the licence
            wanted.append(name)
        elif folder in parts:
            weights.setdefault(folder, []).append(file)
    for folder, files in weights.items():
        for file in chosen_weights(files, pickles=pickles, wanted=variant)[1]:
            wanted.append(f"{folder}/{file}")
    return wanted


def snapshot(
    name: str, revision: str | None, patterns: list[str], *, key: str = KEY, cached_only: bool = False,
    top_only: bool = False,
) -> Path:  # fmt: skip
    """Return the folder into which the files of a repository that fit a pattern were downloaded.

    Args:
        name: of the repository.
        revision: commit or tag; None is the newest.
        patterns: in which ``*`` stands for slashes, too.
        key: of the configuration that names the repository, for errors.
        cached_only: whether the hub is not asked.
        top_only: whether files in folders are left out.

    Raises:
        ValueError: if the hub refuses, or they are not cached and it cannot be reached.
    """
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {"local_files_only": True} if cached_only else {}
    if top_only:
        options["ignore_patterns"] = ["*/*"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, **options))
    except (OSError, ValueError, *unreachable()) as error:  # type: ignore[misc]  # mypy does not unpack a tuple of classes
        raise refused(name, error, key) from error


def unreachable() -> tuple[type[Exception], ...]:
    """Return what the hub's client raises if there is no connection; its library of HTTP depends on its version."""
    import huggingface_hub.errors as errors

    http = importlib.import_module(errors.HfHubHTTPError.__mro__[1].__module__.partition(".")[0])
    return (errors.OfflineModeIsEnabled, ConnectionError, TimeoutError, http.TransportError)


def refused(name: str, error: Exception, key: str) -> ValueError:
    """Return the error to raise if the hub does not give the repository that ``key`` names: what to do about it."""
    reasons = {
        "GatedRepoError": "its owner gives access on request: ask on its page, then log in with 'hf auth login'",
        "RepositoryNotFoundError": "the hub has none of this name, or it is private: log in with 'hf auth login'",
        "RevisionNotFoundError": "it has no such teacher.revision",
        "LocalEntryNotFoundError": "it is not in the local cache, and the hub cannot be reached",
    }
    text = " ".join(str(error).split())[:200]
    reason = next((reasons[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in reasons), text)
    return ValueError(f"{key}: there is no local folder {name!r}, so it is taken as a hub id; {reason}")
