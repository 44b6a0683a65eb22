"""The sampling contract: everything a caller must know to sample a student as it was trained.

It lies as ``stepdistill.json`` in an export. :func:`describe` makes it, :func:`write_contract` and
:func:`read_contract` are its only writer and reader.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypeAlias, TypedDict

from diffusers import DiffusionPipeline

from stepdistill.diffusion.samplers import Sampler
from stepdistill.families.base import Family
from stepdistill.files.ranges import PositiveInt, Range
from stepdistill.files.reading import read_json
from stepdistill.files.schema import ConfigError, build, convert

CONTRACT = "stepdistill.json"

FORMAT = 1
"""The version of the file that this package writes, and the newest that it reads."""

Number: TypeAlias = int | float
Side: TypeAlias = Annotated[int, Range(at_least=1, at_most=2**15)]
"""Of an image, in pixels."""


class Call(TypedDict):
    """The arguments of a call that are known here; a pipeline may take more."""

    num_inference_steps: NotRequired[Annotated[int, Range(at_least=1, at_most=1000)] | None]
    guidance_scale: NotRequired[Number | None]
    true_cfg_scale: NotRequired[Number | None]
    negative_prompt: NotRequired[str | None]
    eta: NotRequired[Number | None]
    timesteps: NotRequired[list[Number] | None]
    sigmas: NotRequired[list[Number] | None]
    height: NotRequired[Side | None]
    width: NotRequired[Side | None]
    num_frames: NotRequired[PositiveInt]
    max_sequence_length: NotRequired[PositiveInt]
    cfg_normalization: NotRequired[bool]
    use_resolution_binning: NotRequired[bool]
    clean_caption: NotRequired[bool]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a student comes from: its teacher, its training, what it was measured at."""

    method: str | None = None
    """Name of the distillation method."""
    teacher: str | None = None
    """``teacher.path`` of the training."""
    teacher_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further keys of the ``teacher`` section that say which weights it has: single file, variant, LoRAs, words."""
    triggers: list[str] = dataclasses.field(default_factory=list)
    """Words of prompts that call what was added to the teacher."""
    license: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """The teacher's licence as its model card says it: ``license``, perhaps ``license_name`` and ``license_link``."""
    data: str | None = None
    """Name of the training's data."""
    teacher_sha256: str | None = None
    """Fingerprint of the teacher's weights."""
    guidance_distilled: float | None = None
    """The teacher's guidance scale in training; 1 is none."""
    config_hash: str | None = None
    """Fingerprint of the resolved configuration."""
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Cost of the training, the fields of :class:`stepdistill.training.cost.TrainingCost`."""
    critic: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """sha256 of the feature networks used in training, by configuration key; none of them may evaluate the student."""
    start: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """``path`` and ``training`` of the student that the training started from."""
    method_facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further JSON values by name, which the method adds; also keys of an export that this version does not know."""
    selected: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Step, metric and value by which the best student was selected, what it was measured on, and by which sampler."""
    results: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Metrics of the exported student, and the number of samples."""
    measured_on: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What :attr:`results` depend on besides the student: features, reference, seed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contract:
    """A student's sampling contract. Without arguments: that of a pipeline of which nothing is known."""

    format: Annotated[int, Range(at_least=1, at_most=FORMAT)] = FORMAT
    """Version of the file format."""
    pipeline: str | None = None
    """Class name of the pipeline."""
    scheduler: str | None = None
    """Class name of the scheduler."""
    own_code: bool = False
    """Whether the directory holds Python files that must run."""
    sampler: str | None = None
    """Name of the sampler, see :attr:`stepdistill.diffusion.samplers.Sampler.name`."""
    steps: int | None = None
    """Number of steps, each one network call."""
    timesteps: list[Number] = dataclasses.field(default_factory=list)
    """What the network embeds at each step."""
    gamma: float | None = None
    """Noise parameter of strategic stochastic sampling; None for other samplers."""
    guidance_scale: float | None = None
    """Guidance scale of the call; 1 is none."""
    guidance_convention: str | None = None
    """What the call's ``guidance_scale`` means."""
    prediction_type: str | None = None
    """What the network's output is, see :mod:`stepdistill.diffusion.prediction`."""
    conditioning: str | None = None
    """``"prompt"``, ``"class_labels"`` or ``"none"``."""
    num_classes: int | None = None
    """Number of class labels; None without labels."""
    sample_shape: list[int] = dataclasses.field(default_factory=list)
    """(C, H, W) of what the network sees."""
    global_noise: bool | None = None
    """Whether stock diffusers draws the noise that steps add from torch's global generator, not the call's."""
    call: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Keyword arguments with which a call of the pipeline samples as trained."""
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Versions of the libraries that wrote the export."""
    origin: Origin = dataclasses.field(default_factory=Origin)
    linked: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Paths of the parts that are links into the teacher's folder, by name."""
    absent: list[str] = dataclasses.field(default_factory=list)
    """Parts that the teacher lacks and that diffusers' own loading wants to be told are None: SD3's third encoder."""

    @property
    def reproduced_guidance(self) -> float:
        """The teacher's guidance scale whose images the student reproduces: baked in, or else that of its call."""
        distilled = self.origin.guidance_distilled
        if distilled is not None and distilled != 1:
            return distilled
        return 1.0 if self.guidance_scale is None else self.guidance_scale

    def to_json(self) -> dict[str, Any]:
        """Return the content of the file: one flat object, without what is not known."""
        facts: dict[str, Any] = {}
        for name, value in vars(self).items():
            if name == "origin":
                facts |= _origin_to_json(self.origin)
            elif name == "num_classes" or _is_known(value):
                facts[name] = value
        return facts

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Contract:
        """Read the content of a file, of this version or an older one: keys may be missing.

        Raises:
            ValueError: if a value is of another type than it is written with.
        """
        convert(facts.get("call", {}), Call, "call")
        rest = dict(facts)
        own = {name: rest.pop(name) for name in _names(cls) if name in rest}
        origin = {name: rest.pop(name) for name in _names(Origin) if name in rest}
        if "guidance_baked_in" in rest:  # older exports of LCM have the same number under both names
            origin.setdefault("guidance_distilled", rest.pop("guidance_baked_in"))
        return build(cls, own | {"origin": origin | {"method_facts": rest}})


