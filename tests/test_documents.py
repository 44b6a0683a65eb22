"""Documents that cannot rot: every key of the configuration with its default, every module, every path and link."""

import argparse
import dataclasses
import importlib
import json
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from contracts.cases import sections, teacher_for
from test_layout import FLOORS

from stepdistill import load_pipeline, methods
from stepdistill.cli import make_parser
from stepdistill.data.latent_cache import CacheConfig
from stepdistill.data.ode_pairs import PairsConfig
from stepdistill.diffusion.samplers import Sampler
from stepdistill.families.loading import families
from stepdistill.methods import find_method, method_names
from stepdistill.training.config import PLAIN_SECTIONS, RENAMED, resolve
from stepdistill.training.optimizers import OptimConfig
from stepdistill.training.run import Run

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
CONFIGURATION = (ROOT / "docs/CONFIGURATION.md").read_text()
SECTIONS = {**PLAIN_SECTIONS, "optim": OptimConfig, "cache": CacheConfig, "pairs": PairsConfig}


# ------------------------------------------------------------------------------------------ reading markdown


def section_of(text: str, heading: str) -> str:
    """The text below a heading, up to the next one."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"no heading {heading!r}"
    return found.group(1)


def rows_of(text: str) -> list[list[str]]:
    """The cells of a section's tables, without their heads."""
    rows = [line.strip(" |").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows[1:]]


# --------------------------------------------------------------------------------------------- configuration


def type_text(hint: Any) -> str:
    """A type as the document writes it."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in args)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(dict.fromkeys(type_text(option) for option in args if option is not type(None)))
    if origin is tuple:
        items = type_text(args[0])
        return f"list of {items.replace('list', 'lists', 1) if items.startswith('list') else items + 's'}"
    if origin is Mapping:
        return "section"
    return {int: "whole number", float: "number", str: "text", bool: "true or false"}[hint]


def default_text(field: dataclasses.Field) -> str:
    """A default as the document writes it."""
    if field.default is dataclasses.MISSING:
        return "required"
    if field.default is None or field.default in ("", ()):
        return "none"
    return f"`{value_text(field.default)}`"


def value_text(value: Any) -> str:
    """A value as YAML has it in one line."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(value_text, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def keys_of(config: type) -> list[tuple[str, str, str]]:
    """(key, type, default) of every field of a section, as the document writes them."""
    hints = get_type_hints(config)
    return [
        (f"`{field.name}`", type_text(hints[field.name]), default_text(field)) for field in dataclasses.fields(config)
    ]


def optim_text(method: str) -> str:
    """The ``optim`` sections of a method, and where its defaults differ from the optimiser's."""
    distiller = find_method(method)
    turns = []
    for turn in distiller.turn_names:
        own: Mapping[str, Any] = distiller.optim_defaults.get(turn, {})
        listed = ", ".join(f"`{key}: {value_text(value)}`" for key, value in own.items())
        turns.append(f"`optim.{turn}`" + (f" ({listed})" if listed else ""))
    turns += [f"`optim.{head}` (by default as `optim.{turn}`)" for head, turn in distiller.heads.items()]
    return f"Optimisers: {', '.join(turns)}."


@pytest.mark.parametrize("name", SECTIONS)
def test_every_key_of_a_section_is_documented(name: str) -> None:
    documented = [tuple(row[:3]) for row in rows_of(section_of(CONFIGURATION, f"`{name}`"))]
    assert documented == keys_of(SECTIONS[name])


@pytest.mark.parametrize("name", method_names())
def test_every_option_of_a_method_is_documented(name: str) -> None:
    section = section_of(CONFIGURATION, f"`method: {{name: {name}}}`")
    assert [tuple(row[:3]) for row in rows_of(section)] == keys_of(find_method(name).Config)
    assert optim_text(name) in section


def test_no_method_is_documented_that_does_not_exist() -> None:
    documented = re.findall(r"^### `method: \{name: (\w+)\}`$", CONFIGURATION, re.MULTILINE)
    assert documented == sorted(method_names())


def test_every_renamed_key_is_documented() -> None:
    documented = dict(row[:2] for row in rows_of(section_of(CONFIGURATION, "Renamed keys")))
    assert documented == {f"`{old}`": f"`{new}`" for old, new in RENAMED.items()}


# ---------------------------------------------------------------------------------------- methods, teachers


