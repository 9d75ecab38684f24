"""Machine code that is kept for later processes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from spade_faiss.patch_search import pyramid_simd


def test_machine_code_is_not_taken_where_any_source_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller holds the code of what it calls, which may be in another file."""
    (tmp_path / "added.py").write_text("def add(a, b):\n    return a + b\n")
    spec: Any = importlib.util.spec_from_file_location("added", tmp_path / "added.py")
    added = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(added)

    def is_taken() -> bool:
        compiled: Any = pyramid_simd.jit(added.add)
        assert compiled(2, 3) == 5
        return sum(compiled.stats.cache_hits.values()) == 1

    assert not is_taken()
    assert is_taken()
    now = pyramid_simd.sources()
    monkeypatch.setattr(pyramid_simd, "sources", lambda: (*now[1:], (now[0][0], now[0][1] + 1, now[0][2])))
    assert not is_taken()
    assert is_taken()
    monkeypatch.undo()
    assert not is_taken()


def test_all_files_are_looked_at() -> None:
    names = {name for name, _, _ in pyramid_simd.sources()}
    assert {"bounds_kernels.py", "bounds_panels.py", "pyramid_simd.py"} <= names
