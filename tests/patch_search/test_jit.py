"""Machine code that is kept for later processes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from spade_faiss.patch_search import compiled


def test_machine_code_is_not_taken_where_any_source_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller holds the code of what it calls, which may be in another file."""
    (tmp_path / "added.py").write_text("def add(a, b):\n    return a + b\n")
    spec: Any = importlib.util.spec_from_file_location("added", tmp_path / "added.py")
    added = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(added)

    def is_taken() -> bool:
        function: Any = compiled.jit(added.add)
        assert function(2, 3) == 5
        return sum(function.stats.cache_hits.values()) == 1

    assert not is_taken()
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
