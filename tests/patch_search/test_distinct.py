"""The nearest patch of each of several neighbours, and the spacing of what was matched, against the oracle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spade_faiss as sf
from spade_faiss.patch_search.distinct import search_distinct
from spade_faiss.patch_search.spacing import search_spaced, spacing
from spade_faiss.system.devices import torch_device
from tests import reference

GPU = pytest.param("cuda:0", marks=pytest.mark.cuda)


@pytest.fixture(scope="module", params=["cpu", "cpu:0", GPU])  # cpu:0 is what runs on a GPU, on the CPU
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where is searched."""
    known = {request.param: request.param}
    with pytest.MonkeyPatch.context() as patch:
        for module in ("search", "spacing"):
            patch.setattr(
                f"spade_faiss.patch_search.{module}.torch_device", lambda name: known.get(name) or torch_device(name)
            )
        yield request.param


def equals_oracle(query: np.ndarray, neighbours: np.ndarray, kappa: int, device: str) -> None:
    """Equal distances but for the rounding of values to float32, and patches that have these distances."""
    sq_distances, places = search_distinct(query, neighbours, kappa, device)
    expected, _ = reference.search_distinct(query, neighbours, kappa)
    cells = neighbours.astype(np.float64).transpose(0, 2, 3, 1).reshape(-1, len(query))
    off = 2.0**-23 * (np.linalg.norm(query.astype(np.float64), axis=0).max() + np.linalg.norm(cells, axis=1).max())
    tolerance = 1e-6 * expected + 2 * np.sqrt(expected) * off + off**2
    assert (np.abs(sq_distances - expected) <= tolerance).all()
    true = ((cells[places] - query.astype(np.float64).T[:, None]) ** 2).sum(axis=2)
    assert (np.abs(true - expected) <= tolerance).all()
    a_neighbour = neighbours.shape[2] * neighbours.shape[3]
    assert all(len(set(row // a_neighbour)) == kappa for row in places)


@settings(max_examples=40)
@given(
    shape=st.tuples(*[st.integers(1, most) for most in (6, 9, 7, 9)]),
    patches=st.integers(1, 30),
    dtype=st.sampled_from(["float16", "float32", "float64"]),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_equals_the_oracle(
    device: str, shape: tuple[int, int, int, int], patches: int, dtype: str, seed: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    neighbours, query = rng.normal(size=shape).astype(dtype), rng.normal(size=(shape[1], patches)).astype(dtype)
    neighbours[-1] = neighbours[0]  # copies tie, and the earlier wins
    query[:, 0] = neighbours[0, :, 0, 0]
    equals_oracle(query, neighbours, data.draw(st.integers(1, shape[0])), device)


@pytest.mark.parametrize("scale", [0, 1e-18, 1e4])
@pytest.mark.parametrize("offset", [0, 1e3])
def test_patches_that_products_cannot_tell_apart(device: str, scale: float, offset: float) -> None:
    """Hair's breadths on a large mean, and values of one kind: such neighbours are measured whole."""
    rng = np.random.default_rng(1)
    neighbours = (offset + scale * rng.normal(size=(5, 4, 6, 11))).astype(np.float32)
    query = (offset + scale * rng.normal(size=(4, 9))).astype(np.float32)
    sq_distances, places = search_distinct(query, neighbours, 3, device)
    expected, expected_places = reference.search_distinct(query, neighbours, 3)
    np.testing.assert_allclose(sq_distances, expected, rtol=1e-5, atol=1e-38)
    np.testing.assert_array_equal(places, expected_places)


def test_more_threads_find_the_same(two_threads: None) -> None:
    rng = np.random.default_rng(2)
    equals_oracle(rng.normal(size=(3, 50)), rng.normal(size=(9, 3, 8, 8)), 4, "cpu")


def test_distances_that_no_float32_holds_are_refused(device: str) -> None:
    with pytest.raises(sf.FeatureError, match="squared distances fit float32"):
        search_distinct(np.full((2, 1), 3e30), np.full((2, 2, 1, 1), -3e30), 1, device)


@pytest.mark.parametrize("k", [2, 3, 4, 7])
def test_spacing_equals_the_oracle(k: int, device: str) -> None:
    rng = np.random.default_rng(k)
    level = rng.normal(size=(k, 3, 4, 5)).astype(np.float16)
    level[:, :, 0, 0] = 1  # in all neighbours alike: at 0 from each other
    matches = np.stack([rng.integers(0, most, (6, 2)) for most in (k, 4, 5)], axis=-1).astype(np.int32)
    matches[0] = [[0, 0, 0], [k - 1, 0, 0]]
    for own in (level, torch.from_numpy(level).to(device)):
        found = spacing(own, matches, device=device)
        np.testing.assert_allclose(found, reference.spacing(level, matches, 3), rtol=1e-5)
        assert (found[0] == 0).all()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"kappa": 4}, r"kappa: expected 1 to 3, the number of neighbours, which are distinct, found 4"),
        ({"kappa": 0}, r"kappa: expected 1 to 3, the number of neighbours, which are distinct, found 0"),
        ({"device": "nonsense"}, r"device: expected .* found 'nonsense'"),
        ({"window": 0}, r"distinct: goes with window 'all', found 0"),
        ({"window": 1}, r"distinct: goes with window 'all', found 1"),
        ({"metric": "cosine"}, r"distinct: goes with metric 'l2', found 'cosine'"),
        ({"engine": "flat"}, r"distinct: goes with engine 'auto', found 'flat'"),
    ],
)
def test_what_does_not_go_with_it(options: dict[str, Any], expected: str) -> None:
    levels = [np.ones((2, 3, 3))], [np.ones((3, 2, 3, 3))]
    with pytest.raises((sf.OptionError, sf.DeviceError), match=expected):
        sf.search_levels(*levels, distinct=True, **options)


def test_each_level_by_its_own_nearest_neighbours(device: str) -> None:
    rng = np.random.default_rng(3)
    shapes = [(4, 5, 6), (3, 2, 3)]
    query = [rng.normal(size=shape) for shape in shapes]
    neighbours = [rng.normal(size=(4, *shape)) for shape in shapes]
    for (sq_distances, matches), own, others in zip(
        sf.search_levels(query, neighbours, kappa=2, distinct=True, device=device), query, neighbours, strict=True
    ):
        expected, places = reference.search_distinct(own.reshape(len(own), -1), others, 2)
        grid = own.shape[1:]
        np.testing.assert_allclose(sq_distances, expected.reshape(*grid, 2), rtol=1e-5)
        np.testing.assert_array_equal(
            matches, np.stack(np.unravel_index(places, (4, *grid)), axis=-1).reshape(*grid, 2, 3)
        )


def test_spacing_of_hairs_breadths_on_a_large_offset() -> None:
    """What bounds the search are distances of values as they are, and patches are float32."""
    rng = np.random.default_rng(5)
    level = 1000 + 1e-3 * rng.normal(size=(9, 5, 6, 7))
    level[:, :, 3:] += 100 * rng.normal(size=(5, 1, 1))
    query = level[4].reshape(5, -1) + 1e-4 * rng.normal(size=(5, 42))
    _, places, found = search_spaced(query, level, 8)
    matches = np.stack(np.unravel_index(places[None, :, 0], (9, 6, 7)), axis=-1)
    expected = reference.spacing(level, matches, 3)[0]
    off = 2.0**-23 * np.abs(level - level.mean()).max() * np.sqrt(5)
    assert (np.abs(np.sqrt(found) - np.sqrt(expected)) <= off).all()


def test_spacing_of_small_values_beside_large_ones() -> None:
    """What is subtracted from all patches is far larger than the distances of some, and rounds them."""
    rng = np.random.default_rng(5)
    level = np.where(rng.random((9, 1, 6, 7)) < 0.5, 1e-3, 1) * rng.normal(size=(9, 5, 6, 7))
    level = np.where(np.abs(level) < 0.02, level, level + 100).astype(np.float16)
    _, places, found = search_spaced(level[4].reshape(5, -1), level, 8)
    matches = np.stack(np.unravel_index(places[None, :, 0], (9, 6, 7)), axis=-1)
    expected = reference.spacing(level, matches, 3)[0]
    assert (np.abs(np.sqrt(found) - np.sqrt(expected)) <= 2.0**-23 * 100 * np.sqrt(5)).all()
