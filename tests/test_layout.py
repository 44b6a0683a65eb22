"""Where things are: rooms import only rooms on lower floors, and documents name paths that exist."""

import ast
import graphlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "stepdistill"

FLOORS = (
    {"files"},
    {"assets", "batch", "config", "loading", "randomness"},
    {"diffusion"},
    {"families"},
    {"networks", "export"},
    {"data", "features", "losses"},
    {"discriminators", "pretraining"},
    {"methods"},
    {"inference"},
    {"evaluation"},
    {"training"},
    {"benchmark"},
    {"cli"},
)
"""Each room imports only rooms on floors above it in this list, never one beside it."""
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """Every module but the package's own ``__init__``, by its name without ``stepdistill.``."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    del found[""]
    return found


def imports(source: str, known: set[str]) -> set[str]:
    """What a module imports of the package, also inside functions and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "stepdistill":
            names = [f"{node.module}.{alias.name}".partition(".")[2] for alias in node.names]
            found |= {name if name in known else name.rpartition(".")[0] for name in names}
        elif isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2] for a in node.names if a.name.startswith("stepdistill.")}
    return {name for name in found if name and name.split(".")[0] != "pipelines"}


def violations(graph: dict[str, set[str]]) -> list[str]:
    """Imports of a room on the same floor or above."""
    found = []
    for module, imported in graph.items():
        for other in sorted(imported):
            room, target = module.split(".")[0], other.split(".")[0]
            if room != target and FLOOR[target] >= FLOOR[room]:
                found.append(f"{module} imports {other}")
    return found


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(path.read_text(), set(known)) - {name} for name, path in known.items()}


def test_every_room_has_a_floor(graph: dict[str, set[str]]) -> None:
    assert {name.split(".")[0] for name in graph} == set(FLOOR)


def test_rooms_import_lower_floors_only(graph: dict[str, set[str]]) -> None:
    assert violations(graph) == []


def test_no_import_cycle(graph: dict[str, set[str]]) -> None:
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle


def test_a_broken_floor_is_found() -> None:
    source = "def f():\n    from stepdistill.training.run import Run\n"
    assert imports(source, {"training.run"}) == {"training.run"}
    assert violations({"losses.regression": {"training.run"}}) == ["losses.regression imports training.run"]


def test_the_root_is_small() -> None:
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= 8


# ------------------------------------------------------------------------------------------------ size

LONGEST_FILE, LONGEST_FUNCTION = 350, 50
PER_THOUSAND_LINES = {"type checks": 5, "comprehensions": 20}
"""At most so many over the whole package: more of the first want polymorphism, of the second plain loops."""
IMPORTED_NAMES = {"dmd2": 20, "lcm": 14}
"""A method file imports fewer names than this: what is not in its algorithm box belongs in the base."""
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return {name: path.read_text() for name, path in modules().items()}


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Yield every function of a module and its number of lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


def count(source: str) -> dict[str, int]:
    """Count the calls of ``isinstance`` and the class patterns of ``match``, and the comprehensions of a module."""
    found = dict.fromkeys(PER_THOUSAND_LINES, 0)
    for node in ast.walk(ast.parse(source)):
        found["comprehensions"] += isinstance(node, COMPREHENSIONS)
        found["type checks"] += isinstance(node, ast.MatchClass)
        found["type checks"] += isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance"
    return found


def imported_names(source: str) -> int:
    """Count the names that a module imports, without ``__future__``."""
    names = 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.module != "__future__"):
            names += len(node.names)
    return names


def test_files_and_functions_are_short(sources: dict[str, str]) -> None:
    long = [name for name, source in sources.items() if len(source.splitlines()) > LONGEST_FILE]
    for name, source in sources.items():
        long += [f"{name}.{function}" for function, lines in functions(source) if lines > LONGEST_FUNCTION]
    assert long == []


@pytest.mark.parametrize("what", PER_THOUSAND_LINES)
def test_type_checks_and_comprehensions_are_few(sources: dict[str, str], what: str) -> None:
    lines = sum(len(source.splitlines()) for source in sources.values())
    assert sum(count(source)[what] for source in sources.values()) <= PER_THOUSAND_LINES[what] * lines / 1000


@pytest.mark.parametrize(("method", "limit"), IMPORTED_NAMES.items())
def test_a_method_imports_few_names(sources: dict[str, str], method: str, limit: int) -> None:
    assert imported_names(sources[f"methods.{method}"]) < limit


