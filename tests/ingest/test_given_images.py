"""Images that an iterable gives, each with its key: the same gallery as from files, in bounded memory."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import spade_faiss as sf
from spade_faiss.detect.query_files import query_given
from spade_faiss.store.source_images import pixels_digest
from tests.helpers.images import write_images
from tests.ingest.test_ingest import counts, create


@pytest.fixture
def gallery(tmp_path: Path, toy: sf.Extractor) -> sf.Gallery:
    return create(tmp_path / "given.gallery", toy)


def noise(n: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (n, 40, 48, 3), dtype=np.uint8))


def named(images: list[Any]) -> list[tuple[str, Any]]:
    return [(f"{number}", image) for number, image in enumerate(images)]


WAYS = {
    "path": lambda path: path,
    "text": str,
    "bytes": Path.read_bytes,
    "file": lambda path: io.BytesIO(path.read_bytes()),
    "PIL": Image.open,
    "array": lambda path: np.asarray(Image.open(path)),
}


@pytest.mark.parametrize("way", WAYS)
def test_features_are_those_of_the_files(
    way: str, gallery: sf.Gallery, image_folder: Path, toy: sf.Extractor, tmp_path: Path
) -> None:
    files = sorted(image_folder.iterdir())
    report = gallery.add(((path.name, WAYS[way](path)) for path in files), toy)
    assert counts(report) == (12, 0, 0, [])
    own = create(tmp_path / "own.gallery", toy)
    own.add_images(image_folder, toy)
    assert gallery.keys() == own.keys()
    for one, other in zip(gallery.read(range(12)), own.read(range(12)), strict=True):
        assert one.tobytes() == other.tobytes()
    of_files = way not in ("PIL", "array")  # a file is known by its bytes, whoever reads it
    assert (gallery.snapshot().digests(range(12)) == own.snapshot().digests(range(12))) == of_files
    assert gallery.verify() == []


def closed_files(paths: list[Path]) -> Iterator[Any]:
    for path in paths:
        with path.open("rb") as file:
            yield file


def one_array(paths: list[Path]) -> Iterator[Any]:
    buffer = np.empty((64, 64, 3), np.uint8)
    for path in paths:
        buffer[:] = np.asarray(Image.open(path))
        yield buffer


def one_tensor(paths: list[Path]) -> Iterator[Any]:
    for array in one_array(paths):
        yield torch.from_numpy(array)


def one_bytearray(paths: list[Path]) -> Iterator[Any]:
    buffer = bytearray()
    for path in paths:
        buffer[:] = path.read_bytes()
        yield buffer


@pytest.mark.parametrize("give", [closed_files, one_array, one_tensor, one_bytearray])
def test_a_giver_may_close_or_refill_what_it_gave(
    give: Any, gallery: sf.Gallery, toy: sf.Extractor, tmp_path: Path
) -> None:
    """Items are taken ahead of the work, which is to see each as it was when it was given."""
    files = sorted(write_images(tmp_path / "frames", 24, size=(64, 64)).iterdir())
    assert counts(gallery.add(zip([file.name for file in files], give(files), strict=True), toy)) == (24, 0, 0, [])
    own = create(tmp_path / "own.gallery", toy)
    own.add_images(tmp_path / "frames", toy)
    for one, other in zip(gallery.read(range(24)), own.read(range(24)), strict=True):
        assert one.tobytes() == other.tobytes()
    detector = sf.Detector(own, toy, sf.SearchOptions(k=2))
    expected = [detector.query(file).image_score for file in files]
    assert [found.image_score for found in detector.stream(give(files))] == expected
    given = query_given(detector, zip(map(str, files), give(files), strict=True))
    assert [found.image_score for _, found in given] == expected


def test_run_again_it_adds_nothing_and_leaves_the_network_alone(
    gallery: sf.Gallery, toy: sf.Extractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery.add(named(noise(5)), toy)
    monkeypatch.setattr(toy, "extract", None)
    assert counts(gallery.add(named(noise(5)), toy)) == (0, 0, 5, [])


def test_changed_pixels_are_skipped_unless_they_are_to_replace(gallery: sf.Gallery, toy: sf.Extractor) -> None:
    gallery.add(named(noise(5)), toy)
    report = gallery.add(named(noise(6, seed=1)), toy)
    assert counts(report) == (1, 0, 0, list("01234"))
    assert "replace=True" in report.skipped[0].reason
    assert counts(gallery.add(named(noise(6, seed=1)), toy, replace=True)) == (5, 5, 1, [])
    with pytest.raises(sf.KeyConflictError):
        gallery.add(named(noise(1, seed=2)), toy, strict=True)


@pytest.mark.parametrize("apart", [0, 3, 40])  # in one batch, in the next, and long after
@pytest.mark.parametrize("replace", [False, True])
def test_a_key_that_comes_twice_is_one_image(apart: int, replace: bool, gallery: sf.Gallery, toy: sf.Extractor) -> None:
    first, second = noise(2)
    between = [(f"other {number}", image) for number, image in enumerate(noise(apart, seed=3))]
    same = gallery.add([("a", first), *between, ("a", first)], toy, replace=replace)
    assert counts(same) == (apart + 1, 0, 1, [])
    report = gallery.add([("b", first), *between, ("b", second)], toy, replace=replace)
    assert counts(report) == ((2, 1, apart, []) if replace else (1, 0, apart, ["b"]))
    assert len(gallery) == apart + 2
    [digest] = gallery.snapshot().digests(gallery.ids(["b"]))
    assert digest == pixels_digest(second if replace else first)


def test_what_cannot_be_read_is_skipped_or_raised(gallery: sf.Gallery, toy: sf.Extractor, tmp_path: Path) -> None:
    good, other = noise(2)
    bad = [("empty", b""), ("float", good.astype(np.float32)), ("gone", tmp_path / "gone.png"), ("none", None)]
    report = gallery.add([("a", good), *bad, ("b", other)], toy)
    assert counts(report) == (2, 0, 0, ["empty", "float", "gone.png", "none"])
    with pytest.raises(sf.ImageError, match="float: expected"):
        gallery.add([("c", noise(1, seed=5)[0]), bad[1]], toy, strict=True)
    assert gallery.keys() == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([{"image": 1, "label": 2}], r"expected \(key, image\), found dict of 2 as item 0; a generator makes pairs"),
        (["ab"], "found str of 2 as item 0"),
        ([("a", 1, 2)], "found tuple of 3 as item 0"),
        ([3], "found int as item 0"),
        ({"a": 1}, r"expected an iterable of \(key, image\), found dict"),
        ("a.png", r"expected an iterable of \(key, image\), found str"),
        (None, r"expected an iterable of \(key, image\), found NoneType"),
        ([(3, None)], "keys: expected"),
        ([("", None)], "keys: expected"),
        ([(np.zeros((9, 9)), "a")], "^keys: expected text of 1 to 4096 bytes without NUL, found ndarray$"),
    ],
)
def test_other_items_are_named(images: Any, message: str, gallery: sf.Gallery, toy: sf.Extractor) -> None:
    with pytest.raises((sf.ImageError, sf.FeatureError), match=message):
        gallery.add(images, toy)


def test_rows_that_come_by_their_numbers(gallery: sf.Gallery, toy: sf.Extractor) -> None:
    class Rows:  # as torch's data sets are
        def __getitem__(self, number: int) -> tuple[str, Any]:
            return named(noise(5))[number]

    assert counts(gallery.add(Rows(), toy)) == (5, 0, 0, [])  # type: ignore[arg-type]


def test_an_error_of_the_iterable_keeps_what_came_before(gallery: sf.Gallery, toy: sf.Extractor) -> None:
    def rows() -> Iterator[tuple[str, Any]]:
        yield from named(noise(7))
        raise ConnectionError("the data set is gone")

    with pytest.raises(ConnectionError, match="gone"):
        gallery.add(rows(), toy)
    assert len(gallery) == 7


def test_images_are_taken_as_they_are_needed(
    gallery: sf.Gallery, toy: sf.Extractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = extracted = ahead = 0
    extract = toy.extract

    def rows() -> Iterator[tuple[str, Any]]:
        nonlocal taken, ahead
        for pair in named(noise(1) * 200):
            taken += 1
            ahead = max(ahead, taken - extracted)
            yield pair

    def counted(views: Any) -> Any:
        nonlocal extracted
        extracted += len(views)
        return extract(views)

    monkeypatch.setattr(toy, "extract", counted)
    gallery.add(rows(), toy)
    assert taken == extracted == 200
    assert ahead <= 4 * toy.batch_size


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, toy: sf.Extractor, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "killed.gallery"
    create(path, toy, shard_bytes=1).close()  # a commit a batch

    def rows() -> Iterator[tuple[str, Any]]:
        yield from named(noise(60))
        os.kill(os.getpid(), signal.SIGKILL)

    if not (child := os.fork()):
        try:
            sf.Gallery.open(path).add(rows(), toy)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    gallery = sf.Gallery.open(path)
    kept = len(gallery)
    assert 0 < kept < 60
    assert gallery.verify() == []
    assert counts(gallery.add(named(noise(60)), toy)) == (60 - kept, 0, kept, [])
    assert gallery.keys() == [str(number) for number in range(60)]


def test_recomputed_patches_need_files(tmp_path: Path, toy: sf.Extractor) -> None:
    gallery = sf.Gallery.create(tmp_path / "r", toy.spec, patches="recompute")
    file = write_images(tmp_path / "images", 1) / "000.png"
    report = gallery.add([("file", file), ("array", noise(1)[0])], toy)
    assert counts(report) == (1, 0, 0, ["array"])
    assert "the path of an image file, from which the gallery recomputes patches, found ndarray" in str(report.skipped)
    assert gallery.snapshot().source(0) == str(file)


def test_images_in_tiles_have_the_tiles_of_files(tmp_path: Path, image_folder: Path) -> None:
    toy = sf.load_extractor("toy", options=sf.FeatureOptions(image_size=32, tile=32, overlap=0))
    given, own = create(tmp_path / "given", toy), create(tmp_path / "own", toy)
    own.add_images(image_folder, toy)
    report = given.add(((path.name, Image.open(path)) for path in sorted(image_folder.iterdir())), toy)
    assert report.added == 12
    assert given.keys() == own.keys()
    for one, other in zip(given.read(range(len(own))), own.read(range(len(own))), strict=True):
        assert one.tobytes() == other.tobytes()
