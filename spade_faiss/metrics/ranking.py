"""Metrics from counts at falling thresholds, with bounds of their error; shared by image and pixel metrics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Reals = NDArray[np.float64]
Keys = NDArray[np.uint32]
Number = TypeVar("Number", bound=np.generic)


@dataclass(frozen=True)
class Metrics:
    """Metrics by name, all in [0, 1].

    `error_bounds` is the largest possible difference from the exact value; 0: exact.
    """

    values: dict[str, float | None]
    reasons: dict[str, str] = field(default_factory=dict)  # why a value is None
    error_bounds: dict[str, float] = field(default_factory=dict)


def why_undefined(what: str, normal: int, anomalous: int) -> str:
    """Return why metrics are undefined, given the number of each class; "": they are defined."""
    if normal and anomalous:
        return ""
    if not normal and not anomalous:
        return f"there is no {what}"
    return f"no {what} is {'normal' if anomalous else 'anomalous'}: there is nothing to tell apart"


def undefined(names: tuple[str, ...], reason: str) -> Metrics:
    """Return metrics that are all None, for the same reason."""
    return Metrics(dict.fromkeys(names), dict.fromkeys(names, reason))


def ranking_metrics(normal: Counts, anomalous: Counts) -> tuple[float, float, float]:
    """Return AUROC, AP and F1Max from the number of each class, (t,), that each lower threshold adds."""
    tp, fp = np.cumsum(anomalous), np.cumsum(normal)
    auroc = np.dot(normal / fp[-1], (tp - anomalous / 2) / tp[-1])
    ap = np.dot(anomalous / tp[-1], tp / (tp + fp))
    return float(auroc), float(ap), float(np.max(2 * tp / (tp + fp + tp[-1])))


def ranking_bounds(normal: Counts, anomalous: Counts, several: NDArray[np.bool_]) -> tuple[float, float, float]:
    """Return how far AUROC, AP and F1Max can be from their values if the scores in each bin were told apart.

    Inside a bin the curve can be any monotone one: at one extreme all its normal scores come first, at the other last.

    Args:
        normal: (t,) number of normal scores that each lower threshold adds.
        anomalous: (t,) number of anomalous scores.
        several: (t,) whether the threshold's bin holds several values.
    """
    tp, fp = np.cumsum(anomalous), np.cumsum(normal)
    split_normal, split_anomalous = normal * several, anomalous * several
    auroc = np.dot(split_normal / fp[-1], anomalous / tp[-1]) / 2
    precision, best = tp / (tp + fp), tp / np.maximum(tp + fp - normal, 1)
    first = tp - anomalous + 1
    ap = np.dot(split_anomalous / tp[-1], np.maximum(best - precision, precision - first / (first + fp)))
    f1 = np.max(2 * tp / (tp + fp - split_normal + tp[-1])) - np.max(2 * tp / (tp + fp + tp[-1]))
    return float(auroc), float(ap), float(f1)


def cumulated(steps: Counts | Reals) -> Reals:
    """Return the share reached at each threshold, from (t,) steps: (t + 1,) from exactly 0 to exactly 1."""
    reached = np.zeros(len(steps) + 1)
    np.cumsum(steps, out=reached[1:])
    reached /= reached[-1]
    return reached


def area_under(x: Reals, y: Reals, limit: float) -> float:
    """Integrate a curve by trapezoids from 0 to the limit, interpolated there, and divide by the limit."""
    inside = int(np.searchsorted(x, limit, "right"))
    end = np.interp(limit, x[inside - 1 : inside + 1], y[inside - 1 : inside + 1])
    x, y = np.append(x[:inside], limit), np.append(y[:inside], end)
    return float(np.dot(np.diff(x), y[1:] + y[:-1]) / 2 / limit)


def area_bound(x: Reals, y: Reals, several: NDArray[np.bool_], limit: float) -> float:
    """Return the largest error of `area_under`: the boxes of bins of several values up to the limit."""
    return float(np.dot(np.diff(np.minimum(x, limit)), np.diff(y) * several) / limit)
