"""Areas and ranking figures from counts at falling thresholds, with bounds of their error."""

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
    """Figures by name, all in [0, 1]."""

    values: dict[str, float | None]
    reasons: dict[str, str] = field(default_factory=dict)  # for each value that is None, why
    error_bounds: dict[str, float] = field(default_factory=dict)  # farthest from the exact value; 0: it is exact


def _one_class(what: str, normal: int, anomalous: int) -> str:
    """Say why nothing can be told apart, if so."""
    if normal and anomalous:
        return ""
    if not normal and not anomalous:
        return f"there is no {what}"
    return f"no {what} is {'normal' if anomalous else 'anomalous'}: there is nothing to tell apart"


def _undefined(names: tuple[str, ...], reason: str) -> Metrics:
    return Metrics(dict.fromkeys(names), dict.fromkeys(names, reason))


def _ranking(normal: Counts, anomalous: Counts) -> tuple[float, float, float]:
    """AUROC, AP and F1Max from the number of each class, (t,), that each lower threshold adds."""
    tp, fp = np.cumsum(anomalous), np.cumsum(normal)
    auroc = np.dot(normal / fp[-1], (tp - anomalous / 2) / tp[-1])
    ap = np.dot(anomalous / tp[-1], tp / (tp + fp))
    return float(auroc), float(ap), float(np.max(2 * tp / (tp + fp + tp[-1])))


def _ranking_bounds(normal: Counts, anomalous: Counts, several: NDArray[np.bool_]) -> tuple[float, float, float]:
    """How far AUROC, AP and F1Max can be from what they are with the values inside each bin told apart.

    Inside a bin the curve can take any monotone way: at one end all its normal scores come first, at the other last.
    """
    tp, fp = np.cumsum(anomalous), np.cumsum(normal)
    split_normal, split_anomalous = normal * several, anomalous * several
    auroc = np.dot(split_normal / fp[-1], anomalous / tp[-1]) / 2
    precision, best = tp / (tp + fp), tp / np.maximum(tp + fp - normal, 1)
    first = tp - anomalous + 1
    ap = np.dot(split_anomalous / tp[-1], np.maximum(best - precision, precision - first / (first + fp)))
    f1 = np.max(2 * tp / (tp + fp - split_normal + tp[-1])) - np.max(2 * tp / (tp + fp + tp[-1]))
    return float(auroc), float(ap), float(f1)


def _cumulated(steps: Counts | Reals) -> Reals:
    """Return the share reached at each threshold, (t,) steps -> (t + 1,), from exactly 0 to exactly 1."""
    reached = np.zeros(len(steps) + 1)
    np.cumsum(steps, out=reached[1:])
    reached /= reached[-1]
    return reached


def _area(x: Reals, y: Reals, limit: float) -> float:
    """Integrate a curve by trapezoids from 0 to the limit, interpolating there; divided by the limit."""
    inside = int(np.searchsorted(x, limit, "right"))
    end = np.interp(limit, x[inside - 1 : inside + 1], y[inside - 1 : inside + 1])
    x, y = np.append(x[:inside], limit), np.append(y[:inside], end)
    return float(np.dot(np.diff(x), y[1:] + y[:-1]) / 2 / limit)


def _area_bound(x: Reals, y: Reals, several: NDArray[np.bool_], limit: float) -> float:
    """How far `_area` can be off: the boxes in which the curve runs through bins of several values, up to the limit."""
    return float(np.dot(np.diff(np.minimum(x, limit)), np.diff(y) * several) / limit)
