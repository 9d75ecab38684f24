"""The oracle against numbers worked out by hand, published ones, and second constructions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests import reference


def row(values: list[float]) -> np.ndarray:
    """One channel, one row: (1, 1, w)."""
    return np.array(values, np.float64)[None, None]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # 2 -> 4: centres at -0.25, 0.25, 0.75, 1.25, the outer two held at the ends
        ([2, 6], [2, 3, 5, 6]),
        # 3 -> 5: centres at -0.2, 0.4, 1, 1.6, 2.2
        ([0, 10, 20], [0, 4, 10, 16, 20]),
        # 5 -> 2: centres at 0.75 and 3.25; antialiasing would let the 100 in
        ([0, 4, 100, 8, 12], [3, 9]),
        ([7], [7, 7, 7]),
    ],
)
def test_upsample_by_hand(values: list[float], expected: list[float]) -> None:
    np.testing.assert_allclose(reference.upsample(row(values), (1, len(expected))), row(expected), atol=1e-13)
    column, expected_column = row(values).transpose(0, 2, 1), row(expected).transpose(0, 2, 1)
    np.testing.assert_allclose(reference.upsample(column, (len(expected), 1)), expected_column, atol=1e-13)


@pytest.mark.parametrize(
    ("old", "new"),
    [((2, 3), (4, 6)), ((3, 2), (7, 11)), ((5, 4), (7, 11)), ((1, 1), (3, 4)), ((7, 11), (5, 4)), ((1, 5), (9, 2))],
)
def test_upsample_is_that_of_torch(old: tuple[int, int], new: tuple[int, int]) -> None:
    level = np.random.default_rng(0).normal(size=(3, *old))
    expected = F.interpolate(torch.from_numpy(level)[None], size=new, mode="bilinear", align_corners=False)[0].numpy()
    np.testing.assert_allclose(reference.upsample(level, new), expected, rtol=0, atol=1e-13)
    np.testing.assert_allclose(reference.resize_map(level[0], new), expected[0], rtol=0, atol=1e-13)


def test_patch_features_concatenate_the_levels_on_the_finest_grid() -> None:
    fine, coarse = np.arange(8.0).reshape(2, 1, 4), row([2, 6])
    features = reference.patch_features([fine, coarse])
    np.testing.assert_array_equal(features, [[[0, 4, 2], [1, 5, 3], [2, 6, 5], [3, 7, 6]]])


def test_search_of_two_patches_by_hand() -> None:
    query = [np.array([[[0, 3]], [[0, 4]]])]  # patches (0, 0) and (3, 4)
    neighbours = [np.array([[[[3, 1]], [[4, 0]]]])]  # patches (3, 4) and (1, 0)
    sq_distances, matches = reference.search_patches(query, neighbours, kappa=2)
    np.testing.assert_array_equal(sq_distances, [[[1, 25], [0, 20]]])
    np.testing.assert_array_equal(matches, [[[[0, 0, 1], [0, 0, 0]], [[0, 0, 0], [0, 0, 1]]]])


def test_search_orders_ties_by_neighbour_row_column() -> None:
    query = [np.zeros((1, 2, 2))]
    neighbours = [np.array([[[[5, 1], [1, 0]]], [[[1, 0], [1, 1]]]])]
    sq_distances, matches = reference.search_patches(query, neighbours, kappa=6)
    np.testing.assert_array_equal(sq_distances[0, 0], [0, 0, 1, 1, 1, 1])
    expected = [(0, 1, 1), (1, 0, 1), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 1, 0)]
    np.testing.assert_array_equal(matches[0, 0], expected)


def test_search_is_that_of_torch_cdist() -> None:
    rng = np.random.default_rng(1)
    shapes = [(3, 5, 7), (2, 3, 2)]
    query = [rng.normal(size=shape) for shape in shapes]
    neighbours = [rng.normal(size=(4, *shape)) for shape in shapes]

    def patches(levels: list[np.ndarray]) -> torch.Tensor:
        upsampled = [
            F.interpolate(torch.from_numpy(level), size=(5, 7), mode="bilinear", align_corners=False)
            for level in levels
        ]
        return torch.cat(upsampled, dim=1).permute(0, 2, 3, 1).reshape(-1, 5)

    expected, ids = torch.cdist(patches([level[None] for level in query]), patches(neighbours)).topk(3, largest=False)
    sq_distances, matches = reference.search_patches(query, neighbours, kappa=3)
    np.testing.assert_allclose(sq_distances.reshape(-1, 3), expected.numpy() ** 2, rtol=1e-10)
    np.testing.assert_array_equal(matches.reshape(-1, 3, 3) @ [35, 7, 1], ids.numpy())


def test_retrieve_by_hand() -> None:
    gallery = np.array([[3, 4], [0, 1], [1, 0], [0, 0]], np.float32)
    ids, sq_distances = reference.retrieve(np.zeros(2, np.float32), gallery, k=4)
    np.testing.assert_array_equal(ids, [3, 1, 2, 0])  # 1 and 2 tie
    np.testing.assert_array_equal(sq_distances, [0, 1, 1, 25])
    np.testing.assert_array_equal(reference.retrieve(gallery[0], gallery, k=1)[0], [0])


def test_image_score_by_hand() -> None:
    assert reference.image_score(np.array([1, 2, 6, 100]), 3) == 3


def test_gaussian_is_that_of_scipy() -> None:
    # the examples in the documentation of scipy.ndimage.gaussian_filter1d
    values = np.array([[1.0, 2.0, 3.0, 4.0, 5.0]])
    narrow = [[1.42704095, 2.06782203, 3.0, 3.93217797, 4.57295905]]
    wide = [[2.91948343, 2.95023502, 3.0, 3.04976498, 3.08051657]]
    np.testing.assert_allclose(reference.gaussian(values, 0, 1), narrow, atol=5e-9)
    np.testing.assert_allclose(reference.gaussian(values, 0, 4), wide, atol=5e-9)
    np.testing.assert_allclose(reference.gaussian(values.T, 1, 0), np.transpose(narrow), atol=5e-9)


def test_gaussian_by_hand() -> None:
    # radius 4 over [1, 0], seen as ... 1 0 0 1 [1 0] 0 1 1 0 ...: ones lie at -4, -1, 0, 3 and 4 from the first
    weight = [math.exp(-0.5 * distance**2) for distance in range(5)]
    share = (weight[0] + weight[1] + weight[3] + 2 * weight[4]) / (weight[0] + 2 * sum(weight[1:]))
    np.testing.assert_allclose(reference.gaussian(np.array([[1, 0]]), 0, 1), [[share, 1 - share]], rtol=1e-13)
    untouched = np.array([[1.0, 5.0], [2.0, -3.0]])
    np.testing.assert_array_equal(reference.gaussian(untouched, 0, 0), untouched)


@pytest.mark.parametrize("sigmas", [(0.1, 0.9), (2.0, 0.0), (1.3, 7.0)])
def test_gaussian_is_a_convolution_of_the_mirrored_map(sigmas: tuple[float, float]) -> None:
    grid = np.random.default_rng(2).normal(size=(6, 5))
    expected = grid
    for axis, sigma in enumerate(sigmas):
        radius = int(4 * sigma + 0.5)
        kernel = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * (sigma or 1) ** 2))
        padded = np.pad(expected, [(radius, radius) if a == axis else (0, 0) for a in (0, 1)], mode="symmetric")
        expected = np.apply_along_axis(np.convolve, axis, padded, kernel / kernel.sum(), "valid")
    np.testing.assert_allclose(reference.gaussian(grid, *sigmas), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("image_size", [(448, 112), (13, 50), (4, 3)])
def test_map_without_crop_is_resized_then_smoothed(image_size: tuple[int, int]) -> None:
    sq_distances = np.random.default_rng(3).random((7, 11, 2))
    whole = (100, 260)
    sigmas = (3 * image_size[0] / 224, 3 * image_size[1] / 224)
    expected = reference.gaussian(reference.resize_map(sq_distances.mean(axis=2), image_size), *sigmas)
    result = reference.anomaly_map(sq_distances, image_size, whole, whole, sigma=3)
    np.testing.assert_allclose(result, expected, rtol=1e-12)


def test_map_with_crop_by_hand() -> None:
    # 8 px squashed to 4, of which the network saw the middle 2: rows and columns 2 to 5, at 2 px a grid cell
    sq_distances = np.array([[0, 4], [8, 12]])[..., None]
    result = reference.anomaly_map(sq_distances, (8, 8), (4, 4), (2, 2), sigma=0)
    expected = np.zeros((8, 8))
    expected[2:6, 2:6] = np.add.outer([0, 2, 6, 8], [0, 1, 3, 4])
    np.testing.assert_allclose(result, expected, atol=1e-13)


def test_map_with_odd_margin_starts_at_the_floor_of_half_of_it() -> None:
    sq_distances = np.array([[1, 2]])[..., None]
    result = reference.anomaly_map(sq_distances, (1, 5), (1, 5), (1, 2), sigma=0)
    np.testing.assert_array_equal(result, [[0, 1, 2, 0, 0]])


def test_map_smooths_inside_the_crop_only_by_the_scale_that_the_network_saw() -> None:
    # 512 px squashed to 256 and cropped to 224: the crop spans 448 px, so 4 px at 224 are 8; across, 256 px: 4
    sq_distances = np.random.default_rng(4).random((5, 5, 1))
    result = reference.anomaly_map(sq_distances, (512, 256), (256, 256), (224, 224), sigma=4)
    inside = reference.resize_map(sq_distances[..., 0], (448, 224))
    np.testing.assert_allclose(result[32:480, 16:240], reference.gaussian(inside, 8, 4), rtol=1e-12)
    result[32:480, 16:240] = 0
    assert not result.any()
