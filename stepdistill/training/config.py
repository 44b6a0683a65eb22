"""The configuration of a run."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from stepdistill import config as configuration
from stepdistill.data.base import DataConfig
from stepdistill.evaluation.metrics.table import METRICS, check_sample
from stepdistill.export.pipeline import ExportConfig
from stepdistill.families.config import TeacherConfig
from stepdistill.files.places import Place
from stepdistill.files.precision import TrainingPrecision
from stepdistill.files.ranges import Decay, NonNegativeInt, PositiveInt, Range, Seed
from stepdistill.files.schema import ConfigError, build
from stepdistill.files.words import nearest
from stepdistill.methods import find_method
from stepdistill.methods.base import Distiller
from stepdistill.training.optimizers import OptimConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The ``train`` section."""

    steps: PositiveInt
    """Training steps of the whole run, over all its stages."""
    output_dir: Place
    accumulation: PositiveInt = 1
    """Micro-batches per step of a turn's optimiser."""
    precision: TrainingPrecision = "fp32"
    """Precision in which networks compute; weights, optimisers and losses stay in float32. In ``fp16``, for GPUs
    without ``bf16``, losses are scaled, and steps whose gradients overflow are left out."""
    ema: Decay = 0.0
    """Decay of the student's moving average, which is evaluated and exported in its place; 0 is none."""
    offload_encoders: bool = False
    """Whether VAE and text encoders wait in the host's memory while they do not encode."""
    offload_ema: bool = False
    """Whether the average is held in the host's memory."""
    gradient_checkpointing: bool = False
    compile: bool = False
    """Whether the repeated blocks of all networks are compiled."""
    seed: Seed = 0
    log_every: PositiveInt = 10
    sample_every: PositiveInt = 500
    save_every: PositiveInt = 500
    keep: PositiveInt = 2
    """How many checkpoints are kept."""
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    nan_policy: Literal["raise", "skip"] = "raise"
    """What happens when a loss or gradient is not finite: the run ends, or the step is left out, 10 times in 100 steps
    at most."""
    timeout: Annotated[float, Range(above=0, at_most=10**7)] = 1800.0
    """Seconds that a process waits for the others, and longer than anything the main process does alone."""

    def __post_init__(self) -> None:
        if self.offload_ema and not self.ema:
            raise ValueError("ema: expected above 0 with offload_ema, which holds that average, got 0")


FREE_KEYS = (
    "train.output_dir", "train.log_every", "train.sample_every", "train.save_every", "train.keep", "train.tracker",
    "train.nan_policy", "train.timeout", "train.offload_encoders", "train.offload_ema",
    "data.download", "data.num_workers", "data.revision", "teacher.path", "teacher.revision",
    "teacher.trust_remote_code", "teacher.trust_pickles",
    "eval.every", "eval.metrics", "eval.num_samples", "eval.seed", "eval.features", "eval.reference", "export.frozen",
    "export.push_to_hub", "export.private",
)  # fmt: skip
"""Keys that may change between a run and its resumption, because the result does not depend on them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BankConfig:
    """The ``bank`` section: a full copy of the network per role, or one network with an adapter per role."""

    name: Literal["copy", "adapter"] = "copy"
    rank: PositiveInt = 64
    """Rank of the adapters."""
    init_from: Place | None = None
    """A finished student's pipeline folder to start from instead of the teacher; adapters start from its projection to
    their rank."""


NOT_IN_TRAINING = frozenset({"clip", "captions", "attributes"})
"""What metrics may need that the ``eval`` section does not name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The ``eval`` section: what is measured during training, on the role that will be exported, from fixed seeds."""

    every: NonNegativeInt = 0
    """Training steps between two measurements; 0 measures nothing."""
    metrics: tuple[str, ...] = ("fd",)
    num_samples: Annotated[int, Range(at_least=2)] = 1000
    seed: Seed = 1
    """Seed of the samples; tables use seed 0, so that no student is selected on the samples of a table."""
    features: Place = "embedded"
    reference: Place = "embedded"

    def __post_init__(self) -> None:
        check_sample(self.metrics, self.num_samples)
        for name in self.metrics:
            if not NOT_IN_TRAINING.isdisjoint(METRICS[name].needs):
                raise ValueError(
                    f"metrics: expected metrics of images alone, got {name!r}, which `stepdistill evaluate` measures "
                    "on the finished student"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole configuration, every section resolved."""

    teacher: TeacherConfig
    method: Any
    method_name: str
    bank: BankConfig
    data: DataConfig
    optim: dict[str, OptimConfig]
    train: TrainConfig
    eval: EvalConfig
    export: ExportConfig

    def as_sections(self) -> dict[str, Any]:
        """Return the configuration as it would be written in YAML."""
        tree = configuration.to_dict(self)
        tree["method"] = {"name": tree.pop("method_name"), **tree["method"]}
        return tree


