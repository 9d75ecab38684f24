"""Options of commands that concern image files: --bits, --max-pixels, and notes on frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from spade_faiss.cli.main import cli
from spade_faiss.gallery.gallery import Gallery
from tests.helpers.command_line import TOY

RNG = np.random.default_rng(0)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(3):
        image = RNG.integers(0, 4096, (20, 30), dtype=np.uint16)
        Image.fromarray(image).save(tmp_path / "images" / f"{number}.png")
    return tmp_path / "images"


def test_bits(images: Path, tmp_path: Path) -> None:
    plain = run("build", tmp_path / "plain", images, *TOY)
    note = "note: 3 images with 16 bits a value, and no value above 4095"
    assert plain.exit_code == 0
    assert note in plain.stderr
    assert "build the gallery with --bits 12 (--bits 16 if not)" in plain.stderr
    assert note in run("query", tmp_path / "plain", images).stderr
    assert "note: 3 images" not in run("query", tmp_path / "plain", images, "--quiet").stderr
    chosen = run("build", tmp_path / "chosen", images, *TOY, "--bits", 12)
    assert chosen.exit_code == 0
    assert note not in chosen.stderr
    with Gallery.open(tmp_path / "chosen") as gallery:
        assert gallery.spec.bits == 12
    found = run("query", tmp_path / "chosen", images)
    assert found.exit_code == 0
    assert note not in found.stderr
    refused = run("build", tmp_path / "few", images, *TOY, "--bits", 10)
    assert refused.exit_code == 1 or refused.exit_code == 3
    again = run("build", tmp_path / "chosen", images, *TOY)
    assert "bits: expected 12, found 16" in str(again.exception)


@pytest.mark.slow
@pytest.mark.usefixtures("forked_workers")
def test_max_pixels(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)  # less than half: Pillow would refuse to open them
    for workers in (1, 2):
        refused = run("build", tmp_path / "g", images, *TOY, "--workers", workers)
        assert refused.exit_code == 1
        assert "expected at most 200 pixels, found more; if it is not an attack, set --max-pixels N" in refused.stderr
        built = run("build", tmp_path / f"g{workers}", images, *TOY, "--workers", workers, "--max-pixels", 600)
        assert (built.exit_code, Image.MAX_IMAGE_PIXELS) == (0, 200)  # only while the command ran
    assert run("query", tmp_path / "g1", images).exit_code == 3
    assert run("query", tmp_path / "g1", images, "--max-pixels", 600).exit_code == 0


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_more_frames_are_noted_once_for_a_run(tmp_path: Path, workers: int) -> None:
    (tmp_path / "in").mkdir()
    for number, suffix in enumerate(("tif", "png", "gif")):
        frames = [Image.fromarray(RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(2)]
        path = tmp_path / "in" / f"{number}.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
        frames[0].save(tmp_path / "in" / f"one{number}.png")
    files = sorted((tmp_path / "in").iterdir())
    said = "note: 3 images with several frames or pages: only the first of each was read"
    built = run("build", tmp_path / "g", *files, *TOY, "--workers", workers)
    assert built.exit_code == 0
    assert built.stderr.count(said) == 1
    assert run("query", tmp_path / "g", *files).stderr.count(said) == 1
