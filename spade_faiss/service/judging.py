"""What the log says of the line: other thresholds, scores beside the normal ones, drift."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..detect.calibration import Calibration, images_needed
from ..errors import OptionError
from .generations import Generation
from .log.inspections import Line

ALARM = 0.001  # p-value of the test under which drift is reported
FEWEST = 20  # parts that the test needs
BINS = 40


def rejudged(lines: Sequence[Line], calibration: Calibration, false_alarms: float) -> dict[str, Any]:
    """Return the verdicts that inspections would have at another false-alarm rate.

    Args:
        lines: inspections, with their scores.
        calibration: of the gallery.
        false_alarms: the rate.

    Raises:
        OptionError: too few normal images for the rate.
    """
    other = calibration.promising(false_alarms)
    parts = []
    for line in lines:
        now = verdict_at(line, other)
        parts.append({"id": line["uid"], "before": line["verdict"], "after": now, "changes": now != line["verdict"]})
    n = len(calibration.image_scores)
    return {
        "false_alarms": false_alarms,
        "in_force": calibration.false_alarms,
        "thresholds": {"image": other.image_threshold, "pixel": other.pixel_threshold},
        "least": 1 / (n + 1),
        "images": n,
        "parts": parts,
        "anomalous_before": sum(part["before"] == "anomalous" for part in parts),
        "anomalous_after": sum(part["after"] == "anomalous" for part in parts),
        "changed": sum(part["changes"] for part in parts),
    }


def verdict_at(line: Line, calibration: Calibration) -> str | None:
    """Return the verdict that an inspection would have; None: it was not judged, or its patches were not searched."""
    if line["image_score"] is None or line["peak"] is None:
        return None
    if line["image_score"] <= calibration.image_threshold:
        return "normal"
    if not line["searched"]:
        return None
    threshold = calibration.pixel_threshold
    return "anomalous" if line["peak"] > threshold and line["map_max"] > threshold else "normal"


def rates(calibration: Calibration) -> list[float]:
    """Return the false-alarm rates that a slider offers: those that so many images can promise, one a threshold."""
    n = len(calibration.image_scores)
    lowest = 1 / (n + 1)
    steps = [0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3]
    found = sorted({rate for rate in (*steps, calibration.false_alarms) if images_needed(rate) <= n} | {lowest})
    usable = []
    for rate in found:
        try:
            calibration.promising(rate)
        except OptionError:
            continue
        usable.append(rate)
    return usable


def drift(lines: Sequence[Line], calibration: Calibration | None) -> dict[str, Any]:
    """Test whether parts still look as the normal images did: then their p-values are uniform.

    The parts' scores and those of calibration are compared by the two-sample Kolmogorov-Smirnov test, which is the
    test of uniform p-values that knows how few normal images they come from. Parts that somebody called defective are
    left out.
    """
    scores = [line["image_score"] for line in lines if line["image_score"] is not None and line["label"] != "defect"]
    if calibration is None or len(scores) < FEWEST:
        return {
            "parts": len(scores),
            "needed": FEWEST,
            "p_value": None,
            "statistic": None,
            "alarm": False,
            "toward": "",
        }
    from scipy import stats

    found = stats.ks_2samp(scores, calibration.image_scores)
    higher = float(np.median(scores)) > float(np.median(calibration.image_scores))
    return {
        "parts": len(scores),
        "needed": FEWEST,
        "p_value": float(found.pvalue),
        "statistic": float(found.statistic),
        "alarm": bool(found.pvalue < ALARM),
        "toward": "higher scores" if higher else "lower scores",
    }


def histogram(lines: Sequence[Line], calibration: Calibration | None) -> dict[str, Any]:
    """Return the image scores of parts and of the normal images in shared bins, evenly spaced in their logarithm."""
    parts = np.array([line["image_score"] for line in lines if line["image_score"] is not None], np.float64)
    normal = calibration.image_scores if calibration else np.empty(0)
    both = np.concatenate([parts, normal])
    both = both[np.isfinite(both)]
    if not len(both) or both.max() <= 0:
        return {"edges": [], "parts": [], "normal": [], "threshold": None}
    low = max(float(both[both > 0].min()), float(both.max()) * 1e-4)
    edges = np.geomspace(low * 0.95, float(both.max()) * 1.05, BINS + 1)
    counts = [np.histogram(np.clip(one, edges[0], edges[-1]), edges)[0] for one in (parts, normal)]
    return {
        "edges": edges.tolist(),
        "parts": counts[0].tolist(),
        "normal": counts[1].tolist(),
        "threshold": calibration.image_threshold if calibration else None,
    }


def staleness(generation: Generation) -> dict[str, Any] | None:
    """Return the calibration of a generation in words for programs; None: it has none."""
    calibration = generation.calibration
    if calibration is None:
        return None
    return {
        "generation": calibration.generation,
        "stale": generation.is_stale,
        "false_alarms": calibration.false_alarms,
        "images": len(calibration.image_scores),
        "image_threshold": calibration.image_threshold,
        "pixel_threshold": calibration.pixel_threshold,
    }
