"""An export on the Hugging Face hub: the files that an export writes and no others, as one commit.

What is uploaded says nothing of this machine: paths in the settings become names, and the card's calls open the
repository. ``huggingface_hub`` does the uploading, under the token that ``hf auth login`` or ``HF_TOKEN`` gives it.
"""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from stepdistill.export.contract import CONTRACT, read_contract
from stepdistill.export.model_card import card_on_hub
from stepdistill.export.provenance import public_name, with_names, without_paths
from stepdistill.export.replacing import is_export
from stepdistill.families.hub import HUB_ID, unreachable
from stepdistill.files.reading import read_json, read_text
from stepdistill.files.words import shown, visible
from stepdistill.loading import parts
from stepdistill.loading.index import INDEX

KEY = "export.push_to_hub"
ROOT_FILES = ("README.md", "samples.png", CONTRACT, INDEX)
"""What an export's own folder holds beside its parts."""
ENDINGS = (".json", ".txt", ".model", ".jinja", ".safetensors")
"""Endings of what a part's folder holds: weights, settings, tokenizers. Checkpoints and logs are in no such folder."""
BEGUN = {".gitattributes", "README.md"}
"""Files of a repository that was made by hand and holds nothing yet."""
REFUSALS = {401: "the hub does not know the token: log in with 'hf auth login'", 403: "the token may not write there"}
"""What an answer of the hub means, by its code."""


def check_name(name: str) -> None:
    """Raise ``ValueError`` unless ``name`` can be that of a repository, ``user/name``."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        fits = False
    else:
        fits = HUB_ID.fullmatch(name) is not None
    if not fits:
        raise ValueError(f"push_to_hub: expected user/name of letters, digits, '-', '_' and '.', got {shown(name)}")


def check_upload(name: str, *, private: bool) -> list[str]:
    """Return the files that a repository holds, none if it is yet to be made; called before training, too.

    Raises:
        ValueError: if there is no token, it may not write, the repository holds something other than an export or is
            public and should be private, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if get_token() is None:
        raise ValueError(f"{KEY}: expected a token that may write: log in with 'hf auth login', or set HF_TOKEN")
    api = HfApi()
    with _hub_errors(name):
        user = api.whoami()
    _check_writer(user, name)
    with _hub_errors(name):
        try:
            info = api.model_info(name)
        except RepositoryNotFoundError:
            return []
    if private and not info.private:
        raise ValueError(f"{KEY}: {name}: expected a private repository, got a public one")
    names = [file.rfilename for file in info.siblings or ()]
    if CONTRACT not in names and (others := sorted({*names} - BEGUN)):
        raise ValueError(f"{KEY}: {name}: expected a new repository or an earlier export, got one with {others[0]}")
    return names


def _check_writer(user: dict[str, Any], name: str) -> None:
    """Raise ``ValueError`` unless the user of a token, as the hub describes it, may write to ``name``."""
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError(f"{KEY}: expected a token that may write, got one that may only read")
    owners = [user["name"]]
    for organisation in user.get("orgs", ()):
        owners.append(organisation["name"])
    if name.partition("/")[0].casefold() not in {owner.casefold() for owner in owners}:
        raise ValueError(f"{KEY}: {name}: expected a repository of {' or '.join(owners)}, to whom the token belongs")


def upload(folder: Path, name: str, *, private: bool) -> str:
    """Upload an export as one commit, and remove files of an earlier export that it has none of.

    Args:
        folder: of the export.
        name: of the repository, ``user/name``; it is made if it is not there.
        private: whether a new one is hidden.

    Returns:
        The address of the commit.

    Raises:
        ValueError: if the folder is no whole export, or the upload fails: the export is still there, and the message
            has the command that uploads it.
    """
    files = public_files(folder)
    try:
        return _commit(files, check_upload(name, private=private), name, private=private)
    except ValueError as error:
        again = ["stepdistill", "push", "--pipeline", str(folder), "--push_to_hub", name, *["--private"] * private]
        raise ValueError(f"{error}; the export is complete in {folder}, upload it with: {shlex.join(again)}") from error


