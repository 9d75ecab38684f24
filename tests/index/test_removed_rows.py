"""Indexes of which most rows were removed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.index.image_index import ImageIndex


def features(images: int) -> sf.Features:
    return sf.Features(np.full((images, 16), 0.3, np.float32), [np.zeros((images, 1, 1, 1), np.float16)])


@pytest.mark.parametrize("nprobe", [None, 1, 4, 19])
@pytest.mark.parametrize("k", [5, 20, 25])
def test_a_search_among_few_that_are_left_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, k: int, nprobe: int | None
) -> None:
    """Of the lists that are visited all rows are found, and later rows make up the number, but for the candidates."""
    spec, options = sf.ExtractorSpec("own", ((1, 1, 1),), image_dim=16), sf.IndexOptions(memory=1, nlist=20)
    with sf.Gallery.create(tmp_path / "g", spec, options) as gallery:
        gallery.append([str(number) for number in range(1000)], features(1000))
        gallery.remove([str(number) for number in range(990)])
        gallery.append([f"later {number}" for number in range(15)], features(15))
    searches, search = list[int](), ImageIndex._search

    def counted(index: ImageIndex, *args: Any) -> Any:
        searches.append(1)
        assert len(searches) < 50
        return search(index, *args)

    monkeypatch.setattr(ImageIndex, "_search", counted)
    with sf.Gallery.open(tmp_path / "g") as gallery:
        ids, sq_distances = gallery.search(features(1).image, k, nprobe=nprobe)
        assert len(set(ids[0].tolist())) == k
        assert (ids >= 990).all()
        assert np.isfinite(sq_distances).all()
