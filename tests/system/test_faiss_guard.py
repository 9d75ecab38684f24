"""An installation of FAISS of which part is gone is named in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PARTS = {
    "nothing in it": "",
    "a compiled part that is gone": "from .swigfaiss import *",
    "another module": "class IndexFlatL2: pass",
}


@pytest.mark.parametrize("name", PARTS)
def test_half_uninstalled_faiss(name: str, tmp_path: Path) -> None:
    """faiss-cpu and faiss-gpu are both the module faiss: pip removes the files of one (FAISS's INSTALL.md)."""
    (tmp_path / "faiss").mkdir()
    (tmp_path / "faiss" / "__init__.py").write_text(PARTS[name])
    places = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    command = [sys.executable, "-c", "import spade_faiss"]
    env = {**os.environ, "PYTHONPATH": places}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: faiss: expected faiss-cpu or faiss-gpu, ")
    assert last.endswith("install exactly one: pip uninstall faiss-cpu faiss-gpu; pip install faiss-cpu (or faiss-gpu)")
    assert "During handling" not in done.stderr
