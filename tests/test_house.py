"""No room imports from above it, there are no circles, and files and functions stay small: see house.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.house import BESIDE, PACKAGE, ROOMS, WITHIN, circles, oversized, violations


def test_no_room_imports_from_above_it() -> None:
    assert violations() == []


def test_no_circles_of_imports() -> None:
    assert circles() == []


def test_files_and_functions_are_small() -> None:
    assert oversized() == []


def test_rooms_are_what_is_there() -> None:
    there = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()} - {"__init__", "__pycache__", "py.typed"}
    assert there == set(ROOMS)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The rooms and files of the package, all empty."""
    for path in PACKAGE.rglob("*.py"):
        empty = tmp_path / "spade_faiss" / path.relative_to(PACKAGE)
        empty.parent.mkdir(parents=True, exist_ok=True)
        empty.touch()
    return tmp_path / "spade_faiss"


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
def test_an_import_against_the_order_is_named(package: Path, room: str, line: str, names: str) -> None:
    (package / room / "new.py").write_text(f"{line}\n")
    [found] = violations(package)
    assert found.startswith(f"spade_faiss/{room}/new.py:{line.count(chr(10)) + 1}: {room} imports {names}, but may")


def test_an_import_against_the_order_within_a_room_is_named(package: Path) -> None:
    inner = package / "patch_search" / "bounds"
    (inner / "new.py").write_text("from ..pyramid.plan import Plan\nfrom ..gpu import search\n")
    (package / "patch_search" / "new.py").write_text("from .gpu import search\n")
    assert violations(package) == [
        "spade_faiss/patch_search/bounds/new.py:2: bounds imports spade_faiss.patch_search.gpu.search, "
        "which comes after it in patch_search"
    ]


def test_rooms_within_a_room_are_what_is_there() -> None:
    there = {path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*/*/*.py")}
    assert there == {f"{room}/{inner}" for room, some in WITHIN.items() for inner in some}


def test_a_room_that_is_not_in_the_order_is_named(package: Path) -> None:
    (package / "attic").mkdir()
    (package / "attic" / "new.py").touch()
    assert "found attic" in violations(package)[0]


def test_a_circle_is_named(package: Path) -> None:
    (package / "store" / "a.py").write_text("from .b import x\n")
    (package / "store" / "b.py").write_text("from . import a\n")
    assert circles(package) == [["spade_faiss.store.a", "spade_faiss.store.b"]]


def test_what_is_too_large_is_named(package: Path) -> None:
    (package / "store" / "a.py").write_text("\n" * 401)
    (package / "store" / "b.py").write_text("def long():\n" + "    x = 1\n" * 70)
    (package / "store" / "c.py").write_text("class A:\n    def f(self, a, b, c, d, e, f, *, g): ...\n")
    (package / "store" / "d.py").write_text("@jit\ndef f(a, b, c, d, e, f, g): ...\n")  # a kernel
    (package / "store" / "e.py").write_text("class Public:\n    def f(self, a, b, c, d, e, f, g): ...\n")
    (package / "__init__.py").write_text('__all__ = ["Public"]\n')
    assert [line.partition(": ")[2] for line in oversized(package)] == [
        "401 lines, more than 400",
        "long: 71 lines, more than 70",
        "f: 7 parameters, more than 6",
    ]


@pytest.mark.parametrize("folder", BESIDE)
def test_what_is_too_long_beside_the_package_is_named(package: Path, folder: str) -> None:
    assert any((PACKAGE.parent / folder).glob("**/*.py"))
    beside = package.parent / folder / "deeper"
    beside.mkdir(parents=True)
    (beside / "a.py").write_text("\n" * 401)
    (beside / "b.py").write_text("def long():\n" + "    x = 1\n" * 70)
    (beside / "c.py").write_text("def test(a, b, c, d, e, f, g): ...\n")  # as many as it has fixtures and cases
    assert oversized(package) == [
        f"{folder}/deeper/a.py: 401 lines, more than 400",
        f"{folder}/deeper/b.py:1: long: 71 lines, more than 70",
    ]
