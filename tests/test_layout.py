"""Where things are: rooms import only rooms on lower floors, and documents name paths that exist."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "stepdistill"

FLOORS = (
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
