"""Exports that hold their student alone, and links to the teacher's VAE, text encoders and tokenizers.

Such an export may be moved, its teacher may not.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from stepdistill.families.base import Family
from stepdistill.loading import only_pickle, parts

NO_LINKS: Mapping[str, Path] = MappingProxyType({})
"""Everything is copied."""


def link(place: Path, target: Path) -> None:
    """Make ``place`` a link to the folder ``target``; raises ``ValueError`` where the file system takes none."""
    try:
        place.symlink_to(target, target_is_directory=True)
    except OSError as error:
        raise ValueError(
            f"export.frozen: {place} cannot be made a link ({error.strerror}); wanted export.frozen=copy"
        ) from error


def check_links(folder: Path) -> None:
    """Raise ``ValueError`` if links cannot be made in ``folder``: now, and not after the training."""
    probe = folder / ".link"
    probe.unlink(missing_ok=True)
    link(probe, folder)
    probe.unlink()


def frozen_folders(teacher: Path, family: Family) -> dict[str, Path]:
    """The folders of a teacher that its student's export may link to: all beside its network and its scheduler.

    The paths are absolute, so that the export may be moved.

    Raises:
        ValueError: if the teacher is a network alone, or one of its folders is missing or holds pickles, which no
            export does.
    """
    if not family.frozen_modules:
        raise ValueError(f"export.frozen: {teacher} has nothing beside its network to link to; wanted copy")
    frozen = [name for name in parts(teacher) if name not in (family.component, "scheduler")]
    folders = {name: (teacher / name).resolve() for name in frozen}
    for name, folder in folders.items():
        if not folder.is_dir():
            raise ValueError(f"export.frozen: no folder {teacher / name} to link to; wanted copy")
        if (pickle := only_pickle(folder)) is not None:
            raise ValueError(f"export.frozen: {pickle} is a pickle, which no export has; wanted copy")
    return folders


def refuse_broken_links(folder: Path) -> None:
    """Raise ``ValueError`` if a part of a pipeline's folder is a link to what is not there."""
    for place in sorted(folder.iterdir()):
        if place.is_symlink() and not place.exists():
            raise ValueError(
                f"{place}: a link to {place.readlink()}, which is not there; put the teacher back, or export the "
                "student again with export.frozen=copy"
            )
