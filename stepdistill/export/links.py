"""Exports that hold only the student, with links to the teacher's VAE, text encoders and tokenizers.

Such an export may be moved; its teacher may not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from stepdistill.families.additions import touches_encoders
from stepdistill.families.base import Family
from stepdistill.families.config import TeacherConfig
from stepdistill.files.weights import chosen_weights
from stepdistill.loading import only_pickle, parts

NO_LINKS: Mapping[str, Path] = MappingProxyType({})
"""The links of an export that copies everything."""


def link(place: Path, target: Path) -> None:
    """Make ``place`` a link to the folder ``target``; raise ``ValueError`` if the file system has no links."""
    try:
        place.symlink_to(target, target_is_directory=True)
    except OSError as error:
        raise ValueError(f"export.frozen: expected copy: {place} cannot be made a link ({error.strerror})") from error


def check_links(folder: Path) -> None:
    """Raise ``ValueError`` if links cannot be made in ``folder``; called before training."""
    probe = folder / ".link"
    probe.unlink(missing_ok=True)
    link(probe, folder)
    probe.unlink()


def frozen_folders(teacher: Path, family: Family, config: TeacherConfig) -> dict[str, Path]:
    """Return the folders of a teacher that an export may link to: all but those of its network and its scheduler.

    The paths are absolute, so that the export may be moved.

    Raises:
        ValueError: if the teacher is a network without a pipeline or a single file, or one of its folders is missing,
            or holds pickles, or is read in a variant, which stock diffusers would not find, or is changed by what is
            added to the teacher.
    """
    if teacher.is_file():
        raise ValueError(f"export.frozen: expected copy: {teacher} is a single file, so there is no folder to link to")
    if touches_encoders(config):
        raise ValueError("export.frozen: expected copy: teacher.lora or teacher.embeddings change a text encoder")
    if not family.frozen_modules:
        raise ValueError(f"export.frozen: expected copy: {teacher} has nothing but its network, so nothing to link to")
    frozen = [name for name in parts(teacher) if name not in (family.component, "scheduler")]
    folders = {name: (teacher / name).resolve() for name in frozen}
    for name, folder in folders.items():
        if not folder.is_dir():
            raise ValueError(f"export.frozen: expected copy: there is no folder {teacher / name} to link to")
        if (pickle := only_pickle(folder)) is not None:
            raise ValueError(f"export.frozen: expected copy: {pickle} is a pickle, and exports hold none")
        read, _ = chosen_weights((path.name for path in folder.iterdir()), pickles=False, wanted=config.variant)
        if read is not None:
            raise ValueError(f"export.frozen: expected copy: {folder} is read in the variant {read!r}")
    return folders


def refuse_broken_links(folder: Path) -> None:
    """Raise ``ValueError`` if a part of a pipeline's folder is a broken link."""
    for place in sorted(folder.iterdir()):
        if place.is_symlink() and not place.exists():
            raise ValueError(
                f"{place}: broken link to {place.readlink()}; put the teacher back, or export the student again with "
                "export.frozen=copy"
            )


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Raise ``ValueError`` if one of these parts is a link in ``folder``: a save would overwrite the teacher's file."""
    for name in sorted(names):
        if (folder / name).is_symlink():
            raise ValueError(
                f"save_directory: expected another folder, got {folder}, where {name} is a link: what it leads to, the "
                "teacher's, would be overwritten"
            )
