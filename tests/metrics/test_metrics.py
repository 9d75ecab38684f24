"""Metrics against numbers worked out by hand, an exact reference by sorting, adeval, and MVTec's own script."""

from __future__ import annotations

import importlib
import sys
import tracemalloc
from collections.abc import Iterator, Sequence
from multiprocessing.reduction import ForkingPickler
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spade_faiss.errors import FeatureError, OptionError
from spade_faiss.metrics.image import IMAGE_METRICS, image_metrics
from spade_faiss.metrics.pixel import BINS, CURVE_POINTS, PIXEL_METRICS, PixelMetrics
from spade_faiss.metrics.ranking import Metrics

Pair = tuple[np.ndarray, np.ndarray]  # (H, W) map and mask
FEWEST_BINS = 2**16


# --- reference -------------------------------------------------------------------------------------------------------


def exact(pairs: Sequence[Pair], limit: float = 0.3) -> dict[str, float]:
    """The pixel metrics from all pixels at once: sorted, and cut after the last of each group of equal scores."""
    scores = np.concatenate([anomaly_map.ravel() for anomaly_map, _ in pairs]).astype(np.float64)
    masks = np.concatenate([mask.ravel() for _, mask in pairs])
    shares = np.zeros(len(scores))
    regions = 0
    at = 0
    for _, mask in pairs:
        for region in flood(mask):
            shares[at + np.array(region)] = 1 / len(region)
            regions += 1
        at += mask.size
    order = np.argsort(-scores)
    last = np.append(np.diff(scores[order]) != 0, True)
    tp, fp, pro = (np.cumsum(each[order])[last] for each in (masks, ~masks, shares / regions))
    tpr, fpr = (np.append(0, each / each[-1]) for each in (tp, fp))
    pro = np.append(0, pro)
    inside = fpr <= limit
    x, y = np.append(fpr[inside], limit), np.append(pro[inside], np.interp(limit, fpr, pro))
    return {
        "pixel_AUROC": float(np.sum(np.diff(fpr) * (tpr[1:] + tpr[:-1])) / 2),
        "pixel_AP": float(np.sum(np.diff(tpr) * tp / (tp + fp))),
        "pixel_F1Max": float(np.max(2 * tp / (tp + fp + tp[-1]))),
        "pixel_AUPRO": float(np.sum(np.diff(x) * (y[1:] + y[:-1])) / 2 / limit),
    }


def flood(mask: np.ndarray) -> list[list[int]]:
    """The 8-connected regions of (H, W), each as positions in the flattened mask."""
    width = mask.shape[1]
    left = {(int(row), int(column)) for row, column in np.argwhere(mask)}
    regions = []
    while left:
        region = [left.pop()]
        for row, column in region:
            around = {(row + down, column + right) for down in (-1, 0, 1) for right in (-1, 0, 1)} & left
            left -= around
            region += around
        regions.append([row * width + column for row, column in region])
    return regions


