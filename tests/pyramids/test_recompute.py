"""A gallery that recomputes its patches: the same answers as one that stores them, whatever is done to it."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.detect.audit import suspect_images
from spade_faiss.options import Patches
from spade_faiss.store.manifest import Manifest
from spade_faiss.store.source_images import SourceImages
from tests.helpers.crash import content, failing_flush, reopen
from tests.helpers.galleries import OWN, random_features_of
from tests.helpers.images import make_images
from tests.helpers.recomputed import assert_same_detection, create

PAPER = (sf.SearchOptions(k=5, kappa=2), sf.ScoreOptions())
ROBUST = (
    sf.SearchOptions(k=4, level_weights="spread"),
    sf.ScoreOptions(image_score="map", positions="damped"),
)


def both(tmp_path: Path, normal: Path, extractor: sf.Extractor) -> tuple[sf.Gallery, sf.Gallery]:
    """The same images, stored and recomputed."""
    galleries = create(tmp_path / "stored", extractor, "stored"), create(tmp_path / "recomputed", extractor)
    for gallery in galleries:
        gallery.add_images(normal, extractor)
    return galleries


# The same answers


@pytest.mark.slow
@pytest.mark.parametrize("options", [PAPER, ROBUST], ids=["paper", "robust"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_bit_by_bit_what_a_stored_gallery_answers(
    tmp_path: Path,
    normal: Path,
    queries: list[Path],
    dtype: str,
    options: tuple[sf.SearchOptions, sf.ScoreOptions],
) -> None:
    extractor = sf.load_extractor("toy", options=sf.FeatureOptions(batch_size=3, dtype=dtype))  # type: ignore[arg-type]
    stored, recomputed = (sf.Detector(gallery, extractor, *options) for gallery in both(tmp_path, normal, extractor))
    for _ in range(2):  # from the files, and from what the detector keeps of them
        for found, expected in zip(recomputed.stream(queries), stored.stream(queries), strict=True):
            assert_same_detection(found, expected)
    ids = [7, 0, 3]
    for found, expected in zip(recomputed.leave_one_out(ids), stored.leave_one_out(ids), strict=True):
        assert_same_detection(found, expected)


@pytest.mark.slow
def test_with_a_network_to_a_thousandth(tmp_path: Path, normal: Path, queries: list[Path]) -> None:
    """A network's last bits depend on what else is in the batch."""
    extractor = sf.load_extractor(options=sf.FeatureOptions(image_size=64, batch_size=5, device="cpu"))
    galleries = both(tmp_path, normal, extractor)
    stored, recomputed = (sf.Detector(gallery, extractor, sf.SearchOptions(k=7)) for gallery in galleries)
    for found, expected in zip(recomputed.stream(queries), stored.stream(queries), strict=True):
        assert found.image_score == expected.image_score
        assert found.neighbours.keys == expected.neighbours.keys
        np.testing.assert_allclose(found.anomaly_map, expected.anomaly_map, rtol=1e-3)
    ids = list(range(12))
    for one, other in zip(galleries[0].read(ids), galleries[1].read(ids, extractor), strict=True):
        assert abs(one.astype(np.float32) - other).max() <= 2e-3 * abs(one).max()


def test_calibration_and_audit_are_those_of_a_stored_gallery(tmp_path: Path, normal: Path, toy: sf.Extractor) -> None:
    stored, recomputed = (sf.Detector(gallery, toy, *ROBUST) for gallery in both(tmp_path, normal, toy))
    found, expected = sf.calibrate(recomputed, 0.1), sf.calibrate(stored, 0.1)
    assert found.image_scores.tolist() == expected.image_scores.tolist()
    assert found.map_maxima.tolist() == expected.map_maxima.tolist()
    assert found.baseline is not None
    assert expected.baseline is not None
    assert found.baseline.to_json() == expected.baseline.to_json()
    suspects = sf.find_suspects(recomputed)
    assert suspects == sf.find_suspects(stored)
    originals = SourceImages(recomputed.gallery.snapshot())  # found without being told where
    [(_, pixels, _)] = suspect_images(recomputed, suspects[:1], originals)
    assert np.ptp(pixels) > 0  # the picture, not a grey stand-in


def test_threads_share_a_detector(gallery: sf.Gallery, toy: sf.Extractor, tmp_path: Path) -> None:
    detector = sf.Detector(gallery, toy, sf.SearchOptions(k=4))
    paths = sorted(make_images(tmp_path / "many", 16, seed=5).iterdir())
    alone = [sf.Detector(gallery, toy, sf.SearchOptions(k=4)).query(path) for path in paths]
    with ThreadPoolExecutor(8) as pool:
        for found, expected in zip(pool.map(detector.query, paths), alone, strict=True):
            assert_same_detection(found, expected)


