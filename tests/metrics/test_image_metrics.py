"""Image metrics against numbers worked out by hand and their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spade_faiss.errors import FeatureError
from spade_faiss.metrics.image import IMAGE_METRICS, image_metrics


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
