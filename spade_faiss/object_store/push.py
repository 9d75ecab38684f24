"""Push: a gallery's folder becomes the content of an address, in one step at the end.

Objects go up first, each under a name that nobody else uses. Then gallery.json is put in the place of the one that was
there when the push began, or not at all. Killed before that, the old gallery stays as it is, and the next push finds
the objects that are up already.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import xxhash

from ..errors import CorruptGalleryError, GalleryError
from ..options import MIB
from ..store.locks import ReaderLock
from ..store.manifest import FILE, IndexEntry, KeysEntry, Manifest
from ..system.failpoints import failpoint
from ..system.progress import progress_bar
from .address import Address
from .bucket import Bucket, Listed, is_upload_of
from .commit import BESIDE, OBJECT_NAME, OBJECTS, Commit, StoredObject, new_object, rows_of
from .files import checksum_of
from .origins import SHARDS, file_at, remember, remembered
from .rows import rows_content


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        generation: that is there now.
        uploaded: objects.
        uploaded_bytes: of these.
        kept: objects that were there already.
        swept: objects deleted.

    Example:
        >>> pushed = sf.push("toy.gallery", "memory://bucket/pushed.gallery", replace=True)
        >>> pushed.generation, pushed.uploaded, pushed.kept, pushed.swept  # a shard, its rows, image index, key table
        (2, 4, 0, 0)
    """

    generation: int
    uploaded: int
    uploaded_bytes: int
    kept: int
    swept: int


@dataclass(frozen=True)
class _There:
    """What was at the address when the push began."""

    commit: Commit | None = None
    version: str | None = None  # for Bucket.replace
    ours: bool = False  # whether this folder pushed or pulled it
    damaged: bool = False  # nobody knows what it condemned: no object can be relied on

    @cached_property
    def named(self) -> set[str]:
        """The objects that the commit names."""
        return {one.object for one in self.commit.objects.values()} if self.commit else set()


@dataclass
class _Push:
    """A push under way."""

    folder: Path
    bucket: Bucket
    manifest: Manifest
    beside: dict[str, bytes]  # files beside the manifest
    listing: dict[str, Listed]
    there: _There
    check: bool
    uploaded: int = 0
    uploaded_bytes: int = 0
    objects: dict[str, StoredObject] = field(default_factory=dict)

    def upload(self, file: str, content: bytes | Path) -> None:
        """Find the object with a file's content, or make it."""
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        checksum = xxhash.xxh3_128_hexdigest(content) if isinstance(content, bytes) else checksum_of(content)
        name = self._known(file, checksum, size, content)
        if name is None:
            name = new_object(file, checksum)
            self.bucket.upload(name, content)
            failpoint("uploaded", Path(file))
            self.uploaded += 1
            self.uploaded_bytes += size
        self.objects[file] = StoredObject(name, size)

    def _known(self, file: str, checksum: str, size: int, content: bytes | Path) -> str | None:
        """Return the name of an object that has a content; what no commit names is compared with it first."""
        suffix = Path(file).suffix
        condemned = self.there.commit.condemned if self.there.commit else ()
        for name, listed in () if self.there.damaged else self.listing.items():
            found = OBJECT_NAME.fullmatch(name)
            if not found or found[1] != checksum or not name.endswith(suffix) or listed.bytes != size:
                continue
            if name in condemned:
                continue
            if (name in self.there.named and not self.check) or self._has(name, listed, size, content):
                return name
        return None

    def _has(self, name: str, listed: Listed, size: int, content: bytes | Path) -> bool:
        if isinstance(content, Path) and not self.check and is_upload_of(listed, content):
            return True
        checksum = OBJECT_NAME.fullmatch(name)
        digest = xxhash.xxh3_128()
        try:
            for block in self.bucket.stream(name, size):
                digest.update(block)
        except CorruptGalleryError:
            return False
        return checksum is not None and digest.hexdigest() == checksum[1]

    def shard(self, number: int) -> None:
        """Upload a shard and its rows, unless this folder has pushed or pulled them: their names are never reused."""
        entry = self.manifest.shards[number]
        files = entry.file, rows_of(entry.file)
        if self.there.commit and self.there.ours and not self.check:
            known = [self.there.commit.objects.get(file) for file in files]
            there = [one for one in known if one and one.object in self.listing]
            if len(there) == 2 and there[0].bytes == entry.bytes and self._sizes_agree(there):
                self.objects |= dict(zip(files, there, strict=True))
                return
        path = self.folder / entry.file
        self.upload(files[1], rows_content(path, entry, self.manifest.schema))
        self.upload(files[0], path)

    def whole(self, entry: IndexEntry | KeysEntry) -> None:
        """Upload an image index or a key table, which is compared with the manifest first.

        Raises:
            CorruptGalleryError: it is missing or damaged.
        """
        path, digest = self.folder / entry.file, xxhash.xxh3_64()
        try:
            with path.open("rb") as file:
                while block := file.read(MIB):
                    digest.update(block)
        except OSError as error:
            raise CorruptGalleryError(f"{path}: cannot be read: {error.strerror or error}; reindex first") from error
        if digest.hexdigest() != entry.xxh3:
            raise CorruptGalleryError(
                f"{path}: expected checksum {entry.xxh3}, found {digest.hexdigest()}; reindex the gallery first"
            )
        self.upload(entry.file, path)

    def _sizes_agree(self, objects: list[StoredObject]) -> bool:
        return all(self.listing[one.object].bytes == one.bytes for one in objects)

    def unnamed(self) -> tuple[str, ...]:
        """Return the objects that the new commit does not name."""
        named = {one.object for one in self.objects.values()}
        return tuple(name for name in self.listing if OBJECT_NAME.fullmatch(name) and name not in named)


