"""Every number from outside has a range: in configurations, and on the command line."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import math
import pkgutil
from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest

import stepdistill
from stepdistill.cli import make_parser
from stepdistill.files.ranges import Decay, PositiveInt, Range, Seed, in_range
from stepdistill.files.schema import ConfigError, build, convert
from stepdistill.training.config import resolve


def configurations() -> Iterator[type]:
    """All dataclasses of the package that are read from YAML."""
    for module in pkgutil.walk_packages(stepdistill.__path__, "stepdistill."):
        if module.name.startswith("stepdistill.pipelines"):  # they travel; they have no configuration
            continue
        for owner in vars(importlib.import_module(module.name)).values():
            for cls in (owner, getattr(owner, "Config", None)):
                named = isinstance(cls, type) and (cls.__name__.endswith("Config") or cls.__name__ == "Protocol")
                if named and dataclasses.is_dataclass(cls) and cls.__module__ == module.name:
                    yield cls


def numbers(hint: Any) -> Iterator[Any]:
    """The numeric types within a type: ``Annotated`` ones whole, as they carry their range."""
    if hint in (int, float) or (get_origin(hint) is Annotated and get_args(hint)[0] in (int, float)):
        yield hint
        return
    for part in get_args(hint):
        if isinstance(part, type) or get_origin(part) is not None:
            yield from numbers(part)


FIELDS = []
for config in configurations():
    hints = get_type_hints(config, include_extras=True)
    for field in dataclasses.fields(config):
        for kind in numbers(hints[field.name]):
            name = f"{config.__module__.removeprefix('stepdistill.')}.{config.__name__}.{field.name}"
            FIELDS.append(pytest.param(config, field, kind, id=name))


def test_all_configurations_were_found():
    found = {parameter.id.rpartition(".")[0].rpartition(".")[2] for parameter in FIELDS}
    assert found >= {
        "TrainConfig", "OptimConfig", "BankConfig", "EvalConfig", "DataConfig", "TeacherConfig", "BenchmarkConfig",
        "Protocol", "CacheConfig", "PairsConfig", "FitConfig", "PretrainConfig", "TextTeacherConfig", "Config",
    }  # fmt: skip
    assert len(FIELDS) > 120


@pytest.mark.parametrize(("config", "field", "kind"), FIELDS)
def test_every_numeric_key_has_a_range(config, field, kind):
    """FAULTS 6; RELIABILITY row 24."""
    assert get_origin(kind) is Annotated, f"{field.name}: give it one of stepdistill.files.ranges"
    base, limits = get_args(kind)
    default = field.default if isinstance(field.default, (int, float)) else None
    assert default is None or default in limits
    outside = [math.nan, math.inf, -math.inf, 10**400]
    outside += [value for value in (base(-1), base(0)) if value not in limits]
    for value in outside:
        with pytest.raises(ConfigError, match=r"^key: expected"):
            convert(value, kind, "key")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"optim": {"student": {"clip": 0}}}, "optim.student.clip: expected above 0, got 0"),
        ({"optim": {"student": {"clip": -1}}}, "optim.student.clip: expected above 0, got -1"),
        ({"optim": {"student": {"warmup": -1}}}, "optim.student.warmup: expected at least 0, got -1"),
        ({"optim": {"student": {"betas": [0.9, 1]}}}, r"optim.student.betas\[1\]: expected at least 0 and below 1"),
        ({"train": {"seed": -1}}, "train.seed: expected at least 0 and at most 9223372036854775807, got -1"),
        ({"train": {"seed": 2**63}}, "train.seed: expected whole number, got 9223372036854775808"),
        ({"method": {"first_time": math.nan}}, "method.first_time: expected number, got nan"),
        ({"method": {"gan_weight": -0.1}}, "method.gan_weight: expected at least 0, got -0.1"),
        ({"data": {"caption_dropout": 1.5}}, "data.caption_dropout: expected at least 0 and at most 1, got 1.5"),
        ({"teacher": {"null_class": -1}}, "teacher.null_class: expected at least 0, got -1"),
    ],
)
def test_a_number_out_of_range_is_refused_by_its_key(override, message):
    sections: dict[str, Any] = {
        "teacher": {"path": "embedded"}, "method": {"name": "dmd2"}, "data": {"name": "noise"},
        "train": {"steps": 4, "output_dir": "unused"}, "optim": {},
    }  # fmt: skip
    for name, keys in override.items():
        sections[name] = sections[name] | keys
    with pytest.raises(ConfigError, match=message):
        resolve(sections)


@dataclasses.dataclass(frozen=True)
class Options:
    decays: tuple[Decay, ...] = ()
    count: PositiveInt | None = None


def test_ranges_hold_within_tuples_and_beside_none():
    assert build(Options, {"decays": [0, 0.5], "count": None}) == Options((0.0, 0.5), None)
    with pytest.raises(ConfigError) as error:
        build(Options, {"decays": [0.5, 1], "count": 0})
    assert error.value.problems == [
        "decays[1]: expected at least 0 and below 1, got 1",
        "count: expected at least 1, got 0",
    ]


# ------------------------------------------------------------------------------------------- command line


def numeric_flags() -> Iterator[tuple[str, argparse.Action]]:
    commands = make_parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr, index]
    for command, parser in commands.items():
        for action in parser._actions:
            if action.type in (int, float) or getattr(action.type, "__name__", "") in ("int", "float"):
                yield command, action


@pytest.mark.parametrize(("command", "flag"), [pytest.param(*pair, id=pair[1].dest) for pair in numeric_flags()])
def test_every_numeric_flag_has_a_range(command, flag):
    """FAULTS 6; RELIABILITY row 24."""
    assert flag.type not in (int, float), f"{flag.dest}: make its type with in_range"
    for text in ("-1", "nan", "inf", "1e400", "two"):
        with pytest.raises((argparse.ArgumentTypeError, ValueError)):
            flag.type(text)


@pytest.mark.parametrize("text", ["--num_inference_steps=0", "--batch_size=0", "--seed=-1", "--num_images=-4"])
def test_a_flag_out_of_range_ends_with_code_2(text, capsys):
    with pytest.raises(SystemExit) as exit_:
        make_parser().parse_args(["generate", "--pipeline", "x", "--output", "y.png", text])
    assert exit_.value.code == 2
    flag, _, value = text.partition("=")
    assert f"argument {flag}: expected at least" in (error := capsys.readouterr().err) and f"got {value}" in error


def test_words_of_a_range():
    assert str(Range()) == "any finite number"
    assert str(Range(above=0, at_most=1)) == "above 0 and at most 1"
    assert math.nan not in Range() and math.inf not in Range() and 0 in Range()
    assert in_range(Seed)("7") == 7