def _origin_to_json(origin: Origin) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for name, value in vars(origin).items():
        if name == "method_facts":
            facts |= value
        elif _is_known(value):
            facts[name] = value
    return facts


def _is_known(value: Any) -> bool:
    return value is not None and value != {} and value != []


def _names(cls: type) -> list[str]:
    """Fields of a dataclass that are a key of the file."""
    return [field.name for field in dataclasses.fields(cls) if field.name not in ("origin", "method_facts")]


def describe(
    family: Family,
    pipeline: DiffusionPipeline,
    sampler: Sampler,
    *,
    guidance_scale: float,
    own_code: bool,
    origin: Origin,
    linked: Mapping[str, str],
) -> Contract:
    """Return the contract of a student's pipeline.

    Args:
        family: the student's family.
        pipeline: what is exported.
        sampler: the rule and grid it was trained for.
        guidance_scale: of a bare call; 1 is none.
        own_code: whether the export holds Python files.
        origin: where the student comes from.
        linked: parts that are links, by name.
    """
    call = call_arguments(family, pipeline, sampler, guidance_scale)
    return Contract(
        pipeline=type(pipeline).__name__,
        scheduler=type(pipeline.scheduler).__name__,
        own_code=own_code,
        **sampler.contract(),
        guidance_scale=call.get("guidance_scale", guidance_scale),
        guidance_convention=family.guidance_convention,
        prediction_type=family.prediction_type,
        conditioning=family.conditioning,
        num_classes=family.num_classes,
        sample_shape=list(family.sample_shape),
        global_noise=True if draws_globally(family, sampler) else None,
        call=call,
        versions={name: importlib.metadata.version(name) for name in ("diffusers", "torch")},
        origin=origin,
        linked=linked,
        absent=absent_parts(pipeline),
    )


def absent_parts(pipeline: DiffusionPipeline) -> list[str]:
    """Return the parts that a pipeline lacks although its class does not call them optional."""
    optional = type(pipeline)._optional_components
    return [name for name, part in pipeline.components.items() if part is None and name not in optional]


def draws_globally(family: Family, sampler: Sampler) -> bool:
    """Return whether the stock pipeline draws the noise of a sampler's later steps from torch's global generator."""
    return sampler.adds_noise and sampler.steps > 1 and not family.hands_generators_on


def call_arguments(
    family: Family, pipeline: DiffusionPipeline, sampler: Sampler, guidance_scale: float
) -> dict[str, Any]:
    """Return the keyword arguments with which a call of the pipeline samples as trained."""
    arguments = {"num_inference_steps": sampler.steps, **family.guidance_arguments(guidance_scale)}
    arguments |= {**sampler.pipeline_kwargs, **family.pipeline_kwargs}
    arguments |= sampler.schedule.explicit_sigmas(sampler.times[:-1])
    accepted = inspect.signature(pipeline.__call__).parameters
    return {name: value for name, value in arguments.items() if name in accepted}


def write_contract(contract: Contract, folder: Path) -> None:
    """Write the contract into an export."""
    (folder / CONTRACT).write_text(json.dumps(contract.to_json(), indent=2) + "\n", encoding="utf-8")


def read_contract(folder: Path) -> Contract:
    """Return the contract in a pipeline's folder; an empty one if the folder was not exported here."""
    path = folder / CONTRACT
    if not path.is_file():
        return Contract()
    try:
        return Contract.from_json(read_json(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {problem.removeprefix('origin.')}" for problem in error.problems) from None


def contract_of(pipeline: Any) -> Contract:
    """Return the contract that :func:`stepdistill.load_pipeline` applied to a pipeline; an empty one if it had none."""
    return getattr(pipeline, "contract", Contract())
