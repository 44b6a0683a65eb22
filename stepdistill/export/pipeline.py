"""A student as a plain diffusers directory, and back.

Stock diffusers loads the export: its pipeline and scheduler are stock wherever they can express the student, else one
self-contained file of ``stepdistill.pipelines`` lies beside the weights. :func:`load_pipeline` applies the sampling
contract (:mod:`stepdistill.export.contract`), so that a call without arguments samples as trained.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import shlex
import shutil
from collections.abc import Mapping, Sized
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn

from stepdistill.diffusion.samplers import Sampler
from stepdistill.export.adapters import write_adapter
from stepdistill.export.contract import CONTRACT, Contract, Origin, describe, read_contract, write_contract
from stepdistill.export.generators import handed_on
from stepdistill.export.habits import check_habits
from stepdistill.export.links import NO_LINKS, link, refuse_broken_links, refuse_links
from stepdistill.export.model_card import SampleSheet, model_card
from stepdistill.export.replacing import replacing
from stepdistill.export.servers import mark_distilled
from stepdistill.export.sharing import check_name
from stepdistill.families.base import Family
from stepdistill.families.hub import expand_home, nearest_place
from stepdistill.files.weights import naming
from stepdistill.files.words import nearest
from stepdistill.loading import open_folder
from stepdistill.loading.classes import is_our_class

CUSTOM_FILE = "pipeline.py"


GRIDS = ("sigmas", "timesteps")
"""Arguments of a call that contain its grid of times."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The ``export`` section."""

    frozen: Literal["copy", "link"] = "copy"
    """Whether VAE, text encoders and tokenizers are copied into the export, or links to the teacher's."""
    push_to_hub: str | None = None
    """Repository on the hub, ``user/name``, to which the finished student is uploaded."""
    private: bool = False
    """Whether a new repository is hidden from others."""

    def __post_init__(self) -> None:
        if self.push_to_hub is None and self.private:
            raise ValueError("private: expected push_to_hub, which says where, got none")
        if self.push_to_hub is None:
            return
        check_name(self.push_to_hub)
        if self.frozen == "link":
            raise ValueError("frozen: expected copy with push_to_hub, got link: the teacher's parts would be missing")


def export_pipeline(
    family: Family,
    network: nn.Module,
    sampler: Sampler,
    folder: Path,
    *,
    origin: Origin | None = None,
    guidance_scale: float = 1.0,
    lora: Mapping[str, Tensor] | None = None,
    links: Mapping[str, Path] = NO_LINKS,
    samples: SampleSheet | None = None,
    index: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """Write ``network`` as a pipeline directory that samples like ``sampler``.

    The directory appears complete or not at all, see :mod:`stepdistill.export.replacing`.

    Args:
        family: the student's family.
        network: a plain diffusers model.
        sampler: the rule and grid it was trained for.
        folder: where to write; an existing export is replaced, and nothing else.
        origin: where the student comes from, for its contract.
        guidance_scale: diffusers' scale of a bare call; 1 is none.
        lora: the student's adapter; written to ``lora/`` beside the merged weights, for ``load_lora_weights``.
        links: parts that are not copied but linked to, see :func:`stepdistill.export.links.frozen_folders`.
        samples: the picture of the model card.
        index: further keys of ``model_index.json``, for programs other than diffusers.

    Raises:
        ValueError: if no scheduler can express the sampler, the file system has no links, or ``folder`` holds something
            other than an export.
    """
    pipeline = family.pipeline(network.eval(), sampler, guidance_scale)
    mark_distilled(pipeline, sampler, guidance_scale)
    linked = {name: str(target) for name, target in links.items()}
    contract = describe(
        family, pipeline, sampler, guidance_scale=guidance_scale, origin=origin or Origin(), linked=linked,
        own_code=has_own_class(pipeline) or bool(family.code),
    )  # fmt: skip
    with replacing(folder) as partial:
        write_contract(contract, partial)
        save_pipeline(pipeline, partial, links, family.code, index)
        if lora is not None:
            write_adapter(pipeline, family.component, lora, contract, partial / "lora")
        (partial / "README.md").write_text(model_card(contract, samples), encoding="utf-8")
        if samples is not None:
            samples.picture.save(partial / "samples.png")
    return folder


def save_pipeline(
    pipeline: DiffusionPipeline, folder: Path, links: Mapping[str, Path] = NO_LINKS,
    code: Mapping[str, bytes] = MappingProxyType({}), keys: Mapping[str, Any] = MappingProxyType({}),
) -> None:  # fmt: skip
    """Save a pipeline together with the files of its custom classes, where diffusers looks for them.

    Args:
        pipeline: what is saved.
        folder: where.
        links: parts that are linked to.
        code: Python files of a teacher with its own code, by their path in its folder.
        keys: further keys of ``model_index.json``.
    """
    if links:
        save_parts(pipeline, folder, links)
    else:
        pipeline.save_pretrained(folder, safe_serialization=True)
    for place, content in code.items():
        if Path(place).parts[0] not in links:
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            (folder / place).write_bytes(content)
    add_to_index(folder, add_our_files(pipeline, folder) | brought_classes(pipeline) | dict(keys))


def add_our_files(pipeline: DiffusionPipeline, folder: Path) -> dict[str, list[str]]:
    """Put the files of this package's classes where diffusers looks for them; return their entries of the index."""
    entries = {}
    if is_our_class(type(pipeline)):
        shutil.copy(inspect.getfile(type(pipeline)), folder / CUSTOM_FILE)
        entries["_class_name"] = [Path(CUSTOM_FILE).stem, type(pipeline).__name__]
    for name, component in pipeline.components.items():
        if is_our_class(type(component)):
            file = Path(inspect.getfile(type(component)))
            shutil.copy(file, folder / name / file.name)
            entries[name] = [file.stem, type(component).__name__]
    return entries


def add_to_index(folder: Path, entries: Mapping[str, Any]) -> None:
    """Replace entries of a folder's ``model_index.json``."""
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | dict(entries), indent=2) + "\n")


