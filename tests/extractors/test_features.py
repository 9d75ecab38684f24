"""Features, the spec that says what made them, and the toy extractor, whose numbers are worked out by hand."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import numpy as np
import pytest

from spade_faiss.errors import FeatureError, OptionError, SpecMismatchError
from spade_faiss.extractors.features import Features
from spade_faiss.extractors.pooling import average_neighbourhoods
from spade_faiss.extractors.registry import Extractor, load_extractor
from spade_faiss.extractors.spec import ExtractorSpec
from spade_faiss.options import FeatureOptions

# Two levels, three numbers an image feature; not made from images here.
OWN = ExtractorSpec("own", level_shapes=((2, 4, 3), (5, 2, 1)), image_dim=3, dtype="float32")
OWN_16 = dataclasses.replace(OWN, dtype="float16")
FROM_IMAGES = ExtractorSpec(
    name="net",
    level_shapes=((2, 4, 3), (5, 2, 1)),
    image_dim=3,
    neighbourhood=3,
    level_names=("a", "b"),
    resized=(40, 30),
    crop=(32, 24),
    mean=(0.485, 0.456, 0.406),
    std=(0.1, 1 / 3, 0.229),  # a third has no short decimal: JSON must keep it all the same
    weights_sha256="ab" * 32,
    weights="file.pth",
)


def toy(**options: Any) -> Extractor:
    return load_extractor("toy", options=FeatureOptions(**{"dtype": "float32", **options}))


def features(n: int = 4, spec: ExtractorSpec = OWN, dtype: Any = np.float32, image_dtype: Any = np.float32) -> Features:
    rng = np.random.default_rng(n)
    levels = [rng.normal(size=(n, *shape)).astype(dtype) for shape in spec.level_shapes]
    return Features(rng.normal(size=(n, spec.image_dim)).astype(image_dtype), levels)


# --- Features --------------------------------------------------------------------------------------------------------


def test_rows_of_features() -> None:
    whole = features(5)
    for rows in (slice(1, 3), [4, 0]):
        part = whole[rows]
        assert len(part) == 2
        assert np.array_equal(part.image, whole.image[rows])
        assert all(np.array_equal(some, every[rows]) for some, every in zip(part.levels, whole.levels, strict=True))


# --- toy extractor ---------------------------------------------------------------------------------------------------


def test_toy_numbers() -> None:
    rows, columns = np.indices((32, 32))
    red, green = rows * 2, columns * 4
    blue = np.where(rows < 16, np.where(columns < 16, 0, 51), np.where(columns < 16, 102, 255))
    view = np.stack([red, green, blue], axis=-1).astype(np.uint8)
    found = toy().extract([view])

    assert [level.shape for level in found.levels] == [(1, 3, 8, 8), (1, 3, 4, 4), (1, 3, 2, 2)]
    for level, stride in zip(found.levels, (4, 8, 16), strict=True):
        cells = np.arange(32 // stride)
        middle = stride * cells + (stride - 1) / 2  # mean row, or column, of a cell
        assert level[0, 0] * 255 == pytest.approx(np.repeat(2 * middle[:, None], len(cells), axis=1), rel=1e-5)
        assert level[0, 1] * 255 == pytest.approx(np.repeat(4 * middle[None], len(cells), axis=0), rel=1e-5)
        quadrants = np.kron([[0, 51], [102, 255]], np.ones((len(cells) // 2, len(cells) // 2)))
        assert level[0, 2] * 255 == pytest.approx(quadrants, rel=1e-5)

    # Means of rows 0..15 and 16..31 are 7.5 and 23.5.
    expected = [(15, 30, 0), (15, 94, 51), (47, 30, 102), (47, 94, 255)]
    assert found.image.shape == (1, 12)
    assert found.image[0] * 255 == pytest.approx(np.ravel(expected), rel=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_toy_dtypes(dtype: str) -> None:
    found = toy(dtype=dtype).extract([np.full((32, 32, 3), 85, np.uint8)])  # a third
    assert found.image.dtype == np.float32
    assert [level.dtype.name for level in found.levels] == [dtype] * 3
    assert found.image == pytest.approx(1 / 3, rel=1e-6)
    assert found.levels[0].astype(float) == pytest.approx(1 / 3, rel=2**-11 if dtype == "float16" else 1e-6)


def test_toy_images_do_not_touch_each_other() -> None:
    views = list(np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8))
    together = toy(neighbourhood=3).extract(views)
    for number, view in enumerate(views):
        alone = toy(neighbourhood=3).extract([view])
        assert np.array_equal(together.image[number], alone.image[0])
        for several, one in zip(together.levels, alone.levels, strict=True):
            assert np.array_equal(several[number], one[0])


def test_toy_sizes_and_levels() -> None:
    extractor = toy(image_size=(60, 90), crop=(48, 80), levels=("stride4", "stride16"))
    assert extractor.spec.level_shapes == ((3, 12, 20), (3, 3, 5))
    view = extractor.spec.view.apply(np.full((100, 70, 3), 200, np.uint8))
    assert view.shape == (48, 80, 3)
    found = extractor.extract([view])
    extractor.spec.check(found)
    assert found.levels[1] == pytest.approx(200 / 255, rel=1e-5)


def test_toy_neighbourhood() -> None:
    view = np.zeros((32, 32, 3), np.uint8)
    view[:16, :16] = 255  # of the 2 x 2 of the coarsest level, one is 1
    plain, averaged = (toy(levels=("stride16",), neighbourhood=p).extract([view]) for p in (1, 3))
    assert plain.levels[0][0, 0].tolist() == [[1, 0], [0, 0]]
    assert averaged.levels[0][0, 0] == pytest.approx(0.25)  # every position sees all four
    assert np.array_equal(averaged.image, plain.image)


@pytest.mark.parametrize("options", [{"image_size": 40}, {"image_size": (32, 40)}, {"image_size": 64, "crop": 24}])
def test_toy_sizes_that_do_not_divide(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"expects multiples of 16 px, found \(\d+, \d+\)"):
        toy(**options)


def test_toy_smaller_strides_need_smaller_multiples() -> None:
    assert toy(image_size=(12, 20), levels=("stride4",)).spec.level_shapes == ((3, 3, 5),)


@pytest.mark.parametrize("levels", [("layer1",), ("stride4", "stride5"), ("stride8", "stride4"), ("stride4",) * 2])
def test_toy_unknown_levels(levels: tuple[str, ...]) -> None:
    with pytest.raises(OptionError, match=r"^levels: expected some of .*'stride4', 'stride8', 'stride16'") as caught:
        toy(levels=levels)
    assert str(levels) in str(caught.value)


def test_toy_refuses_weights() -> None:
    with pytest.raises(OptionError, match=r"toy has no weights, found weights some\.pth"):
        load_extractor("toy", weights="some.pth")


@pytest.mark.parametrize(
    "options",
    [{}, {"crop": 16, "image_size": 24}, {"levels": ("stride8",), "neighbourhood": 5}, {"dtype": "float16"}],
)
def test_options_of_a_spec_make_the_same_spec_again(options: dict[str, Any]) -> None:
    spec = toy(**options).spec
    assert load_extractor(spec.name, options=spec.options()).spec == spec
    again = spec.options(batch_size=3, device="cpu")
    assert (again.batch_size, again.device) == (3, "cpu")


# --- neighbourhood ---------------------------------------------------------------------------------------------------


def averaged_by_loop(level: np.ndarray, p: int) -> np.ndarray:
    """Mean over the p x p positions around each one, those off the map left out; (n, c, h, w) float64."""
    half, (h, w) = p // 2, level.shape[2:]
    means = np.empty(level.shape)
    for row in range(h):
        for column in range(w):
            rows, columns = slice(max(0, row - half), row + half + 1), slice(max(0, column - half), column + half + 1)
            means[:, :, row, column] = level[:, :, rows, columns].mean(axis=(2, 3), dtype=np.float64)
    return means


@pytest.mark.parametrize("p", [1, 3, 5, 9])
def test_neighbourhood_equals_a_plain_loop(p: int) -> None:
    rng = np.random.default_rng(p)
    levels = [rng.normal(size=shape).astype(np.float32) for shape in [(2, 3, 7, 5), (2, 1, 4, 6), (2, 2, 1, 9)]]
    for found, level in zip(average_neighbourhoods(levels, p), levels, strict=True):
        assert found.dtype == np.float32
        assert found == pytest.approx(averaged_by_loop(level, p), rel=1e-5, abs=1e-6)


# --- spec: as JSON ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [OWN, FROM_IMAGES, toy().spec], ids=["own", "from-images", "toy"])
def test_spec_survives_json(spec: ExtractorSpec) -> None:
    again = ExtractorSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec
    assert hash(again) == hash(spec)  # tuples again, not lists


@pytest.mark.parametrize(
    "changed",
    [
        {"level_shapes": []},
        {"level_shapes": None},
        {"level_shapes": [[2, 4]]},
        {"level_shapes": [[2, 4, 0]]},
        {"level_shapes": [[2, 4, 1.5]]},
        {"image_dim": 0},
        {"image_dim": "3"},
        {"dtype": "float64"},
        {"neighbourhood": 2},
        {"resized": [40]},
        {"resized": [0, 40]},
        {"resized": "large"},
        {"crop": {}},
        {"crop": [32, 24, 3]},
        {"colour": "blue"},
    ],
    ids=str,
)
def test_json_that_is_no_spec(changed: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        ExtractorSpec.from_json({**json.loads(json.dumps(FROM_IMAGES.to_json())), **changed})


@pytest.mark.parametrize("missing", ["name", "level_shapes", "image_dim"])
def test_json_without_a_field(missing: str) -> None:
    values = OWN.to_json()
    del values[missing]
    with pytest.raises(TypeError, match=missing):
        ExtractorSpec.from_json(values)


def test_features_of_ones_own_have_no_view() -> None:
    with pytest.raises(FeatureError, match=r"'own' takes features, not images: use Gallery\.append"):
        _ = OWN.view


def test_bytes_per_image() -> None:
    values = 2 * 4 * 3 + 5 * 2 * 1
    assert OWN.bytes_per_image == 4 * values + 4 * 3
    assert OWN_16.bytes_per_image == 2 * values + 4 * 3


def test_a_spec_in_one_line() -> None:
    assert repr(OWN) == "ExtractorSpec('own', levels 2x4x3 5x2x1 float32, image 3)"
    assert repr(FROM_IMAGES) == (
        "ExtractorSpec('net', 40x30 px cropped to 32x24, levels 2x4x3 5x2x1 float16, neighbourhood 3, image 3)"
    )
    assert (
        repr(toy(image_size=64, strides=(8,)).spec) == "ExtractorSpec('toy', 64x64 px, levels 3x8x8 float32, image 12)"
    )


# --- spec: against another -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("name", "other"),
        ("level_shapes", ((2, 4, 3), (5, 2, 2))),
        ("image_dim", 4),
        ("dtype", "float32"),
        ("neighbourhood", 1),
        ("level_names", ("a", "c")),
        ("resized", (40, 31)),
        ("crop", (32, 25)),
        ("mean", (0.5, 0.5, 0.5)),
        ("std", (0.5, 0.5, 0.5)),
        ("weights_sha256", "cd" * 32),
    ],
)
def test_require_names_what_differs_with_both_values(name: str, value: Any) -> None:
    other = dataclasses.replace(FROM_IMAGES, **{name: value})
    with pytest.raises(SpecMismatchError) as caught:
        FROM_IMAGES.require(other, "here.gallery")
    message = str(caught.value)
    assert message.startswith("here.gallery: ")
    assert f"{name}: expected {getattr(FROM_IMAGES, name)}, found {value};" in message
    assert message.count("expected") == 1


def test_require_names_all_that_differ() -> None:
    other = dataclasses.replace(FROM_IMAGES, image_dim=7, neighbourhood=5)
    with pytest.raises(SpecMismatchError, match=r"image_dim: expected 3, found 7; neighbourhood: expected 3, found 5"):
        FROM_IMAGES.require(other, "here")


def test_require_does_not_mind_where_weights_came_from() -> None:
    FROM_IMAGES.require(dataclasses.replace(FROM_IMAGES, weights="elsewhere.pth"), "here")


# --- spec: against features ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 4])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_features_that_fit(n: int, dtype: Any) -> None:
    given = features(n, dtype=dtype, image_dtype=dtype)
    for spec in (OWN, OWN_16):
        stored = spec.cast(given)
        assert stored.image.dtype == np.float32
        assert [level.dtype.name for level in stored.levels] == [spec.dtype] * 2
        for level, given_level in zip(stored.levels, given.levels, strict=True):
            assert np.array_equal(level, given_level.astype(spec.dtype))


def test_cast_makes_contiguous() -> None:
    given = features()
    turned = [np.asfortranarray(level) for level in given.levels]
    stored = OWN.cast(Features(np.asfortranarray(given.image), turned))
    for array, expected in zip([stored.image, *stored.levels], [given.image, *given.levels], strict=True):
        assert array.flags.c_contiguous
        assert np.array_equal(array, expected)


@pytest.mark.parametrize(
    "reshape",
    [
        pytest.param(lambda given: Features(given.image, given.levels[:1]), id="a-level-less"),
        pytest.param(lambda given: Features(given.image, given.levels * 2), id="levels-more"),
        pytest.param(lambda given: Features(given.image, given.levels[::-1]), id="coarsest-first"),
        pytest.param(lambda given: Features(given.image, [given.levels[0], given.levels[1][:3]]), id="images-less"),
        pytest.param(lambda given: Features(given.image[:3], given.levels), id="image-features-less"),
        pytest.param(
            lambda given: Features(given.image, [level.transpose(0, 2, 3, 1) for level in given.levels]), id="nhwc"
        ),
        pytest.param(lambda given: Features(given.image, [level[0] for level in given.levels]), id="one-image"),
    ],
)
def test_levels_of_wrong_shape(reshape: Any) -> None:
    wrong = reshape(features())
    for method in (OWN.check, OWN.cast):
        with pytest.raises(FeatureError, match=r"^levels: expected shapes \[.*\], found \[.*\]$") as caught:
            method(wrong)
        assert str([level.shape for level in wrong.levels]) in str(caught.value)


@pytest.mark.parametrize("shape", [(4, 2), (4, 3, 1), (4,)])
def test_image_features_of_wrong_shape(shape: tuple[int, ...]) -> None:
    wrong = Features(np.zeros(shape, np.float32), features().levels)
    with pytest.raises(FeatureError, match="^" + re.escape(f"image features: expected shape (4, 3), found {shape}")):
        OWN.check(wrong)


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.bool_, np.complex64])
def test_numbers_of_another_kind(dtype: Any) -> None:
    name = np.dtype(dtype).name
    with pytest.raises(FeatureError, match=f"^level 0: expected float16 or float32, found {name}"):
        OWN.check(features(dtype=dtype))
    with pytest.raises(FeatureError, match=f"^image feature: expected float16 or float32, found {name}"):
        OWN.check(features(image_dtype=dtype))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(value: float, dtype: Any) -> None:
    for spec in (OWN, OWN_16):
        wrong = features(dtype=dtype, image_dtype=dtype)
        wrong.levels[1][2, 4, 1, 0] = value
        with pytest.raises(FeatureError, match=r"^level 1 of image 2 of 4: expected finite values"):
            spec.cast(wrong)
        wrong.image[3, 1] = value
        with pytest.raises(FeatureError, match=r"^image feature of image 3 of 4: expected finite values"):
            spec.cast(wrong)


def test_infinities_that_cancel() -> None:
    wrong = features()
    wrong.levels[0][1, 0, 0, 0], wrong.levels[0][2, 0, 0, 0] = np.inf, -np.inf
    with pytest.raises(FeatureError, match=r"^level 0 of image 1 of 4: expected finite values"):
        OWN.check(wrong)


def test_large_values_are_finite_though_their_sum_is_not() -> None:
    large = features()
    large.levels[0][:] = 3e38
    assert OWN.cast(large).levels[0].max() == np.float32(3e38)


def test_float16_overflow_names_the_level() -> None:
    given = features()
    given.levels[0][:] = 65504  # the largest that fits
    assert OWN_16.cast(given).levels[0].min() == 65504
    given.levels[1][2, 0, 0, 0] = -70000
    with pytest.raises(FeatureError, match=r"^level 1: expected values within ±65504.*found 70000; .*dtype float32"):
        OWN_16.cast(given)
    OWN.cast(given)


@pytest.mark.parametrize("where", ["image", "level"])
def test_float64_that_float32_cannot_hold(where: str) -> None:
    given = features(dtype=np.float64, image_dtype=np.float64)
    (given.image if where == "image" else given.levels[1]).flat[0] = 1e300
    with pytest.raises(FeatureError) as caught:
        OWN.cast(given)
    assert "dtype float32" not in str(caught.value)  # which it is already


# --- by name ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet19", "Toy", "", "alexnet", "__import__('os')"])
def test_unknown_name(name: str) -> None:
    with pytest.raises(OptionError, match=r"^extractor: expected efficientnet_lite0, toy, timm:.*wide_resnet50_2") as e:
        load_extractor(name)
    assert str(e.value).endswith(f"found {name!r}")
