"""Image metrics, which are exact."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ..errors import FeatureError
from .ranking import Metrics, ranking_metrics, undefined, why_undefined

IMAGE_METRICS = ("image_AUROC", "image_AP", "image_F1Max")


def image_metrics(scores: ArrayLike, labels: ArrayLike) -> Metrics:
    """Compute image_AUROC, image_AP and image_F1Max, exactly; see metrics.pixel for the definitions.

    Args:
        scores: (n,) finite, higher is more anomalous; compared as float64.
        labels: (n,) of 0 (normal) and 1 (anomalous), or bool.

    Raises:
        FeatureError: the shapes differ, a score is NaN or infinite, or a label is neither 0 nor 1.
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise FeatureError(f"expected one label a score, (n,) and (n,), found {scores.shape} and {labels.shape}")
    for name, array, ok, expected in (
        ("score", scores, np.isfinite(scores), "a finite number"),
        ("label", labels, np.isin(labels, (0, 1)), "0 or 1"),
    ):
        if not ok.all():
            index = int(np.argmin(ok))
            raise FeatureError(f"{name} {index}: expected {expected}, found {array[index]}")
    distinct, group = np.unique(scores, return_inverse=True)
    normal, anomalous = (np.bincount(group[labels == label], minlength=len(distinct))[::-1] for label in (0, 1))
    reason = why_undefined("image", int(normal.sum()), int(anomalous.sum()))
    if reason:
        return undefined(IMAGE_METRICS, reason)
    return Metrics(
        dict(zip(IMAGE_METRICS, ranking_metrics(normal, anomalous), strict=True)),
        error_bounds=dict.fromkeys(IMAGE_METRICS, 0.0),
    )
