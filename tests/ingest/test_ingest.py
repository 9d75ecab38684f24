"""From folders of images into a gallery: what is counted, skipped, kept, and how much of it is in memory at a time."""

from __future__ import annotations

import os
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import spade_faiss as sf
from spade_faiss.images.decode import decode
from spade_faiss.images.sources import ImageFile
from tests.helpers.images import write_images


def create(path: Path, extractor: sf.Extractor, shard_bytes: int = 2**28) -> sf.Gallery:
    return sf.Gallery.create(path, extractor.spec, sf.IndexOptions(device="cpu"), shard_bytes)


def extract(extractor: sf.Extractor, paths: Sequence[Path]) -> sf.Features:
    """The features of images one at a time, without any of what ingesting does."""
    each = [extractor.extract([extractor.spec.view.apply(decode(path))]) for path in paths]
    return sf.Features(
        np.concatenate([features.image for features in each]),
        [np.concatenate(levels) for levels in zip(*(features.levels for features in each), strict=True)],
    )


def assert_features_of(gallery: sf.Gallery, keys: list[str], expected: sf.Features) -> None:
    ids = gallery.ids(keys)
    for found, level in zip(gallery.read(ids), expected.levels, strict=True):
        assert found.tobytes() == level.tobytes()
    nearest, sq_distances = gallery.search(expected.image, 1)
    assert nearest[:, 0].tolist() == ids
    assert sq_distances.max() == 0


def counts(report: sf.IngestReport) -> tuple[int, int, int, list[str]]:
    return report.added, report.replaced, report.unchanged, [skipped.path.name for skipped in report.skipped]


@pytest.fixture
def gallery(tmp_path: Path, toy: sf.Extractor) -> sf.Gallery:
    return create(tmp_path / "toy.gallery", toy)


def test_every_image_is_there_with_its_own_features(
    gallery: sf.Gallery, image_folder: Path, toy: sf.Extractor, tmp_path: Path
) -> None:
    write_images(image_folder / "deeper" / "ünd so", 3, seed=1, size=(90, 31))
    (image_folder / "000.png").rename(image_folder / "zz.PNG")
    (image_folder / "notes.txt").write_text("no image")
    (image_folder / ".hidden.png").write_text("no image")
    report = gallery.add_images(str(image_folder), toy)
    assert counts(report) == (15, 0, 0, [])
    assert report.seconds > 0
    keys = sorted([f"{number:03d}.png" for number in range(1, 12)] + ["zz.PNG"])
    keys = sorted([*keys, *(f"deeper/ünd so/00{number}.png" for number in range(3))])
    assert gallery.keys() == keys  # in their order, whichever was read first
    assert_features_of(gallery, keys, extract(toy, [image_folder / key for key in keys]))


def test_sources_keep_their_order_and_may_be_files(gallery: sf.Gallery, image_folder: Path, toy: sf.Extractor) -> None:
    second = write_images(image_folder.parent / "second" / "x", 2, seed=5)
    gallery.add_images([second.parent, image_folder / "003.png", image_folder / "001.png"], toy)
    assert gallery.keys() == ["x/000.png", "x/001.png", "003.png", "001.png"]


def test_run_again_it_adds_nothing(gallery: sf.Gallery, image_folder: Path, toy: sf.Extractor) -> None:
    gallery.add_images(image_folder, toy)
    generation = gallery.generation
    assert counts(gallery.add_images(image_folder, toy)) == (0, 0, 12, [])
    assert gallery.generation == generation
    write_images(image_folder / "more", 2, seed=3)
    assert counts(gallery.add_images(image_folder, toy)) == (2, 0, 12, [])
    os.utime(image_folder / "000.png", (1, 1))  # content counts, not its date
    assert counts(gallery.add_images(image_folder, toy)) == (0, 0, 14, [])


