"""Who may import whom: rooms stand above each other, and nothing imports in a circle."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import autoprune

PACKAGE = Path(autoprune.__file__).parent

# A room imports from those before it. Rooms of one line do not know each other.
ROOMS = (
    {"errors", "files", "families", "images", "quiet_imports"},
    {"policy"},
    {"contract", "trace"},
    {"parts"},
    {"engine"},
    {"methods"},
    {"models", "tiny", "viz"},
    {"loading"},
    {"bench", "evaluation", "serving"},
    {"tuning"},
    {"commands"},
    {"web"},
    {"cli"},
    {"__main__", "llava_eval"},
)
RANK = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}

# Who may import transformers: the engine, what loads models, and what measures them.
KNOW_TRANSFORMERS = {
    "engine",
    "models",
    "tiny",
    "loading",
    "bench",
    "evaluation",
    "serving",
    "tuning",
    "commands",
    "web",
}


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Every module by its name without "autoprune."."""
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found.pop("", None)
    return found


def imports_of(name: str, path: Path, known: set[str]) -> tuple[set[str], set[str]]:
    """Modules of the package that a module imports anywhere in its file, and other packages."""
    here = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            wanted = [(alias.name.split("."), None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                base = ["autoprune", *here[: len(here) - node.level + 1], *base]
            wanted = [(base, alias.name) for alias in node.names]
        else:
            continue
        for base, name_in_it in wanted:
            if base[0] != "autoprune":
                outside.add(base[0])
                continue
            whole = ".".join([*base[1:], name_in_it or ""]).strip(".")
            inside.add(whole if whole in known else ".".join(base[1:]))
    return inside & known - {name}, outside


def graph(package: Path = PACKAGE) -> dict[str, tuple[set[str], set[str]]]:
    found = modules(package)
    return {name: imports_of(name, path, set(found)) for name, path in found.items()}


def wrong_imports(edges: dict[str, set[str]]) -> list[str]:
    """Imports from a room that does not stand below."""
    room = {name: name.split(".")[0] for name in edges}
    return [
        f"{name} imports {other}"
        for name, others in edges.items()
        for other in others
        if room[name] != room[other] and RANK[room[other]] >= RANK[room[name]]
    ]


def test_every_module_is_in_a_room():
    assert {name.split(".")[0] for name in modules()} == set(RANK)


def test_rooms_import_only_from_those_below():
    assert wrong_imports({name: inside for name, (inside, _) in graph().items()}) == []


def test_nothing_imports_in_a_circle():
    try:
        TopologicalSorter({name: inside for name, (inside, _) in graph().items()}).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_only_the_engine_and_what_loads_models_know_transformers():
    knowing = {name for name, (_, outside) in graph().items() if "transformers" in outside}
    assert {name.split(".")[0] for name in knowing} <= KNOW_TRANSFORMERS


def test_a_method_touches_no_part_of_the_engine():
    """Methods are decided upon what they are shown; only their base class starts the engine."""
    engine = {
        name: {other for other in inside if other.startswith("engine")}
        for name, (inside, _) in graph().items()
        if name.startswith("methods.")
    }
    assert {name: parts for name, parts in engine.items() if parts} == {
        "methods.base": {"engine.attach"}
    }


@pytest.mark.parametrize("page", ["docs/ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_pages_name_files_that_exist(page):
    text = (PACKAGE.parent / page).read_text("utf-8")
    named = {name for name in re.findall(r"[\w/]+\.py\b|[\w/]+/(?=[`<])", text) if "/" in name}
    roots = [PACKAGE, PACKAGE.parent, PACKAGE.parent / "docs"]
    assert named
    assert {name for name in named if not any((root / name).exists() for root in roots)} == set()


def test_what_imports_upwards_is_found(tmp_path):
    for name, text in {
        "policy/cost.py": "def f():\n    from ..methods import base\n",
        "methods/__init__.py": "",
        "methods/base.py": "from autoprune.policy.cost import f\n",
        "policy/__init__.py": "",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    edges = {name: inside for name, (inside, _) in graph(tmp_path).items()}
    assert wrong_imports(edges) == ["policy.cost imports methods.base"]
    with pytest.raises(CycleError):
        TopologicalSorter(edges).prepare()
