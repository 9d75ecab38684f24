"""Scores and maps against the oracle, and against numbers worked out by hand."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from spade_faiss.detect.scoring import anomaly_map, knn_score
from spade_faiss.images.view import View
from tests import reference

WHOLE = View(resized=(224, 224), crop=(224, 224))
CROPPED = View(resized=(256, 256), crop=(224, 224))
ODD_MARGIN = View(resized=(255, 257), crop=(224, 224))
NOT_SQUARE = View(resized=(256, 320), crop=(224, 192))
TALL = View(resized=(300, 128), crop=(300, 100))

VIEWS = pytest.mark.parametrize(
    "view",
    [WHOLE, CROPPED, ODD_MARGIN, NOT_SQUARE, TALL],
    ids=["whole", "cropped", "odd-margin", "not-square", "tall"],
)


def make(grid: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """(h, w, kappa) squared distances, ascending."""
    values = np.random.default_rng(seed).gamma(2, 3, size=grid)
    return np.sort(values, axis=-1).astype(np.float32)


# --- image score -----------------------------------------------------------------------------------------------------


def test_knn_score_is_the_mean_of_the_nearest() -> None:
    sq_distances = np.array([1, 2, 6, 100], np.float32)
    assert knn_score(sq_distances, 1) == 1
    assert knn_score(sq_distances, 3) == 3
    assert knn_score(sq_distances, 4) == 27.25
    assert type(knn_score(sq_distances, 3)) is float  # not a NumPy scalar, which json would refuse


@pytest.mark.parametrize("k_score", [1, 7, 50])
def test_knn_score_equals_oracle(k_score: int) -> None:
    sq_distances = make((1, 1, 50))[0, 0]
    assert knn_score(sq_distances, k_score) == pytest.approx(reference.image_score(sq_distances, k_score), rel=1e-6)


# --- map -------------------------------------------------------------------------------------------------------------


@VIEWS
@pytest.mark.parametrize("sigma", [0, 0.7, 4])
@pytest.mark.parametrize(
    ("grid", "image_size"),
    [
        ((14, 14, 1), (97, 131)),
        ((7, 11, 3), (64, 33)),
        ((28, 28, 2), (19, 23)),  # an image smaller than the grid: sampled, not averaged
        ((1, 1, 1), (40, 50)),
        ((1, 5, 2), (30, 8)),
    ],
    ids=lambda size: "x".join(map(str, size)),
)
def test_map_equals_oracle(view: View, sigma: float, grid: tuple[int, int, int], image_size: tuple[int, int]) -> None:
    sq_distances = make(grid)
    expected = reference.anomaly_map(sq_distances, image_size, view.resized, view.crop, sigma)
    result = anomaly_map(sq_distances, image_size, view, sigma)
    assert result.shape == image_size
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5 * expected.max())


@pytest.mark.parametrize("view", [WHOLE, CROPPED], ids=["whole", "cropped"])
@pytest.mark.parametrize("sigma", [150, 1000])
def test_sigma_larger_than_the_image(view: View, sigma: float) -> None:
    # mirrored again and again; at 1000 the map is as good as its mean
    sq_distances = make((6, 4, 1))
    expected = reference.anomaly_map(sq_distances, (12, 17), view.resized, view.crop, sigma)
    result = anomaly_map(sq_distances, (12, 17), view, sigma)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5 * expected.max())


def test_map_at_the_size_of_a_photograph() -> None:
    sq_distances = make((56, 56, 1))
    expected = reference.anomaly_map(sq_distances, (300, 451), CROPPED.resized, CROPPED.crop, 4)
    result = anomaly_map(sq_distances, (300, 451), CROPPED, 4)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5 * expected.max())


def test_map_by_hand() -> None:
    # means over kappa of 0 and 4 on a grid of 2, and 4 pixels: at -0.25, 0.25, 0.75, 1.25 of the grid
    sq_distances = np.array([[[0, 0], [3, 5]]], np.float32)
    result = anomaly_map(sq_distances, (1, 4), View(resized=(1, 2), crop=(1, 2)), 0)
    np.testing.assert_allclose(result, [[0, 1, 3, 4]], atol=1e-6)


def test_map_of_a_crop_lies_where_the_network_looked() -> None:
    # 16 px squashed to 8, of which the middle 4 were seen: pixels 4 to 11, a grid cell every 2 px
    sq_distances = np.array([1, 3, 5, 7], np.float32).reshape(1, 4, 1)
    result = anomaly_map(sq_distances, (1, 16), View(resized=(1, 8), crop=(1, 4)), 0)
    np.testing.assert_allclose(result, [[0] * 4 + [1, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7] + [0] * 4], atol=1e-6)


@VIEWS
@pytest.mark.parametrize("sigma", [0, 4, 300])
def test_constant_map_stays_constant_inside_and_zero_outside(view: View, sigma: float) -> None:
    image_size = (90, 61)
    result = anomaly_map(np.full((7, 9, 2), 123.456, np.float32), image_size, view, sigma)
    left, top, right, bottom = view.region(image_size)
    expected = np.zeros(image_size)
    expected[top:bottom, left:right] = 123.456
    np.testing.assert_allclose(result, expected, rtol=1e-5)
    outside = np.ones(image_size, bool)
    outside[top:bottom, left:right] = False
    assert (result[outside] == 0).all()


@VIEWS
@pytest.mark.parametrize("image_size", [(97, 131), (224, 224), (8, 9), (1000, 3)])
def test_region_is_where_the_oracle_is_not_zero(view: View, image_size: tuple[int, int]) -> None:
    expected = reference.anomaly_map(np.ones((2, 3, 1)), image_size, view.resized, view.crop, 0)
    left, top, right, bottom = view.region(image_size)
    assert (bottom - top) * (right - left) == np.count_nonzero(expected)
    assert expected[top:bottom, left:right].all()


def test_image_of_which_no_pixel_was_seen_has_a_map_of_zeros() -> None:
    # two pixels across, centred at 2 and 6 of 8; the network saw 3 to 5
    result = anomaly_map(np.ones((2, 2, 1), np.float32), (2, 2), View(resized=(8, 8), crop=(2, 2)), 4)
    np.testing.assert_array_equal(result, np.zeros((2, 2)))


def test_smoothing_keeps_the_mean_and_lowers_the_peak() -> None:
    sq_distances = np.zeros((15, 15, 1), np.float32)
    sq_distances[3, 8] = 100
    sharp, smooth = (anomaly_map(sq_distances, (60, 60), WHOLE, sigma) for sigma in (0, 12))
    assert smooth.mean() == pytest.approx(sharp.mean(), rel=1e-5)
    assert smooth.max() < 0.8 * sharp.max()


def test_distances_are_left_alone() -> None:
    sq_distances = make((7, 11, 3))
    before = sq_distances.copy()
    anomaly_map(sq_distances, (64, 33), CROPPED, 4)
    np.testing.assert_array_equal(sq_distances, before)
    sq_distances.flags.writeable = False
    np.testing.assert_array_equal(
        anomaly_map(sq_distances, (64, 33), CROPPED, 4), anomaly_map(before, (64, 33), CROPPED, 4)
    )


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="what threads do is read from /proc")
def test_no_thread_waits_busily_after_a_map() -> None:
    # A thread of OpenBLAS does, for tens of milliseconds after a product: the next search would share a core with it.
    code = """
        import os, time
        from pathlib import Path
        import numpy as np, torch
        from spade_faiss.detect.scoring import anomaly_map
        from spade_faiss.images.view import View
        torch.set_num_threads(2)
        view = View(resized=(320, 320), crop=(320, 320))
        for _ in range(3):
            anomaly_map(np.ones((40, 40, 1), np.float32), (320, 320), view, 2.8)
            for _ in range(10):  # whoever has only not had a core yet soon sleeps
                time.sleep(0.001)
                tasks = [path for path in Path("/proc/self/task").iterdir() if int(path.name) != os.getpid()]
                states = [(path / "stat").read_text().rsplit(")", 1)[1].split()[0] for path in tasks]
                if "R" not in states:
                    break
            print(*states)
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, check=True
    )
    assert "R" not in done.stdout.split(), done.stdout
    assert done.stdout.split()
