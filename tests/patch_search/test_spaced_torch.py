"""Distinct matches and their spacing, all levels in one go on a torch device, against the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import spade_faiss as sf
from spade_faiss.patch_search.gpu import recorded as recorded_torch
from spade_faiss.patch_search.gpu import spaced as spaced_torch
from spade_faiss.patch_search.gpu.candidates import Chosen
from spade_faiss.patch_search.gpu.spaced import search_spaced_torch
from spade_faiss.patch_search.search import search_in_steps, search_spaced_finite
from spade_faiss.system.recorded import AFTER, Recorder
from tests import reference
from tests.helpers.patches import make, make_ties

SHAPES = [(5, 9, 8), (7, 4, 5), (3, 2, 2)]
DEVICES = ["cpu", pytest.param("cuda:0", marks=pytest.mark.cuda)]


def searched(query: list[Any], neighbours: list[Any], kappa: int, device: str) -> list[Any]:
    return search_spaced_torch([own.reshape(len(own), -1) for own in query], neighbours, kappa, device)


def is_the_oracles(found: list[Any], query: list[Any], neighbours: list[Any], kappa: int) -> None:
    for (sq_distances, at, spacing), own, others in zip(found, query, neighbours, strict=True):
        expected, places = reference.search_distinct(own.reshape(len(own), -1), others, kappa)
        np.testing.assert_allclose(sq_distances, expected, rtol=1e-5, atol=1e-9)
        np.testing.assert_array_equal(at, places)
        grid = own.shape[1:]
        matches = np.stack(np.unravel_index(at[:, 0], (len(others), *grid)), axis=-1).reshape(*grid, 3)
        np.testing.assert_allclose(spacing.reshape(grid), reference.spacing(others, matches, 3), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("k", "kappa"), [(2, 1), (3, 3), (7, 4)])
def test_spaced_levels_are_the_oracles(k: int, kappa: int, device: str) -> None:
    query, neighbours = make(SHAPES, k)
    is_the_oracles(searched(query, neighbours, kappa, device), query, neighbours, kappa)


@pytest.mark.parametrize("device", DEVICES)
def test_where_all_is_in_doubt_the_spacing_is_that_of_the_match(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other patches are taken for the nearest at first."""

    def mistaken(_: Any, chosen: Chosen) -> Chosen:
        return chosen._replace(at=chosen.at.roll(1, dims=1), undecided=torch.ones_like(chosen.undecided))

    monkeypatch.setattr(spaced_torch, "refined", mistaken)
    query, neighbours = make_ties([(6, 9, 8), (5, 4, 5)], 5)
    again: list[int] = []
    search = spaced_torch.searched
    monkeypatch.setattr(spaced_torch, "searched", lambda *args: again.append(len(args[2])) or search(*args))
    is_the_oracles(searched(query, neighbours, 3, device), query, neighbours, 3)
    assert sum(again) > 50


@pytest.mark.parametrize("device", DEVICES)
def test_more_than_is_on_the_device_at_a_time_is_searched_by_parts(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, neighbours = make(SHAPES, 6)
    monkeypatch.setattr(spaced_torch, "PART", 1000)
    monkeypatch.setattr("spade_faiss.patch_search.gpu.search.PART", 1000)
    is_the_oracles(searched(query, neighbours, 3, device), query, neighbours, 3)


@pytest.mark.parametrize("device", DEVICES)
def test_values_too_large_are_refused(device: str) -> None:
    query, neighbours = make(SHAPES[:1], 3)
    with pytest.raises(sf.FeatureError, match="fit float32"), np.errstate(over="ignore", invalid="ignore"):
        searched([np.full_like(query[0], 3e30)], [np.full_like(neighbours[0], -3e30)], 2, device)


def test_all_levels_go_to_the_device_together(monkeypatch: pytest.MonkeyPatch) -> None:
    query, neighbours = make(SHAPES, 4)
    options = sf.SearchOptions(matching="by_level", kappa=2, distinct=True, device="cpu")
    expected = search_spaced_finite(query, neighbours, options)
    calls: list[int] = []

    def on_cpu(own: Any, others: Any, kappa: int, device: str) -> Any:
        calls.append(len(own))
        return search_spaced_torch(own, others, kappa, "cpu")

    monkeypatch.setattr("spade_faiss.patch_search.search._place", lambda *_: "cuda:0")
    monkeypatch.setattr("spade_faiss.patch_search.search.as_typed", lambda *_: torch.inference_mode())
    monkeypatch.setattr(spaced_torch, "search_spaced_torch", on_cpu)
    found = search_spaced_finite(query, neighbours, options)
    assert calls == [3]
    for one, right in zip(found, expected, strict=True):
        for a, b in zip(one, right, strict=True):
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, rtol=1e-5)