def by_definition(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The image metrics: AUROC by comparing all pairs, the others threshold by threshold."""
    normal, anomalous = scores[labels == 0], scores[labels == 1]
    wins = (anomalous[:, None] > normal).mean() + (anomalous[:, None] == normal).mean() / 2
    precisions, recalls, f1s = [], [0.0], []
    for threshold in sorted(set(scores.tolist()), reverse=True):
        tp, fp, fn = (anomalous >= threshold).sum(), (normal >= threshold).sum(), (anomalous < threshold).sum()
        precisions.append(tp / (tp + fp))
        recalls.append(tp / (tp + fn))
        f1s.append(2 * tp / (2 * tp + fp + fn))
    return {
        "image_AUROC": float(wins),
        "image_AP": float(np.sum(np.diff(recalls) * precisions)),
        "image_F1Max": float(max(f1s)),
    }


def counted(pairs: Sequence[Pair], bins: int = 2**19) -> PixelMetrics:
    metrics = PixelMetrics(bins)
    for anomaly_map, mask in pairs:
        metrics.add(anomaly_map, mask)
    return metrics


def far_off(result: Metrics, expected: dict[str, float]) -> dict[str, float]:
    return {name: abs(float(result.values[name] or 0) - expected[name]) for name in PIXEL_METRICS}


# --- maps ------------------------------------------------------------------------------------------------------------


def masks(rng: np.random.Generator, n: int, side: int) -> list[np.ndarray]:
    """n masks with blobs of many sizes, some of one pixel; every third is empty."""
    found = []
    for number in range(n):
        mask = np.zeros((side, side + 5), bool)
        for _ in range(number % 3 * 3):
            row, column, height, width = rng.integers((0, 0, 1, 1), (side, side, side // 3, side // 3))
            mask[row : row + height, column : column + width] = True
        mask[rng.integers(0, side, 2), rng.integers(0, side, 2)] |= number % 3 > 0
        found.append(mask)
    return found


def make(kind: str, n: int = 6, side: int = 64, seed: int = 0) -> list[Pair]:
    rng = np.random.default_rng(seed)
    pairs = []
    for mask in masks(rng, n, side):
        noise = rng.standard_normal(mask.shape) + 1.2 * mask
        anomaly_map = {
            "random": noise,
            "distances": np.exp(noise) * 30,
            "ties": np.round(noise * 2) / 2,
            "two values": (noise > 1.5).astype(float),
            "constant": np.full(mask.shape, 3.25),
            "negative": -np.exp(-noise),
            "signed zeros": np.copysign(np.maximum(noise, 0), rng.standard_normal(mask.shape)),
            "offset": 1000 + 0.002 * noise,
            "offset beside zeros": np.where(rng.random(mask.shape) < 0.3, 0, 1000 + 0.002 * noise),
            "wide": 10 ** (noise * 3),
            "all of float32": np.sign(noise - 1) * 10 ** np.clip(noise * 12, -40, 38),
            "saturated": 1 / (1 + np.exp(-10 - 2 * noise)),
            "inverted": -noise,
        }[kind]
        pairs.append((anomaly_map.astype(np.float32), mask))
    return pairs


KINDS = (
    "random", "distances", "ties", "two values", "constant", "negative", "signed zeros", "offset",
    "offset beside zeros", "wide", "all of float32", "saturated", "inverted",
)  # fmt: skip
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def box(shape: tuple[int, int], *places: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    for top, left, bottom, right in places:
        mask[top:bottom, left:right] = True
    return mask


# --- images ----------------------------------------------------------------------------------------------------------


def test_image_metrics_by_hand() -> None:
    # the example of scikit-learn's roc_auc_score and average_precision_score; best at 0.35: 2 found, 1 false alarm
    result = image_metrics([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])
    assert result.values == pytest.approx({"image_AUROC": 3 / 4, "image_AP": 5 / 6, "image_F1Max": 4 / 5})
    assert all(type(value) is float for value in result.values.values())
    assert result.reasons == {}
    assert result.error_bounds == dict.fromkeys(IMAGE_METRICS, 0)


def test_equal_scores_pass_together() -> None:
    # 2 anomalous, 3 normal; thresholds 5: 1 and 1, then 1: the rest
    result = image_metrics([5, 5, 1, 1, 1], [1, 0, 1, 0, 0])
    assert result.values == pytest.approx(
        {"image_AUROC": (0.5 + 2 + 0 + 1) / 6, "image_AP": (1 / 2 + 2 / 5) / 2, "image_F1Max": 4 / 7}
    )
    constant = image_metrics(np.full(10, 7.0), [1] * 3 + [0] * 7)
    assert constant.values == pytest.approx({"image_AUROC": 0.5, "image_AP": 0.3, "image_F1Max": 6 / 13})


@given(st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=2, max_size=40))
def test_image_metrics_equal_their_definitions(images: list[tuple[int, bool]]) -> None:
    scores, labels = np.array([score for score, _ in images]), np.array([label for _, label in images])
    result = image_metrics(scores, labels)
    if labels.all() or not labels.any():
        assert set(result.values.values()) == {None}
        return
    assert result.values == pytest.approx(by_definition(scores, labels), abs=1e-12)
    flipped = image_metrics(-scores, labels)
    assert flipped.values["image_AUROC"] == pytest.approx(1 - float(result.values["image_AUROC"] or 0), abs=1e-12)
    for increasing in (scores**3 / 8, np.exp(scores), 1000 + 1e-9 * scores):
        assert image_metrics(increasing, labels).values == result.values


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ([0, 0], "no image is anomalous: there is nothing to tell apart"),
        ([True, True], "no image is normal: there is nothing to tell apart"),
        ([], "there is no image"),
    ],
    ids=["normal", "anomalous", "none"],
)
def test_one_class_of_images_has_no_metrics(labels: list[int], reason: str) -> None:
    result = image_metrics(np.arange(len(labels)), labels)
    assert result.values == dict.fromkeys(IMAGE_METRICS, None)
    assert result.reasons == dict.fromkeys(IMAGE_METRICS, reason)


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([1, np.nan, 2], [0, 1, 1], "score 1: expected a finite number, found nan"),
        ([1, 2, -np.inf], [0, 1, 1], "score 2: expected a finite number, found -inf"),
        ([1, 2, 3], [0, 2, 1], "label 1: expected 0 or 1, found 2"),
        ([1, 2, 3], [0, 1], r"expected one label a score, \(n,\) and \(n,\), found \(3,\) and \(2,\)"),
        ([[1, 2]], [[0, 1]], r"found \(1, 2\) and \(1, 2\)"),
    ],
)
def test_bad_images_are_named(scores: list[float], labels: list[int], message: str) -> None:
    with pytest.raises(FeatureError, match=message):
        image_metrics(scores, labels)


# --- pixels ----------------------------------------------------------------------------------------------------------


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


# --- other implementations -------------------------------------------------------------------------------------------


def opencv_stand_in() -> ModuleType:
    """All that adeval uses of OpenCV: 8-connected regions, numbered, and their areas; resizing to the size it has."""
    cv2 = ModuleType("cv2")

    def connected(mask: np.ndarray, connectivity: int, ltype: int) -> tuple[int, np.ndarray, np.ndarray, None]:
        assert connectivity == 8
        regions = flood(mask > 0)
        numbers = np.zeros(mask.size, int)
        for number, region in enumerate(regions, start=1):
            numbers[region] = number
        areas = np.array([[mask.size - np.count_nonzero(mask)], *([len(region)] for region in regions)])
        return len(areas), numbers.reshape(mask.shape), areas, None

    def resize(anomaly_map: np.ndarray, size: tuple[int, int], interpolation: int) -> np.ndarray:
        assert anomaly_map.shape == size[::-1]
        return anomaly_map

    cv2.__dict__.update(connectedComponentsWithStats=connected, resize=resize)
    cv2.__dict__.update(CC_STAT_AREA=0, CV_16U=2, INTER_LINEAR=1)
    return cv2


@pytest.fixture(scope="module", params=["with OpenCV", "without OpenCV"])
def adeval(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """adeval runs everywhere without OpenCV, whose wheel needs a libGL that not every machine has."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "with OpenCV":
            pytest.importorskip("cv2", exc_type=ImportError)
        else:
            patch.setitem(sys.modules, "cv2", opencv_stand_in())
        for name in [name for name in sys.modules if name.partition(".")[0] == "adeval"]:
            patch.delitem(sys.modules, name)  # it keeps the cv2 with which it was first imported
        with pytest.MonkeyPatch.context() as importing:
            # Importing it changes how this process pickles functions for multiprocessing; that is undone.
            importing.setattr(ForkingPickler, "reducer_override", None, raising=False)
            importing.setattr(ForkingPickler, "_extra_reducers", dict(ForkingPickler._extra_reducers))
            adeval = importlib.import_module("adeval")
        if hasattr(np, "trapezoid"):  # adeval 1.1 calls np.trapz, which NumPy 2.4 no longer has
            patch.setattr(np, "trapz", np.trapezoid, raising=False)
        yield adeval


DEGENERATE = {
    "constant": (np.full((20, 20), 5.0), box((20, 20), (3, 3, 9, 9))),
    "mask found exactly": (1.0 * box((20, 20), (3, 3, 9, 9)), box((20, 20), (3, 3, 9, 9))),
    "limit inside a jump": (1.0 * box((20, 20), (0, 0, 9, 20)), box((20, 20), (3, 3, 12, 9))),
    "one pixel": (np.arange(400.0).reshape(20, 20), box((20, 20), (15, 4, 16, 5))),
    "corner to corner": (
        np.arange(400.0).reshape(20, 20)[::-1] % 101,
        box((20, 20), (2, 2, 9, 9), (9, 9, 10, 10)),  # one region, or two of very different sizes
    ),
    "diagonal": (np.arange(400.0).reshape(20, 20) % 37, np.eye(20, dtype=bool)),
    "all but one pixel": (np.arange(400.0).reshape(20, 20) % 37, ~box((20, 20), (15, 4, 16, 5))),
    "every second column": (np.arange(400.0).reshape(20, 20) % 39, np.tile([True, False], (20, 10))),
    "a small region beside a large one": (
        np.arange(400.0).reshape(20, 20)[::-1] % 101,
        box((20, 20), (0, 0, 1, 1), (5, 0, 20, 20)),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "distances", "ties", "two values", "constant", "inverted", *DEGENERATE])
def test_pixel_metrics_equal_those_of_adeval(adeval: Any, kind: str) -> None:
    pairs = [DEGENERATE[kind]] if kind in DEGENERATE else make(kind, side=96)
    low, high = (float(extreme([extreme(anomaly_map) for anomaly_map, _ in pairs])) for extreme in (np.min, np.max))
    margin = 0.01 * (high - low) + 0.1  # it counts in bins of equal width, which must reach beyond all scores
    other = adeval.EvalAccumulator(low - margin, high + margin, nstrips=100_000 if kind == "distances" else 20_000)
    for anomaly_map, mask in pairs:
        other.add_anomap(anomaly_map.astype(np.float32), mask.astype(np.uint8))
    result = counted(pairs).result().values
    assert result["pixel_AUPRO"] == pytest.approx(other._aupro(), abs=1e-4)
    assert result["pixel_AUROC"] == pytest.approx(other._auroc(other._pixel_acc), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0.3, 1])
@pytest.mark.parametrize("kind", ["random", "inverted"])
def test_aupro_equals_that_of_the_official_script(adeval: Any, kind: str, limit: float) -> None:
    # MVTec's, as adeval carries it, with every normal pixel a threshold: its own steps are off by up to
    # 1 / (2 * limit * thresholds), and it has no curve for equal scores.
    from adeval.au_pro import calculate_au_pro

    pairs = make(kind, side=50)
    maps, truths = zip(*pairs, strict=True)
    thresholds = sum(int((~mask).sum()) for mask in truths)
    expected, _ = calculate_au_pro(truths, maps, integration_limit=limit, num_thresholds=thresholds)
    assert counted(pairs).result(limit).values["pixel_AUPRO"] == pytest.approx(expected, abs=1e-4)
