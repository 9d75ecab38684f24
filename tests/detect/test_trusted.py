"""Images that a person has confirmed: their like is normal by one of them; nothing else changes."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import spade_faiss as sf
from spade_faiss.detect.level_matches import FLOOR
from spade_faiss.detect.matching import trusting
from spade_faiss.images.sources import ImageFile
from spade_faiss.patch_search.spacing import NEAREST
from spade_faiss.store.trusted import FILE, change_trusted, read_trusted
from tests import reference
from tests.helpers.galleries import make_gallery
from tests.helpers.images import make_images

RELATIVE = sf.RECIPES["relative"]
SEARCH = sf.SearchOptions(k=5, matching="by_level", kappa=3, distinct=True)
KEY = "confirmed.png"


def write_odd(path: Path, size: tuple[int, int] = (40, 48)) -> Path:
    """An image that is nothing like the normal ones, no two parts of it alike."""
    rows, columns = np.indices(size)
    pixels = np.stack([255 - rows, 255 - columns, np.zeros(size)], axis=-1)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    return write_odd(tmp_path / "odd.png")


@pytest.fixture
def gallery(tmp_path: Path, toy: sf.Extractor, odd: Path) -> sf.Gallery:
    """Nine normal images, and the odd one, which nobody has confirmed yet."""
    found, _ = make_gallery(tmp_path / "gallery", make_images(tmp_path / "normal", 9))
    found.add_images([ImageFile(odd, KEY)], toy)
    return found


def detector_of(gallery: sf.Gallery, toy: sf.Extractor, **more: Any) -> sf.Detector:
    return sf.Detector(gallery, toy, SEARCH, RELATIVE.score, **more)


def like(odd: Path) -> np.ndarray:
    """The same thing, a little darker."""
    return np.maximum(np.asarray(Image.open(odd)).astype(int) - 3, 0).astype(np.uint8)


def other() -> np.ndarray:
    """Another defect."""
    return np.full((40, 48, 3), (0, 0, 255), np.uint8)


def test_a_query_equals_the_oracle(gallery: sf.Gallery, toy: sf.Extractor, odd: Path) -> None:
    gallery.trust([KEY, "002.png"])
    detector = detector_of(gallery, toy)
    baseline = detector.baseline()
    assert baseline is not None
    features = toy.extract([toy.spec.view.apply(like(odd))])
    stored = np.stack([gallery.snapshot().image_feature(row) for row in range(10)])
    ids, _ = reference.retrieve(features.image[0], stored, 5)
    trusted = [place for place, key in enumerate(gallery.keys(ids)) if key in gallery.trusted()]
    assert trusted
    found = []
    for own, others in zip(features.levels, gallery.read(ids), strict=True):
        patches, grid = own[0].reshape(own.shape[1], -1), own.shape[2:]
        sq_distances, places = reference.search_distinct(patches, others, 3)
        neighbours = places // (grid[0] * grid[1])
        matches = np.stack(np.unravel_index(places[:, 0], (5, *grid)), axis=-1).reshape(*grid, 3)
        mean = reference.mean_or_trusted(sq_distances, neighbours, trusted).reshape(grid)
        found.append((mean, reference.spacing(others, matches, NEAREST)))
    figures = [(level.low, level.high, level.typical) for level in baseline.levels]
    expected = reference.relative_map(found, figures)
    np.testing.assert_allclose(detector.query(like(odd)).sq_distances[..., 0], expected, rtol=1e-4)


def test_its_like_is_normal_and_another_defect_is_not(gallery: sf.Gallery, toy: sf.Extractor, odd: Path) -> None:
    before = detector_of(gallery, toy)
    gallery.trust([KEY])
    after = detector_of(gallery, toy)
    assert after.query(odd).anomaly_map == pytest.approx(FLOOR)
    assert before.query(odd).image_score > 3 * FLOOR  # one of three images averaged
    assert after.query(like(odd)).image_score < before.query(like(odd)).image_score / 2
    assert after.query(other()).image_score > 0.9 * before.query(other()).image_score


@pytest.mark.parametrize("kind", ["nobody", "elsewhere", "ignored", "ended", "replaced"])
def test_without_trusted_images_nothing_changes(
    gallery: sf.Gallery, toy: sf.Extractor, odd: Path, tmp_path: Path, kind: str
) -> None:
    """To the bit: none, one that is not in the gallery, one that is not to count, or does not any more."""
    before = detector_of(gallery, toy).query(odd)
    if kind == "elsewhere":
        change_trusted(gallery.path, {"later.png": "0" * 64})
    if kind in ("ignored", "ended"):
        gallery.trust([KEY])
    if kind == "ended":
        gallery.distrust([KEY])
    if kind == "replaced":  # other content under the key is another image
        gallery.trust(["000.png"])
        assert detector_of(gallery, toy).query(tmp_path / "normal" / "000.png").anomaly_map == pytest.approx(FLOOR)
        make_images(tmp_path / "normal", 1, seed=70)
        gallery.add_images(tmp_path / "normal", toy, replace=True)
        assert gallery.trusted() == []
        before = detector_of(gallery, toy, trusting=False).query(odd)
    after = detector_of(gallery, toy, trusting=kind != "ignored").query(odd)
    np.testing.assert_array_equal(after.anomaly_map, before.anomaly_map)
    np.testing.assert_array_equal(after.matches, before.matches)
    assert after.image_score == before.image_score


def test_with_concatenated_levels(gallery: sf.Gallery, toy: sf.Extractor, odd: Path) -> None:
    """The nearest of kappa matches counts alone; with one match nothing changes."""
    search, one = sf.SearchOptions(k=5, kappa=4), sf.SearchOptions(k=5)
    before, same = sf.Detector(gallery, toy, search).query(odd), sf.Detector(gallery, toy, one).query(odd)
    gallery.trust([KEY])
    after = sf.Detector(gallery, toy, search).query(odd)
    assert before.map_max > 0
    assert after.map_max == pytest.approx(0, abs=1e-6)
    assert (after.matches == before.matches[:, :, :1]).all()
    np.testing.assert_array_equal(sf.Detector(gallery, toy, one).query(odd).anomaly_map, same.anomaly_map)


def test_distances_never_grow(rng: np.random.Generator) -> None:
    sq_distances = np.sort(rng.random((4, 5, 3), np.float32), axis=2)
    matches = rng.integers(0, 6, (4, 5, 3, 3)).astype(np.int32)
    some, at = trusting(sq_distances, matches, np.arange(6) < 3)
    alone = matches[:, :, 0, 0] < 3
    assert (some[alone] == sq_distances[alone][:, :1]).all()
    assert (at[alone] == matches[alone][:, :1]).all()
    np.testing.assert_array_equal(some[~alone], sq_distances[~alone])
    assert (some.mean(axis=2) <= sq_distances.mean(axis=2)).all()


def test_a_copy_is_trusted_too(gallery: sf.Gallery, toy: sf.Extractor, odd: Path) -> None:
    """Of copies one is a neighbour, and need not be the one that was confirmed."""
    gallery.add_images([ImageFile(odd, "again.png")], toy)
    gallery.trust(["again.png"])
    found = detector_of(gallery, toy).query(odd)
    assert found.neighbours.keys[0] == KEY
    assert found.anomaly_map == pytest.approx(FLOOR)


def test_all_tiles_of_an_image_are_trusted(tmp_path: Path) -> None:
    options = sf.FeatureOptions(tile=(40, 48))
    gallery, toy = make_gallery(tmp_path / "tiles", make_images(tmp_path / "normal", 6, size=(80, 96)), options)
    odd = write_odd(tmp_path / "odd.png", (80, 96))
    gallery.add_images([ImageFile(odd, KEY)], toy)
    before = detector_of(gallery, toy).query(odd)
    gallery.trust([KEY])
    assert detector_of(gallery, toy).query(odd).anomaly_map == pytest.approx(FLOOR, abs=1e-3)
    assert before.map_max > 1.5 * FLOOR


def test_normal_images_are_compared_with_trusted_ones(gallery: sf.Gallery, toy: sf.Extractor) -> None:
    """Calibration judges by the same rule, and so do copies of the detector."""
    gallery.trust(["004.png"])
    detector = detector_of(gallery, toy)
    ids = gallery.ids(["003.png"])
    [found] = detector.leave_one_out(ids)
    for same in (pickle.loads(pickle.dumps(detector)), detector.uncalibrated()):
        assert [one.image_score for one in same.leave_one_out(ids)] == [found.image_score]
    [bare] = detector_of(gallery, toy, trusting=False).leave_one_out(ids)
    assert found.image_score != bare.image_score
    assert pickle.loads(pickle.dumps(detector_of(gallery, toy, trusting=False))).query(other()).image_score != (
        detector.query(other()).image_score
    )


def test_removed_images_are_not_trusted(gallery: sf.Gallery) -> None:
    gallery.trust([KEY, "001.png"])
    assert gallery.trusted() == ["001.png", KEY]
    assert gallery.info()["trusted"] == 2
    gallery.remove([KEY])
    assert list(read_trusted(gallery.path)) == ["001.png"]
    with pytest.raises(sf.OptionError, match=r"found 'nobody\.png', which is not"):
        gallery.trust(["001.png", "nobody.png"])


@pytest.mark.parametrize("damage", [("1", "2"), ("{", "["), ('"images"', '"others"'), (KEY, "else.png")])
def test_a_damaged_list_is_refused(gallery: sf.Gallery, toy: sf.Extractor, damage: tuple[str, str]) -> None:
    gallery.trust([KEY])
    path = gallery.path / FILE
    path.write_text(path.read_text().replace(*damage, 1))
    with pytest.raises(sf.CorruptGalleryError, match=r"trusted.json: .*; delete it, and trust the images again"):
        detector_of(gallery, toy)
    assert [problem.file for problem in gallery.verify()] == [FILE]
    before = gallery.keys()
    with pytest.raises(sf.CorruptGalleryError, match=r"trusted.json: "):
        gallery.remove([before[0]])
    gallery.refresh()
    assert gallery.keys() == before
