"""The demo, from the sample images to its page, with the toy extractor; `make demo` runs it with the real one."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.cli.demo import run_demo, sample_folder
from spade_faiss.recipes import DEFAULT_RECIPE, RECIPES
from tests.helpers.galleries import OWN, random_features_of

pytestmark = pytest.mark.slow  # `make test-fast` leaves the module out


@pytest.mark.slow
def test_the_demo_writes_a_page_that_needs_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = RECIPES[DEFAULT_RECIPE]
    small = dataclasses.replace(recipe, features=dataclasses.replace(recipe.features, image_size=96))
    monkeypatch.setitem(RECIPES, DEFAULT_RECIPE, small)
    older = sf.Gallery.create(tmp_path / "samples.gallery", OWN)  # is replaced, whatever it is of
    older.append(["old"], random_features_of(1))
    older.close()
    lines = list(run_demo(tmp_path, "toy", progress=False))
    assert lines[0].startswith("40 normal images, toy")
    tests = sorted(path for path in (sample_folder() / "test").rglob("*") if path.is_file())
    keys = [path.relative_to(sample_folder() / "test").as_posix() for path in tests]
    assert [line.split()[0] for line in lines[3 : 3 + len(keys)]] == keys
    assert re.fullmatch(r"\d of 9 maps of defective images peak on the defect; \d+ s in all", lines[-2])

    page = (tmp_path / "index.html").read_text()
    assert page.count("<article") == len(keys)
    # The image, its map, five normal images, and for each region, or the map's maximum, a patch and what it matched.
    patches = page.count('src="data:image/jpeg;base64,') - 7 * len(keys)
    assert patches >= 2 * len(keys)
    assert patches % 2 == 0
    assert page.count("ground truth outlined") == 9
    assert not re.search(r"https?:|src=\"(?!data:)", page)
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["key"] for line in results] == keys
    first = np.load(tmp_path / "maps" / f"{keys[0]}.npy")
    assert first.max() == np.float32(results[0]["map_max"])