def in_steps(query: list[Any], neighbours: list[Any], options: sf.SearchOptions) -> list[Any]:
    """Search, and measure the spacing again, of every other patch where its last match lies."""
    found, spacing = search_in_steps(query, neighbours, options)
    turned, others = [], []
    for _, matches, _ in found:
        array = np.array(matches.cpu() if isinstance(matches, torch.Tensor) else matches)
        others.append(np.arange(array[..., 0, 0].size).reshape(array.shape[:2]) % 2 == 1)
        array[others[-1]] = array[others[-1]][:, ::-1]
        turned.append(array)
    return [(*one, each) for one, each in zip(found, spacing(turned, others), strict=True)]


def expected_spacings(level: np.ndarray, at: np.ndarray, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the spacing where the first match of each patch lies, and of every other where its last does."""
    first, other = (reference.spacing(level, at[:, :, one], 3) for one in (0, last))
    return first, np.where(np.arange(first.size).reshape(first.shape) % 2 == 1, other, first)


@pytest.mark.parametrize("place", ["cpu", "cuda:0"])
@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("part", [10**9, 1000])
def test_the_spacing_of_what_the_caller_chooses(
    place: str, tensors: bool, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, and by what a GPU would be given, in one go and by parts."""
    query, neighbours = make(SHAPES, 6)
    options = sf.SearchOptions(matching="by_level", kappa=2, distinct=True, device="cpu")
    monkeypatch.setattr(spaced_torch, "PART", part)
    if place != "cpu":
        monkeypatch.setattr("spade_faiss.patch_search.search._place", lambda *_: place)
        monkeypatch.setattr("spade_faiss.patch_search.search.as_typed", lambda *_: torch.inference_mode())
        monkeypatch.setattr(spaced_torch, "as_typed", lambda *_: torch.inference_mode())
        for name in ("search_spaced_torch", "search_apart_torch", "spacings_torch"):
            call = getattr(spaced_torch, name)
            monkeypatch.setattr(spaced_torch, name, lambda *given, call=call: call(*given[:3], "cpu"))
    others = [torch.from_numpy(level) for level in neighbours] if tensors else neighbours
    for (sq_distances, matches, spacing, again), own, level in zip(
        in_steps(query, others, options), query, neighbours, strict=True
    ):
        expected, places = reference.search_distinct(own.reshape(len(own), -1), level, 2)
        grid = own.shape[1:]
        at = np.stack(np.unravel_index(places, (6, *grid)), axis=-1).reshape(*grid, 2, 3)
        np.testing.assert_allclose(sq_distances.reshape(-1, 2), expected, rtol=1e-5)
        np.testing.assert_array_equal(matches, at)
        for one, right in zip((spacing, again), expected_spacings(level, at, 1), strict=True):
            np.testing.assert_allclose(one, right, rtol=1e-5)


@pytest.mark.cuda
def test_recorded_searches_in_steps_find_the_same() -> None:
    options = sf.SearchOptions(matching="by_level", kappa=3, distinct=True, device="cuda")
    for seed in range(AFTER + 3):
        query, neighbours = make(SHAPES, 5, np.float16, seed=seed)
        there = [torch.from_numpy(level).cuda() for level in neighbours]
        for (sq_distances, matches, spacing, again), own, level in zip(
            in_steps(query, there, options), query, neighbours, strict=True
        ):
            expected, places = reference.search_distinct(own.reshape(len(own), -1), level, 3)
            at = np.stack(np.unravel_index(places, (5, *own.shape[1:])), axis=-1).reshape(*own.shape[1:], 3, 3)
            np.testing.assert_allclose(sq_distances.reshape(-1, 3), expected, rtol=1e-5)
            np.testing.assert_array_equal(matches, at)
            for one, right in zip((spacing, again), expected_spacings(level, at, 2), strict=True):
                np.testing.assert_allclose(one, right, rtol=1e-5)


@pytest.mark.cuda
def test_recorded_spaced_searches_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder: Recorder[Any] = Recorder(8)
    monkeypatch.setattr(recorded_torch, "_recorder", recorder)
    pairs = [make(SHAPES, 4, np.float16, seed=seed) for seed in range(AFTER + 3)]
    ties = make_ties(SHAPES, 4)
    pairs.append(tuple([level.astype(np.float16) for level in side] for side in ties))  # type: ignore[arg-type]
    for query, neighbours in pairs:
        there = [torch.from_numpy(level).cuda() for level in neighbours]
        is_the_oracles(searched(query, there, 3, "cuda:0"), query, neighbours, 3)
    assert recorder.recorded() == 1
