"""Pull: the gallery at an address becomes a folder, or brings one up to date.

Files come first, each compared with its checksum and published whole. Then gallery.json commits them, as a writer
does. Killed before that, the folder is as it was, and the next pull keeps the files that are there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import xxhash

from ..errors import GalleryError
from ..store.cleanup import sweep
from ..store.create import PARTS
from ..store.locks import HOLDER, READERS, WRITER, WriterLock
from ..store.manifest import FILE, Manifest
from ..system.atomic_files import TEMPORARY, flush_to_disk, storage_errors, whole_file, write_whole
from ..system.progress import progress_bar
from .address import Address
from .bucket import Bucket
from .commit import BESIDE, Commit, StoredObject
from .files import checksum_of, compared, read_commit
from .origins import FILE as ORIGINS
from .origins import LOCK as ORIGINS_LOCK
from .origins import SHARDS, file_at, remember, remembered


@dataclass(frozen=True)
class Pulled:
    """What a pull did.

    Attributes:
        generation: that the folder has now.
        fetched: files.
        fetched_bytes: of these.
        kept: files that were there already.

    Example:
        >>> _ = sf.push("toy.gallery", "memory://bucket/pulled.gallery", replace=True)
        >>> pulled = sf.pull("memory://bucket/pulled.gallery", "pulled.gallery")
        >>> pulled.generation, pulled.fetched, pulled.kept  # a shard, image index, key table
        (2, 3, 0)
    """

    generation: int
    fetched: int
    fetched_bytes: int
    kept: int


def pull(address: str, folder: str | Path, *, timeout: float = 0, progress: bool = False) -> Pulled:
    """Download a gallery from an object store. The same call goes on after an interruption.

    Args:
        address: of the gallery, as s3://bucket/tiles.gallery.
        folder: one that does not exist, or is empty; or the gallery that was pulled from there or pushed there last,
            without a commit since, which moves on to the last generation.
        timeout: seconds to wait for another process that is writing to the folder.
        progress: show a bar where standard error is a terminal.

    Returns:
        what was downloaded.

    Raises:
        GalleryNotFoundError: there is no gallery at that address.
        CorruptGalleryError: an object is missing, cut short or changed.
        GalleryLockedError: another process is writing to the folder.
        GalleryError: the folder has something else, a commit since, or another history of the gallery; the store cannot
            be read, there is no such bucket, or there are no credentials; or the disk is full or refuses.
        OptionError: the scheme is unknown, or its package is not installed.

    Example:
        >>> _ = sf.push("toy.gallery", "memory://bucket/toy.gallery")
        >>> pulled = sf.pull("memory://bucket/toy.gallery", "pulled.gallery")
        >>> sf.Gallery.open("pulled.gallery").keys() == gallery.keys()
        True
    """
    folder, bucket = Path(folder), Bucket(Address(address))
    commit = read_commit(bucket)
    _check_folder(folder)
    with storage_errors(f"cannot write {folder}"):
        for part in PARTS:
            (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / READERS).touch()
        flush_to_disk(folder.parent)
    with WriterLock(folder, timeout):
        there = _what_is_there(folder, bucket, commit)
        _require_same_history(folder, bucket, commit, there, progress)
        fetched = _fetch_all(folder, bucket, commit, there, progress)
        _commit(folder, bucket, commit, there)
        sweep(folder, commit.manifest)
    size, kept = sum(one.bytes for one in fetched), len(commit.files) - len(fetched)
    return Pulled(commit.manifest.generation, len(fetched), size, kept)


def _check_folder(folder: Path) -> None:
    """Refuse a folder with files of something else: a gallery, or the remains of a pull that was killed, are none."""
    if not folder.exists() or (folder / FILE).exists():
        return
    known = {*PARTS, READERS, WRITER, HOLDER, *(file + TEMPORARY for file in (FILE, ORIGINS)), ORIGINS, ORIGINS_LOCK}
    if not folder.is_dir() or {path.name for path in folder.iterdir()} - known:
        raise GalleryError(f"{folder}: expected nothing, an empty folder or a gallery to pull into, found something")


def _what_is_there(folder: Path, bucket: Bucket, commit: Commit) -> dict[str, bytes]:
    """Return the contents of a folder's gallery.json, and of the files beside it, as far as they are there.

    Raises:
        GalleryError: one of them has changed since it was pulled or pushed, and would be lost.
    """
    found, new = {}, commit.checksums()
    for name in (FILE, *BESIDE):
        try:
            found[name] = (folder / name).read_bytes()
        except FileNotFoundError:
            continue
        checksum = xxhash.xxh3_128_hexdigest(found[name])
        if name in new and checksum not in (new[name], *remembered(folder, file_at(name, bucket.address))):
            raise GalleryError(
                f"{folder / name}: expected what was pulled from {bucket.address} or pushed there last, found a "
                "change; pull into another folder, or push this one (replace=True)"
            )
    return found


def _require_same_history(
    folder: Path, bucket: Bucket, commit: Commit, there: dict[str, bytes], progress: bool
) -> None:
    """Refuse a commit that has other content under the name of a file that the folder's gallery.json names.

    The folder's shards are read for that, unless it is known that the commit has just these.

    Raises:
        GalleryError: it has: the gallery at the address was replaced by one that was made apart from the folder's.
    """
    if FILE not in there:
        return
    old, new = Manifest.parse(there[FILE], folder / FILE), commit.manifest
    for one, other in ((old.index, new.index), (old.keys, new.keys)):
        if one and other and one.file == other.file and one.xxh3 != other.xxh3:
            raise _another_history(folder / one.file, bucket)
    if commit.shards_checksum(old) in remembered(folder, file_at(SHARDS, bucket.address)):
        return
    shards = [entry for entry in old.shards if entry.file in commit.objects]
    for entry in progress_bar(shards, "compare", progress, unit="file"):
        if not _may_be(folder / entry.file, entry.bytes, commit.objects[entry.file]):
            raise _another_history(folder / entry.file, bucket)


def _may_be(path: Path, size: int, one: StoredObject) -> bool:
    """Return whether a shard of that size has an object's content; one that is gone or cut short is fetched again."""
    if size != one.bytes:
        return False
    with storage_errors(f"cannot read {path}"):
        return not path.is_file() or path.stat().st_size != size or checksum_of(path) == one.checksum


