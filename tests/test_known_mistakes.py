"""The six known ways to get SPADE wrong: a check for each, and proof that it fails when the mistake is put in.

Every check goes through Detector, on images whose answers can be worked out by hand, and raises AssertionError. A
mistake is patched in between the detector and one of its stages, whichever engine works behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

import spade_faiss as sf
from spade_faiss.detect import matching, scorer
from spade_faiss.images.view import View
from tests import reference

SIDE = 32  # px, of all images here: the toy extractor's own size, where its finest grid is 8 x 8
CELL = 4  # px, of that grid

Check = Callable[[Path], None]
Break = Callable[[pytest.MonkeyPatch], None]


def make_detector(folder: Path, images: Sequence[np.ndarray], sigma: float = 0, **options: Any) -> sf.Detector:
    """A detector that compares with all of the images, by features in float32."""
    extractor = sf.load_extractor("toy", options=sf.FeatureOptions(dtype="float32", **options))
    gallery = sf.Gallery.create(folder / "g", extractor.spec)
    gallery.append(
        [str(number) for number in range(len(images))],
        extractor.extract([extractor.spec.view.apply(i) for i in images]),
    )
    return sf.Detector(gallery, extractor, score=sf.ScoreOptions(sigma=sigma))


def grey(value: int) -> np.ndarray:
    return np.full((SIDE, SIDE, 3), value, np.uint8)


def random_cells(n: int) -> np.ndarray:
    """(n, 8, 8, 3) colours: each cell of an image, which is a patch of the finest level, has a colour of its own."""
    return np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3), np.uint8)


def painted(cells: np.ndarray) -> np.ndarray:
    """(8, 8, 3) colours -> (32, 32, 3) image."""
    return cells.repeat(CELL, axis=0).repeat(CELL, axis=1)


# --- checks ----------------------------------------------------------------------------------------------------------


def whole_gallery(folder: Path) -> None:
    """A query whose every patch is one of the gallery's, of all images in equal parts, has no anomaly anywhere."""
    cells = random_cells(5)
    at = np.random.default_rng(1).permutation(5 * 64)[:64]
    at[:5] = np.arange(5) * 64 + 63  # the last patch of each image among them
    mosaic = cells.reshape(-1, 3)[at].reshape(8, 8, 3)
    found = make_detector(folder, [painted(one) for one in cells], levels=("stride4",)).query(painted(mosaic))
    assert found.anomaly_map.max() == 0
    assert set(found.matches[..., 0].ravel()) == set(range(5))


def all_positions(folder: Path) -> None:
    """A normal image whose parts have moved is normal."""
    (cells,) = random_cells(1)
    found = make_detector(folder, [painted(cells)], levels=("stride4",)).query(painted(np.roll(cells, (3, 2), (0, 1))))
    assert found.anomaly_map.max() == 0


def squared_distances(folder: Path) -> None:
    """Grey 110 among grey 100 is (10 / 255)^2 off in 12 numbers of the image feature, and in 3 colours x 3 levels."""
    detector = make_detector(folder, [grey(100)])
    for difference in (10, 20):
        found = detector.query(grey(100 + difference))
        assert found.image_score == pytest.approx(12 * (difference / 255) ** 2, rel=1e-4)
        assert found.neighbours.sq_distances == pytest.approx([found.image_score], rel=1e-4)
        assert found.anomaly_map == pytest.approx(np.full((SIDE, SIDE), 9 * (difference / 255) ** 2), rel=1e-4)


def levels_together(folder: Path) -> None:
    """The map is that of the oracle, which concatenates the levels before it searches."""
    *normal, query = np.random.default_rng(2).integers(0, 256, (4, SIDE, SIDE, 3), np.uint8)
    detector = make_detector(folder, normal, sigma=4)
    features = detector.extractor.extract([query, *normal])
    sq_distances, _ = reference.search_patches(
        [level[0] for level in features.levels], [level[1:] for level in features.levels], 1
    )
    expected = reference.anomaly_map(sq_distances, (SIDE, SIDE), (SIDE, SIDE), (SIDE, SIDE), 4)
    np.testing.assert_allclose(detector.query(query).anomaly_map, expected, rtol=1e-4)


def own_scores(folder: Path) -> None:
    """What is said of an image does not depend on which others are looked at."""
    detector = make_detector(folder, [grey(100)])
    alone = detector.query(grey(120))
    together = detector.query_batch([grey(101), grey(120), grey(255)])[1]
    assert together.image_score == alone.image_score
    assert (together.anomaly_map == alone.anomaly_map).all()


