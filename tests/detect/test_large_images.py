"""Large images: what is decoded ahead is bounded in bytes, and how many pixels an image may have can be chosen."""

from __future__ import annotations

import contextlib
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import spade_faiss as sf
from spade_faiss.datasets.category import GOOD, Category, Sample
from spade_faiss.datasets.check import check_category
from spade_faiss.detect.query_files import query_files
from spade_faiss.images import reading
from spade_faiss.images.decode import decode, image_bytes
from spade_faiss.images.sources import find_images
from spade_faiss.store.source_images import content_digest
from spade_faiss.system.prefetch import ByteGate

pytestmark = pytest.mark.slow  # `make test-fast` leaves the module out


RNG = np.random.default_rng(0)
SIDE = 200
IMAGE = 7 * SIDE * SIDE  # bytes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(24):
        pixels = RNG.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number:02}.png")
    return tmp_path / "images"


@pytest.fixture
def detector(folder: Path, tmp_path: Path) -> sf.Detector:
    toy = sf.load_extractor("toy", options=sf.FeatureOptions(batch_size=4))
    gallery = sf.Gallery.create(tmp_path / "g", toy.spec)
    gallery.add_images(folder, toy)
    return sf.Detector(gallery, toy, sf.SearchOptions(k=1))


def test_bytes_of_an_image_come_from_its_header(folder: Path) -> None:
    assert image_bytes((folder / "00.png").read_bytes()) == IMAGE
    assert image_bytes(b"no image") == 8


class Watched(ByteGate):
    """A gate that remembers the most that was held."""

    gates: list[Watched]

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.limit, self.most = limit, 0
        self.gates.append(self)

    def leave(self, size: int) -> None:
        self.most = max(self.most, self._held)
        super().leave(size)


@pytest.fixture
def gates(monkeypatch: pytest.MonkeyPatch) -> list[Watched]:
    Watched.gates = []
    monkeypatch.setattr(reading, "ByteGate", Watched)
    monkeypatch.setattr(reading, "DECODE_BYTES", 2 * IMAGE + 100)
    module = sys.modules["spade_faiss.detect.query_files"]
    monkeypatch.setattr(module, "ByteGate", Watched)
    monkeypatch.setattr(module, "KEPT_BYTES", 3 * SIDE * SIDE * 4)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    return Watched.gates


def test_query_is_bounded_in_bytes_and_its_answers_do_not_change(
    folder: Path, detector: sf.Detector, gates: list[Watched]
) -> None:
    files = find_images([folder])
    for file, pixels, detection in query_files(detector, files):
        assert np.array_equal(pixels, decode(file.path))  # those that were not kept are decoded again
        assert detection.neighbours.keys == [file.key]
        assert detection.image_score == 0
        assert detection.anomaly_map.shape == (SIDE, SIDE)
    assert len(gates) == 2  # of decoding, and of pixels that are kept
    for gate in gates:
        assert 0 < gate.most <= gate.limit
        assert gate._held == 0


def test_pixels_that_are_not_wanted_are_not_kept(folder: Path, detector: sf.Detector, gates: list[Watched]) -> None:
    shapes = {pixels.shape for _, pixels, _ in query_files(detector, find_images([folder]), with_pixels=False)}
    assert shapes == {(0, 0, 3)}
    assert sorted(gate.most > 0 for gate in gates) == [False, True]


def test_building_is_bounded_in_bytes(folder: Path, tmp_path: Path, gates: list[Watched]) -> None:
    toy = sf.load_extractor("toy")
    for patches in ("stored", "recompute"):
        gallery = sf.Gallery.create(tmp_path / patches, toy.spec, patches=patches)
        assert gallery.add_images(folder, toy).added == 24
        assert sf.Detector(gallery, toy, sf.SearchOptions(k=3)).query(folder / "03.png").neighbours.keys[0] == "03.png"
    assert len(gates) >= 3
    assert all(0 < gate.most <= gate.limit for gate in gates)


def test_looking_at_a_labelled_set_is_bounded_in_bytes(folder: Path, gates: list[Watched]) -> None:
    samples = [Sample(file.path, file.key, GOOD, False) for file in find_images([folder])]
    checked = check_category(Category("images", [], samples, "folders", False), content_digest)
    assert len(checked.digests) == 24
    [gate] = gates
    assert 0 < gate.most <= gate.limit


def test_gate_lets_one_in_that_is_larger_than_the_limit() -> None:
    gate = ByteGate(10)
    with gate.room(100):
        assert not gate.enter(1)
    assert gate.enter(4)
    assert gate.enter(6)
    assert not gate.enter(1)


def test_gate_waits_and_makes_room_after_errors() -> None:
    gate, entered = ByteGate(10), threading.Event()

    def enter() -> None:
        with gate.room(8):
            entered.set()

    thread = threading.Thread(target=enter)
    with contextlib.suppress(ZeroDivisionError), gate.room(8):
        thread.start()
        assert not entered.wait(0.05)
        raise ZeroDivisionError
    thread.join(10)
    assert entered.is_set()
