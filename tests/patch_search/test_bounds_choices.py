"""What a search by bounds takes over from earlier ones: time, never the answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import spade_faiss as sf
from spade_faiss.patch_search.bounds import choices as bounds_choices
from spade_faiss.patch_search.bounds import plan as bounds_plan
from spade_faiss.patch_search.bounds import search as bounds
from spade_faiss.patch_search.bounds.choices import AGAIN, KINDS, Choices
from spade_faiss.patch_search.bounds.plan import Projection
from spade_faiss.patch_search.bounds.search import TooMuchLeftError, search_bounds, search_levels_by_bounds
from tests import reference

BUDGET = 8**4 * 6 * 0.5  # nanoseconds, far too little


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note each time that directions are chosen, whatever little there is to search."""
    found: list[int] = []
    choose = bounds._choose

    def noted(*args: Any) -> None:
        found.append(1)
        choose(*args)

    monkeypatch.setattr(bounds_plan, "has_tiles", lambda: False)  # they multiply so few channels without directions
    monkeypatch.setattr(bounds, "WORTH", -1)
    monkeypatch.setattr(bounds, "_choose", noted)
    return found


def images(axes: slice, number: int = 8, seed: int = 0) -> np.ndarray:
    """Levels (number, 30, 9, 9) float32 that differ in some of the channels, and hardly in the others."""
    rng = np.random.default_rng(seed)
    levels = 1e-3 * rng.normal(size=(number, 30, 9, 9))
    levels[:, axes] += rng.normal(size=levels[:, axes].shape)
    return levels.astype(np.float32)


def search(levels: np.ndarray, distinct: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Search the first image among the others."""
    found: tuple[np.ndarray, np.ndarray] = search_bounds(levels[0].reshape(30, -1), levels[1:], 3, distinct)
    return found


@pytest.mark.parametrize("distinct", [True, False])
def test_a_search_takes_the_directions_of_the_one_before(chosen: list[int], distinct: bool) -> None:
    search(images(slice(0, 3)), distinct)
    later = images(slice(0, 3), seed=1)
    found = search(later, distinct)
    assert len(chosen) == 1
    bounds_choices.CHOICES.clear()
    again = search(later, distinct)
    assert len(chosen) == 2
    for one, other in zip(found, again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_images_of_another_kind_get_directions_of_their_own(chosen: list[int]) -> None:
    search(images(slice(0, 3)))
    other = images(slice(20, 23))
    found = search(other)
    assert len(chosen) == 2
    expected = reference.search_distinct(other[0].reshape(30, -1), other[1:], 3)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_array_equal(found[1], expected[1])


def test_other_sizes_are_of_another_kind(chosen: list[int]) -> None:
    levels = images(slice(0, 3))
    search(levels)
    search(levels[:-1])
    search_bounds(levels[0].reshape(30, -1), levels[1:], 2, True)
    search_bounds(levels[0].reshape(30, -1)[:, 1:], levels[1:], 3, True)
    assert len(chosen) == 4


def test_directions_are_chosen_anew_after_some_searches(chosen: list[int]) -> None:
    levels = images(slice(0, 3))
    for _ in range(2 * AGAIN):
        search(levels)
    assert len(chosen) == 2


def test_what_was_handed_over_is_handed_over_before_it_is_loaded(
    chosen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    query, *others = np.random.default_rng(9).normal(size=(7, 200, 8, 8))
    search = [query], [np.stack(others)], 1, BUDGET
    with pytest.raises(TooMuchLeftError):
        search_levels_by_bounds(*search)
    with monkeypatch.context() as patched:
        patched.setattr(bounds, "BoundsGallery", lambda *_: pytest.fail("the neighbours were loaded"))
        for _ in range(AGAIN - 1):
            with pytest.raises(TooMuchLeftError):
                search_levels_by_bounds(*search)
    with pytest.raises(TooMuchLeftError):
        search_levels_by_bounds(*search)
    assert len(chosen) == 2
    search_levels_by_bounds([query], [np.stack(others)], 1)  # asked for by its name, it is never handed over


@pytest.mark.parametrize(("factor", "offset"), [(1, 0), (1, 1e-4), (1, 7), (1e-3, 0), (1e4, 0), (0, 0), (1e30, 0)])
def test_a_glance_shows_whether_patches_lie_where_earlier_ones_did(
    chosen: list[int], factor: float, offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[int] = []
    gallery = bounds.BoundsGallery

    def noted(*args: Any) -> Any:
        loaded.append(1)
        return gallery(*args)

    def found_in(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return search_levels_by_bounds([levels[0, :20], levels[0, 20:]], [levels[1:, :20], levels[1:, 20:]], 2)

    monkeypatch.setattr(bounds, "BoundsGallery", noted)
    found_in(images(slice(0, 3)))
    later = (images(slice(0, 3), seed=1) * factor + offset).astype(np.float32)
    if factor == 1e30:
        with pytest.raises(sf.FeatureError, match="squared distances fit float32"):
            found_in(later)
        return
    found = found_in(later)
    assert len(loaded) == (2 if factor == 1 and offset < 1 else 3)  # else they are loaded anew
    bounds_choices.CHOICES.clear()
    for one, other in zip(found, found_in(later), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_recent_kinds_are_remembered() -> None:
    choices, sample = Choices(), torch.eye(4)
    projections = [Projection(4, torch.eye(4)[:2], True)]
    for kind in range(KINDS + 1):
        choices.keep(kind, projections, sample)
    assert choices.take(0, sample) is None
    found = choices.take(KINDS, sample)
    assert found is not None
    assert found.left == 0.5
    assert choices.take(KINDS, torch.eye(4)[:, 2:]) is None  # of which the directions explain nothing