def test_the_network_gets_no_more_than_a_batch(
    gallery: sf.Gallery, toy: sf.Extractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, real = [], toy.extract

    def extract(views: list[np.ndarray]) -> sf.Features:
        sizes.append(len(views))
        return real(views)

    monkeypatch.setattr(toy, "extract", extract)
    gallery.read([1, 5, 2, 7, 3, 8, 0, 4, 6], toy)
    assert sizes == [4, 4, 1]


# What is on disk


def test_shards_hold_paths_in_place_of_levels(gallery: sf.Gallery, normal: Path, toy: sf.Extractor) -> None:
    [path] = gallery.path.glob("shards/*.h5")
    with h5py.File(path, "r") as file:
        assert sorted(file) == ["checksums", "digests", "image", "keys", "sources"]
        assert file["sources"].asstr()[:].tolist() == [str(normal / f"{number:03d}.png") for number in range(12)]
        assert file["checksums"].shape == (12, 2)
    assert gallery.patches == "recompute"
    info = gallery.info()
    assert info["patches"] == "recompute"
    stored = toy.spec.bytes_per_image
    assert info["bytes_per_image_if"] == {"stored": stored, "recompute": info["bytes_per_image"]}


def test_an_image_of_wide_resnet50_2_takes_at_most_9_kb(tmp_path: Path) -> None:
    spec = sf.ExtractorSpec(
        name="wide",
        level_shapes=((256, 56, 56), (512, 28, 28), (1024, 14, 14)),
        image_dim=2048,
        resized=(224, 224),
        crop=(224, 224),
    )
    n, gallery = 40, create(tmp_path / "g", toy_like(spec))
    levels = [np.broadcast_to(np.zeros(1, np.float16), (n, *shape)) for shape in spec.level_shapes]
    names = [f"{'folder/' * 12}{number:06d}.png" for number in range(n)]
    with gallery.writer() as writer:
        writer.append(names, sf.Features(np.eye(n, 2048, dtype=np.float32), levels), names, sources=names)
    [path] = gallery.path.glob("shards/*.h5")
    assert path.stat().st_size / n < 9000 < spec.bytes_per_image / 300
    assert gallery.info()["bytes_per_image"] == pytest.approx(path.stat().st_size / n, rel=0.1)


def toy_like(spec: sf.ExtractorSpec) -> sf.Extractor:
    """An extractor of another spec, which is not to extract anything."""
    extractor = sf.load_extractor("toy")
    extractor.spec = spec
    return extractor


def test_a_shard_is_closed_sooner_where_a_byte_stands_for_more_work(tmp_path: Path, toy: sf.Extractor) -> None:
    sizes = []
    for patches in ("stored", "recompute"):
        sf.Gallery.create(tmp_path / patches, toy.spec, patches=patches)
        sizes.append(Manifest.read(tmp_path / patches).shard_bytes)
    assert sizes[1] < sizes[0]


def test_no_such_way_to_have_patches(tmp_path: Path, toy: sf.Extractor) -> None:
    with pytest.raises(sf.OptionError, match="patches: expected stored or recompute, found 'neither'"):
        create(tmp_path / "g", toy, "neither")  # type: ignore[arg-type]
    with pytest.raises(sf.OptionError, match="patches: expected stored, as features are not made from images"):
        sf.Gallery.create(tmp_path / "g", OWN, patches="recompute")
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize("patches", ["stored", "recompute"])
def test_a_manifest_that_says_the_other_way_is_found_out(
    tmp_path: Path, normal: Path, toy: sf.Extractor, patches: Patches
) -> None:
    gallery = create(tmp_path / "g", toy, patches)
    gallery.add_images(normal, toy)
    other = {"stored": "recompute", "recompute": "stored"}[patches]
    file = gallery.path / "gallery.json"
    values = json.loads(file.read_bytes())
    del values["xxh3"]
    file.write_text(json.dumps(values | {"patches": other}))
    with pytest.raises(sf.CorruptGalleryError, match="damaged"):
        reopen(gallery.path).keys()


# Features without images


def test_features_without_images_are_refused(gallery: sf.Gallery, toy: sf.Extractor) -> None:
    features = random_features_of(1, toy.spec)
    with pytest.raises(sf.OptionError, match="cannot take features without them; use add_images"):
        gallery.append(["new"], features)
    with gallery.writer() as writer, pytest.raises(sf.OptionError, match="use add_images"):
        writer.append(["new"], features, sources=["/new.png"])  # a digest of features says nothing of a file
    with gallery.writer() as writer, pytest.raises(sf.FeatureError, match="sources: expected 1"):
        writer.append(["new"], features, ["digest"], sources=[])
    assert len(gallery) == 12
    assert gallery.verify() == []


def test_levels_take_the_extractor(gallery: sf.Gallery, toy: sf.Extractor) -> None:
    with pytest.raises(sf.OptionError, match=r"use a Detector, or Gallery\.read\(ids, extractor\)"):
        gallery.read([0])
    other = sf.load_extractor("toy", options=sf.FeatureOptions(image_size=64))
    with pytest.raises(sf.SpecMismatchError, match="resized"):
        gallery.read([0], other)
    assert [level.shape for level in gallery.read([3, 3], toy)] == [(2, *shape) for shape in toy.spec.level_shapes]
    assert [level.shape for level in gallery.read([], toy)] == [(0, *shape) for shape in toy.spec.level_shapes]


# A life


def test_remove_compact_and_reopen(gallery: sf.Gallery, normal: Path, toy: sf.Extractor, tmp_path: Path) -> None:
    expected = content(gallery)
    gallery.remove(["003.png", "007.png"])
    gallery.add_images(make_images(tmp_path / "more" / "deeper", 3, seed=8).parent, toy)
    assert gallery.info()["shards"] == 2
    kept = content(gallery)
    assert {key: kept[key] for key in expected if key in kept} == {
        key: levels for key, levels in expected.items() if key not in ("003.png", "007.png")
    }
    assert gallery.compact() > 0
    assert (gallery.info()["shards"], gallery.info()["removed"]) == (1, 0)
    again = reopen(gallery.path)
    assert content(again) == content(gallery) == kept
    assert sorted(kept)[-3:] == [f"deeper/00{number}.png" for number in range(3)]
    assert again.verify() == []
    report = again.add_images(normal, toy)
    assert (report.added, report.unchanged) == (2, 10)


def flip_in_shard(gallery: sf.Gallery, text: str) -> None:
    [path] = gallery.path.glob("shards/*.h5")
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(text.encode()) + len(text) - 1] ^= 1
    path.write_bytes(damaged)


