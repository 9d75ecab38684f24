"""Tiles of images: where they lie, what they are called, and how their maps are weighed."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import spade_faiss as sf
from spade_faiss.images.tiling import Tiling, cut, image_key, place_of, size_of
from spade_faiss.images.view import View

WHOLE, CROPPED = View((32, 32), (32, 32)), View((40, 40), (32, 32))
SIDES = st.integers(1, 300)


@st.composite
def tilings(draw: st.DrawFn) -> Tiling:
    tile = draw(st.tuples(st.integers(8, 90), st.integers(8, 90)))
    overlap = draw(st.none() | st.integers(0, min(tile) // 2))
    return Tiling(draw(st.sampled_from([WHOLE, CROPPED])), tile, overlap)


@settings(max_examples=40)
@given(tilings(), st.tuples(SIDES, SIDES))
def test_tiles_of_one_size_cover_the_image_and_share_the_overlap(tiling: Tiling, size: tuple[int, int]) -> None:
    """Sides need not be a multiple of a tile's (open-edge-platform/anomalib issue 1401: 8000 x 2000 px)."""
    boxes = tiling.boxes(size)
    covered, (height, width) = np.zeros(size, int), size
    for box in boxes:
        cut(covered, box)[:] += 1
    assert covered.min() >= 1
    assert tiling.tile is not None
    assert {size_of(box) for box in boxes} == {(min(height, tiling.tile[0]), min(width, tiling.tile[1]))}
    assert boxes[0][:2] == (0, 0)
    assert boxes[-1][2:] == (width, height)
    if tiling.view is WHOLE:
        lefts = sorted({left for left, *_ in boxes})
        shared = [first + tiling.tile[1] - second for first, second in pairwise(lefts)]
        assert all(pixels >= tiling.shared for pixels in shared)


@settings(max_examples=40)
@given(tilings(), st.tuples(SIDES, SIDES))
def test_weights_are_1_in_total_wherever_the_network_looks(tiling: Tiling, size: tuple[int, int]) -> None:
    """Nothing is divided by 0 at the borders (lmitechnologies/LMI_AI_Solutions pull request 401)."""
    rows, columns = tiling.weights(size)
    total = np.zeros(size)
    for number, box in enumerate(tiling.boxes(size)):
        row, column = divmod(number, len(columns))
        cut(total, box)[:] += np.outer(rows[row], columns[column])
    left, top, right, bottom = tiling.region(size)
    np.testing.assert_allclose(total[top:bottom, left:right], 1, atol=1e-6)
    assert total.sum() == pytest.approx((right - left) * (bottom - top))


@settings(max_examples=40)
@given(tilings(), st.tuples(SIDES, SIDES), st.text(max_size=20))
def test_a_key_says_the_tile(tiling: Tiling, size: tuple[int, int], key: str) -> None:
    keys, boxes = tiling.keys(f"{key}.png", size), tiling.boxes(size)
    assert len(set(keys)) == len(boxes)
    assert {image_key(one) for one in keys} == {f"{key}.png"}
    assert [tiling.box(one, size) for one in keys] == boxes
    assert [tiling.number(one, size) for one in keys] == list(range(len(boxes)))


@pytest.mark.parametrize("key", ["a#xywh=1,2,3,4.png", "a#xywh=1,2,3.png", "#xywh=1,2,3,x", "a#xywh=-1,2,3,4"])
def test_names_that_look_like_places_are_names(key: str) -> None:
    assert (image_key(key), place_of(key)) == (key, None)


def test_a_place_that_an_image_does_not_have() -> None:
    with pytest.raises(sf.ImageError, match=r"expected a tile of an image of 100x50 px, found 'a#xywh=1,2,3,4'"):
        Tiling(WHOLE, (32, 32)).box("a#xywh=1,2,3,4", (50, 100))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tile": 0}, "tile: expected pixels >= 1"),
        ({"tile": (64, 0)}, "tile: expected pixels >= 1"),
        ({"tile": (64, 32), "overlap": 17}, "overlap: expected pixels from 0 to 16, half a tile, found 17"),
        ({"tile": 64, "overlap": -1}, "overlap: expected pixels from 0 to 32"),
        ({"overlap": 8}, r"overlap: expected none without tiles \(tile=HxW\), found 8"),
    ],
)
def test_options_that_make_no_tiles(options: dict[str, int], words: str) -> None:
    with pytest.raises(sf.OptionError, match=words):
        sf.FeatureOptions(**options)  # type: ignore[arg-type]


def test_the_spec_keeps_them_and_says_nothing_where_there_are_none() -> None:
    plain = sf.load_extractor("toy").spec
    assert not {"tile", "overlap"} & set(plain.to_json())
    tiled = sf.load_extractor("toy", options=sf.FeatureOptions(tile=(64, 48), overlap=0)).spec
    assert (tiled.to_json()["tile"], tiled.to_json()["overlap"]) == ((64, 48), 0)
    assert sf.ExtractorSpec.from_json(tiled.to_json()) == tiled
    assert sf.load_extractor("toy", options=tiled.options()).spec == tiled
    assert "tiles of 64x48 px" in repr(tiled)
    with pytest.raises(sf.SpecMismatchError, match=r"tile: expected None, found \(64, 48\)"):
        plain.require(tiled, "gallery")
    tiled.require(tiled, "gallery")
    default = sf.load_extractor("toy", options=sf.FeatureOptions(tile=64)).spec
    default.require(sf.load_extractor("toy", options=sf.FeatureOptions(tile=64, overlap=8)).spec, "its overlap is 8")


def test_features_of_no_images_have_no_tiles() -> None:
    with pytest.raises(sf.OptionError, match="tile: expected none for features that no images made"):
        sf.ExtractorSpec("own", level_shapes=((3, 5, 7),), image_dim=6, tile=(64, 64))
