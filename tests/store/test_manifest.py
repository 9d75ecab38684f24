"""gallery.json: read back as it was written, and refused in one line whatever is done to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.errors import CorruptGalleryError, GalleryNotFoundError
from spade_faiss.index.metadata import IndexFacts
from spade_faiss.store.manifest import FILE, IndexEntry, KeysEntry, Manifest, ShardEntry

WRONG = ["a text", -1, 2.5, None, [], {}]  # whatever a field holds, most of these are of another kind

FACTS = IndexFacts("IVF4,Flat", "asked for", nprobe=2, candidates=1.5, recall=0.98, k=5, imbalance=1.2, mapped=True)

Edit = Callable[[dict[str, Any]], None]


def a_manifest(spec: sf.ExtractorSpec) -> Manifest:
    return Manifest(
        spec=spec,
        index_options=sf.IndexOptions("ivf", nlist=4, nprobe=2, train_images=9),
        shard_bytes=1000,
        generation=7,
        next_shard=3,
        shards=(ShardEntry("shards/000000.h5", 5, 9000).without([0, 3]), ShardEntry("shards/000002.h5", 4, 8000)),
        index=IndexEntry("index/image-000007.faiss", 9, 9, 400, "0123456789abcdef", FACTS),
        keys=KeysEntry("index/keys-000007.npy", 9, 300, "0123456789abcdef"),
        created_by="a test",
    )


@pytest.fixture
def folder(tmp_path: Path, own_spec: sf.ExtractorSpec) -> Path:
    a_manifest(own_spec).write(tmp_path)
    return tmp_path


def edit(folder: Path, change: Edit) -> None:
    values = json.loads((folder / FILE).read_bytes())
    values.pop("xxh3", None)  # else every edit is refused, whatever it is
    change(values)
    (folder / FILE).write_text(json.dumps(values))


def refusal(folder: Path) -> str:
    """The one line with which reading refuses."""
    with pytest.raises(CorruptGalleryError) as caught:
        Manifest.read(folder)
    assert "\n" not in str(caught.value)
    assert FILE in str(caught.value)
    return str(caught.value)


def test_it_reads_what_was_written(folder: Path, own_spec: sf.ExtractorSpec, toy: sf.Extractor) -> None:
    assert Manifest.read(folder) == a_manifest(own_spec)
    assert (Manifest.read(folder).rows, Manifest.read(folder).removed) == (9, 2)
    bare = Manifest(toy.spec, sf.IndexOptions(), 1)  # a spec with every field, and no shard or index yet
    bare.write(folder)
    assert Manifest.read(folder) == bare


def test_a_recipe_of_a_later_release_is_no_damage(toy_gallery: sf.Gallery, toy: sf.Extractor) -> None:
    """The gallery opens, is searched, checked and added to; only the defaults of its queries are not known."""
    path = toy_gallery.path
    edit(path, lambda values: values.update(recipe="ornate", created_by="spade-faiss 9.0"))
    with sf.Gallery.open(path, device="cpu") as gallery:
        assert gallery.verify() == []
        assert gallery.info()["recipe"]["name"] == "ornate"
        assert gallery.info()["recipe"].keys() == sf.RECIPES["paper"].to_json().keys()
        gallery.remove([gallery.keys()[0]])
        for call in (lambda: gallery.recipe, lambda: sf.Detector(gallery, toy)):
            with pytest.raises(sf.GalleryError) as caught:
                call()
            assert type(caught.value) is sf.GalleryError
            assert str(caught.value) == (
                f"{path}: made by a later release (spade-faiss 9.0): expected recipe paper or robust or relative or "
                "sharp or wary or rad, found 'ornate'; query it with that release"
            )
    assert Manifest.read(path).recipe == "ornate"  # a commit keeps it


def test_a_gallery_of_before_there_was_a_choice_stores_its_patches(folder: Path) -> None:
    edit(folder, lambda values: values.update(patches="recompute"))
    assert Manifest.read(folder).patches == "recompute"
    edit(folder, lambda values: values.pop("patches"))
    assert Manifest.read(folder).patches == "stored"
    edit(folder, lambda values: values.update(patches="forgotten"))
    assert "expected stored or recompute, found 'forgotten'" in refusal(folder)


def test_the_device_is_of_the_machine_not_of_the_gallery(folder: Path, own_spec: sf.ExtractorSpec) -> None:
    a_manifest(own_spec).on("cuda:3").write(folder)
    assert Manifest.read(folder).index_options.device == "auto"


def test_the_index_options_are_those_of_the_gallery_wherever_it_is_opened(own_spec: sf.ExtractorSpec) -> None:
    moved = a_manifest(own_spec).on("cpu")
    assert moved.index_options == sf.IndexOptions("ivf", nlist=4, nprobe=2, train_images=9, device="cpu")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"null", b'"spade-faiss gallery"', b"{}", b"\0" * 500, b"[" * 100_000, b"9" * 5000],
    ids=lambda content: repr(content[:8]),
)
def test_what_is_not_the_json_of_a_gallery_is_refused(folder: Path, content: bytes) -> None:
    (folder / FILE).write_bytes(content)
    refusal(folder)


def test_cut_short_anywhere_it_is_refused(folder: Path) -> None:
    content = (folder / FILE).read_bytes()
    for length in range(0, len(content) - 1, 37):
        (folder / FILE).write_bytes(content[:length])
        refusal(folder)


@pytest.mark.slow
def test_any_flipped_bit_is_refused(folder: Path, own_spec: sf.ExtractorSpec) -> None:
    """A row would count again that was removed, an index be searched less well, a shard's number be used twice."""
    content = (folder / FILE).read_bytes()
    with (folder / FILE).open("r+b", buffering=0) as file:  # in place: a file that is cut first waits for the disk
        for place, byte in enumerate(content):
            for bit in range(8):
                file.seek(place)
                file.write(bytes([byte ^ 1 << bit]))
                refusal(folder)
            file.seek(place)
            file.write(bytes([byte]))
    Manifest.read(folder)


