"""The house has an order: a room imports only from the rooms before it in ROOMS. CONTRIBUTING.md shows it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "spade_faiss"

GROUND = ("_version", "errors", "options", "recipes", "arrays")  # modules beside the rooms
ROOMS = (
    *GROUND, "system", "images", "extractors", "index", "store", "pyramids", "ingest", "gallery", "patch_search",
    "detect", "datasets", "metrics", "report", "evaluate", "cli",
)  # fmt: skip
ONLY = {  # rooms that stand on less than all of those before them
    "index": {*GROUND, "system"},
    "patch_search": {*GROUND, "system"},
    "datasets": {*GROUND, "system", "images"},
    "metrics": {*GROUND, "system"},
}


def imports(path: Path, package: Path = PACKAGE) -> Iterator[tuple[int, str]]:
    """Every import of a file from its own package, nested ones and those for types too: (line, dotted module)."""
    parts = path.relative_to(package.parent).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.startswith("spade_faiss"))
        elif isinstance(node, ast.ImportFrom):
            base = parts[: -node.level] if node.level else ()
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            if module.startswith("spade_faiss"):
                # `from . import a` names modules, `from .a import b` one module and what is in it.
                known = [".".join([module, alias.name]) for alias in node.names]
                yield from ((node.lineno, name if _is_module(name, package) else module) for name in known)


def _is_module(name: str, package: Path) -> bool:
    path = package.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def violations(package: Path = PACKAGE) -> list[str]:
    """Each import against the order, as a line that says where, what and why."""
    found = []
    for path in sorted(package.rglob("*.py")):
        own = path.relative_to(package).parts[0].removesuffix(".py")
        if own == "__init__":
            continue  # the contents page stands above all rooms
        where = path.relative_to(package.parent).as_posix()
        if own not in ROOMS:
            found.append(f"{where}: expected a room of ROOMS in {Path(__file__).name}, found {own}")
            continue
        allowed = ONLY.get(own, set(ROOMS[: ROOMS.index(own)])) | {own}
        for line, module in imports(path, package):
            if room_of(module) not in allowed:
                found.append(
                    f"{where}:{line}: {own} imports {module}, but may import only {', '.join(sorted(allowed))}"
                )
    return found


def circles(package: Path = PACKAGE) -> list[list[str]]:
    """Circles of imports between files, each as the modules along it."""
    edges: dict[str, set[str]] = {}
    for path in sorted(package.rglob("*.py")):
        name = ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
        if name.count(".") and path.name != "__init__.py":
            edges[name] = {module for _, module in imports(path, package)}
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> None:
        if name in trail:
            found.append(trail[trail.index(name) :])
        elif name not in done:
            for other in sorted(edges.get(name, ())):
                visit(other, [*trail, name])
            done.add(name)

    for name in edges:
        visit(name, [])
    return found


def test_no_room_imports_from_above_it() -> None:
    assert violations() == []


def test_no_circles_of_imports() -> None:
    assert circles() == []


def test_rooms_are_what_is_there() -> None:
    there = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()} - {"__init__", "__pycache__", "py.typed"}
    assert there == set(ROOMS)


@pytest.mark.parametrize(
    ("room", "line", "names"),
    [
        ("store", "from ..detect.detector import Detector", "spade_faiss.detect.detector"),
        ("patch_search", "from ..index import image_index", "spade_faiss.index.image_index"),
        ("images", "import spade_faiss.store.manifest", "spade_faiss.store.manifest"),
        ("system", "def f() -> None:\n    from ..cli import main", "spade_faiss.cli.main"),
        ("metrics", "from spade_faiss.datasets.category import Category", "spade_faiss.datasets.category"),
    ],
)
def test_an_import_against_the_order_is_named(tmp_path: Path, room: str, line: str, names: str) -> None:
    package = tmp_path / "spade_faiss"
    for path in PACKAGE.rglob("*.py"):
        (package / path.relative_to(PACKAGE)).parent.mkdir(parents=True, exist_ok=True)
        (package / path.relative_to(PACKAGE)).write_text("")
    (package / room / "new.py").write_text(f"{line}\n")
    [found] = violations(package)
    assert found.startswith(f"spade_faiss/{room}/new.py:{line.count(chr(10)) + 1}: {room} imports {names}, but may")


def test_a_circle_is_named(tmp_path: Path) -> None:
    room = tmp_path / "spade_faiss" / "store"
    room.mkdir(parents=True)
    (room / "a.py").write_text("from .b import x\n")
    (room / "b.py").write_text("from . import a\n")
    assert circles(room.parent) == [["spade_faiss.store.a", "spade_faiss.store.b"]]
