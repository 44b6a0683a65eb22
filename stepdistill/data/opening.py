"""Opening the data of a training."""

from __future__ import annotations

from pathlib import Path

from stepdistill.data.base import DataConfig, Dataset, locate_data
from stepdistill.data.datasets import check_stated, open_data
from stepdistill.data.hf_datasets import is_saved
from stepdistill.data.image_files import visible_files
from stepdistill.data.latent_cache import LatentCacheDataset
from stepdistill.data.metadata import metadata_file
from stepdistill.data.ode_pairs import PairDataset
from stepdistill.families.base import Family


def open_dataset(config: DataConfig, family: Family, *, needs_images: bool) -> Dataset:
    """Open the ``data`` section for a teacher: a latent cache, or the data itself.

    Args:
        config: the section.
        family: the opened teacher.
        needs_images: whether the training needs more than prompts.

    Raises:
        ValueError: naming the file, key or sample at fault.
    """
    channels, *size = family.image_shape
    if config.name in ("cache", "pairs"):
        check_stated(config, channels, tuple(size), takes_text=family.takes_text)
    if config.name == "cache":
        return LatentCacheDataset(config, family, needs_images=needs_images)
    if config.name == "pairs":
        return PairDataset(config, family)
    if config.name == "images" and not family.encodes_images:
        raise ValueError(
            f"data.name: expected 'prompts' or 'pairs' (the teacher's own samples), got 'images': an "
            f"{type(family).__name__} teacher encodes none"
        )
    for place, bucket in enumerate(config.buckets):
        family.check_size((bucket[0], bucket[1]), f"data.buckets[{place}]")
    return open_data(
        locate_data(config), channels=channels, size=tuple(size), num_classes=family.num_classes,
        takes_text=family.takes_text,
    )  # fmt: skip


def check_apart(config: DataConfig, output_dir: Path) -> None:
    """Raise ``ValueError`` if the pictures that a run writes would join the images that it is trained on.

    That is where it writes into their folder, not hidden there, and no table or tar says which they are: it would be
    refused its own resumption, and another run would be trained on samples.
    """
    folder = Path(config.path or "")
    if config.name != "images" or not folder.is_dir() or not output_dir.resolve().is_relative_to(folder.resolve()):
        return
    is_hidden = any(name.startswith(".") for name in output_dir.resolve().relative_to(folder.resolve()).parts)
    is_table = metadata_file(folder) or is_saved(folder) or visible_files(folder, "**/*-of-*.parquet")
    if not is_hidden and not is_table and not visible_files(folder, "*.tar"):
        raise ValueError(
            f"train.output_dir: expected a folder outside data.path ({folder}), whose images the run's pictures would "
            f"join, got {output_dir}"
        )
