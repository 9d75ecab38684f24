"""Outlines: the same pixels as their mask, by the rule of centres and by pycocotools; few corners."""

from __future__ import annotations

import sys
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

import spade_faiss as sf
from spade_faiss.detect.regions import EIGHT_CONNECTED
from spade_faiss.labels import joined, outlines
from tests.helpers.polygons import filled
from tests.helpers.results import masks


@pytest.mark.parametrize("key", masks())
def test_outlines_have_the_pixels_of_their_mask(key: str) -> None:
    mask = masks()[key]
    parts = outlines(mask)
    np.testing.assert_array_equal(filled(list(chain.from_iterable(parts)), mask.shape), mask)
    np.testing.assert_array_equal(filled([joined(part) for part in parts], mask.shape), mask)
    assert len(parts) == ndimage.label(mask, EIGHT_CONNECTED)[1]


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_any_mask(height: int, width: int, data: st.DataObject) -> None:
    bits = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    mask = np.array(bits).reshape(height, width)
    parts = outlines(mask, tolerance=data.draw(st.sampled_from([0.0, 0.35, 0.49])))
    np.testing.assert_array_equal(filled([joined(part) for part in parts], mask.shape), mask)


def test_holes_follow_their_outer_ring() -> None:
    mask = masks()["a/ring.png"]
    [[outer, *holes]] = outlines(mask)
    assert (outer.min(axis=0).tolist(), outer.max(axis=0).tolist()) == ([5, 4], [27, 19])
    assert [12.5, 12.5] in [hole.mean(axis=0).tolist() for hole in holes]  # that of one pixel
    assert len(holes) == 3


def test_one_pixel_and_a_whole_image() -> None:
    [[pixel]] = outlines(np.ones((1, 1), np.bool_), left=9, top=7)
    assert sorted(pixel.tolist()) == [[9, 7.5], [9.5, 7], [9.5, 8], [10, 7.5]]
    [[whole]] = outlines(np.ones((30, 40), np.bool_))
    assert (len(whole), whole.min(), whole.max(axis=0).tolist()) == (8, 0, [40, 30])
    assert outlines(np.zeros((3, 4), np.bool_)) == []


def test_corners_that_are_not_needed_are_left_out() -> None:
    y, x = np.mgrid[:200, :300]
    disc = ((x - 150) ** 2 + (y - 100) ** 2) < 80**2
    [[few]], [[all_corners]] = outlines(disc), outlines(disc, tolerance=0)
    assert len(few) < len(all_corners) / 3
    np.testing.assert_array_equal(filled([few], disc.shape), disc)


def test_compiled_code_keeps_the_same_corners(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.random.default_rng(0).random((40, 50)) < 0.7
    expected = outlines(mask)
    monkeypatch.setattr(sys.modules["spade_faiss.labels.outlines"], "COMPILED", 0)
    found = outlines(mask)
    assert [len(part) for part in found] == [len(part) for part in expected]
    for pair in zip(chain.from_iterable(found), chain.from_iterable(expected), strict=True):
        np.testing.assert_array_equal(*pair)


def test_a_tolerance_that_loses_pixels_is_refused() -> None:
    with pytest.raises(sf.OptionError, match=r"tolerance: expected pixels from 0 to below 0\.5, found 0\.5"):
        outlines(np.ones((2, 2), np.bool_), tolerance=0.5)


def test_masks_of_integers_and_what_is_none() -> None:
    mask = masks()["a/ring.png"]
    for same in (mask.astype(np.uint8) * 255, mask.astype(int), mask.tolist()):
        for pair in zip(chain.from_iterable(outlines(same)), chain.from_iterable(outlines(mask)), strict=True):
            np.testing.assert_array_equal(*pair)
    for other in (mask.astype(np.float32), mask[..., None], np.zeros(3, np.bool_)):
        with pytest.raises(sf.OptionError, match=r"inside: expected an \(h, w\) mask of bool, found \("):
            outlines(other)


def test_without_contourpy_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "contourpy", None)
    with pytest.raises(sf.OptionError, match=r"pip install 'spade-faiss\[labels\]'"):
        outlines(np.ones((2, 2), np.bool_))
