"""The gallery through its public surface: made, filled, asked, opened again, and any life at all."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spade_faiss as sf
from tests.helpers.galleries import OWN, random_features_of
from tests.helpers.own_galleries import KEYS, N, assert_holds, create, named, pick, reopen


def test_from_nothing_to_neighbours(tmp_path: Path, features: sf.Features) -> None:
    path = tmp_path / "deep" / "new folder"
    gallery = create(path)
    assert (len(gallery), gallery.generation, gallery.keys(), gallery.verify()) == (0, 0, [], [])
    with pytest.raises(sf.NotEnoughImagesError, match=r"K = 1 .* found 0"):
        gallery.search(features.image, 1)

    appended = gallery.append(KEYS, features)
    assert (appended.added, appended.replaced, appended.unchanged) == (N, 0, 0)
    assert gallery.keys() == KEYS  # in the order of appending
    assert gallery.generation > 0
    assert_holds(gallery, KEYS, features)
    assert_holds(reopen(path), KEYS, features)
    assert gallery.verify() == []

    queries = random_features_of(3, seed=9).image
    ids, sq_distances = gallery.search(queries, 5)
    brute = ((queries[:, None].astype(np.float64) - features.image[None]) ** 2).sum(axis=2)
    assert ids.tolist() == np.argsort(brute, axis=1)[:, :5].tolist()
    np.testing.assert_allclose(sq_distances, np.sort(brute, axis=1)[:, :5], rtol=1e-5)
    assert gallery.search(queries, 5, without=ids[0, :2])[0][0].tolist() == np.argsort(brute[0])[2:7].tolist()


def test_rows_come_back_in_the_order_asked_for(gallery: sf.Gallery, features: sf.Features) -> None:
    order = [11, 0, 7, 7, 4, 5]
    ids = gallery.ids([KEYS[row] for row in order])
    assert gallery.keys(np.array(ids)) == [KEYS[row] for row in order]
    for found, level in zip(gallery.read(np.array(ids)), features.levels, strict=True):
        assert found.tobytes() == level[order].tobytes()
    assert [level.shape for level in gallery.read([])] == [(0, 3, 5, 7), (0, 2, 3, 3)]


def test_names_that_are_not_there(gallery: sf.Gallery) -> None:
    assert "no such" not in gallery
    with pytest.raises(KeyError, match="no such"):
        gallery.ids([KEYS[0], "no such"])
    for wrong in (-1, N):
        with pytest.raises(sf.OptionError, match=f"expected 0 to {N - 1}, found {wrong}"):
            gallery.read([0, wrong])
        with pytest.raises(sf.OptionError, match=f"found {wrong}"):
            gallery.keys([wrong])


@pytest.mark.parametrize("ids", [[5], [0, 5], np.array([5], np.uint8)])
def test_removed_ids_are_not_answered(gallery: sf.Gallery, ids: Any) -> None:
    gallery.remove([KEYS[5]])
    for ask in (gallery.keys, gallery.read):
        with pytest.raises(sf.OptionError, match="found 5, which was removed"):
            ask(ids)


@pytest.mark.parametrize("ids", [[1.7], [True, False], ["a"], [np.nan], [[1, 2]], (n for n in (1, 2)), 3, None])
def test_ids_are_whole_numbers(gallery: sf.Gallery, ids: Any) -> None:
    for ask in (gallery.keys, gallery.read)[ids is None :]:
        with pytest.raises(sf.OptionError, match="ids: expected whole numbers, found"):
            ask(ids)
        with pytest.raises(sf.OptionError, match="ids: expected whole numbers, found"):
            gallery.snapshot().keys(ids)


@pytest.mark.parametrize("k", [0, -1, 2.5, "3", None, True])
def test_k_is_a_number(gallery: sf.Gallery, features: sf.Features, k: Any) -> None:
    with pytest.raises(sf.OptionError, match="k: expected a number >= 1, found"):
        gallery.search(features.image, k)


@pytest.mark.parametrize("k", [np.int64(2), np.uint8(2)])
def test_numbers_of_numpy_are_numbers(gallery: sf.Gallery, features: sf.Features, k: Any) -> None:
    assert gallery.search(features.image, k)[0].tolist() == gallery.search(features.image, 2)[0].tolist()


def test_features_beyond_float32_are_refused(gallery: sf.Gallery, features: sf.Features) -> None:
    with pytest.raises(sf.FeatureError, match="expected finite values in float32"):
        gallery.search(features.image.astype(np.float64) * 1e300, 2)


def test_more_neighbours_than_images_names_both(gallery: sf.Gallery, features: sf.Features) -> None:
    with pytest.raises(sf.NotEnoughImagesError, match=rf"K = {N + 1} .* found {N}"):
        gallery.search(features.image, N + 1)
    gallery.remove(KEYS[:2])
    with pytest.raises(sf.NotEnoughImagesError, match=rf"K = {N} .* found {N - 2}"):
        gallery.search(features.image, N)


@pytest.mark.parametrize(
    "queries",
    [np.zeros(6, np.float32), np.zeros((2, 7), np.float32), np.zeros((2, 6), int), np.full((2, 6), np.nan)],
    ids=["one-dimensional", "other-d", "integers", "nan"],
)
def test_queries_of_another_shape_or_not_finite_are_refused(gallery: sf.Gallery, queries: np.ndarray) -> None:
    with pytest.raises(sf.FeatureError, match="expected"):
        gallery.search(queries, 1)


def test_info_is_json_and_agrees_with_the_files(gallery: sf.Gallery) -> None:
    gallery.remove(KEYS[3:4])
    info = json.loads(json.dumps(gallery.info()))
    assert (info["images"], info["removed"], info["shards"]) == (N - 1, 1, 2)
    assert info["bytes"] == sum(len(data) for name, data in named(gallery.path).items() if name != "gallery.json")
    assert info["extractor"]["name"] == "own"
    assert info["bytes_per_image"] == 2 * (3 * 5 * 7 + 2 * 3 * 3) + 4 * 6
    assert info["generation"] == gallery.generation


@pytest.mark.parametrize("index", ["ivf", "IVF3,Flat", "HNSW8"])
def test_every_kind_of_index_survives_a_life(tmp_path: Path, features: sf.Features, index: str) -> None:
    gallery = create(tmp_path / "g", index=index)
    for start in range(0, N, 4):
        gallery.append(KEYS[start : start + 4], features[start : start + 4])
    gallery.remove(KEYS[2:4])
    rows = [0, 1, *range(4, N)]
    for at in (gallery, reopen(gallery.path)):
        assert_holds(at, [KEYS[row] for row in rows], pick(features, rows))
    gallery.compact()
    assert_holds(gallery, [KEYS[row] for row in rows], pick(features, rows))


def test_an_index_that_needs_more_images_does_not_half_refuse_an_append(tmp_path: Path, features: sf.Features) -> None:
    gallery = create(tmp_path / "g", index="IVF8,Flat")
    with pytest.warns(UserWarning, match=r"flat until there are more images.*points \(4\).*clusters \(8\)"):
        gallery.append(KEYS[:4], features[:4])
    assert_holds(gallery, KEYS[:4], features[:4])
    gallery.append(KEYS[4:], features[4:])  # now there are enough
    assert_holds(reopen(tmp_path / "g"), KEYS, features)


def test_a_damaged_manifest_or_another_format_version(gallery: sf.Gallery) -> None:
    manifest = gallery.path / "gallery.json"
    content = manifest.read_text()
    manifest.write_text(content.replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(sf.CorruptGalleryError, match="expected format version 1, found 2"):
        reopen(gallery.path)
    manifest.write_text(content[:100])
    with pytest.raises(sf.CorruptGalleryError, match=r"gallery\.json: damaged"):
        reopen(gallery.path)
    assert len(gallery) == N  # whoever has it open reads on


# Making and opening


def test_there_is_no_gallery_to_open(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing", str(tmp_path / "nothing")):
        with pytest.raises(sf.GalleryNotFoundError, match="expected a gallery"):
            sf.Gallery.open(path)
    assert list(tmp_path.iterdir()) == []


def test_create_leaves_alone_what_is_there(tmp_path: Path, gallery: sf.Gallery, features: sf.Features) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_text("mine")
    for path in (gallery.path, tmp_path / "file", tmp_path / "folder", tmp_path / "file" / "below"):
        with pytest.raises(sf.GalleryError) as caught:
            create(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert_holds(reopen(gallery.path), KEYS, features)
    assert [file.read_text() for file in (tmp_path / "file", tmp_path / "folder" / "x")] == ["mine", "mine"]
    (tmp_path / "empty").mkdir()
    assert len(create(tmp_path / "empty")) == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"level_shapes": ()},
        {"level_shapes": ((3, 5),)},
        {"level_shapes": ((3, 0, 7),)},
        {"image_dim": 0},
        {"dtype": "float64"},
    ],
    ids=["no-levels", "no-shape", "empty-level", "no-dimensions", "dtype"],
)
def test_a_spec_that_is_none_makes_no_gallery(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(sf.OptionError):
        create(tmp_path / "g", dataclasses.replace(OWN, **fields))
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize("size", [256e6, -1, 0, True, "1 GB", np.int64(10**6)])
def test_a_shard_size_that_is_none_makes_no_gallery(tmp_path: Path, size: Any) -> None:
    with pytest.raises(sf.OptionError, match="shard_bytes: expected a whole number of bytes >= 1, found"):
        create(tmp_path / "g", shard_bytes=size)
    assert not (tmp_path / "g").exists()


def test_an_index_that_faiss_does_not_know_makes_no_gallery(tmp_path: Path) -> None:
    with pytest.raises(sf.OptionError, match="nonsense"):
        create(tmp_path / "g", index="nonsense")
    assert not (tmp_path / "g").exists()


def test_another_spec_names_the_fields_and_both_values(toy_gallery: sf.Gallery, image_folder: Path) -> None:
    before = named(toy_gallery.path)
    options = sf.FeatureOptions(neighbourhood=3, dtype="float32")
    with pytest.raises(sf.SpecMismatchError) as caught:
        toy_gallery.add_images(image_folder, sf.load_extractor("toy", options=options))
    message = str(caught.value)
    assert "neighbourhood: expected 1, found 3" in message
    assert "dtype: expected float16, found float32" in message
    assert "resized" not in message  # the same on both sides
    assert named(toy_gallery.path) == before


def test_where_the_weights_came_from_does_not_matter() -> None:
    one, other = (dataclasses.replace(OWN, weights_sha256="5", weights=name) for name in ("a.pth", "b.pth"))
    one.require(other, "here")
    with pytest.raises(sf.SpecMismatchError, match="weights_sha256: expected 5, found 6"):
        one.require(dataclasses.replace(other, weights_sha256="6"), "here")


# Any order of anything


@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("seed", range(2))
def test_a_random_life_equals_a_dict(tmp_path: Path, seed: int) -> None:
    """Appends, replacements, removals, compacts and reopenings against a dict of key -> content."""
    rng = np.random.default_rng(seed)
    path, names = tmp_path / "g", [f"{number}.png" for number in range(15)]
    gallery = create(path, index=["flat", "ivf"][seed], shard_bytes=4 * OWN.bytes_per_image)
    model: dict[str, int] = {}  # key -> the seed of its features

    def contents(versions: list[int]) -> sf.Features:
        rows = [random_features_of(1, seed=version) for version in versions]
        return sf.Features(
            np.concatenate([row.image for row in rows]),
            [np.concatenate(levels) for levels in zip(*(row.levels for row in rows), strict=True)],
        )

    for _ in range(32):
        step = rng.choice(
            ["append", "replace", "remove", "compact", "reopen", "rebuild"], p=[0.4, 0.2, 0.2, 0.1, 0.05, 0.05]
        )
        keys = rng.choice(names, rng.integers(1, 6), replace=False).tolist()
        versions = (100 * np.array([names.index(key) for key in keys]) + rng.integers(0, 3, len(keys))).tolist()
        wanted = dict(zip(keys, versions, strict=True))
        same = sum(model.get(key) == version for key, version in wanted.items())
        differs = sum(key in model for key in keys) - same
        if step == "append" and differs:
            with pytest.raises(sf.KeyConflictError):
                gallery.append(keys, contents(versions))
        elif step in ("append", "replace"):
            appended = gallery.append(keys, contents(versions), replace=step == "replace")
            counts = (appended.added, appended.replaced, appended.unchanged)
            assert counts == (len(keys) - same, differs, same)
            model |= wanted
        elif step == "remove" and not model.keys() >= set(keys):
            with pytest.raises(sf.OptionError):
                gallery.remove(keys)
        elif step == "remove":
            gallery.remove(keys)
            for key in keys:
                del model[key]
        elif step == "compact":
            assert gallery.compact() >= 0
            assert gallery.info()["removed"] == 0
        elif step == "rebuild":
            gallery.rebuild_index()
        else:
            gallery.close()
            gallery = reopen(path)
        if model:
            assert_holds(gallery, list(model), contents(list(model.values())))
        else:
            assert gallery.keys() == []
    assert gallery.verify() == []
    assert_holds(reopen(path), list(model), contents(list(model.values())))
    gallery.compact()
    manifest = json.loads((path / "gallery.json").read_bytes())
    assert {shard["file"] for shard in manifest["shards"]} == {
        name for name in named(path) if name.startswith("shards/")
    }
