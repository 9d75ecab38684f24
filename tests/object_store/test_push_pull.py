"""Push and pull: what is there afterwards, what is uploaded again, and who may replace what."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

import fsspec
import pytest

import spade_faiss as sf
from spade_faiss.detect.calibration import FILE as CALIBRATION
from spade_faiss.object_store import bucket as buckets
from spade_faiss.object_store import push as pushing
from spade_faiss.object_store.address import Address
from spade_faiss.object_store.bucket import Bucket, Listed, is_upload_of
from spade_faiss.system import failpoints
from tests.helpers.stores import SHARD, N, append, same

OBJECTS = 2 * N // SHARD + 2  # of the gallery: shards and their rows, image index, key table


def objects(address: str) -> dict[str, int]:
    return {name: one.bytes for name, one in Bucket(Address(address)).listing("objects").items()}


def address(scheme: str, folder: Path) -> str:
    """Return where to push to; the server is started for S3 only."""
    return f"file://{folder}/store/tiles.gallery" if scheme == "file" else f"{scheme}://bucket/tiles.gallery"


@pytest.fixture(params=["s3", "memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param in ("s3", "memory"):
        request.getfixturevalue({"s3": "client", "memory": "memory"}[request.param])
    return address(request.param, tmp_path)


def test_what_is_pushed_is_read_and_pulled(gallery: sf.Gallery, url: str, tmp_path: Path) -> None:
    (gallery.path / CALIBRATION).write_text("{}")
    done = sf.push(gallery.path, url)
    assert (done.generation, done.uploaded, done.kept, done.swept) == (gallery.generation, OBJECTS + 1, 0, 0)
    assert sum(objects(url).values()) == done.uploaded_bytes
    with sf.Gallery.open(url, cache=tmp_path / "cache") as opened:
        assert same(gallery, opened)
        assert opened.verify() == []
        assert repr(opened) == repr(gallery).replace(str(gallery.path), url)
        assert opened.info() == {**gallery.info(), "path": url}
        assert opened.file(CALIBRATION).read_text() == "{}"
    pulled = sf.pull(url, tmp_path / "pulled")
    assert (pulled.generation, pulled.fetched, pulled.kept) == (gallery.generation, OBJECTS - N // SHARD, 0)
    files = [
        path.relative_to(gallery.path) for path in gallery.path.rglob("*") if path.suffix in (".h5", ".json", ".npy")
    ]
    for file in files:
        if file.name != "remote.json":
            assert (tmp_path / "pulled" / file).read_bytes() == (gallery.path / file).read_bytes(), file
    assert same(gallery, sf.Gallery.open(tmp_path / "pulled"))


def test_a_second_push_uploads_what_is_new(gallery: sf.Gallery, memory: str, tmp_path: Path) -> None:
    sf.push(gallery.path, memory)
    assert sf.push(gallery.path, memory).uploaded == 0
    with sf.Gallery.open(memory, cache=tmp_path / "cache") as opened:
        before = set(objects(memory))
        append(gallery, N, N + 1)
        gallery.remove(["000"])
        done = sf.push(gallery.path, memory)
        assert (done.uploaded, done.swept) == (4, 0)  # a shard, its rows, image index, key table
        assert before < set(objects(memory))
        assert len(opened) == N  # its generation is still there
        assert opened.read([N - 1])
        opened.refresh()
        assert same(gallery, opened)


def test_sweep_deletes_what_no_manifest_names(gallery: sf.Gallery, memory: str, tmp_path: Path) -> None:
    sf.push(gallery.path, memory)
    gallery.remove(["000"])
    gallery.compact()
    old = set(objects(memory))
    done = sf.push(gallery.path, memory, sweep=True)
    assert done.swept == len(old - set(objects(memory))) == OBJECTS  # all shards were merged
    assert same(gallery, sf.Gallery.open(memory, cache=tmp_path / "cache"))
    assert sf.push(gallery.path, memory, check=True).uploaded == 0


def test_what_another_push_condemned_is_not_used_again(
    gallery: sf.Gallery, memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be deleted at any time, even after this push has named it."""
    sf.push(gallery.path, memory)
    first = gallery.path.rename(tmp_path / "first.gallery")
    with sf.Gallery.create(tmp_path / "other", gallery.spec) as other:
        append(other, 0, 1)
    monkeypatch.setattr(pushing.Bucket, "delete", lambda *_: None)  # the sweep is slow
    sf.push(tmp_path / "other", memory, replace=True, sweep=True)
    condemned = pushing.Commit.parse(Bucket(Address(memory)).read("gallery.json") or b"", Path()).condemned
    assert len(condemned) == OBJECTS
    monkeypatch.undo()
    assert sf.push(first, memory, replace=True).uploaded == OBJECTS
    Bucket(Address(memory)).delete(condemned)
    assert sf.Gallery.open(memory, cache=tmp_path / "cache").verify() == []


