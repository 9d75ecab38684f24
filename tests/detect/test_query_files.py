"""Image files that change or vanish while they are queried, after their pixels were read and not kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import spade_faiss as sf
from spade_faiss.detect.query_files import query_files
from spade_faiss.images.sources import find_images
from spade_faiss.ingest.pipeline import Skipped
from spade_faiss.system.prefetch import ByteGate
from tests.helpers.images import write_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", 4)


@pytest.fixture
def detector(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> sf.Detector:
    monkeypatch.setattr(ByteGate, "enter", lambda *_: False)  # no pixels are kept
    toy = sf.load_extractor("toy")
    gallery = sf.Gallery.create(tmp_path / "g", toy.spec)
    gallery.add_images(folder, toy)
    return sf.Detector(gallery, toy, sf.SearchOptions(k=1))


@pytest.mark.parametrize("size", [(40, 40), (64, 48)])
def test_replaced_file_is_skipped_and_the_run_goes_on(
    detector: sf.Detector, folder: Path, size: tuple[int, int]
) -> None:
    skipped: list[Skipped] = []
    found = query_files(detector, find_images([folder]), skipped)
    keys = [next(found)[0].key]
    Image.new("RGB", size).save(folder / "001.png")
    (folder / "002.png").unlink()
    keys += [file.key for file, _, _ in found]
    assert keys == ["000.png", "003.png"]
    changed, gone = (one.reason for one in skipped)
    assert changed == f"{folder / '001.png'}: changed while it was queried; query it again"
    assert gone.startswith(f"{folder / '002.png'}: cannot be read: ")


def test_replaced_file_is_an_error_where_none_is_skipped(detector: sf.Detector, folder: Path) -> None:
    found = query_files(detector, find_images([folder]))
    assert np.array_equal(next(found)[1], np.asarray(Image.open(folder / "000.png")))
    Image.new("RGB", (40, 40)).save(folder / "001.png")
    with pytest.raises(sf.ImageError, match=r"001\.png: changed while it was queried"):
        next(found)