def test_what_is_counted() -> None:
    source = "import a, b\nfrom c import d\n\ndef f(x):\n    return [y for y in x if isinstance(y, int)]\n"
    assert count(source) == {"type checks": 1, "comprehensions": 1}
    assert count("match x:\n    case int():\n        pass\n")["type checks"] == 1
    assert list(functions(source)) == [("f", 2)] and imported_names(source) == 3


# ------------------------------------------------------------------------------------------- documents

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCE_SUFFIXES = {".py", ".md", ".yaml", ".toml"}
"""Endings of files that are written by hand. Other bare names in documents are files that a run or a user makes."""
PLACEHOLDERS = ("runs/", "path/to/", "data/")
"""Beginnings of paths that stand for a user's own files or for what a command writes."""
WRITTEN_BY_RUNS = {"config.yaml"}
"""Names with a source suffix that belong to the output folder of a run."""


def named_paths(text: str) -> Iterator[str]:
    """Yield the paths that a document names in code: words of fenced blocks and of backticks, without placeholders.

    A word counts if it starts with a top-level folder of the repository or ends as source files do. The value of
    ``key=value`` is such a word, ``{a,b}`` names two paths, and ``<name>`` stands for any name.
    """
    folders = tuple(f"{path.name}/" for path in ROOT.iterdir() if path.is_dir())
    for code in re.findall(r"```.*?```|`[^`]+`", text, re.DOTALL):
        for word in re.findall(r"(?:[\w./*-]|<\w+>|\{[\w,]+\})+", code):
            for path in alternatives(re.sub(r"<\w+>", "*", word).rstrip(".")):
                is_source = Path(path).suffix in SOURCE_SUFFIXES and Path(path).stem.strip(".") != ""
                if path.startswith(PLACEHOLDERS) or path in WRITTEN_BY_RUNS:
                    continue
                if is_source or path.startswith(folders):
                    yield path


def alternatives(word: str) -> list[str]:
    """Return every reading of a word with ``{a,b}`` in it, as the shell has them."""
    parts = re.split(r"\{([\w,]+)\}", word)
    choices = [part.split(",") if place % 2 else [part] for place, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def named_links(text: str) -> set[str]:
    """Return the relative targets of links and pictures."""
    targets = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    plain = {(link or picture).partition("#")[0] for link, picture in targets}
    return {target for target in plain if target and "://" not in target}


def exists(path: str) -> bool:
    """Whether the repository has a path, named from its root or by its last parts, with ``*`` for any name."""
    if any(ROOT.glob(path)):
        return True
    folders = ("configs", "docs", "pipelines", "scripts", "stepdistill", "tests")
    return any(next((ROOT / folder).rglob(path), None) for folder in folders)


def missing_paths(text: str, folder: Path) -> list[str]:
    """Return what a document in ``folder`` names and the repository does not have."""
    code = {path for path in named_paths(text) if not exists(path)}
    return sorted(code | {link for link in named_links(text) if not (folder / link).exists()})


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_that_a_document_names_exists(document: Path) -> None:
    assert missing_paths(document.read_text(), document.parent) == []


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("`stepdistill/nowhere.py`", ["stepdistill/nowhere.py"]),
        ("see `nowhere.py`, and `trainer.py`.", ["nowhere.py"]),
        ("```bash\npython scripts/nowhere.py --config configs/demo.yaml\n```", ["scripts/nowhere.py"]),
        ("`--config=configs/nowhere.yaml`", ["configs/nowhere.yaml"]),
        ("`configs/{demo,nowhere}.yaml`", ["configs/nowhere.yaml"]),
        ("`stepdistill/methods/<name>.py` and `nowhere/<name>.py`", ["nowhere/*.py"]),
        ("[a](docs/NOWHERE.md), [b](docs/RESULTS.md#top), [c](https://a.org/b.md)", ["docs/NOWHERE.md"]),
        ('<img src="docs/nowhere.png">', ["docs/nowhere.png"]),
        ("`runs/a/b.yaml`, `path/to/images.py`, `data/c.py`, `config.yaml`, `.py`, `fake/denoising`", []),
    ],
)
def test_a_path_that_is_not_there_is_found(text: str, missing: list[str]) -> None:
    assert missing_paths(text, ROOT) == missing