def test_a_push_replaces_only_what_its_folder_knows(gallery: sf.Gallery, memory: str, tmp_path: Path) -> None:
    url = memory
    sf.push(gallery.path, url)
    sf.pull(url, tmp_path / "other")
    with sf.Gallery.open(tmp_path / "other") as other:
        append(other, N, N + 1)
    sf.push(tmp_path / "other", url)
    append(gallery, N + 1, N + 2)
    with pytest.raises(sf.GalleryError, match=r"found generation \d+ from elsewhere; pull that, or replace it"):
        sf.push(gallery.path, url)
    with pytest.raises(sf.GalleryError, match="generation that was pulled"):
        sf.pull(url, gallery.path)
    assert same(sf.Gallery.open(url, cache=tmp_path / "cache"), sf.Gallery.open(tmp_path / "other"))
    # Both have a shard of one number, with other images in it.
    sf.push(gallery.path, url, replace=True)
    assert same(sf.Gallery.open(url, cache=tmp_path / "cache"), gallery)


def test_a_pulled_gallery_moves_on(gallery: sf.Gallery, memory: str, tmp_path: Path) -> None:
    sf.push(gallery.path, memory)
    sf.pull(memory, tmp_path / "pulled")
    append(gallery, N, N + 1)
    gallery.remove(["003"])
    sf.push(gallery.path, memory)
    moved = sf.pull(memory, tmp_path / "pulled")
    assert (moved.fetched, moved.kept) == (3, N // SHARD)  # shard, image index, key table
    with sf.Gallery.open(tmp_path / "pulled") as pulled:
        assert same(pulled, gallery)
        assert sorted(path.name for path in (tmp_path / "pulled/index").iterdir()) == sorted(
            path.name for path in (gallery.path / "index").iterdir()
        )
        append(pulled, N + 1, N + 2)
    assert sf.push(tmp_path / "pulled", memory).uploaded == 4


def test_two_pushes_at_once_do_not_mix(
    gallery: sf.Gallery, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sf.Gallery.create(tmp_path / "other", gallery.spec) as other:
        append(other, 0, 2)

    def first(step: str) -> None:
        if step == "remembered gallery.json":
            monkeypatch.setattr(failpoints, "action", None)
            sf.push(tmp_path / "other", url)

    for folder, there in ((gallery.path, None), (gallery.path, "again")):
        if there:  # a gallery to replace, rather than none
            sf.push(gallery.path, url, replace=True)
            append(gallery, N, N + 1)
            monkeypatch.setattr(pushing, "_what_is_there", _without_refusal)
        monkeypatch.setattr(failpoints, "action", first)
        with pytest.raises(sf.GalleryLockedError, match=r"gallery.json: expected what was there when this push began"):
            sf.push(folder, url)
        assert same(sf.Gallery.open(url, cache=tmp_path / "cache"), sf.Gallery.open(tmp_path / "other"))


def _without_refusal(*arguments: Any, really: Any = pushing._what_is_there) -> Any:
    return really(*arguments[:-1], True)


def test_an_answer_that_was_lost(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A retry of the client finds its own object, which is no other push."""
    there = Bucket(Address("s3://bucket/tiles.gallery"))
    files = there._filesystem()
    put = files.pipe_file

    def twice(*args: Any, **kwargs: Any) -> None:
        put(*args, **kwargs)
        put(*args, **kwargs)

    monkeypatch.setattr(files, "pipe_file", twice)
    there.replace("gallery.json", b"1", None)
    assert there.read_version("gallery.json")[0] == b"1"


def test_objects_that_are_there_are_compared(gallery: sf.Gallery, client: Any, tmp_path: Path) -> None:
    """A leftover counts only with its content, whatever its name says."""
    url = "s3://bucket/tiles.gallery"
    sf.push(gallery.path, url)
    keys = [one["Key"] for one in client.list_objects_v2(Bucket="bucket")["Contents"]]
    client.delete_object(Bucket="bucket", Key="tiles.gallery/gallery.json")
    shards = sorted(key for key in keys if key.endswith(".h5"))
    whole = client.get_object(Bucket="bucket", Key=shards[0])["Body"].read()
    client.put_object(Bucket="bucket", Key=shards[0], Body=whole[:-1])
    client.put_object(Bucket="bucket", Key=shards[1], Body=bytes(len(whole)))
    assert sf.push(gallery.path, url).uploaded == 2
    assert sf.Gallery.open(url, cache=tmp_path / "cache").verify() == []


def test_check_uploads_again_what_has_changed(gallery: sf.Gallery, memory: str, tmp_path: Path) -> None:
    sf.push(gallery.path, memory)
    files = fsspec.filesystem("memory")
    [shard, *_] = [name for name in files.find("/bucket") if name.endswith(".h5")]
    files.pipe_file(shard, bytes(files.size(shard)))
    opened = sf.Gallery.open(memory, cache=tmp_path / "cache")
    [problem] = opened.verify()
    assert "it has changed; push the gallery again (check=True)" in problem.message
    assert sf.push(gallery.path, memory).uploaded == 0
    assert sf.push(gallery.path, memory, check=True).uploaded == 1
    opened.refresh()
    assert opened.verify() == []


def test_etag_of_an_upload_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: Any) -> None:
    monkeypatch.setattr(buckets, "PART", 5 * 2**20)  # S3 takes no smaller ones
    file = tmp_path / "file"
    store = Bucket(Address("s3://bucket/tiles.gallery"))
    for size in (1, 12 * 2**20):
        file.write_bytes(bytes(size))
        store.upload("objects/some", file)
        [listed] = store.listing("objects").values()
        assert ("-" in listed.etag) == (size > 1)
        assert is_upload_of(listed, file)
        file.write_bytes(b"1" + bytes(size - 1))
        assert not is_upload_of(listed, file)
    assert not is_upload_of(Listed(size, hashlib.sha256().hexdigest()), file)


def test_a_damaged_shard_is_not_pushed(gallery: sf.Gallery, memory: str) -> None:
    path = gallery.path / "shards/000001.h5"
    content = bytearray(path.read_bytes())
    at = content.find(gallery.read([SHARD])[0][0].tobytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(sf.CorruptGalleryError, match=r"found image '004' damaged; repair it first"):
        sf.push(gallery.path, memory)
    assert Bucket(Address(memory)).read("gallery.json") is None


@pytest.mark.parametrize("what", ["damaged", "gone"])
def test_a_damaged_index_is_not_pushed(gallery: sf.Gallery, memory: str, what: str) -> None:
    [path] = gallery.path.glob("index/*.faiss")
    content = path.read_bytes()
    path.unlink()
    if what == "damaged":
        path.write_bytes(content[:-1] + b"?")
    with pytest.raises(sf.CorruptGalleryError, match=r"image-\d+.faiss: .*; reindex"):
        sf.push(gallery.path, memory)


def test_nothing_is_relied_on_beside_a_damaged_commit(gallery: sf.Gallery, memory: str, tmp_path: Path) -> None:
    """It may have condemned objects, which a sweep is about to delete."""
    sf.push(gallery.path, memory)
    old = objects(memory)
    fsspec.filesystem("memory").pipe_file("/bucket/tiles.gallery/gallery.json", b"{}")
    assert sf.push(gallery.path, memory, replace=True).uploaded == OBJECTS
    Bucket(Address(memory)).delete(list(old))
    assert sf.Gallery.open(memory, cache=tmp_path / "cache").verify() == []


def test_readers_keep_their_files_while_a_push_reads_them(
    gallery: sf.Gallery, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery.close()

    def compact(step: str) -> None:
        monkeypatch.setattr(failpoints, "action", None)
        with sf.Gallery.open(gallery.path) as other:
            other.remove(["000"])
            other.compact()

    monkeypatch.setattr(failpoints, "action", compact)
    sf.push(gallery.path, memory)
    assert threading.active_count() < 50