def test_a_file_from_before_it_had_a_checksum_is_read(folder: Path, own_spec: sf.ExtractorSpec) -> None:
    edit(folder, lambda values: None)
    assert "xxh3" not in (folder / FILE).read_text().replace('"xxh3": "0123456789abcdef"', "")
    assert Manifest.read(folder) == a_manifest(own_spec)


def test_a_folder_in_its_place_is_refused(folder: Path) -> None:
    (folder / FILE).unlink()
    (folder / FILE).mkdir()
    refusal(folder)


def test_no_gallery_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(GalleryNotFoundError, match=r"expected a gallery \(a folder with gallery.json\)"):
            Manifest.read(path)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_version_names_both(folder: Path, version: object) -> None:
    edit(folder, lambda values: values.update(format_version=version))
    assert f"expected format version 1, found {version}" in refusal(folder)


def leaves(values: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The path of every field, of every kind."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [path] * bool(path) + [leaf for key, value in items for leaf in leaves(value, (*path, key))]


def at(values: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        values = values[key]
    return values


# Where the field may hold None, and where it may be left out, because it has a default.
OPTIONAL = {"index", "keys", "index_options.nlist", "index_options.nprobe", "index_options.train_images"}
OPTIONAL |= {"spec.resized", "spec.crop", "recipe", "index_options.memory", "index.facts.nprobe", "index.facts.recall"}
ALLOWED = [*((None, name) for name in sorted(OPTIONAL)), ("a text", "recipe")]  # a recipe may be a later release's
DEFAULTED = {"recipe", "patches"} | {f"index_options.{field.name}" for field in fields(sf.IndexOptions)}
DEFAULTED |= {f"spec.{field.name}" for field in fields(sf.ExtractorSpec) if field.default is not MISSING}


def test_each_field_of_another_kind_or_missing_is_refused_when_it_is_read(folder: Path) -> None:
    """Not later, in the middle of a search or an append: what is read is used without a second look."""
    edit(folder, lambda values: None)
    content, wrongly = (folder / FILE).read_bytes(), []
    for path in leaves(json.loads(content)):
        if path == ("created_by",):  # free text, only ever shown
            continue
        name = ".".join(map(str, path))
        for wrong in [*WRONG, "left out"]:
            values = json.loads(content)
            parent, value = at(values, path[:-1]), at(values, path)
            if wrong == "left out":
                if isinstance(parent, list) or name in DEFAULTED:
                    continue
                del parent[path[-1]]
            elif (type(wrong) is type(value) and wrong != -1) or (wrong, name) in ALLOWED:
                continue
            else:
                parent[path[-1]] = wrong
            (folder / FILE).write_text(json.dumps(values))
            try:
                Manifest.read(folder)
                wrongly.append(f"{name} = {wrong!r} in place of {value!r}: accepted")
            except CorruptGalleryError as error:
                assert "\n" not in str(error)  # noqa: PT017
            except Exception as error:
                wrongly.append(f"{name} = {wrong!r} in place of {value!r}: {error!r}")
    assert not wrongly, "\n".join(wrongly)


@pytest.mark.parametrize(
    "name",
    [
        "../x.h5",
        "shards/../../x.h5",
        "/etc/passwd",
        "/shards/000000.h5",
        "shards/000000.h5\0",
        "shards/000000.h5\n",
        "shards\\000000.h5",
        "./shards/000000.h5",
        "shards/0.h5",
        "index/image-000007.faiss",
        "",
    ],
)
def test_no_name_leaves_the_folder(folder: Path, name: str) -> None:
    edit(folder, lambda values: values["shards"][0].update(file=name))
    refusal(folder)


@pytest.mark.parametrize("name", ["../{}", "/tmp/{}", "index/{}\0", "index/../{}", "gallery.json"])
@pytest.mark.parametrize(("entry", "file"), [("index", "image-000007.faiss"), ("keys", "keys-000007.npy")])
def test_no_name_of_a_derived_file_leaves_the_folder(folder: Path, entry: str, file: str, name: str) -> None:
    assert json.loads((folder / FILE).read_bytes())[entry]["file"] == f"index/{file}"
    edit(folder, lambda values: values[entry].update(file=name.format(file)))
    refusal(folder)


@pytest.mark.parametrize("removed", [[0, 3], "9", "9000", "94", "00", "9x", "0x90", "9 0", "٩٠", "90\n", "", None])
def test_removed_rows_are_a_bit_for_each_row_of_the_shard(folder: Path, removed: object) -> None:
    """Which for rows 0 and 3 of 5 is 10010000, hexadecimal 90."""

    def change(values: dict[str, Any]) -> None:
        assert values["shards"][0]["removed"] == "90"
        values["shards"][0]["removed"] = removed

    edit(folder, change)
    assert "removed: expected" in refusal(folder) or removed == ""  # "": then the number of images is wrong


@pytest.mark.parametrize("images", [1, 7, 8, 9, 16, 100])
def test_rows_may_be_removed_one_after_another(folder: Path, own_spec: sf.ExtractorSpec, images: int) -> None:
    entry, removed = ShardEntry("shards/000000.h5", images, 90_000), set[int]()
    for row in np.random.default_rng(images).permutation(images).tolist():
        assert [row for row in range(images) if entry.is_removed(row)] == sorted(removed)
        entry = entry.without([row])
        removed.add(row)
        Manifest(own_spec, sf.IndexOptions(), 1, shards=(entry,)).write(folder)
        read = Manifest.read(folder)
        assert (read.shards, read.removed) == ((entry,), len(removed))
        assert np.flatnonzero(entry.removed_mask).tolist() == sorted(removed)


@pytest.mark.parametrize("shards", [1, 10_000])
def test_it_stays_small_with_half_of_a_million_images_removed(
    folder: Path, own_spec: sf.ExtractorSpec, shards: int
) -> None:
    images = 1_000_000 // shards
    entries = [ShardEntry(f"shards/{n:06d}.h5", images, 10**9).without(range(0, images, 2)) for n in range(shards)]
    Manifest(own_spec, sf.IndexOptions(), 1, shards=tuple(entries)).write(folder)
    assert (folder / FILE).stat().st_size < 1.2e6
    assert Manifest.read(folder).removed == 500_000


def test_a_shard_named_twice_is_refused(folder: Path) -> None:
    edit(folder, lambda values: values["shards"][1].update(file="shards/000000.h5"))
    assert "twice" in refusal(folder)


def test_counts_that_contradict_each_other_are_refused(folder: Path) -> None:
    content = (folder / FILE).read_bytes()
    edit(folder, lambda values: values.update(images=8))
    assert "expected 7" in refusal(folder)
    for entry in ("index", "keys"):
        (folder / FILE).write_bytes(content)
        edit(folder, lambda values, entry=entry: values[entry].update(images=10))
        assert "10 images" in refusal(folder)


def test_a_field_of_a_later_release_is_refused_rather_than_ignored(folder: Path) -> None:
    edit(folder, lambda values: values["shards"][0].update(compressed=True))
    assert "compressed" in refusal(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values["shards"][1].update(images=10**12),
        lambda values: values["shards"][1].update(images=10**12, bytes=10**15),
        lambda values: values["spec"].update(image_dim=10**12),
        lambda values: values["spec"].update(level_shapes=[[10**6, 10**3, 10**3]]),
        lambda values: values["spec"].update(image_dim=10**9) or values["shards"][1].update(bytes=10**15),
        lambda values: values["shards"][1].update(images=10**400),
    ],
    ids=["rows", "rows-and-bytes", "image_dim", "level_shapes", "all", "beyond-int64"],
)
def test_no_number_makes_room_that_no_file_fills(folder: Path, change: Edit) -> None:
    def edited(values: dict[str, Any]) -> None:
        before = values["shards"][1]["images"]
        change(values)
        values["images"] += values["shards"][1]["images"] - before

    edit(folder, edited)
    assert "expected" in refusal(folder)


def test_values_nested_without_end_are_refused(folder: Path) -> None:
    (folder / FILE).write_text('{"format": ' + "[" * 100_000 + "]" * 100_000 + "}")
    refusal(folder)
