"""Large images on the command line: build --tile, and what the other commands say of such a gallery."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.command_line import Spade
from tests.helpers.images import make_images

pytestmark = pytest.mark.slow  # `make test-fast` has test_tiles.py


@pytest.fixture
def strips(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "strips").mkdir()
    for number in range(12):
        pixels = rng.normal(120, 12, (40, 120, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "strips" / f"{number:03d}.png")
    return tmp_path / "strips"


@pytest.fixture
def tiled(tmp_path: Path, strips: Path, spade: Spade) -> Path:
    options = "--extractor", "toy", "--image-size", 64, "--tile", "40x48", "--overlap", 8
    found = spade("build", tmp_path / "g", strips, *options, "--quiet")
    assert found.status == 0
    assert "12 added (0 replaced), 0 unchanged, 0 skipped; 36 tiles in" in found.out
    return tmp_path / "g"


def test_from_strips_to_verdicts(tmp_path: Path, strips: Path, tiled: Path, spade: Spade) -> None:
    info = spade("info", tiled).out
    assert "tiles      36 (0 removed and not yet compacted), no copies" in info
    assert "tiling     larger images in tiles of 40x48 px, which share 8 px" in info
    assert json.loads(spade("info", tiled, "--json").out)["extractor"]["tile"] == [40, 48]
    calibrated = spade("calibrate", tiled, "--false-alarms", 0.1, "--quiet")
    assert (calibrated.status, calibrated.err) == (0, "")
    assert calibrated.out.startswith("12 images: image score above")
    pixels = np.array(Image.open(strips / "003.png"))
    pixels[8:28, 80:100] = (250, 0, 250)
    (tmp_path / "test").mkdir()
    Image.fromarray(pixels).save(tmp_path / "test" / "bad.png")
    found = spade("query", tiled, tmp_path / "test", "--normal", strips, "--output", tmp_path / "out")
    assert found.status == 0
    [line] = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert (line["verdict"], line["tiles"], line["region"]) == ("anomalous", 3, [0, 0, 120, 40])
    boxes = [region["box"] for region in line["regions"]]
    assert any(left < 100 and right > 80 and top < 28 and bottom > 8 for left, top, right, bottom in boxes)
    assert np.load(tmp_path / "out" / "maps" / "bad.png.npy").shape == (40, 120)
    with np.load(tmp_path / "out" / "matches" / "bad.png.npz") as matches:
        assert matches["tiles"].tolist()[0] == [0, 0, 48, 40]
        assert len(matches["sq_distance"]) == 3
    page = (tmp_path / "out" / "report.html").read_text()
    assert "36 normal tiles" in page
    assert "not found" not in page  # every neighbour has its picture, cut out of its image
    again = spade("audit", tiled)
    assert again.status == 0
    removed = spade("remove", tiled, "003.png")
    assert removed.out.startswith("1 removed; 33 tiles in")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--overlap", "8"], "overlap: expected none without tiles (--tile HxW), found 8"),
        (["--tile", "64", "--overlap", "40"], "overlap: expected pixels from 0 to 32, half a tile, found 40"),
    ],
)
def test_options_that_do_not_fit_are_one_line(
    tmp_path: Path, strips: Path, spade: Spade, options: list[str], words: str
) -> None:
    found = spade("build", tmp_path / "new", strips, "--extractor", "toy", *options)
    assert found.status != 0
    assert words in found.error
    assert not (tmp_path / "new").exists()


def test_a_gallery_goes_on_with_its_own_tiles(tiled: Path, strips: Path, spade: Spade) -> None:
    other = spade("build", tiled, strips, "--extractor", "toy", "--image-size", 64, "--tile", 64)
    assert "tile: expected (40, 48), found (64, 64)" in other.error
    make_images(strips / "more", 1, seed=1, size=(50, 100))
    added = spade("add", tiled, strips, "--quiet")
    assert "1 added (0 replaced), 12 unchanged, 0 skipped; 42 tiles in" in added.out