def _another_history(path: Path, bucket: Bucket) -> GalleryError:
    return GalleryError(
        f"{path}: expected the content that {bucket.address} has under this name, found other content: that is "
        "another history of the gallery, or the file is damaged; pull into another folder"
    )


def _fetch_all(
    folder: Path, bucket: Bucket, commit: Commit, there: dict[str, bytes], progress: bool
) -> list[StoredObject]:
    """Download the files that are not there; returns their objects. Shards never change, so those named are there."""
    known = Manifest.parse(there[FILE], folder / FILE).shards if FILE in there else ()
    named = {one.file for one in known}
    fetched = []
    for file, one in progress_bar(list(commit.files.items()), "pull", progress, unit="file"):
        path = folder / file
        whole = path.is_file() and path.stat().st_size == one.bytes
        if whole and (file in named or checksum_of(path) == one.checksum):
            continue
        with storage_errors(f"cannot write {path}"), whole_file(path) as target:
            for block in compared(bucket, one):
                target.write(block)
        fetched.append(one)
    return fetched


def _commit(folder: Path, bucket: Bucket, commit: Commit, there: dict[str, bytes]) -> None:
    """Put gallery.json and the files beside it in place, and remember where they are from."""
    new = {name: b"".join(compared(bucket, commit.objects[name])) for name in BESIDE if name in commit.objects}
    checksums = commit.checksums()
    for name, content in {FILE: commit.manifest_bytes, **new}.items():
        key = file_at(name, bucket.address)
        remember(folder, key, checksums[name])
        if there.get(name) != content:
            with storage_errors(f"cannot write {folder / name}"):
                write_whole(folder / name, content)
        remember(folder, key, checksums[name], alone=True)
    remember(folder, file_at(SHARDS, bucket.address), commit.shards_checksum(commit.manifest), alone=True)
    remember(folder, str(bucket.address), commit.checksum, alone=True)
