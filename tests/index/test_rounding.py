"""Flat indexes whose rounding in batches keeps images out of what is fetched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.index.image_index import ImageIndex
from tests.helpers.search import Held


@pytest.mark.parametrize("k", [1, 3])
def test_what_rounding_has_kept_out_is_not_replaced_by_what_was_removed(
    monkeypatch: pytest.MonkeyPatch, k: int
) -> None:
    """A search for one query, without that rounding, finds more of the removed ones, and is repeated for more."""
    rng = np.random.default_rng(0)
    query = rng.standard_normal((1, 16)).astype(np.float32)
    near = query + 1e-4 * rng.standard_normal((150, 16)).astype(np.float32)
    xb = np.concatenate([near, rng.standard_normal((150, 16)).astype(np.float32)])
    removed = np.arange(300) < 150
    index = ImageIndex.build(Held(xb), 16, sf.IndexOptions("flat", device="cpu"))
    expected = 150 + np.argsort(((xb[150:] - query) ** 2).sum(axis=1))[:k]

    def rounded(queries: np.ndarray, fetch: int, nprobe: int) -> Any:  # as a batch might have it
        others = ((xb[150:] - query) ** 2).sum(axis=1)
        order = np.argsort(others)[:fetch]
        return others[None, order].astype(np.float32), 150 + order[None]

    monkeypatch.setattr(index, "_search", rounded)
    monkeypatch.setattr("spade_faiss.index.image_index.ROUNDING", 1.0)
    monkeypatch.setattr("spade_faiss.index.image_index.OVERFETCH", 0)
    ids, sq_distances = index.search(query, k, removed=removed)
    np.testing.assert_array_equal(ids[0], expected)
    assert np.isfinite(sq_distances).all()
