"""Which cells are explained by which normal patches, on detections small enough to follow by hand."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import spade_faiss as sf
from spade_faiss.detect.calibration import Judgement
from spade_faiss.detect.explanation import Match, correspondences, match_arrays
from spade_faiss.detect.regions import find_regions
from spade_faiss.images.view import View
from tests.helpers.galleries import make_gallery

VIEW = View((8, 8), (8, 8))
THRESHOLD = 5.0


def detection(cells: np.ndarray, *, kappa: int = 1, pixels: int = 10, view: View = VIEW) -> sf.Detection:
    """A map that shows each cell as a square of pixels; cell (r, c) was matched with cell (c, r) of image r."""
    h, w = cells.shape
    scores = np.repeat(np.repeat(cells, pixels, 0), pixels, 1).astype(np.float32)
    rows, columns = np.indices((h, w), np.int32)
    steps = np.arange(kappa, dtype=np.int32)
    matches = np.stack(
        [np.broadcast_to(part[..., None], (h, w, kappa)) for part in (rows, columns, rows)], axis=3
    ) + steps.reshape(1, 1, kappa, 1) * np.array([0, 0, 1])
    regions, labels = find_regions(scores, THRESHOLD)
    return sf.Detection(
        image_score=1.0,
        anomaly_map=scores,
        region=(0, 0, w * pixels, h * pixels),
        neighbours=sf.Neighbours([f"{row}.png" for row in range(h)], np.arange(h, dtype=np.float32)),
        sq_distances=(cells[..., None] + np.arange(kappa)).astype(np.float32),
        matches=matches.astype(np.int32),
        judgement=Judgement("anomalous" if regions else "normal", 0.1, 0.6, regions, labels),
    )


@pytest.fixture
def cells() -> np.ndarray:
    """Three regions above 5, peaks 9, 8 and 7; one of them of three cells."""
    grid = np.zeros((8, 8))
    grid[1, 1], grid[6, 6], grid[1, 5], grid[1, 6], grid[2, 5] = 7, 9, 6, 8, 5.5
    return grid


def test_the_worst_cell_of_each_region_worst_first(cells: np.ndarray) -> None:
    found = correspondences(detection(cells), VIEW)
    assert [(one.row, one.column) for one in found] == [(6, 6), (1, 6), (1, 1)]
    assert [one.region.peak for one in found if one.region] == [9, 8, 7]
    assert [one.region.area for one in found if one.region] == [100, 300, 100]
    assert found[1].matches == [Match("1.png", 6, 1, 8.0)]
    assert len(correspondences(detection(cells), VIEW, regions=2)) == 2


def test_the_first_of_kappa_matches(cells: np.ndarray) -> None:
    found = correspondences(detection(cells, kappa=5), VIEW, matches=3)
    assert found[0].matches == [Match("6.png", 6, 6 + step, 9.0 + step) for step in range(3)]


@pytest.mark.parametrize("judgement", [None, Judgement("normal", 0.5, 0.4, [])])
def test_without_regions_it_is_the_maximum_of_the_map(cells: np.ndarray, judgement: Judgement | None) -> None:
    one = replace(detection(cells), judgement=judgement)
    assert [(c.region, c.row, c.column) for c in correspondences(one, VIEW)] == [(None, 6, 6)]


def test_a_region_between_the_centres_of_cells_is_explained_by_the_cell_of_its_peak() -> None:
    one = detection(np.zeros((8, 8)))
    one.anomaly_map[39, 20:22] = 6, 7  # the last pixels above the border of cells (3, 2) and (4, 2)
    judged = sf.Judgement("anomalous", 0.1, 0.6, *find_regions(one.anomaly_map, THRESHOLD))
    one = sf.Detection(**{**one.__dict__, "judgement": judged})
    assert [(c.row, c.column) for c in correspondences(one, VIEW)] == [(3, 2)]


def test_the_peak_of_another_region_inside_the_box_is_not_taken() -> None:
    grid = np.zeros((8, 8))
    grid[0, :] = grid[:, 0] = 6  # an L whose box is everything
    grid[0, 7] = 6.5
    grid[5, 5] = 9
    found = correspondences(detection(grid), VIEW)
    assert [(one.row, one.column) for one in found] == [(5, 5), (0, 7)]


def test_cells_lie_where_the_crop_was() -> None:
    view = View((16, 16), (8, 8))  # the middle: pixels 40 to 120 of 160
    one = detection(np.zeros((8, 8)), pixels=20, view=view)
    one.anomaly_map[52, 97] = 1  # 12 px down and 57 px to the right inside the crop, of cells of 10 px
    assert [(c.row, c.column) for c in correspondences(one, view)] == [(1, 5)]


def test_nothing_searched_has_no_correspondences(cells: np.ndarray) -> None:
    assert correspondences(detection(cells, kappa=0), VIEW) == []


@pytest.mark.parametrize("kappa", [0, 1, 3])
def test_match_arrays_need_no_pickle(cells: np.ndarray, kappa: int) -> None:
    one = detection(cells, kappa=kappa)
    buffer = io.BytesIO()
    np.savez(buffer, **match_arrays(one))
    buffer.seek(0)
    with np.load(buffer, allow_pickle=False) as found:
        assert found["keys"].tolist() == one.neighbours.keys
        for name, expected in zip(("neighbour", "row", "column"), np.moveaxis(one.matches, 3, 0), strict=True):
            assert found[name].dtype == np.int32
            np.testing.assert_array_equal(found[name], expected)
        assert found["sq_distance"].dtype == np.float32
        assert found["sq_distance"].shape == (8, 8, kappa)
        assert found["grid"].tolist() == [8, 8]
        assert found["region"].tolist() == [0, 0, 80, 80]


def test_where_scores_are_damped_the_cell_is_that_of_the_highest_score(tmp_path: Path) -> None:
    """Distances are larger at the wild border, and count less there."""
    folder = tmp_path / "normal"
    folder.mkdir()

    def write(path: Path, seed: int, defect: int | None = None) -> None:
        rng = np.random.default_rng(seed)
        pixels = rng.integers(110, 130, (64, 64, 3)).astype(np.uint8)
        rng.integers(0, 255, (64, 16, 3))
        pixels[:, :16] = rng.integers(0, 255)
        if defect is not None:
            pixels[24:40, 8:40] = defect
        Image.fromarray(pixels).save(path)

    for seed in range(40):
        write(folder / f"{seed:03d}.png", seed)
    write(tmp_path / "test.png", 999, 200)
    gallery, toy = make_gallery(tmp_path / "g", folder)
    search, score = sf.RECIPES["robust"].search, replace(sf.RECIPES["robust"].score, sigma=0)
    sf.calibrate(sf.Detector(gallery, toy, search, score), false_alarms=0.1).write(gallery.path)
    detector = sf.Detector(gallery, toy)
    found = detector.query(tmp_path / "test.png")
    baseline = detector.baseline()
    assert baseline is not None
    raw = found.sq_distances.mean(axis=2, dtype=np.float64)
    damped = baseline.damped(raw)
    assert damped.flat[raw.argmax()] < 0.7 * damped.max()
    shown = correspondences(found, gallery.spec.view, regions=1)[0]
    assert damped[shown.row, shown.column] > 0.95 * damped.max()