def push(
    folder: str | Path,
    address: str,
    *,
    replace: bool = False,
    check: bool = False,
    sweep: bool = False,
    progress: bool = False,
) -> Pushed:
    """Upload the last generation of a gallery to an object store. The same call goes on after an interruption.

    Args:
        folder: of the gallery.
        address: where to, as s3://bucket/tiles.gallery.
        replace: replace whatever is there, even if another folder has pushed it.
        check: read every object that is there already, and upload those whose content is not what it should be.
        sweep: delete the objects that the new generation does not name. Readers of older ones lose them.
        progress: show a bar where standard error is a terminal.

    Returns:
        what was uploaded.

    Raises:
        GalleryNotFoundError: the folder is no gallery.
        CorruptGalleryError: a file of the gallery is damaged; or what is there is, and `replace` is False.
        GalleryLockedError: another push has replaced gallery.json meanwhile.
        GalleryError: another folder has pushed there, the store cannot be read or written, there is no such bucket, or
            there are no credentials.
        OptionError: the scheme is unknown, or its package is not installed.

    Example:
        >>> sf.push("toy.gallery", "memory://bucket/toy.gallery").generation == gallery.generation
        True
    """
    folder, bucket = Path(folder), Bucket(Address(address))
    with ReaderLock(folder):  # no writer deletes files meanwhile
        manifest = Manifest.read(folder)
        content = (folder / FILE).read_bytes()
        if Manifest.parse(content, folder / FILE) != manifest:
            raise GalleryError(f"{folder}: expected the same generation at two looks, found a commit; push again")
        beside = {name: path.read_bytes() for name in BESIDE if (path := folder / name).is_file()}
        there = _what_is_there(bucket, folder, {FILE: content, **beside}, replace)
        job = _Push(folder, bucket, manifest, beside, bucket.listing(OBJECTS), there, check)
        for step in progress_bar(list(_steps(job)), "push", progress, unit="file"):
            step()
    commit = _put(job, content, sweep)
    swept = _sweep(job, commit) if sweep else 0
    kept = len(job.objects) - job.uploaded
    return Pushed(manifest.generation, job.uploaded, job.uploaded_bytes, kept, swept)


def _what_is_there(bucket: Bucket, folder: Path, contents: dict[str, bytes], replace: bool) -> _There:
    """Return what is at the address.

    Args:
        bucket: the store.
        folder: of the gallery that is pushed.
        contents: of its gallery.json, and of the files beside it.
        replace: whatever it is.

    Raises:
        GalleryError: it is not to be replaced.
    """
    content, version = bucket.read_version(FILE)
    if content is None:
        return _There()
    try:
        before = Commit.parse(content, bucket.address / FILE)
    except CorruptGalleryError:
        if replace:
            return _There(None, version, damaged=True)
        raise
    ours = before.checksum in remembered(folder, str(bucket.address))
    same = before.checksums() == {name: xxhash.xxh3_128_hexdigest(content) for name, content in contents.items()}
    if not (ours or replace or same):
        raise GalleryError(
            f"{bucket.address}: expected what {folder} has pushed or pulled last, found generation "
            f"{before.manifest.generation} from elsewhere; pull that, or replace it (replace=True)"
        )
    return _There(before, version, ours)


def _steps(job: _Push) -> Iterator[Callable[[], None]]:
    """Yield what there is to upload."""
    manifest = job.manifest
    for number in range(len(manifest.shards)):
        yield lambda number=number: job.shard(number)  # type: ignore[misc]
    for entry in (manifest.index, manifest.keys):
        if entry is not None:
            yield lambda entry=entry: job.whole(entry)  # type: ignore[misc]
    for name, content in job.beside.items():
        yield lambda name=name, content=content: job.upload(name, content)  # type: ignore[misc]


def _put(job: _Push, manifest: bytes, sweep: bool) -> Commit:
    """Put gallery.json, unless the same is there."""
    before, address = job.there.commit, str(job.bucket.address)
    still = tuple(name for name in before.condemned if name in job.listing) if before else ()
    # The store compares contents to find out whether somebody has pushed meanwhile, so that none may come again.
    push = secrets.token_hex(8)
    commit = Commit(manifest, job.manifest, job.objects, job.unnamed() if sweep else still, push)
    if before is not None and before.is_same(commit):
        commit = before
    else:
        remember(job.folder, address, commit.checksum)
        failpoint("remembered", Path(FILE))
        job.bucket.replace(FILE, commit.content, job.there.version)
        failpoint("pushed", Path(FILE))
    remember(job.folder, address, commit.checksum, alone=True)
    for name, checksum in {**commit.checksums(), SHARDS: commit.shards_checksum(commit.manifest)}.items():
        remember(job.folder, file_at(name, job.bucket.address), checksum, alone=True)
    return commit


def _sweep(job: _Push, commit: Commit) -> int:
    """Delete what the commit condemns. No push that began since names one of these, and none makes one again."""
    for name in commit.condemned:
        job.bucket.delete([name])
        failpoint("swept", Path(FILE))
    return len(commit.condemned)