def images_as_they_are(folder: Path) -> None:
    """A change at the very edge is found there, and a change of contrast is a change."""
    ramp = np.linspace(80, 160, SIDE).astype(np.uint8)[None, :, None].repeat(SIDE, axis=0).repeat(3, axis=2)
    detector = make_detector(folder, [ramp])
    assert detector.query(ramp).image_score == 0
    flatter = np.rint(120 + (ramp - 120.0) / 2).astype(np.uint8)
    assert detector.query(flatter).image_score > 1e-3
    for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        marked = ramp.copy()
        marked[row, column] = 255
        found = detector.query(marked)
        assert found.region == (0, 0, SIDE, SIDE)
        assert found.anomaly_map[row, column] == found.anomaly_map.max() > 0


# --- mistakes --------------------------------------------------------------------------------------------------------


def around(stage: str, wrong: Callable[..., Any]) -> Break:
    """A mistake around a stage of the detector: wrong(stage, *args) -> what the stage should return."""
    room = matching if hasattr(matching, stage) else scorer
    return lambda patch: patch.setattr(room, stage, partial(wrong, getattr(room, stage)))


def drop_the_tail(search: Callable[..., Any], query: Any, neighbours: Any, *options: Any, **named: Any) -> Any:
    """Work in blocks of 2 images, and forget what is left over."""
    return search(query, [level[: len(level) // 2 * 2] for level in neighbours], *options, **named)


def compare_the_same_position(
    search: Callable[..., Any], query: Any, neighbours: Any, *options: Any, **named: Any
) -> Any:
    size = query[0].shape[1:]
    images = [reference.patch_features([level[n] for level in neighbours]) for n in range(len(neighbours[0]))]
    each = ((np.array(images) - reference.patch_features(query)) ** 2).sum(axis=-1)
    return each.min(axis=0)[..., None], np.zeros((*size, 1, 3), np.int32)


def search_each_level(search: Callable[..., Any], query: Any, neighbours: Any, *options: Any, **named: Any) -> Any:
    size, total = query[0].shape[1:], 0
    for level, others in zip(query, neighbours, strict=True):
        sq_distances, _ = search([level], [others], *options, **named)
        total = total + reference.resize_map(sq_distances[..., 0], size)[..., None]
    return total, np.zeros((*size, 1, 3), np.int32)


def take_roots(search: Callable[..., Any], *args: Any, **named: Any) -> Any:
    sq_distances, matches = search(*args, **named)
    return np.sqrt(sq_distances), matches


def normalise_by_the_test_set(patch: pytest.MonkeyPatch) -> None:
    query_batch = sf.Detector.query_batch

    def normalised(self: sf.Detector, images: Sequence[Any]) -> list[sf.Detection]:
        found = query_batch(self, images)
        for values in (np.array([one.image_score for one in found]), np.array([one.anomaly_map for one in found])):
            low, span = values.min(), np.ptp(values) or 1
            name = "image_score" if values.ndim == 1 else "anomaly_map"
            found = [replace(one, **{name: (getattr(one, name) - low) / span}) for one in found]
        return found

    patch.setattr(sf.Detector, "query_batch", normalised)


def edit_images(edit: Callable[[Image.Image], Image.Image]) -> Break:
    """Change every image before the network sees it, of the gallery and of the query alike."""
    apply = View.apply
    return lambda patch: patch.setattr(
        View, "apply", lambda self, pixels: apply(self, np.asarray(edit(Image.fromarray(pixels))))
    )


def blank_the_edges(make_map: Callable[..., Any], *args: Any, **named: Any) -> Any:
    scores = make_map(*args, **named)
    inner = np.zeros_like(scores)
    inner[2:-2, 2:-2] = scores[2:-2, 2:-2]
    return inner


MISTAKES: list[tuple[str, Check, Break]] = [
    ("the tail of the gallery is dropped", whole_gallery, around("search_finite", drop_the_tail)),
    ("the same position only", all_positions, around("search_finite", compare_the_same_position)),
    ("plain distances in the map", squared_distances, around("search_finite", take_roots)),
    (
        "plain distances in the score",
        squared_distances,
        around("knn_score", lambda score, d, *k: score(np.sqrt(d), *k)),
    ),
    ("one map per level, then added", levels_together, around("search_finite", search_each_level)),
    ("scores normalised by the test set", own_scores, normalise_by_the_test_set),
    ("hidden contrast", images_as_they_are, edit_images(ImageOps.autocontrast)),
    ("hidden crop", images_as_they_are, edit_images(lambda image: ImageOps.crop(image, 3))),
    ("hidden edges of the map", images_as_they_are, around("anomaly_map", blank_the_edges)),
]


@pytest.mark.parametrize("check", dict.fromkeys(check for _, check, _ in MISTAKES), ids=lambda check: check.__name__)
def test_it_is_done_right(tmp_path: Path, check: Check) -> None:
    check(tmp_path)


@pytest.mark.parametrize(("check", "mistake"), [pytest.param(*rest, id=name) for name, *rest in MISTAKES])
def test_the_mistake_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: Check, mistake: Break) -> None:
    mistake(monkeypatch)
    with pytest.raises(AssertionError):
        check(tmp_path)
