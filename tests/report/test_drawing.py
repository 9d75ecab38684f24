"""Pictures of maps: one colour scale for all images, and nothing drawn where there is nothing to show."""

from __future__ import annotations

import numpy as np
import pytest

from spade_faiss.detect.calibration import Calibration
from spade_faiss.detect.regions import find_regions
from spade_faiss.report.colour_scale import Scale, colours, css_colours
from spade_faiss.report.drawing import OUTLINE, TRUTH, fit, fit_mask, outline, overlay, patch, stroke

IMAGE = np.random.default_rng(0).integers(0, 256, (12, 17, 3), dtype=np.uint8)


def scores(values: object) -> np.ndarray:
    return np.asarray(values, np.float32)


# --- scale -----------------------------------------------------------------------------------------------------------


def test_scale_of_normal_maps() -> None:
    scale = Scale.from_normal([scores([[0, 3]]), scores([[1], [100]]), scores([[4, 2], [0, 0]])])  # maxima 3, 100, 4
    assert scale == Scale(low=2, high=8)


def calibration(map_maxima: object, false_alarms: float = 0.1) -> Calibration:
    maxima = np.asarray(map_maxima, np.float64)
    return Calibration(1, {}, false_alarms, None, maxima, maxima)


def test_scale_of_a_calibration() -> None:
    found = calibration(np.arange(1, 20))  # median 10; rank ceil(20 x 0.9) = 18
    scale = Scale.from_calibration(found)
    assert scale == Scale(low=5, high=36, pixel_threshold=18)
    assert "19 normal maps" in scale.basis
    # The threshold lies well inside the scale, whatever the maps: between a third and half of it.
    assert 1 / 3 <= float(scale.apply(scores(18))) <= 1 / 2


def test_scale_of_a_calibration_of_zeros() -> None:
    scale = Scale.from_calibration(calibration(np.zeros(19)))
    assert scale.high > scale.low


def test_scale_is_linear_between_its_ends_and_clipped() -> None:
    found = Scale(low=2, high=6).apply(scores([[-5, 0, 2], [3, 4, 5], [6, 7, 1e30]]))
    assert found.dtype == np.float32
    assert found == pytest.approx(np.array([[0, 0, 0], [0.25, 0.5, 0.75], [1, 1, 1]]))


def test_scale_is_the_same_for_every_image() -> None:
    scale = Scale(low=1, high=9)
    weak, strong = scores([[0, 3, 4]]), scores([[0, 3, 400]])  # a maximum of its own does not change a map's colours
    assert np.array_equal(scale.apply(weak)[0, :2], scale.apply(strong)[0, :2])


def test_higher_scores_are_never_darker() -> None:
    scale = Scale.from_normal([scores([[0.3]])])
    found = scale.apply(np.sort(np.random.default_rng(0).gamma(1, 0.4, 500)).astype(np.float32))
    assert (np.diff(found) >= 0).all()
    assert (found[0], found[-1]) == (0, 1)


def test_scale_of_maps_that_are_all_zero() -> None:
    scale = Scale.from_normal([scores(np.zeros((3, 3)))] * 2)  # one image searched in a gallery that holds it
    assert scale.high > scale.low
    assert scale.apply(scores([[0, 1e9]])).tolist() == [[0, 1]]


# --- colours ---------------------------------------------------------------------------------------------------------


def test_colours_grow_lighter() -> None:
    found = colours(np.linspace(0, 1, 1000, dtype=np.float32).reshape(10, 100))
    assert (found.shape, found.dtype) == ((10, 100, 3), np.uint8)
    lightness = found.reshape(-1, 3) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > -1).all()  # but for rounding
    assert lightness[0] < 5
    assert lightness[-1] > 240


# --- overlay ---------------------------------------------------------------------------------------------------------


def test_overlay_shows_the_image_where_scores_are_low() -> None:
    values = scores(np.full(IMAGE.shape[:2], 1.5))
    values[4:7, 5:9] = 30
    values[0, 0] = 2  # where colour begins
    before = IMAGE.copy()
    found = overlay(IMAGE, values, Scale(low=2, high=8))
    assert (found.shape, found.dtype) == (IMAGE.shape, np.uint8)
    high = values > 2
    assert np.array_equal(found[~high], IMAGE[~high])
    assert (np.abs(found[high].astype(int) - IMAGE[high]).max(axis=1) > 20).all()
    assert np.array_equal(IMAGE, before)