def save_parts(pipeline: DiffusionPipeline, folder: Path, links: Mapping[str, Path]) -> None:
    """Save the parts of a pipeline as ``save_pretrained`` does, and link those in ``links``."""
    pipeline.save_config(folder)
    for name, part in pipeline.components.items():
        if name in links:
            link(folder / name, links[name])
        elif part is not None:
            part.save_pretrained(folder / name)


def has_own_class(pipeline: DiffusionPipeline) -> bool:
    """Return whether the pipeline or one of its parts has a class of ``stepdistill.pipelines``."""
    return any(is_our_class(type(part)) for part in (pipeline, *pipeline.components.values()))


def brought_classes(pipeline: DiffusionPipeline) -> dict[str, list[str]]:
    """Return the entries of ``model_index.json`` for classes that diffusers read from a model's folder.

    An entry is a module and a class name.
    """
    entries = {}
    for name, thing in {"_class_name": pipeline, **pipeline.components}.items():
        module = type(thing).__module__
        if module.startswith("diffusers_modules."):
            entries[name] = [module.rpartition(".")[2], type(thing).__name__]
    return entries


def load_pipeline(
    path: str | Path, *, trust_remote_code: bool = False, trust_pickles: bool = False, **options: Any
) -> DiffusionPipeline:
    """Load a pipeline directory and apply its contract: a call without arguments samples as trained.

    Code in the directory runs only if it is identical to a file of this package, or if ``trust_remote_code`` is set.

    Args:
        path: an exported directory, or any diffusers pipeline directory.
        trust_remote_code: run other Python files that lie in the directory.
        trust_pickles: read weights that exist only as pickles; an export has none.
        options: passed to ``DiffusionPipeline.from_pretrained``, for example ``dtype``.

    Raises:
        ValueError: if the directory is missing or no pipeline, would run untrusted code, or has broken links.
    """
    folder = expand_home(str(path))
    if not folder.exists():
        raise ValueError(f"{folder}: no such folder{nearest_place(folder)}")
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder}: no model_index.json; expected a diffusers pipeline directory")
    refuse_broken_links(folder)
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        with naming(folder):
            pipeline = open_folder(folder, trust_remote_code=trust_remote_code, trust_pickles=trust_pickles, **options)
    finally:
        diffusers_logging.set_verbosity(verbosity)
    return apply_contract(pipeline, read_contract(folder))


def apply_contract(pipeline: DiffusionPipeline, contract: Contract) -> DiffusionPipeline:
    """Make the contract's arguments the defaults of this pipeline object's call, which hands its generators on.

    The object's ``save_pretrained`` writes the contract, too, and the files of this package's classes.
    """
    defaults = contract.call
    original = type(pipeline)
    taken = inspect.signature(original.__call__).parameters
    if unknown := sorted(defaults.keys() - taken.keys()):
        raise ValueError(
            f"{pipeline.name_or_path}/{CONTRACT}: call: {original.__name__} takes no argument {unknown[0]!r:.200}"
            f"{nearest(unknown[0], taken)}"
        )

    @functools.wraps(original.__call__)
    def call(self: DiffusionPipeline, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(original.__call__).bind_partial(self, *args, **kwargs).arguments
        own = {name: value for name, value in defaults.items() if name not in bound}
        if bound.get("num_inference_steps", defaults.get("num_inference_steps")) != defaults.get("num_inference_steps"):
            own = {name: value for name, value in own.items() if name not in GRIDS}  # they have another number of steps
        if "batch_size" in taken.keys() - bound.keys() and isinstance(bound.get("class_labels"), Sized):
            own["batch_size"] = len(bound["class_labels"])  # or all images would share one noise
        check_habits(contract, own | bound)
        with handed_on(self, bound.get("generator")):
            return original.__call__(self, *args, **(own | kwargs))

    @functools.wraps(original.save_pretrained)
    def save(self: DiffusionPipeline, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("push_to_hub"):  # diffusers would upload before the contract is there
            raise ValueError(
                "push_to_hub: expected False in save_pretrained of a student, got True: save it, then upload the "
                f"folder with: stepdistill push --pipeline {shlex.quote(str(save_directory))} --push_to_hub USER/NAME"
            )
        refuse_links(Path(save_directory), self.components)
        original.save_pretrained(self, save_directory, *args, **kwargs)
        add_to_index(Path(save_directory), add_our_files(self, Path(save_directory)))
        if contract.pipeline is not None:
            write_contract(dataclasses.replace(contract, linked={}), Path(save_directory))  # parts are copies there

    # Python looks __call__ up on the class; the name stays because save_pretrained writes it
    members = {"__call__": call, "save_pretrained": save, "__module__": original.__module__, "contract": contract}
    pipeline.__class__ = type(original.__name__, (original,), members)
    return pipeline
