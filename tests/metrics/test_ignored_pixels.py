"""Pixels that count as neither normal nor anomalous."""

from __future__ import annotations

import numpy as np
import pytest

from spade_faiss.errors import FeatureError
from spade_faiss.metrics.pixel import PixelMetrics


def test_ignored_pixels_change_nothing(rng: np.random.Generator) -> None:
    """Rows that are ignored might as well have been cut off."""
    whole, cut = PixelMetrics(), PixelMetrics()
    for _ in range(3):
        scores, mask = rng.random((40, 30), np.float32), rng.random((40, 30)) < 0.1
        ignored = np.zeros_like(mask)
        ignored[25:] = True
        whole.add(scores, mask, ignored=ignored)
        cut.add(scores[:25], mask[:25])
    assert whole.result() == cut.result()
    assert (whole.regions, whole.images) == (cut.regions, cut.images)


def test_nothing_is_ignored(rng: np.random.Generator) -> None:
    scores, mask = rng.random((40, 30), np.float32), rng.random((40, 30)) < 0.1
    one, other = PixelMetrics(), PixelMetrics()
    one.add(scores, mask)
    other.add(scores, mask, ignored=np.zeros_like(mask))
    assert one.result() == other.result()


def test_all_is_ignored(rng: np.random.Generator) -> None:
    metrics = PixelMetrics()
    metrics.add(rng.random((4, 3), np.float32), np.ones((4, 3), bool), ignored=np.ones((4, 3), bool))
    assert (metrics.regions, metrics.images) == (0, 1)
    assert metrics.result().values["pixel_AUROC"] is None


@pytest.mark.parametrize("ignored", [np.zeros((4, 4), bool), np.zeros((4, 3), np.uint8)])
def test_ignored_of_another_kind(ignored: np.ndarray) -> None:
    with pytest.raises(FeatureError, match="expected a mask"):
        PixelMetrics().add(np.zeros((4, 3), np.float32), np.zeros((4, 3), bool), ignored=ignored)
