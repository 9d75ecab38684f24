"""Maps and masks of every kind, and exact metrics of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from spade_faiss.metrics.pixel import PIXEL_METRICS, PixelMetrics
from spade_faiss.metrics.ranking import Metrics

Pair = tuple[np.ndarray, np.ndarray]  # (H, W) map and mask
FEWEST_BINS = 2**16


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


def counted(pairs: Sequence[Pair], bins: int = 2**19) -> PixelMetrics:
    metrics = PixelMetrics(bins)
    for anomaly_map, mask in pairs:
        metrics.add(anomaly_map, mask)
    return metrics


def far_off(result: Metrics, expected: dict[str, float]) -> dict[str, float]:
    return {name: abs(float(result.values[name] or 0) - expected[name]) for name in PIXEL_METRICS}


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