PLAIN_SECTIONS = {
    "teacher": TeacherConfig, "bank": BankConfig, "data": DataConfig, "train": TrainConfig, "eval": EvalConfig,
    "export": ExportConfig,
}  # fmt: skip
"""Sections that are the same for every method."""


SECTIONS = ("method", "optim", *PLAIN_SECTIONS)

RENAMED = {
    "bank.start": "bank.init_from",
    "method.every": "method.student_update_interval",
    "method.turns": "method.fake_update",
    "method.first": "method.first_time",
}
"""Keys of older configurations and checkpoints, and their present names."""


def with_current_keys(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with its renamed keys under their present names, warning once for each.

    Raises:
        ConfigError: if a key is given under both names.
    """
    current = dict(mapping)
    for old, new in RENAMED.items():
        (section, old_key), (_, new_key) = old.split("."), new.split(".")
        keys = current.get(section)
        if not isinstance(keys, Mapping) or old_key not in keys:
            continue
        if new_key in keys:
            raise ConfigError([f"{old}: the former name of {new}, which is also given"])
        warnings.warn(f"{old} is now called {new}", FutureWarning, stacklevel=3)
        current[section] = _renamed(keys, old_key, new_key)
    return current


def _renamed(keys: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    """Return a section with one key renamed, in the same order."""
    section = {}
    for key, value in keys.items():
        section[new if key == old else key] = value
    return section


def resolve(mapping: Mapping[str, Any]) -> RunConfig:
    """Check a configuration and fill in its defaults; read keys of older configurations with a warning.

    Raises:
        ConfigError: listing every problem of every section.
    """
    mapping = with_current_keys(mapping)
    problems = [f"{name}: unknown section{nearest(str(name), SECTIONS)}" for name in mapping if name not in SECTIONS]
    resolved: dict[str, Any] = {}
    for name, cls in PLAIN_SECTIONS.items():
        problems += _collect(resolved, name, lambda cls=cls, name=name: build(cls, mapping.get(name), name))
    problems += _collect(resolved, "method_name", lambda: _method_name(mapping.get("method")))
    if "method_name" in resolved:
        distiller = find_method(resolved["method_name"])
        options = {key: value for key, value in mapping["method"].items() if key != "name"}
        problems += _collect(resolved, "method", lambda: build(distiller.Config, options, "method"))
        problems += _collect(resolved, "optim", lambda: _build_optim(mapping.get("optim"), distiller))
    if problems:
        raise ConfigError(problems)
    return RunConfig(**resolved)


def _collect(resolved: dict[str, Any], name: str, make: Any) -> list[str]:
    try:
        resolved[name] = make()
    except ConfigError as error:
        return error.problems
    return []


def _method_name(section: Any) -> str:
    if not isinstance(section, Mapping) or "name" not in section:
        raise ConfigError(["method.name: missing (expected the name of a file in stepdistill/methods)"])
    find_method(section["name"])
    return section["name"]


def _build_optim(section: Any, distiller: type[Distiller]) -> dict[str, OptimConfig]:
    section = section or {}
    if not isinstance(section, Mapping):
        raise ConfigError([f"optim: expected a section of keys, got {section!r}"])
    turns = (*distiller.turn_names, *distiller.heads)
    problems = [
        f"optim.{name}: the method has no such turn{nearest(str(name), turns)}" for name in section if name not in turns
    ]
    resolved: dict[str, Any] = {}
    for turn in turns:
        problems += _collect(resolved, turn, lambda turn=turn: _build_turn(section, distiller, turn))
    if problems:
        raise ConfigError(problems)
    return resolved


def _build_turn(section: Mapping[str, Any], distiller: type[Distiller], turn: str) -> OptimConfig:
    owner = distiller.heads.get(turn, turn)
    options = dict(distiller.optim_defaults.get(owner, {}))
    for name in (owner, turn):
        given = section.get(name) or {}
        if not isinstance(given, Mapping):
            raise ConfigError([f"optim.{name}: expected a section of keys, got {given!r}"])
        options |= given
    return build(OptimConfig, options, f"optim.{turn}")
