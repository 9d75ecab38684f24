"""Machine code that is kept for later processes."""

from __future__ import annotations

import gc
import importlib.util
import logging
import sys
from pathlib import Path
from typing import Any

import numba
import pytest

from spade_faiss.patch_search import compiled


def loop_in(folder: Path, module: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function in a file of its own, which nothing has compiled.

    Its module can be imported: what is kept of a function is taken by that, once nobody has the function any more.
    """
    (folder / "added.py").write_text("def add(a, b):\n    return a + b\n")
    spec: Any = importlib.util.spec_from_file_location(module, folder / "added.py")
    added = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, module, added)
    spec.loader.exec_module(added)
    return added.add


def test_machine_code_is_not_taken_where_any_source_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller holds the code of what it calls, which may be in another file."""
    add = loop_in(tmp_path, "added", monkeypatch)

    def is_taken() -> bool:
        function: Any = compiled.jit(add)
        assert function(2, 3) == 5
        return sum(function.stats.cache_hits.values()) == 1

    assert not is_taken()
    gc.collect()
    assert is_taken()
    now = compiled.sources()
    monkeypatch.setattr(compiled, "sources", lambda: (*now[1:], (now[0][0], now[0][1] + 1, now[0][2])))
    assert not is_taken()
    assert is_taken()
    monkeypatch.undo()
    assert not is_taken()


def test_all_files_are_looked_at() -> None:
    names = {name for name, _, _ in compiled.sources()}
    assert {"bounds/kernels.py", "bounds/panels.py", "compiled.py", "flat.py"} <= names


def said_of(function: Any, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What a process that has said nothing logs while a function is made for two types."""
    caplog.clear()
    compiled.announcer.said = False
    with caplog.at_level(logging.INFO, "spade_faiss"):
        assert function(2, 3) == 5
        assert function(2.0, 3) == 5
    return caplog.messages


def test_the_log_says_once_that_loops_are_compiled_and_whether_they_are_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = loop_in(tmp_path, "spade_faiss.added", monkeypatch)
    (line,) = said_of(compiled.jit(add), caplog)
    assert line.endswith("they are kept for later runs")
    gc.collect()
    assert not said_of(compiled.jit(add), caplog), "what is taken from the folder takes no time"
    assert not said_of(numba.njit(loop_in(tmp_path, "somebody.added", monkeypatch)), caplog), "not ours to speak of"

    def njit(**options: Any) -> Any:
        if "cache" in options:
            raise RuntimeError("cannot cache function: no locator available")
        return original(**options)

    original = numba.njit
    monkeypatch.setattr(numba, "njit", njit)
    (line,) = said_of(compiled.jit(add), caplog)
    assert "set NUMBA_CACHE_DIR" in line
