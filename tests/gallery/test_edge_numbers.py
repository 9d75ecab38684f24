"""Numbers at the edge: nothing infinite is stored, no distance is negative, and what is identical is at zero."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.arrays import all_finite
from spade_faiss.patch_search.search import search_patches
from tests.helpers.galleries import OWN, random_features_of

ENGINES = ["flat", "pyramid"]
HALF_MAX = float(np.finfo(np.float16).max)
SHAPES = ((3, 5, 7), (2, 3, 3))


def create(path: Path, dtype: str = "float16") -> sf.Gallery:
    spec = sf.ExtractorSpec(name="own", level_shapes=SHAPES, image_dim=6, dtype=dtype)  # type: ignore[arg-type]
    return sf.Gallery.create(path, spec, sf.IndexOptions("flat", device="cpu"))


def constant(n: int, value: float, dtype: str = "float32") -> sf.Features:
    return sf.Features(
        np.full((n, OWN.image_dim), value, np.float32), [np.full((n, *shape), value, dtype) for shape in SHAPES]
    )


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("value", [65520.0, -1e6, 3e38])  # the first rounds up to infinity
def test_what_float16_cannot_hold_is_refused_with_its_level(tmp_path: Path, number: int, value: float) -> None:
    gallery, features = create(tmp_path / "g"), constant(2, 1.0)
    features.levels[number][1, 0, 0, 0] = value
    with pytest.raises(sf.FeatureError, match=f"level {number}: expected values within .65504"):
        gallery.append(["a", "b"], features)
    assert len(gallery) == 0
    wide = create(tmp_path / "wide", "float32")
    wide.append(["a", "b"], features)
    assert wide.read([1])[number][0, 0, 0, 0] == np.float32(value)


def test_the_largest_float16_is_kept(tmp_path: Path) -> None:
    gallery = create(tmp_path / "g")
    gallery.append(["a"], constant(1, 65519.0))  # rounds down
    assert all((level == HALF_MAX).all() for level in gallery.read([0]))


@pytest.mark.parametrize("value", [2.0**-24, -(2.0**-24), 2.0**-15, 0.0, -0.0])
def test_denormals_come_back(tmp_path: Path, value: float) -> None:
    gallery = create(tmp_path / "g")
    gallery.append(["a"], constant(1, value))
    for level in gallery.read([0]):
        assert level.tobytes() == np.full_like(level, value).tobytes()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("value", [0.0, 2.0**-24, 1.0, HALF_MAX])
def test_constant_maps_are_at_zero_from_themselves(engine: str, value: float) -> None:
    levels = [np.full((3, *shape), value, np.float16) for shape in SHAPES]
    sq_distances, matches = search_patches([level[0] for level in levels], levels, engine=engine, device="cpu")
    assert (sq_distances == 0).all()
    assert (matches == 0).all()  # the first of all that are alike


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("base", [1e-3, 1.0, 1e3, 3e4])
def test_patches_that_differ_in_the_last_digit_are_never_at_less_than_zero(engine: str, base: float) -> None:
    """Where |a|^2 + |b|^2 - 2ab has no digit left."""
    rng = np.random.default_rng(0)
    frames = [(base * (1 + rng.uniform(size=(1, *shape)))).astype(np.float16) for shape in SHAPES]
    levels = [np.concatenate([one, np.nextafter(one, np.float16(np.inf)), one]) for one in frames]
    for query, exact in ((0, True), (1, False)):
        asked = [level[query] for level in levels]
        others = levels if exact else [level[[0, 2]] for level in levels]
        sq_distances, _ = search_patches(asked, others, engine=engine, device="cpu")
        assert np.isfinite(sq_distances).all()
        assert (sq_distances == 0).all() if exact else (sq_distances > 0).all()


@pytest.mark.parametrize("kind", ["flat", "IVF2,Flat", "IVF2,SQ8", "HNSW8"])
@pytest.mark.parametrize("base", [0.0, 1e-20, 1.0, 1e4, 1e15])
@pytest.mark.parametrize("m", [1, 40])
def test_an_image_that_is_in_the_gallery_is_at_zero(tmp_path: Path, kind: str, base: float, m: int) -> None:
    """Alone, and in a batch, for which FAISS takes |q|^2 + |x|^2 - 2qx."""
    rng = np.random.default_rng(1)
    image = (base * (1 + 1e-6 * rng.uniform(size=(60, 6)))).astype(np.float32)
    spec = sf.ExtractorSpec(name="own", level_shapes=SHAPES, image_dim=6)
    gallery = sf.Gallery.create(tmp_path / "g", spec, sf.IndexOptions(kind, device="cpu"))
    gallery.append([str(row) for row in range(60)], sf.Features(image, constant(60, 0.0).levels))
    _, sq_distances = gallery.search(image[:m], 3, nprobe=2 if "IVF" in kind else None)
    assert np.isfinite(sq_distances).all()
    assert (sq_distances >= 0).all()
    assert (sq_distances[:, 0] == 0).all()


@pytest.mark.parametrize("value", [1e18, -1e20, 3e38])
def test_an_image_feature_whose_distances_do_not_fit_float32_is_refused(tmp_path: Path, value: float) -> None:
    features = random_features_of(3)
    features.image[1, 2] = value
    with (
        sf.Gallery.create(tmp_path / "g", OWN) as gallery,
        pytest.raises(sf.FeatureError, match=r"image features: expected values within ±1e\+17"),
    ):
        gallery.append(["a", "b", "c"], features)


@pytest.mark.parametrize("order", ["<", ">"])
def test_every_float16_is_finite_or_not_as_numpy_says(order: str) -> None:
    values = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(f"{order}f2")
    found = [all_finite(values[at : at + 1]) for at in range(len(values))]
    assert found == np.isfinite(values).tolist()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_numbers_are_finite_or_not_as_numpy_says(dtype: str, rng: np.random.Generator) -> None:
    limits = np.finfo(dtype)
    edges = [
        0.0,
        -0.0,
        limits.max,
        limits.min,
        limits.tiny,
        limits.smallest_subnormal,
        np.nan,
        -np.nan,
        np.inf,
        -np.inf,
    ]
    bits = rng.integers(0, 256, (20_000, np.dtype(dtype).itemsize), dtype=np.uint8)  # some are NaN
    values = np.concatenate([np.array(edges, dtype), bits.view(dtype)[:, 0]])
    assert [all_finite(values[at : at + 1]) for at in range(len(values))] == np.isfinite(values).tolist()
    finite = values[np.isfinite(values)].reshape(1, -1).repeat(2, axis=0)[:, ::2]  # not contiguous; its sum overflows
    assert all_finite(finite)
    for bad in edges[-4:]:
        one_bad = finite.copy()
        one_bad[1, 7] = bad
        assert not all_finite(one_bad)
    assert all_finite(np.empty((0, 3), dtype))