def test_a_damaged_path_is_noticed(gallery: sf.Gallery, normal: Path) -> None:
    flip_in_shard(gallery, str(normal / "006.png"))
    [problem] = reopen(gallery.path).verify()
    assert problem.key == "006.png"
    assert "path is not what was written" in problem.message


STEPS: dict[str, Callable[[sf.Gallery, sf.Extractor, Path], object]] = {
    "add": lambda gallery, toy, more: gallery.add_images(more / "new", toy),
    "replace": lambda gallery, toy, more: gallery.add_images(more / "changed", toy, replace=True),
    "moved": lambda gallery, toy, more: gallery.add_images(more / "moved", toy, replace=True),
    "remove": lambda gallery, toy, more: gallery.remove([key for key in ("001.png", "003.png") if key in gallery]),
    "compact": lambda gallery, toy, more: gallery.compact(),
}


def state(gallery: sf.Gallery) -> dict[str, tuple[bytes, str | None]]:
    snapshot = gallery.snapshot()
    places = {key: snapshot.source(row_id) for key, row_id in zip(gallery.keys(), snapshot.ids(), strict=True)}
    return {key: (levels, places[key]) for key, levels in content(gallery).items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_stopped_at_any_flush_every_image_is_old_or_new(
    tmp_path: Path, toy: sf.Extractor, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """An image has its old path, content and levels, or the new ones, and its file answers for them.

    The disk is full at every other flush, and Ctrl-C comes at the others; store/test_crash has both at each
    flush of an append.
    """
    gallery, normal, more = create(tmp_path / "g", toy), make_images(tmp_path / "normal", 6), tmp_path / "more"
    gallery.add_images(normal, toy)
    make_images(more / "new" / "new", 2, seed=21)
    shutil.copytree(normal, more / "moved")
    make_images(more / "changed", 6, seed=23)
    gallery.remove(["000.png", "005.png"])
    gallery.close()
    fail_at = failing_flush(monkeypatch, OSError(errno.ENOSPC, ""), KeyboardInterrupt())
    with reopen(shutil.copytree(gallery.path, tmp_path / "undisturbed")) as undisturbed:
        old = state(undisturbed)
        STEPS[name](undisturbed, toy, more)
        new = state(undisturbed)
    flushes = fail_at(0)
    assert flushes >= 2
    for nth in range(1, flushes + 1):
        path = shutil.copytree(gallery.path, tmp_path / str(nth))
        with reopen(path) as stopped:
            fail_at(nth)
            with pytest.raises((sf.GalleryError, KeyboardInterrupt)):
                STEPS[name](stopped, toy, more)
            fail_at(0)
            with reopen(path) as other:
                for one in (stopped, other):
                    found = state(one)
                    assert len(one) == len(found)
                    assert old.keys() & new.keys() <= found.keys() <= old.keys() | new.keys()
                    assert all(image in (old.get(key), new.get(key)) for key, image in found.items())
                    assert one.verify() == []
            STEPS[name](stopped, toy, more)
            assert state(stopped) == new
            assert stopped.verify() == []
