"""Every setting's bounds: what is outside is refused, naming the setting and the value."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from spade_faiss.errors import OptionError
from spade_faiss.options import FeatureOptions, IndexOptions, ScoreOptions, SearchOptions
from spade_faiss.recipes import RECIPES

NO_COUNTS: list[Any] = [0, -1, 1.5, True, "3"]
NO_SIZES: list[Any] = [0, -224, (0, 224), (224, -1), (224, 1.5), (True, 224), (224,), (224, 224, 3), (), 224.0, "224"]


def bad(options: type, name: str, values: list[Any]) -> list[Any]:
    return [pytest.param(options, name, value, id=f"{options.__name__}-{name}-{value!r}") for value in values]


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        *bad(FeatureOptions, "image_size", NO_SIZES),
        *bad(FeatureOptions, "crop", NO_SIZES),
        *bad(FeatureOptions, "levels", [(), 3, "layer1"]),
        *bad(FeatureOptions, "strides", [4, None, "4", (), (8, 4), (4, 4.5)]),
        *bad(FeatureOptions, "blocks", [0.5, "0.5", ()]),
        *bad(FeatureOptions, "neighbourhood", [*NO_COUNTS, 2, 4]),
        *bad(FeatureOptions, "dtype", ["float64", "half", "", None]),
        *bad(FeatureOptions, "batch_size", [*NO_COUNTS, None]),
        *bad(IndexOptions, "nlist", NO_COUNTS),
        *bad(IndexOptions, "nprobe", NO_COUNTS),
        *bad(IndexOptions, "train_images", NO_COUNTS),
        *bad(SearchOptions, "k", NO_COUNTS),
        *bad(SearchOptions, "k_score", NO_COUNTS),
        *bad(SearchOptions, "nprobe", NO_COUNTS),
        *bad(SearchOptions, "kappa", NO_COUNTS),
        *bad(SearchOptions, "block_bytes", [*NO_COUNTS, None]),
        *bad(SearchOptions, "cache_bytes", [-1, 1.5, True, False, "3", None]),
        *bad(SearchOptions, "device_cache_bytes", [-1, 1.5, True, False, "3", None]),
        *bad(SearchOptions, "verify_reads", [None, 0, 1, "yes"]),
        *bad(SearchOptions, "engine", ["fast", "", None]),
        *bad(ScoreOptions, "image_score", ["max", ""]),
        *bad(ScoreOptions, "positions", ["max", ""]),
        *bad(SearchOptions, "level_weights", ["max", ""]),
        *bad(FeatureOptions, "normalisation", ["own", ""]),
        *bad(FeatureOptions, "blocks", [(), (0.5, 0.25), (0.5, 0.5), (0,), (1.5,), (True,), ("1",), 0.5, (math.nan,)]),
        *bad(FeatureOptions, "tokens", ["unit", ""]),
        *bad(FeatureOptions, "image_feature", ["cls", ""]),
        *bad(FeatureOptions, "strides", [(), (8, 4), (4, 4), (0, 4), ("4",)]),
        *bad(ScoreOptions, "sigma", [-0.1, math.nan, math.inf, -math.inf]),
    ],
)
def test_outside_its_bounds(options: type, name: str, value: Any) -> None:
    with pytest.raises(OptionError) as caught:
        options(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}: expected ")
    assert repr(value) in message
    assert "\n" not in message


def test_index_kind_must_be_named() -> None:
    with pytest.raises(
        OptionError, match=r"^index: expected auto, flat, ivf, ivf-sq, ivf-pq, hnsw or a FAISS factory string, found ''"
    ):
        IndexOptions(kind="")


@pytest.mark.parametrize(
    "make",
    [
        lambda: FeatureOptions(image_size=1, crop=1, levels=("a",), neighbourhood=1, batch_size=1, dtype="float32"),
        lambda: FeatureOptions(image_size=(1, 2), crop=(1, 1), neighbourhood=99),
        lambda: FeatureOptions(blocks=(1e-3, 1), tokens="plain", image_feature="pooled"),
        lambda: IndexOptions(kind="IVF4,Flat", nlist=1, nprobe=1, train_images=1),
        lambda: SearchOptions(k=1, kappa=1, k_score=1, nprobe=1, block_bytes=1, engine="flat", cache_bytes=0),
        lambda: SearchOptions(device_cache_bytes=0),
        lambda: SearchOptions(k=None, k_score=None, nprobe=None),
        lambda: ScoreOptions(image_score="map_max", sigma=0),
    ],
)
def test_at_its_bounds(make: Any) -> None:
    make()


@pytest.mark.parametrize("given", [96, (96, 96), [96, 96]])
def test_a_side_is_a_square(given: Any) -> None:
    options = FeatureOptions(image_size=given, crop=given)
    assert (options.image_size, options.crop) == ((96, 96), (96, 96))
    assert options == FeatureOptions(image_size=96, crop=96)


def test_levels_may_be_a_list() -> None:
    assert FeatureOptions(levels=["a", "b"]) == FeatureOptions(levels=("a", "b"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("image_size", "crop", "expected"),
    [
        (None, None, ((32, 48), (32, 48))),
        (64, None, ((64, 64), (64, 64))),
        ((64, 40), None, ((64, 40), (64, 40))),
        (256, 224, ((256, 256), (224, 224))),
        ((256, 320), (224, 300), ((256, 320), (224, 300))),
        (64, 64, ((64, 64), (64, 64))),
        # A crop without a size would be of an image of its own size: the whole of it.
        (None, 24, ((24, 24), (24, 24))),
        (None, 500, ((500, 500), (500, 500))),
    ],
)
def test_sizes(image_size: Any, crop: Any, expected: Any) -> None:
    assert FeatureOptions(image_size=image_size, crop=crop).sizes(default=(32, 48)) == expected


@pytest.mark.parametrize(("image_size", "crop"), [(224, 256), ((100, 50), (50, 51)), ((50, 100), (51, 50))])
def test_crop_larger_than_the_image(image_size: Any, crop: Any) -> None:
    with pytest.raises(OptionError, match=r"^crop: expected at most the image size \(\d+, \d+\), found \(\d+, \d+\)"):
        FeatureOptions(image_size=image_size, crop=crop).sizes(default=(1000, 1000))


def test_a_recipes_description_under_its_earlier_name() -> None:
    for recipe in RECIPES.values():
        assert recipe.what == recipe.description == recipe.to_json()["what"]


@pytest.mark.parametrize(
    ("options", "values"),
    [
        (SearchOptions, {"k": 3, "kappa": 2, "k_score": 1, "nprobe": 4, "window": 5, "leave_out": 0.25}),
        (SearchOptions, {"distinct": True, "verify_reads": False, "cache_bytes": 0, "window": 0.5}),
        (ScoreOptions, {"min_region": 4, "sigma": 2.5, "truncate": 3}),
        (IndexOptions, {"nlist": 2, "nprobe": 1, "train_images": 40, "recall": 0.5, "memory": 1024}),
        (FeatureOptions, {"image_size": 64, "crop": 32, "neighbourhood": 3, "batch_size": 2, "bits": 12, "overlap": 0}),
        (FeatureOptions, {"image_size": (64, 48), "strides": (4, 8), "blocks": (0.25, 1.0), "count_include_pad": True}),
        (FeatureOptions, {"strides": [4, 8], "levels": ["layer1"]}),
    ],
)
def test_numbers_of_numpy_are_taken_as_pythons(options: type, values: dict[str, Any]) -> None:
    def of_numpy(value: Any) -> Any:
        return [of_numpy(one) for one in value] if isinstance(value, (tuple, list)) else np.array([value])[0]

    if "overlap" in values:
        values["tile"] = 32
    found, expected = options(**{name: of_numpy(value) for name, value in values.items()}), options(**values)
    assert found == expected
    json.dumps([getattr(found, name) for name in values])
