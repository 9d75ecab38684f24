"""Metrics against other implementations: adeval, and MVTec's own script."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.helpers.metric_maps import box, counted, flood, make


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
