"""Guards of the project itself: what the code must never contain, what its files must always be."""

import ast
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from packaging.requirements import Requirement
from packaging.version import Version

from stepdistill.benchmark.config import BenchmarkConfig
from stepdistill.benchmark.demo import demo_of
from stepdistill.config import read_config
from stepdistill.data.base import DataConfig
from stepdistill.data.latent_cache import CacheConfig
from stepdistill.data.ode_pairs import PairsConfig
from stepdistill.families.config import TeacherConfig
from stepdistill.files.reading import parse_yaml
from stepdistill.files.schema import build
from stepdistill.pretraining.pixel import PretrainConfig
from stepdistill.pretraining.text_to_image import TextTeacherConfig
from stepdistill.training.config import resolve

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("stepdistill", "pipelines", "scripts") for path in (ROOT / folder).rglob("*.py"))


# ------------------------------------------------------------------------------------------ forbidden code


def calls(*names: str) -> Callable[[ast.AST], bool]:
    return lambda node: isinstance(node, ast.Call) and ast.unparse(node.func) in names


def passes(keyword: str, value: bool) -> Callable[[ast.AST], bool]:
    return lambda node: (
        isinstance(node, ast.keyword)
        and node.arg == keyword
        and isinstance(node.value, ast.Constant)
        and node.value.value is value
    )


def is_bare_except(node: ast.AST) -> bool:
    return isinstance(node, ast.ExceptHandler) and node.type is None


# what: (does a syntax node do it?, the only files that may, an example that does)
FORBIDDEN = {
    "unpickle": (calls("pickle.load", "pickle.loads", "pickle.Unpickler"), (), "pickle.load(file)"),
    "load any object": (passes("weights_only", False), (), "torch.load(path, weights_only=False)"),
    "load lax YAML": (calls("yaml.load", "yaml.safe_load"), ("stepdistill/files/reading.py",), "yaml.load(text)"),
    "evaluate text": (calls("eval", "exec"), (), "eval(text)"),
    "catch everything": (is_bare_except, (), "try: pass\nexcept: pass"),
    "run remote code": (
        passes("trust_remote_code", True),
        ("stepdistill/loading/__init__.py", "stepdistill/loading/code.py"),
        "load(path, trust_remote_code=True)",
    ),
}


@pytest.mark.parametrize(("found", "allowed", "example"), FORBIDDEN.values(), ids=FORBIDDEN)
def test_the_code_does_not(found: Callable[[ast.AST], bool], allowed: tuple[str, ...], example: str) -> None:
    assert any(map(found, ast.walk(ast.parse(example)))), "the guard itself is blind"
    sources = (path for path in SOURCES if path.relative_to(ROOT).as_posix() not in allowed)
    offenders = [path.relative_to(ROOT) for path in sources if any(map(found, ast.walk(ast.parse(path.read_text()))))]
    assert not offenders


def test_exported_pipelines_do_not_need_the_package() -> None:
    importing = re.compile(r"^\s*(from|import)\s+(stepdistill|\.)", re.MULTILINE)
    assert not [path.name for path in (ROOT / "pipelines").glob("*.py") if importing.search(path.read_text())]


# --------------------------------------------------------------------------------------------------- files


def read_as_its_command_does(mapping: dict[str, Any]) -> None:
    """Resolve a configuration of ``configs/`` with the function of the command that takes it; open no path."""
    if "demo" in mapping:
        demo_of(mapping)
    elif "pairs" in mapping:
        assert mapping.keys() == {"teacher", "pairs"}
        build(TeacherConfig, mapping["teacher"], "teacher")
        build(PairsConfig, mapping["pairs"], "pairs")
    elif "students" in mapping:
        build(BenchmarkConfig, mapping)
    elif "vae" in mapping:
        build(TextTeacherConfig, mapping)
    elif "model" in mapping:
        build(PretrainConfig, mapping)
    else:
        resolve(mapping)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_configuration_resolves(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_file", lambda path: True)  # data that is not here is not opened either
    mapping = parse_yaml(path.read_text())
    read_as_its_command_does(mapping)


def test_the_cache_of_a_configuration_resolves() -> None:
    """``scripts/cache.py`` reads the data of a training and a section that the command line gives."""
    sections = read_config(ROOT / "configs/sd_lcm_lora.yaml", ["cache.output_dir=cache"])
    build(DataConfig, sections["data"], "data")
    build(CacheConfig, sections["cache"], "cache")


@pytest.mark.parametrize("path", sorted((ROOT / "configs/accelerate").glob("*.yaml")), ids=lambda path: path.name)
def test_every_launch_file_is_one_of_accelerates(path: Path) -> None:
    load_config_from_file(str(path))


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.name)
def test_scripts_only_parse_build_and_run(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 60


def project_texts() -> Iterator[tuple[str, str]]:
    """The files that are, or are about to be, under version control, where they are text."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and b"\0" not in (content := path.read_bytes()):
            yield name, content.decode()


def test_no_file_names_a_machine() -> None:
    somewhere = re.compile(
        r"(?<![\w.~-])/(work|tmp|home|root|opt|mnt|usr/(share|local))/|(pypi|pythonhosted|download\.pytorch)\.org"
    )
    assert somewhere.search(" /" + "tmp/x")
    assert [(name, match.group()) for name, text in project_texts() if (match := somewhere.search(text))] == []


# ----------------------------------------------------------------------------------------------- packaging


def test_importing_the_package_is_quick() -> None:
    """`stepdistill` alone must not pull in what takes seconds: a command's --help answers at once."""
    program = (
        "import stepdistill, sys; print(*{'torch', 'diffusers', 'transformers', 'torchmetrics'} & set(sys.modules))"
    )
    imported = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert imported.stdout.split() == []


def test_every_package_is_installed() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "stepdistill").rglob("*.py")}
    assert set(setuptools["packages"]) == {name.replace("/", ".") for name in found} | {"stepdistill.pipelines"}


def test_pipelines_install_as_a_subpackage() -> None:
    try:
        importlib.metadata.distribution("stepdistill")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("stepdistill is on the path but not installed")
    assert importlib.util.find_spec("stepdistill.pipelines") is not None


# ------------------------------------------------------------------------------------------------- libraries

SAFE = {"torch": "2.10", "diffusers": "0.38", "transformers": "5.3", "pillow": "12.3", "safetensors": "0.4.3"}
"""The first versions without known holes in what this package calls, see docs/SECURITY.md."""


def test_no_version_with_known_holes_is_admitted() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    floors = {}
    for text in project["dependencies"]:
        requirement = Requirement(text)
        floors[requirement.name] = max(Version(part.version) for part in requirement.specifier if part.operator == ">=")
    assert [name for name, safe in SAFE.items() if floors[name] < Version(safe)] == []
    pinned = dict(re.findall(r"^([\w-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert [name for name, floor in floors.items() if Version(pinned[name.lower()]) < floor] == []