def _commit(files: dict[str, Path], there: Iterable[str], name: str, *, private: bool) -> str:
    # create_commit, not upload_folder: where xet is installed, that makes several commits
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    operations: list[Any] = []
    for path, place in files.items():
        operations.append(CommitOperationAdd(path, public_content(place, name)))
    for path in stale(there, files):
        operations.append(CommitOperationDelete(path))
    api = HfApi()
    with _hub_errors(name):
        api.create_repo(name, private=private or None, exist_ok=True)  # None: as its owner has it
        commit = api.create_commit(name, operations, commit_message="Upload a student of stepdistill")
    return visible(commit.commit_url)


def public_files(folder: Path) -> dict[str, Path]:
    """Return the files of an export that are uploaded, by their path in it.

    Raises:
        ValueError: if the folder is no export, or parts of it are links to elsewhere.
    """
    if not is_export(folder):
        raise ValueError(f"{folder}: expected the folder of an export, with {CONTRACT} and {INDEX}")
    own_code = read_contract(folder).own_code
    found = [folder / name for name in ROOT_FILES if (folder / name).is_file()]
    for part in sorted([*parts(folder), "lora"]):
        found += [place for place in (folder / part).glob("*") if place.suffix in ENDINGS]
    for place in [folder, *(folder / part for part in parts(folder))] if own_code else ():
        found += place.glob("*.py")
    for place in found:
        if place.is_symlink() or place.parent.is_symlink():
            raise ValueError(f"{place}: expected a file, got a link; export the student again with export.frozen=copy")
    return {place.relative_to(folder).as_posix(): place for place in found if place.name[0] != "."}


def public_content(place: Path, name: str) -> Path | bytes:
    """Return what is uploaded of a file to the repository ``name``: itself, or its text without paths of this machine.

    >>> public_content(Path("unet/diffusion_pytorch_model.safetensors"), "someone/student").name
    'diffusion_pytorch_model.safetensors'
    """
    if place.name == "README.md":
        return card_on_hub(read_text(place), name).encode()
    if place.name not in (CONTRACT, INDEX) and not place.name.endswith("config.json"):
        return place
    facts = read_json(place)
    if place.name == CONTRACT:
        facts |= public_origin(facts)
    return (json.dumps(without_paths(facts), indent=2, ensure_ascii=False) + "\n").encode()


def public_origin(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return those keys of a contract that may hold paths, with names in place of them.

    >>> public_origin({"teacher": "/runs/teacher", "teacher_options": {"lora": ["~/a.safetensors"], "variant": "fp16"}})
    {'teacher': 'teacher', 'teacher_options': {'lora': ['a.safetensors'], 'variant': 'fp16'}}
    """
    found: dict[str, Any] = {}
    if "teacher" in facts:
        found["teacher"] = public_name(facts["teacher"])
    if "teacher_options" in facts:
        found["teacher_options"] = with_names(facts["teacher_options"])
    if "path" in facts.get("start", {}):
        found["start"] = facts["start"] | {"path": public_name(facts["start"]["path"])}
    return found


def stale(there: Iterable[str], files: Iterable[str]) -> list[str]:
    """Return the files of an earlier export in the folders of a new one that this lacks: other shards, an adapter.

    >>> stale(["unet/a.safetensors", "unet/b.safetensors", "notes/a.txt"], ["unet/b.safetensors", "README.md"])
    ['unet/a.safetensors']
    """
    new = {*files}
    folders = {name.partition("/")[0] for name in new if "/" in name} | {"lora"}
    old = []
    for name in there:
        folder, slash, file = name.partition("/")
        if slash and folder in folders and file.endswith((*ENDINGS, ".py")) and name not in new:
            old.append(name)
    return old


@contextlib.contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Turn what the hub's client raises into a sentence about the repository ``name``."""
    try:
        yield
    except unreachable() as error:
        raise ValueError(f"{KEY}: {name}: the hub cannot be reached: {_first_words(error)}") from error
    except (OSError, RuntimeError, ValueError) as error:
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error  # one file of several
        code = getattr(getattr(cause, "response", None), "status_code", 0)
        raise ValueError(f"{KEY}: {name}: {REFUSALS.get(code) or _first_words(cause)}") from error


def _first_words(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
