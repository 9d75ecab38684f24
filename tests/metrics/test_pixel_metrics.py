"""Pixel metrics against numbers worked out by hand and an exact reference by sorting."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spade_faiss.errors import FeatureError, OptionError
from spade_faiss.metrics.image import image_metrics
from spade_faiss.metrics.pixel import BINS, CURVE_POINTS, PIXEL_METRICS, PixelMetrics
from tests.helpers.metric_maps import EVERY_KIND, FEWEST_BINS, box, counted, exact, far_off, flood, make


def test_pixel_metrics_by_hand() -> None:
    # Regions of 1 and of 2 pixels (8-connected: they touch at a corner), and 5 normal pixels in two images.
    first = np.array([[9, 1, 7], [2, 1, 3]], np.float32)
    mask = np.array([[True, False, True], [False, True, False]])
    far = np.array([[True, False, False], [False, False, False]])
    metrics = counted([(first, mask), (first, far)])
    assert (metrics.images, metrics.regions) == (2, 2)
    # scores, highest first: anomalous 9 9 7 1, normal 7 3 3 2 2 1 1 1; areas 3 (9, 7, 1) and 1 (9)
    # threshold      9     7      3      2      1
    # TP, FP         2,0   3,1    3,3    3,5    4,8
    # PRO            2/3   5/6    5/6    5/6    1
    result = metrics.result()
    assert result.values == pytest.approx(
        {
            "pixel_AUROC": (8 + 8 + 7.5 + 1.5) / 32,
            "pixel_AP": (2 / 4) * 1 + (1 / 4) * (3 / 4) + (1 / 4) * (4 / 12),
            "pixel_F1Max": 6 / 8,
            "pixel_AUPRO": ((2 / 3 + 5 / 6) / 2 * (1 / 8) + 5 / 6 * (0.3 - 1 / 8)) / 0.3,
        }
    )
    assert all(type(value) is float for value in result.values.values())
    assert result.error_bounds == dict.fromkeys(PIXEL_METRICS, 0)
    curves = metrics.curves()
    assert curves is not None
    np.testing.assert_allclose(curves.fpr, np.array([0, 0, 1, 3, 5, 8]) / 8)
    np.testing.assert_allclose(curves.tpr, np.array([0, 2, 3, 3, 3, 4]) / 4)
    np.testing.assert_allclose(curves.pro, np.array([0, 4, 5, 5, 5, 6]) / 6)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(1 / 16, 17 / 24), (1 / 8, 3 / 4), (5 / 8, 49 / 60), (1, (0.75 + 4 * 5 / 6 + 3 * 11 / 12) / 8)],
)
def test_integration_limit_by_hand(limit: float, expected: float) -> None:
    # the curve of the test above: between two points, on a point, on a point of a flat stretch, at the end
    first = np.array([[9, 1, 7], [2, 1, 3]], np.float32)
    mask = np.array([[True, False, True], [False, True, False]])
    metrics = counted([(first, mask), (first, box((2, 3), (0, 0, 1, 1)))])
    assert metrics.result(limit).values["pixel_AUPRO"] == pytest.approx(expected)


@pytest.mark.slow
@EVERY_KIND
def test_pixel_metrics_equal_the_exact_ones(kind: str) -> None:
    pairs = make(kind)
    metrics = counted(pairs, BINS)
    result = metrics.result()
    errors = far_off(result, exact(pairs))
    assert metrics.regions == sum(len(flood(mask)) for _, mask in pairs)
    assert max(errors.values()) < 1e-4, errors
    for name, error in errors.items():
        assert error <= result.error_bounds[name] + 1e-12, name
    assert max(result.error_bounds.values()) < 1e-4  # and it knows
    if kind in ("ties", "two values", "constant", "offset", "offset beside zeros", "saturated"):
        assert result.error_bounds == dict.fromkeys(PIXEL_METRICS, 0)  # each distinct value has its own bin


@pytest.mark.parametrize("limit", [0.001, 0.05, 0.3, 1])
@pytest.mark.parametrize("kind", ["random", "ties", "two values", "constant"])
def test_aupro_at_other_limits(kind: str, limit: float) -> None:
    pairs = make(kind)
    found = counted(pairs).result(limit).values["pixel_AUPRO"]
    assert found == pytest.approx(exact(pairs, limit)["pixel_AUPRO"], abs=1e-4)


@EVERY_KIND
def test_error_bounds_hold_with_few_bins(kind: str) -> None:
    pairs = make(kind, seed=1)
    result = counted(pairs, FEWEST_BINS).result()
    errors = far_off(result, exact(pairs))
    for name, error in errors.items():
        assert error <= result.error_bounds[name] + 1e-12, name


def test_error_bounds_say_when_the_bins_are_too_few() -> None:
    # A crowd of near-equal values, beside others all over float32 that take the bins: the worst case there is.
    rng = np.random.default_rng(0)
    pairs = make("offset", side=128)
    for anomaly_map, _ in pairs:
        anywhere = rng.random(anomaly_map.shape) < 0.5
        anomaly_map[anywhere] = 10 ** rng.uniform(-37, 38, anywhere.sum())
    result = counted(pairs, 2**18).result()
    errors = far_off(result, exact(pairs))
    assert errors["pixel_AUROC"] > 1e-3
    assert all(error <= result.error_bounds[name] for name, error in errors.items())


def test_outliers_do_not_cost_the_others_their_precision() -> None:
    pairs = make("offset beside zeros")
    pairs[0][0][0, :6] = [-3e38, -1e-40, 1e-40, 1e-10, 1e10, 3e38]
    result = counted(pairs, 2**20).result()
    assert result.error_bounds == dict.fromkeys(PIXEL_METRICS, 0)
    assert max(far_off(result, exact(pairs)).values()) < 1e-12


FLOAT32 = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(FLOAT32, FLOAT32)
def test_any_two_numbers_sort_as_they_should(normal: float, anomalous: float) -> None:
    result = counted([(np.array([[normal, anomalous]], np.float32), np.array([[False, True]]))]).result()
    assert result.values["pixel_AUROC"] == (anomalous > normal) + (anomalous == normal) / 2


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(-9, 9), st.booleans()), min_size=2, max_size=30))
def test_pixel_auroc_of_transformed_scores(pixels: list[tuple[int, bool]]) -> None:
    scores = np.array([[score for score, _ in pixels]], np.float32)
    mask = np.array([[label for _, label in pixels]])
    result = counted([(scores, mask)]).result().values
    if mask.all() or not mask.any():
        assert set(result.values()) == {None}
        return
    assert counted([(scores**3 / 7, mask)]).result().values == result
    flipped = counted([(-scores, mask)]).result().values["pixel_AUROC"]
    assert flipped == pytest.approx(1 - float(result["pixel_AUROC"] or 0), abs=1e-12)
    image = image_metrics(scores[0], mask[0]).values
    assert [result[f"pixel_{name}"] for name in ("AUROC", "AP", "F1Max")] == list(image.values())


@pytest.mark.parametrize("bins", [2**19, FEWEST_BINS])
@pytest.mark.parametrize("kind", ["ties", "distances", "all of float32"])
def test_order_changes_nothing(kind: str, bins: int) -> None:
    pairs = make(kind, n=9, side=40)
    expected, backwards = counted(pairs, bins), counted(pairs[::-1], bins)
    assert (backwards.images, backwards.regions) == (9, expected.regions)
    for found, value in (
        (backwards.result().values, expected.result().values),
        (backwards.result().error_bounds, expected.result().error_bounds),
    ):
        assert found == pytest.approx(value, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(
    ("masks", "reason"),
    [
        ([], "there is no pixel"),
        ([np.zeros((4, 5), bool)] * 2, "no pixel is anomalous: there is nothing to tell apart"),
        ([np.ones((4, 5), bool)] * 2, "no pixel is normal: there is nothing to tell apart"),
    ],
    ids=["no images", "all empty", "all full"],
)
def test_one_class_of_pixels_has_no_metrics(masks: list[np.ndarray], reason: str) -> None:
    metrics = counted([(np.arange(20, dtype=np.float32).reshape(4, 5), mask) for mask in masks])
    result = metrics.result()
    assert result.values == dict.fromkeys(PIXEL_METRICS, None)
    assert result.reasons == dict.fromkeys(PIXEL_METRICS, reason)
    assert metrics.curves() is None


def test_mask_missed_exactly() -> None:
    # (where adeval divides 0 by 0)
    mask = box((20, 20), (3, 3, 9, 9))
    values = counted([(1.0 - mask, mask)]).result().values
    assert values == pytest.approx(
        {"pixel_AUROC": 0, "pixel_AP": 36 / 400, "pixel_F1Max": 2 * 36 / (400 + 36), "pixel_AUPRO": 0}
    )


def test_empty_beside_full_masks() -> None:
    # one image all anomalous and one all normal, with the same map: as good as guessing
    ramp = np.arange(20, dtype=np.float32).reshape(4, 5)
    result = counted([(ramp, np.ones((4, 5), bool)), (ramp, np.zeros((4, 5), bool))]).result()
    assert result.values["pixel_AUROC"] == pytest.approx(0.5)
    assert result.values["pixel_AUPRO"] == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("anomaly_map", "mask", "message"),
    [
        (np.array([[0, 1], [np.nan, 2]]), np.zeros((2, 2), bool), r"finite float32 scores, found nan at \(1, 0\)"),
        (np.array([[0, np.inf]]), np.zeros((1, 2), bool), r"found inf at \(0, 1\)"),
        (np.array([[0, 1e39]]), np.zeros((1, 2), bool), r"found 1e\+39 at \(0, 1\)"),
        (np.zeros((2, 3)), np.zeros((3, 2), bool), r"expected a mask \(2, 3\) of bool, found \(3, 2\) bool"),
        (np.zeros((2, 3)), np.zeros((2, 3), np.uint8), r"expected a mask \(2, 3\) of bool, found \(2, 3\) uint8"),
        (np.zeros(3), np.zeros(3, bool), r"expected a map \(H, W\), found \(3,\)"),
        (np.zeros((0, 3)), np.zeros((0, 3), bool), r"expected a map \(H, W\), found \(0, 3\)"),
    ],
    ids=["nan", "infinite", "beyond float32", "mask shape", "mask dtype", "one axis", "empty"],
)
def test_bad_maps_are_named_and_not_counted(anomaly_map: np.ndarray, mask: np.ndarray, message: str) -> None:
    metrics = counted(make("ties", n=3))
    before = metrics.result()
    with pytest.raises(FeatureError, match=f"^map 3: .*{message}"):
        metrics.add(anomaly_map, mask)
    with pytest.raises(FeatureError, match=f"^crack/001.png: .*{message}"):
        metrics.add(anomaly_map, mask, "crack/001.png")
    assert metrics.images == 3
    assert metrics.result() == before


@pytest.mark.parametrize("limit", [0, -0.1, 1.01, float("nan")])
def test_integration_limit_is_checked(limit: float) -> None:
    with pytest.raises(OptionError, match="integration_limit: expected an FPR in"):
        counted(make("ties")).result(limit)


@pytest.mark.parametrize("bins", [0, 2**15, 2**16 + 1])
def test_bins_are_checked(bins: int) -> None:
    with pytest.raises(OptionError, match="bins: expected a power of two >= 65536"):
        PixelMetrics(bins)


def test_maps_in_other_memory_orders_and_left_alone() -> None:
    anomaly_map, mask = make("random")[2]
    kept = anomaly_map.copy()
    anomaly_map.flags.writeable = mask.flags.writeable = False
    expected = counted([(anomaly_map, mask)]).result()
    np.testing.assert_array_equal(anomaly_map, kept)
    assert counted([(np.asfortranarray(anomaly_map), np.asfortranarray(mask))]).result() == expected
    assert counted([(np.repeat(anomaly_map, 2, 1)[:, ::2], mask)]).result() == expected
    assert counted([(anomaly_map.astype(np.float64), mask)]).result() == expected


def test_memory_does_not_grow_with_the_number_of_maps() -> None:
    rng = np.random.default_rng(0)
    mask = box((256, 256), (10, 10, 60, 80))
    metrics = PixelMetrics(2**19)
    tracemalloc.start()
    try:
        used = []
        for _ in range(80):
            metrics.add(rng.gamma(2, 3, mask.shape).astype(np.float32), mask)
            used.append(tracemalloc.get_traced_memory()[0])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert used[-1] - used[3] < 50e3  # bytes: the pages of rare values
    assert peak - used[-1] < 60 * mask.size  # bytes: a few arrays of the size of one map


# --- curves ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "ties", "two values", "distances"])
@pytest.mark.parametrize("points", [50, CURVE_POINTS])
def test_curves_keep_their_shape(kind: str, points: int) -> None:
    metrics = counted(make(kind, side=90))
    whole, thinned = metrics.curves(10**9), metrics.curves(points)
    assert whole is not None
    assert thinned is not None
    assert len(thinned.fpr) <= points
    assert len(thinned.fpr) == len(whole.fpr) or len(whole.fpr) > points
    for name in ("fpr", "tpr", "pro"):
        curve = getattr(thinned, name)
        assert curve.shape == thinned.fpr.shape
        assert (np.diff(curve) >= 0).all()
        assert (curve[0], curve[-1]) == (0, 1)
    # every point of the whole curve lies near the thinned one, measured along both axes
    way, short = (curves.fpr + curves.tpr + curves.pro for curves in (whole, thinned))
    for name in ("fpr", "tpr", "pro"):
        between = np.interp(way, short, getattr(thinned, name))
        assert np.abs(between - getattr(whole, name)).max() <= 6 / (points - 2) + 1e-12


def test_curves_give_the_areas() -> None:
    metrics = counted(make("distances", side=128))
    curves, values = metrics.curves(), metrics.result(1).values
    assert curves is not None
    for y, name in ((curves.tpr, "pixel_AUROC"), (curves.pro, "pixel_AUPRO")):
        area = np.sum(np.diff(curves.fpr) * (y[1:] + y[:-1])) / 2
        assert area == pytest.approx(values[name], abs=1e-4)