def test_what_is_there_already_does_not_go_through_the_network_again(
    gallery: sf.Gallery, image_folder: Path, toy: sf.Extractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery.add_images(image_folder, toy)
    monkeypatch.setattr(toy, "extract", None)
    assert counts(gallery.add_images(image_folder, toy)) == (0, 0, 12, [])


def test_a_changed_image_is_skipped_unless_it_is_to_replace(
    gallery: sf.Gallery, image_folder: Path, toy: sf.Extractor
) -> None:
    gallery.add_images(image_folder, toy)
    before = extract(toy, [image_folder / "004.png"])
    changed = image_folder / "004.png"
    changed.write_bytes((write_images(image_folder.parent / "other", 1, seed=9) / "000.png").read_bytes())

    report = gallery.add_images(image_folder, toy)
    assert counts(report) == (0, 0, 11, ["004.png"])
    assert "other content" in report.skipped[0].reason
    assert str(changed) in report.skipped[0].reason
    assert_features_of(gallery, ["004.png"], before)

    assert counts(gallery.add_images(image_folder, toy, replace=True)) == (1, 1, 11, [])
    assert len(gallery) == 12
    assert_features_of(gallery, ["004.png"], extract(toy, [changed]))
    assert counts(gallery.add_images(image_folder, toy, replace=True)) == (0, 0, 12, [])


def test_a_removed_image_comes_back(gallery: sf.Gallery, image_folder: Path, toy: sf.Extractor) -> None:
    gallery.add_images(image_folder, toy)
    gallery.remove(["004.png"])
    assert counts(gallery.add_images(image_folder, toy)) == (1, 0, 11, [])
    assert_features_of(gallery, ["004.png"], extract(toy, [image_folder / "004.png"]))


@pytest.fixture
def with_bad_images(image_folder: Path) -> tuple[Path, dict[str, str]]:
    """Twelve good images, bad ones among them, and a word of the reason for each."""
    good = (image_folder / "000.png").read_bytes()
    (image_folder / "002a.png").write_bytes(b"")
    (image_folder / "004a.png").write_bytes(good[: len(good) // 2])
    (image_folder / "004b.png").write_text("a text, whatever its name says")
    Image.new("RGB", (1, 1)).save(image_folder / "006a.png")
    (image_folder / "008a.png").symlink_to("nowhere.png")
    reasons = {
        "002a.png": "0 bytes",
        "004a.png": "cut short",
        "004b.png": "no decoder",
        "006a.png": "1 x 1",
        "008a.png": "cannot be read",
    }
    return image_folder, reasons


def test_bad_images_are_skipped_and_named(
    gallery: sf.Gallery, with_bad_images: tuple[Path, dict[str, str]], toy: sf.Extractor
) -> None:
    folder, reasons = with_bad_images
    report = gallery.add_images(folder, toy)
    assert counts(report) == (12, 0, 0, list(reasons))
    for skipped in report.skipped:
        assert skipped.path.parent == folder
        assert reasons[skipped.path.name] in skipped.reason
        assert str(skipped.path) in skipped.reason
        assert "\n" not in skipped.reason
    good = [f"{number:03d}.png" for number in range(12)]
    assert gallery.keys() == good
    assert_features_of(gallery, good, extract(toy, [folder / key for key in good]))


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_strict_stops_at_the_first_and_keeps_what_was_before(
    tmp_path: Path, with_bad_images: tuple[Path, dict[str, str]], batch_size: int
) -> None:
    folder, reasons = with_bad_images
    extractor = sf.load_extractor("toy", options=sf.FeatureOptions(batch_size=batch_size))
    gallery = create(tmp_path / "strict.gallery", extractor)
    for bad, kept in (("002a.png", 3), ("004a.png", 5)):
        with pytest.raises(sf.ImageError, match=f"{bad}.*{reasons[bad]}"):
            gallery.add_images(folder, extractor, strict=True)
        expected = [f"{number:03d}.png" for number in range(kept)]
        assert gallery.keys() == expected
        assert_features_of(gallery, expected, extract(extractor, [folder / key for key in expected]))
        (folder / bad).unlink()


def test_strict_stops_at_a_conflict(gallery: sf.Gallery, image_folder: Path, toy: sf.Extractor) -> None:
    gallery.add_images(image_folder / "001.png", toy)
    write_images(image_folder, 2, seed=8)
    with pytest.raises(sf.KeyConflictError, match=r"001\.png"):
        gallery.add_images(image_folder, toy, strict=True)
    assert sorted(gallery.keys()) == ["000.png", "001.png"]


def test_no_image_at_all(gallery: sf.Gallery, tmp_path: Path, image_folder: Path, toy: sf.Extractor) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nothing"):
        with pytest.raises(sf.ImageError, match=str(path)):
            gallery.add_images([image_folder, path], toy)
    assert len(gallery) == 0  # the good source neither: the command was wrong
    (tmp_path / "empty" / "bad.png").write_text("text")
    assert counts(gallery.add_images(tmp_path / "empty", toy)) == (0, 0, 0, ["bad.png"])
    assert gallery.verify() == []


def test_two_sources_with_the_same_names(gallery: sf.Gallery, image_folder: Path, toy: sf.Extractor) -> None:
    other = write_images(image_folder.parent / "other", 1)
    assert gallery.add_images([image_folder, other], toy).added == 13
    assert sorted(gallery.keys()) == [*(f"images/{number:03d}.png" for number in range(12)), "other/000.png"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not have file names that are not Unicode")
def test_a_file_name_that_is_not_unicode(gallery: sf.Gallery, image_folder: Path, toy: sf.Extractor) -> None:
    """It is skipped and named, or taken: it does not stop the eleven others."""
    name = os.fsdecode(b"005\xff.png")
    (image_folder / "005.png").rename(image_folder / name)
    report = gallery.add_images(image_folder, toy)
    assert report.added + len(report.skipped) == 12
    assert report.added >= 11
    assert len(gallery) == report.added
    for skipped in report.skipped:
        skipped.reason.encode()  # it is to be printed, and written to skipped.jsonl


def test_small_shards_are_committed_one_by_one(tmp_path: Path, image_folder: Path, toy: sf.Extractor) -> None:
    gallery = create(tmp_path / "g", toy, shard_bytes=5 * toy.spec.bytes_per_image)
    gallery.add_images(image_folder, toy)
    info = gallery.info()
    assert info["shards"] == 2  # batches of 4: full at 8, and the rest
    assert info["generation"] >= 2
    keys = [f"{number:03d}.png" for number in range(12)]
    assert gallery.keys() == keys
    assert_features_of(gallery, keys, extract(toy, [image_folder / key for key in keys]))
    assert gallery.verify() == []


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    options = sf.FeatureOptions(image_size=256, batch_size=2)
    extractor = sf.load_extractor("toy", options=options)
    view = 3 * 256 * 256  # bytes
    folder = write_images(tmp_path / "many", 96, size=(8, 8))
    few = [folder / f"{number:03d}.png" for number in range(24)]
    peaks = []
    for sources in (few[:1], few, [folder]):  # the first one pays for what is made once
        gallery = create(tmp_path / f"{len(peaks)}.gallery", extractor)
        tracemalloc.start()
        try:
            gallery.add_images(sources, extractor)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert len(gallery) == 96
    assert peaks[2] - peaks[1] < 6 * view  # four times the images: 72 views more, had they been kept


def test_reading_stays_a_bounded_number_of_images_ahead(
    tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spade_faiss.ingest import image_reader

    toy = sf.load_extractor("toy", options=sf.FeatureOptions(batch_size=2))
    write_images(image_folder, 80)
    read = extracted = ahead = 0
    real_read, real_extract = image_reader.read_file, toy.extract

    def count_read(path: Path) -> bytes:
        nonlocal read
        read += 1
        return real_read(path)

    def count_extract(views: Sequence[np.ndarray]) -> sf.Features:
        nonlocal extracted, ahead
        ahead = max(ahead, read - extracted)
        extracted += len(views)
        return real_extract(views)

    monkeypatch.setattr(image_reader, "read_file", count_read)
    monkeypatch.setattr(toy, "extract", count_extract)
    create(tmp_path / "g", toy).add_images(image_folder, toy)
    assert read == extracted == 80
    assert ahead <= 4 * toy.batch_size


def test_an_extractor_of_another_spec_is_refused(gallery: sf.Gallery, image_folder: Path) -> None:
    other = sf.load_extractor("toy", options=sf.FeatureOptions(image_size=64))
    with pytest.raises(sf.SpecMismatchError, match=r"resized: expected \(32, 32\), found \(64, 64\)"):
        gallery.add_images(image_folder, other)
    assert len(gallery) == 0


def test_an_error_of_the_extractor_reaches_the_caller(
    tmp_path: Path, image_folder: Path, toy: sf.Extractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was committed before it stays; what was not is gone, to be done again."""
    gallery = create(tmp_path / "g", toy, shard_bytes=1)
    real, calls = toy.extract, 0

    def fail_third(views: Sequence[np.ndarray]) -> sf.Features:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("out of memory")
        return real(views)

    monkeypatch.setattr(toy, "extract", fail_third)
    with pytest.raises(RuntimeError, match="out of memory"):
        gallery.add_images(image_folder, toy)
    assert gallery.keys() == [f"{number:03d}.png" for number in range(8)]
    assert gallery.verify() == []
    assert counts(gallery.add_images(image_folder, toy)) == (4, 0, 8, [])


def test_nan_from_a_network_stops_the_run(
    gallery: sf.Gallery, image_folder: Path, toy: sf.Extractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = toy.extract

    def broken(views: Sequence[np.ndarray]) -> sf.Features:
        features = real(views)
        features.levels[1][:] = np.nan
        return features

    monkeypatch.setattr(toy, "extract", broken)
    with pytest.raises(sf.FeatureError, match=r"level 1 .*NaN"):
        gallery.add_images(image_folder, toy)
    assert len(gallery) == 0
    assert gallery.verify() == []


def test_sources_bring_their_own_keys(gallery: sf.Gallery, image_folder: Path, toy: sf.Extractor) -> None:
    chosen = [ImageFile(image_folder / f"{number:03d}.png", f"train/{number}") for number in (7, 2)]
    assert gallery.add_images(chosen, toy).added == 2
    assert_features_of(gallery, ["train/7", "train/2"], extract(toy, [source.path for source in chosen]))
    with pytest.raises(sf.ImageError, match="two images would have the key 'train/7'"):
        gallery.add_images([chosen[0], ImageFile(image_folder / "001.png", "train/7")], toy)
