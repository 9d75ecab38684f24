"""What can be wrong with a store, an object or a cache: one line each."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import xxhash

import spade_faiss as sf
from spade_faiss.object_store import bucket as buckets
from spade_faiss.object_store.address import Address, is_address
from spade_faiss.object_store.commit import Commit
from spade_faiss.service.settings import named_galleries
from spade_faiss.store.manifest import CHECKSUM, END
from tests.helpers.command_line import Spade

URL = "s3://bucket/tiles.gallery"


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_no_bucket_and_no_gallery(gallery: sf.Gallery, client: Any, tmp_path: Path) -> None:
    with pytest.raises(
        sf.GalleryNotFoundError, match=r"s3://bucket/tiles.gallery: expected a gallery, found no object"
    ):
        sf.Gallery.open(URL, cache=tmp_path)
    for call in (lambda url: sf.Gallery.open(url, cache=tmp_path), lambda url: sf.push(gallery.path, url)):
        with pytest.raises(sf.GalleryError, match="bucket does not exist; make the bucket first") as error:
            call("s3://other/tiles.gallery")
        one_line(error)
    with pytest.raises(sf.GalleryNotFoundError, match="expected a gallery"):
        sf.push(tmp_path, URL)


def test_no_credentials(client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(sf.GalleryError, match="credentials; set AWS_ACCESS_KEY_ID") as error:
        sf.Gallery.open(URL, cache=tmp_path)
    one_line(error)
    fsspec.filesystem("s3").clear_instance_cache()


def test_denied(client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = buckets.Bucket(Address(URL))

    def deny(*_: Any, **__: Any) -> None:
        raise PermissionError("Access Denied.")

    monkeypatch.setattr(store._filesystem(), "find", deny)
    with pytest.raises(sf.GalleryError, match=r"cannot list .*: Access Denied; check the credentials"):
        store.listing("objects")


def test_schemes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(sf.OptionError, match="expected a scheme that fsspec knows, as s3, found 'nothing'"):
        sf.Gallery.open("nothing://bucket/tiles.gallery", cache=tmp_path)
    really = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "fsspec":
            raise ModuleNotFoundError("No module named 'fsspec'", name="fsspec")
        return really(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(sf.OptionError, match=r"No module named 'fsspec'\); pip install 'spade-faiss\[s3\]'"):
        sf.Gallery.open(URL, cache=tmp_path)


def test_addresses() -> None:
    assert is_address("s3://b/g")
    assert not any(map(is_address, ["C:\\g", "C://g", "/a//b", "s3:/b/g", Path("s3://b/g"), 3, None]))
    assert str(Address("s3://b/g") / "shards" / "0.h5") == "s3://b/g/shards/0.h5"
    assert str(Address(str(Address("file:///b/g")))) == "file:///b/g"


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """Return an edit of gallery.json that mends its checksum."""

    def edit(content: bytes) -> bytes:
        values = json.loads(content)
        del values["xxh3"]
        change(values)
        body = json.dumps(values, indent=1)[:-2].encode()
        return body + CHECKSUM + xxhash.xxh3_64_hexdigest(body).encode() + END

    return edit


def with_file(name: Any) -> Callable[[bytes], bytes]:
    """Return an edit of gallery.json that adds a file: one of the objects, under a name of its own."""
    return edited(lambda values: values["objects"].append({**values["objects"][0], "file": name}))


def newer_gallery(values: dict[str, Any]) -> None:
    inner = json.loads(values["manifest"])
    values["manifest"] = json.dumps({**inner, "format_version": 2})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda content: content[:-9], "damaged or edited"),
        (lambda content: content.replace(b'"condemned": []', b'"condemned": [] '), "not what was pushed"),
        (lambda _: b"{}", "upload galleries with push"),
        (lambda _: b"[" * 100_000, "damaged or edited"),
        (edited(lambda values: values.update(format_version=2)), "expected format version 1, found 2; open it with"),
        (edited(newer_gallery), "expected format version 1, found 2"),
        (edited(lambda values: values["objects"].pop()), "expected an object of .* bytes, found none"),
        (edited(lambda values: values["objects"][0].update(object="objects/../../etc")), "is no name of an object"),
        (edited(lambda values: values["objects"][1].update(bytes=1)), "found one of 1"),
        (edited(lambda values: values["objects"][1].update(bytes=-1)), "damaged or edited"),
        (edited(lambda values: values["objects"].pop(0)), "000000.rows: expected an object, found none"),
        (with_file("../outside"), r"gallery's own files, found one of '\.\./outside'; push it again"),
        (with_file("shards/000009.h5"), "found one of 'shards/000009.h5'"),
        (with_file("shards/000009.rows"), "found one of 'shards/000009.rows'"),
        (with_file("a\nb"), r"found one of 'a\\nb'"),
        (with_file(5), "found one of 5"),
    ],
)
def test_a_gallery_json_that_is_not_whole(
    gallery: sf.Gallery, memory: str, tmp_path: Path, edit: Callable[[bytes], bytes], message: str
) -> None:
    sf.push(gallery.path, memory)
    files = fsspec.filesystem("memory")
    name = "/bucket/tiles.gallery/gallery.json"
    files.pipe_file(name, edit(files.cat_file(name)))
    for call in (lambda: sf.Gallery.open(memory, cache=tmp_path), lambda: sf.push(gallery.path, memory)):
        with pytest.raises(sf.CorruptGalleryError, match=message) as error:
            call()
        assert one_line(error).startswith(f"{memory}/gallery.json: ")
    sf.push(gallery.path, memory, replace=True)
    assert sf.Gallery.open(memory, cache=tmp_path).verify() == []


@pytest.mark.parametrize("name", ["../outside.h5", "{}/outside.h5", "shards/../../outside.h5", "outside.h5"])
def test_no_file_is_pulled_to_another_place(gallery: sf.Gallery, memory: str, tmp_path: Path, name: str) -> None:
    sf.push(gallery.path, memory)
    files = fsspec.filesystem("memory")
    there = "/bucket/tiles.gallery/gallery.json"
    files.pipe_file(there, with_file(name.format(tmp_path))(files.cat_file(there)))
    before = set(tmp_path.rglob("*"))
    with pytest.raises(sf.CorruptGalleryError, match=r"found one of '.*outside\.h5'") as error:
        sf.pull(memory, tmp_path / "pulled")
    one_line(error)
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("scheme", "what", "message"),
    [
        ("s3", "cut", "expected .* bytes.*, found"),
        ("memory", "changed", "checksum|it has changed"),
        ("s3", "gone", "found none; if the"),
    ],
)
def test_an_object_that_is_not_what_was_pushed(
    gallery: sf.Gallery, request: pytest.FixtureRequest, tmp_path: Path, scheme: str, what: str, message: str
) -> None:
    request.getfixturevalue({"s3": "client", "memory": "memory"}[scheme])
    url = f"{scheme}://bucket/tiles.gallery"
    sf.push(gallery.path, url)
    opened = sf.Gallery.open(url, cache=tmp_path / "cache")
    objects = Commit.parse(buckets.Bucket(Address(url)).read("gallery.json") or b"", Path()).objects
    files = buckets.Bucket(Address(url))._filesystem()
    calls = {
        "shards/000000.rows": lambda: opened.keys([0]),
        "shards/000001.h5": lambda: opened.read([6]),
        "shards/000000.h5": lambda: sf.pull(url, tmp_path / "pulled"),
    }
    for file, call in calls.items():
        name = f"bucket/tiles.gallery/{objects[file].object}"
        content = files.cat_file(name)
        if what == "gone":
            files.rm_file(name)
        else:
            files.pipe_file(name, content[:100] if what == "cut" else bytes(len(content)))
        with pytest.raises(sf.CorruptGalleryError, match=message) as error:
            call()
        assert url in one_line(error)
        assert scheme == "s3" or len(opened.verify()) == 1
        files.pipe_file(name, content)
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_a_cache_that_cannot_be_written(
    gallery: sf.Gallery, memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sf.push(gallery.path, memory)
    (tmp_path / "file").touch()
    with pytest.raises(sf.GalleryError, match=r"cannot write to the cache .*file \(cache=FOLDER\)"):
        sf.Gallery.open(memory, cache=tmp_path / "file")
    opened = sf.Gallery.open(memory, cache=tmp_path / "cache")
    really = Path.open

    def full(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.suffix == ".tmp":
            raise OSError(28, "")
        return really(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(sf.GalleryError, match="No space left on device; free some space") as error:
        opened.keys()
    one_line(error)
    monkeypatch.setenv("SPADE_FAISS_CACHE", str(tmp_path / "named"))
    sf.Gallery.open(memory)
    assert (tmp_path / "named").is_dir()


def test_a_folder_to_pull_into_that_is_something_else(gallery: sf.Gallery, memory: str, tmp_path: Path) -> None:
    sf.push(gallery.path, memory)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/letter.txt").touch()
    for path in (tmp_path / "full", tmp_path / "full/letter.txt"):
        with pytest.raises(sf.GalleryError, match="expected nothing, an empty folder or a gallery"):
            sf.pull(memory, path)
    (gallery.path / "remote.json").write_text("[")  # without it, the same gallery is known by its content
    assert sf.push(gallery.path, memory).uploaded == 0


def test_commands(gallery: sf.Gallery, memory: str, tmp_path: Path, spade: Spade) -> None:
    done = spade("push", gallery.path, memory, "--json")
    assert json.loads(done.out)["uploaded"] == 6
    assert "0 objects uploaded (0.0 MiB), 6 there already, 0 swept" in spade("push", gallery.path, memory).out
    cache = ("--cache", tmp_path / "cache", "--cache-size", "1MB")
    assert json.loads(spade("info", memory, "--json", *cache).out)["images"] == 8
    assert "8 images checked, 0 problems" in spade("verify", memory, *cache).out
    assert "4 files downloaded" in spade("pull", memory, tmp_path / "pulled").out
    writing = (
        ["add", memory, tmp_path],
        ["remove", memory, "000"],
        ["compact", memory],
        ["reindex", memory],
        ["calibrate", memory],
    )
    for command in (*writing, ["verify", memory, "--repair"], ["build", memory, tmp_path], ["push", memory, memory]):
        run = spade(*command)
        assert (run.status, "read only; pull the gallery" in run.error) == (1, True), command
    assert "to write" not in spade("evaluate", memory, tmp_path).error  # which only reads
    run = spade("info", memory, "--cache", tmp_path / "small", "--cache-size", "1kB")
    assert "raise it (--cache-size SIZE)" in run.error
    assert "expected an address, as s3://" in spade("push", gallery.path, tmp_path / "there").error


def test_what_does_not_serve_a_store_says_so() -> None:
    with pytest.raises(sf.GalleryError, match=r"s3://bucket/tiles.gallery: expected a folder"):
        named_galleries((f"tiles={URL}",))


def test_a_query_by_command(
    toy_gallery: sf.Gallery, image_folder: Path, memory: str, tmp_path: Path, spade: Spade
) -> None:
    sf.push(toy_gallery.path, memory)
    [image, *_] = sorted(image_folder.rglob("*.png"))
    options = ("-k", 2, "--json", "--quiet", "--cache", tmp_path / "cache", "--output")
    found = [
        json.loads(spade("query", place, image, *options, tmp_path / name).out)
        for name, place in (("disk", toy_gallery.path), ("store", memory))
    ]
    for one in found:
        del one["seconds"]
    assert found[0] == found[1]
    assert json.loads((tmp_path / "store/run.json").read_text())["gallery"] == memory
    assert "Query against tiles.gallery" in (tmp_path / "store/report.html").read_text()
    audited = spade("audit", memory, "-k", 2, "--json", "--quiet", "--cache", tmp_path / "cache")
    assert len(audited.out.splitlines()) == len(toy_gallery)


@pytest.mark.parametrize(
    ("scheme", "missing", "advice"),
    [
        ("s3", "s3fs", "pip install 'spade-faiss[s3]'"),
        ("s3a", "aiobotocore", "pip install 'spade-faiss[s3]'"),
        ("gs", "gcsfs", "pip install 'gcsfs'"),
        ("abfs", "adlfs", "pip install 'adlfs'"),
        ("sftp", "paramiko", "pip install 'fsspec[sftp]'"),
        ("dropbox", "dropboxdrivefs", "install the package that this names"),
        ("dropbox", "fsspec", "pip install 'fsspec'"),
    ],
)
def test_a_package_that_is_missing_is_one_that_exists(
    monkeypatch: pytest.MonkeyPatch, scheme: str, missing: str, advice: str
) -> None:
    def without(*_: Any, **__: Any) -> None:
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(fsspec, "filesystem", without)
    with pytest.raises(sf.OptionError) as caught:
        buckets.Bucket(Address(f"{scheme}://bucket/tiles.gallery"))
    assert str(caught.value).endswith(f"found none (No module named {missing!r}); {advice}")


@pytest.mark.parametrize("address", ["s3://", "s3:///", "memory://", "file://", "file:///", "http://", "gs:////"])
def test_an_address_without_a_place(gallery: sf.Gallery, tmp_path: Path, address: str) -> None:
    for use in (
        sf.Gallery.open,
        lambda place: sf.push(gallery.path, place),
        lambda place: sf.pull(place, tmp_path / "p"),
    ):
        with pytest.raises(sf.OptionError, match=r"expected an address as s3://bucket/tiles\.gallery, found"):
            use(address)