def test_overlay_hides_more_of_the_image_the_higher_the_score() -> None:
    dark, light = np.zeros((1, 50, 3), np.uint8), np.full((1, 50, 3), 255, np.uint8)
    values = scores(np.linspace(0, 10, 50)[None])
    scale = Scale(low=2, high=8)
    # What is left of the difference between two images under the same map.
    left = overlay(light, values, scale).astype(int) - overlay(dark, values, scale)
    assert (np.diff(left, axis=1) <= 1).all()  # but for rounding
    assert (left[0, 0] == 255).all()
    assert (left[0, -1] < 60).all()


# --- outline ---------------------------------------------------------------------------------------------------------


def test_outline_is_two_pixels_outside_the_mask() -> None:
    mask = np.zeros(IMAGE.shape[:2], bool)
    mask[5:8, 6:11] = True
    before = IMAGE.copy()
    found = outline(IMAGE, mask)
    assert (found.shape, found.dtype) == (IMAGE.shape, np.uint8)
    assert np.array_equal(IMAGE, before)

    rows, columns = np.indices(mask.shape)
    # Steps, up or down and left or right, to the nearest pixel of the mask.
    steps = np.maximum(0, np.maximum(5 - rows, rows - 7)) + np.maximum(0, np.maximum(6 - columns, columns - 10))
    drawn = (steps == 1) | (steps == 2)
    assert (found[drawn] == OUTLINE).all()
    assert np.array_equal(found[~drawn], IMAGE[~drawn])


def test_outline_at_the_edge_of_the_image() -> None:
    mask = np.zeros(IMAGE.shape[:2], bool)
    mask[:, :4] = True
    found = outline(IMAGE, mask)
    assert (found[:, 4:6] == OUTLINE).all()
    assert np.array_equal(found[:, :4], IMAGE[:, :4])
    assert np.array_equal(found[:, 6:], IMAGE[:, 6:])  # it does not come round the other side


@pytest.mark.parametrize("value", [False, True])
def test_outline_of_nothing_or_everything(value: bool) -> None:
    assert np.array_equal(outline(IMAGE, np.full(IMAGE.shape[:2], value)), IMAGE)


def test_outline_of_a_width_and_a_colour() -> None:
    mask = np.zeros((20, 20), bool)
    mask[10, 10] = True
    found = outline(np.zeros((20, 20, 3), np.uint8), mask, width=4, colour=TRUTH)
    assert (found[10, 11:15] == TRUTH).all()
    assert not found[10, 15:].any()
    assert not found[10, 10].any()


def test_stroke_grows_with_the_image() -> None:
    assert [stroke(np.zeros((8, side, 3), np.uint8)) for side in (40, 700, 2560)] == [2, 2, 10]


# --- regions, sizes, patches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("min_region", [1, 3, 6, 1000])
def test_labels_hold_the_pixels_of_the_regions(rng: np.random.Generator, min_region: int) -> None:
    found = rng.random((30, 40)).astype(np.float32)
    regions, labels = find_regions(found, 0.8, min_region)
    assert labels.max() == len(regions)
    assert (found[labels > 0] > 0.8).all()
    for number, region in enumerate(regions, start=1):
        rows, columns = np.nonzero(labels == number)
        assert len(rows) == region.area
        assert found[rows, columns].max() == np.float32(region.peak)
        assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == region.box


def test_fit_scales_the_longer_side_up_and_down() -> None:
    assert fit(IMAGE, 340).shape == (240, 340, 3)
    assert fit(np.zeros((900, 30, 3), np.uint8), 90).shape == (90, 3, 3)
    assert fit(np.zeros((900, 8, 3), np.uint8), 90).shape == (90, 1, 3)


def test_a_small_mask_is_not_lost_when_it_shrinks() -> None:
    mask = np.zeros((1000, 500), bool)
    mask[703, 251] = True
    small = fit_mask(mask, 100)
    assert small.shape == (100, 50)
    assert np.argwhere(small).tolist() == [[70, 25]]


def test_patch_cuts_a_box() -> None:
    image = np.zeros((20, 40, 3), np.uint8)
    image[5:10, 30:40] = 200
    assert (patch(image, (30, 5, 40, 10), (10, 20))[3:-3, 3:] == 200).all()  # beside what is around it in the image
    assert patch(image, (29.5, 4.25, 33.25, 9.5), (31, 17)).shape == (31, 17, 3)
    half = patch(image, (20, 5, 40.0000001, 10), (50, 64))  # beyond the edge by rounding
    assert not half[:, :26].any()
    assert (half[20:-20, 38:] == 200).all()


def test_css_colours_are_those_of_the_maps() -> None:
    ends = colours(scores([[0, 1]]))[0]
    assert [css_colours()[0], css_colours()[-1]] == [f"rgb({r} {g} {b})" for r, g, b in ends.tolist()]
