"""What the package promises by name: its contents page, its errors, and that it is quick to import."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

import pytest

import spade_faiss
from spade_faiss import errors

ERRORS = {
    name: value
    for name, value in vars(errors).items()
    if inspect.isclass(value) and value.__module__ == errors.__name__
}


def tree() -> dict[str, tuple[str | None, str | None]]:
    """The tree in the docstring of errors.py: name -> (parent, builtin)."""
    found: dict[str, tuple[str | None, str | None]] = {}
    above: list[tuple[int, str]] = []  # (column, name) of the branch that leads to a line
    for line in str(errors.__doc__).splitlines():
        match = re.match(r"(?P<branch>[│├└─ ]*)(?P<name>\w+Error)\b\s*(\((?P<builtin>\w+)\))?", line)
        if match:
            column = len(match["branch"])
            above = [(other, name) for other, name in above if other < column]
            found[match["name"]] = (above[-1][1] if above else None, match["builtin"])
            above.append((column, match["name"]))
    return found


def test_contents_page_is_sorted_and_complete() -> None:
    names = spade_faiss.__all__
    assert names == sorted(set(names), key=lambda name: (not name.isupper(), name))  # constants first
    assert [name for name in names if not hasattr(spade_faiss, name)] == []
    public = {n for n, v in vars(spade_faiss).items() if not n.startswith("_") and not inspect.ismodule(v)}
    assert public == set(names)  # nothing is there by accident


def test_everything_public_says_what_it_is() -> None:
    assert [name for name in spade_faiss.__all__ if not inspect.getdoc(getattr(spade_faiss, name))] == []


def test_every_error_is_exported() -> None:
    assert set(ERRORS) <= set(spade_faiss.__all__)


def test_error_tree_is_as_drawn() -> None:
    drawn = tree()
    assert set(drawn) == set(ERRORS)
    for name, (parent, builtin) in drawn.items():
        bases = [base for base in (parent, builtin) if base is not None]
        assert [base.__name__ for base in ERRORS[name].__bases__] == (bases or ["Exception"]), name


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_caught_as_their_builtin_and_say_their_message(name: str) -> None:
    builtin = next(base for base in ERRORS[name].__mro__ if base.__module__ == "builtins")
    with pytest.raises(builtin) as caught:
        raise ERRORS[name]("a.png: expected x, found y")
    assert isinstance(caught.value, errors.SpadeError)
    assert str(caught.value) == "a.png: expected x, found y"


@pytest.mark.slow
@pytest.mark.parametrize("module", ["spade_faiss", "spade_faiss.cli"])
def test_import_does_not_wait_for_what_few_need(module: str) -> None:
    slow = {"torch", "timm", "torchvision", "numba", "scipy.ndimage", "scipy.sparse", "jinja2", "tqdm", "tifffile"}
    program = f"import sys, {module}; print(*sorted({slow} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout.strip(), run.stderr) == (0, "", "")