def test_every_method_has_a_row_in_the_readme_and_in_methods() -> None:
    for path in (ROOT / "README.md", ROOT / "docs/METHODS.md"):
        assert set(method_names()) <= set(re.findall(r"^\| `?(\w+)`? \|", path.read_text(), re.MULTILINE)), path.name


def test_the_teachers_are_described_as_they_are() -> None:
    rows = {row[0]: row for row in rows_of(section_of((ROOT / "docs/TEACHERS.md").read_text(), "Families"))}
    assert set(rows) == {f"`{name}`" for name in families()}
    for name, family in families().items():
        row = rows[f"`{name}`"]
        assert re.findall(r"`(\w+)`", row[2]) == list(family.network_classes)
        assert re.findall(r"`(\w+)`", row[3]) == list(family.pipeline_names)
        assert row[4] == (
            "prompts" if family.takes_text else "class labels" if name == "dit" else "class labels or none"
        )
        lora = "yes" if family.loads_lora else "no"
        assert row[5] == ("where diffusers has a loader" if name == "observed" else lora)


def test_the_contract_of_every_sampler_is_documented() -> None:
    rows = {
        row[0]: row[1] for row in rows_of(section_of((ROOT / "docs/EXPORTS.md").read_text(), "The sampling contract"))
    }
    assert {sampler.name for sampler in Sampler.__subclasses__()} <= set(re.findall(r"`(\w+)`", rows["`sampler`"]))


# ---------------------------------------------------------------------------------------------- contributing


def test_the_map_names_every_room_in_floor_order() -> None:
    rooms = [row[:2] for row in rows_of(section_of(CONTRIBUTING, "Map"))]
    floors = [(str(floor), f"`{room}`") for floor, names in enumerate(FLOORS) for room in sorted(names)]
    assert [tuple(row) for row in rooms] == floors


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of the example method, as if its file lay in ``stepdistill/methods``."""
    (code,) = re.findall(r"^```python\n(.*?)^```", CONTRIBUTING, re.MULTILINE | re.DOTALL)
    (tmp_path / "example.py").write_text(code)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    yield "example"
    sys.modules.pop("stepdistill.methods.example", None)
    vars(methods).pop("example", None)


@pytest.mark.parametrize("bank", ["copy", "adapter"])
def test_the_example_method_trains_and_exports(example: str, bank: str, tmp_path: Path) -> None:
    configuration = sections(tmp_path / "run", teacher_for(example), example, bank, steps=30)
    run = Run(resolve(configuration))
    folder = run.train()
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["student/loss"] for row in rows if "student/loss" in row]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert len(load_pipeline(folder)(class_labels=[0, 1]).images) == 2


# ---------------------------------------------------------------------------------------- commands and links


def commands(text: str) -> Iterator[str]:
    """The lines of the code blocks that call a script or the console command."""
    for block in re.findall(r"^ *```(?:bash)?\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield line.split("  #")[0].strip()


def flags_of(command: str) -> set[str]:
    """The long flags that a command of the console has."""
    parser = make_parser()
    (subparsers,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return {flag for action in subparsers.choices[command]._actions for flag in action.option_strings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_have_the_flags_that_documents_give_them(path: Path) -> None:
    names = "train|generate|evaluate|compare|export|push|benchmark|report|demo"
    for line in commands(path.read_text()):
        found = re.search(rf"(?:stepdistill |scripts/)({names})(?:\.py)?(?= )(.*)", line)
        if found:
            wanted = set(re.findall(r"(?<=\s)--\w+", found.group(2)))
            assert wanted <= flags_of(found.group(1)), line


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_headings(path: Path) -> None:
    for target, heading in re.findall(r"\]\(([^)#:]*)#([\w-]+)\)", path.read_text()):
        text = (path.parent / target if target else path).read_text()
        assert heading in {anchor(found) for found in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}, heading


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_file_that_a_configuration_mentions_exists(path: Path) -> None:
    mentioned = re.findall(r"(?<![\w./-])(?:stepdistill|configs|scripts|tests|docs)/[\w./-]+\.\w+", path.read_text())
    assert [name for name in mentioned if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*_*.yaml")), ids=lambda path: path.name)
def test_every_configuration_says_from_what_it_trains_how_long_and_with_what_result(path: Path) -> None:
    header = path.read_text().partition("\n\n")[0]
    for label in () if path.stem == "pixel_dmd_pairs" else ("From:  ", "Time:  ", "Result:"):
        assert f"\n# {label} " in header, label
