"""Worker processes of a program that they cannot import: read from standard input, or deleted meanwhile."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PROGRAM = """
import pathlib, sys
import spade_faiss as sf
if {deleted}:
    pathlib.Path(__file__).unlink()
if __name__ == "__main__":
    toy = sf.load_extractor("toy")
    gallery = sf.Gallery.create("g", toy.spec)
    try:
        print(gallery.add_images("images", toy, workers=2).added, "added")
    except sf.SpadeError as error:
        print(type(error).__name__, error)
"""


def run(folder: Path, *arguments: str, stdin: str = "") -> str:
    (folder / "images").mkdir()
    for number in range(3):
        Image.fromarray(np.full((16, 16, 3), 50 * number, np.uint8)).save(folder / "images" / f"{number}.png")
    command = [sys.executable, *arguments]
    done = subprocess.run(command, input=stdin, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    assert done.stderr == ""
    return done.stdout


SAID = "OptionError workers: expected a program in a file, because each worker process imports it, found {}; save the "


def test_standard_input_is_named(tmp_path: Path) -> None:
    """Python's manual (multiprocessing, "Safe importing of main module") says that the main module is imported."""
    said = run(tmp_path, "-", stdin=PROGRAM.format(deleted=False))
    assert said.startswith(SAID.format("<stdin>"))
    assert "__main__" not in said
    assert said.endswith("or use workers=1\n")


@pytest.mark.slow
def test_program_that_is_gone_is_named(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM.format(deleted=True))
    assert run(tmp_path, "program.py").startswith(SAID.format(tmp_path / "program.py"))


@pytest.mark.slow
def test_command_of_python_needs_no_file(tmp_path: Path) -> None:
    assert run(tmp_path, "-c", PROGRAM.format(deleted=False)) == "3 added\n"
