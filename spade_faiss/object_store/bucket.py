"""Objects under one address: listed, read, uploaded, replaced under a condition. All of fsspec is behind this face.

A failure becomes one line. Credentials and endpoints come from where the store's own tools take them: for S3 the
environment (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL, ...) and ~/.aws, or fsspec's configuration.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import xxhash

from ..errors import CorruptGalleryError, GalleryError, GalleryLockedError, OptionError, first_line
from ..options import MIB
from ..system.atomic_files import write_whole
from ..system.forks import free_at_forks, remember
from .address import SCHEME, Address

PART = 64 * MIB  # of an upload in parts; an object below twice that goes in one
UPLOADS = 4  # parts in flight: with those, 256 MiB in memory
CONNECTIONS = 32  # at a time: an object store answers each in tens of milliseconds, and many at once
BLOCK = 16 * MIB  # of an object that is read in a stream
S3 = ("s3", "s3a")
PACKAGES = {  # by other schemes: what to install, which brings fsspec along
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), "adlfs"),
    **dict.fromkeys(("http", "https"), "fsspec[http]"),
    **dict.fromkeys(("sftp", "ssh"), "fsspec[sftp]"),
    **dict.fromkeys(("smb",), "fsspec[smb]"),
    **dict.fromkeys(("hdfs", "arrow_hdfs"), "fsspec[arrow]"),
    **dict.fromkeys(("hf",), "huggingface_hub"),
    **dict.fromkeys(("oss",), "ossfs"),
}
PUSH_AGAIN = "push the gallery again (check=True)"
LOCK = "push.lock"  # beside gallery.json, where the store is a folder

_memory_lock = free_at_forks(threading.Lock())
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError")
_CHANGED = ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey")  # answers to a conditional put


@dataclass(frozen=True)
class Listed:
    """An object as the store lists it."""

    bytes: int
    etag: str = ""  # of S3: MD5 of an object that came in one part, MD5 of the parts' MD5s and their number otherwise


class Bucket:
    """The objects under an address. Threads may share one, and a forked process may go on with its parent's."""

    def __init__(self, address: Address) -> None:
        """Reach a store.

        Raises:
            OptionError: it names no place in a store; or the scheme is unknown, or its package is not installed.
        """
        found = SCHEME.match(str(address))
        if found is None or not str(address)[found.end() :].strip("/"):
            raise OptionError(f"expected an address as s3://bucket/tiles.gallery, found {str(address)!r}")
        self.address = address
        self.scheme = found[1].lower()
        self.fetched = 0  # bytes
        self.requests = 0  # that fetched them
        self._fs: Any = None
        self._lock = threading.Lock()
        remember(self)
        self._root = str(self._filesystem()._strip_protocol(str(address))).rstrip("/")

    def after_fork(self) -> None:
        """Let go of the connections, which belong to a thread of the parent."""
        self._fs, self._lock = None, threading.Lock()

    def _filesystem(self) -> Any:
        with self._lock:
            if self._fs is None:
                self._fs = _filesystem(self.scheme, self.address)
            return self._fs

    def read(self, name: str) -> bytes | None:
        """Read a whole object; None: there is none."""
        with self._errors(f"cannot read {self.address / name}"):
            try:
                content: bytes = self._filesystem().cat_file(f"{self._root}/{name}")
            except FileNotFoundError as error:
                if "bucket does not exist" in str(error):
                    raise
                return None
        self._count(len(content), 1)
        return content

    def read_version(self, name: str) -> tuple[bytes | None, str | None]:
        """Read a whole object and what tells it from a later one, for `replace`; (None, None): there is none."""
        version = None
        if self.scheme in S3:  # asked for before the content: a replacement in between makes `replace` refuse
            with self._errors(f"cannot read {self.address / name}"), contextlib.suppress(FileNotFoundError):
                version = self._filesystem().info(f"{self._root}/{name}", refresh=True).get("ETag")
        content = self.read(name)
        if content is None:
            return None, None
        return content, version or xxhash.xxh3_128_hexdigest(content)

    def stream(self, name: str, size: int) -> Iterator[bytes]:
        """Read an object in blocks.

        Raises:
            CorruptGalleryError: it is not there, or has another size.
        """
        with self._errors(f"cannot read {self.address / name}"):
            try:
                found = int(self._filesystem().info(f"{self._root}/{name}")["size"])
            except FileNotFoundError as error:
                raise self._vanished(name) from error
        if found != size:
            raise CorruptGalleryError(f"{self.address / name}: expected {size} bytes, found {found}; {PUSH_AGAIN}")
        for start in range(0, size, BLOCK):
            yield self.ranges([(name, start, min(BLOCK, size - start))])[0]

    def ranges(self, wanted: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Read (object, first byte, number of bytes), many at once.

        Raises:
            CorruptGalleryError: an object is not there, or ends before its range does.
            GalleryError: the store cannot be read.
        """
        paths = [f"{self._root}/{name}" for name, _, _ in wanted]
        starts, ends = [start for _, start, _ in wanted], [start + size for _, start, size in wanted]
        with self._errors(f"cannot read {self.address}"):
            found = self._filesystem().cat_ranges(paths, starts, ends, on_error="return")
        for at, (name, start, size) in enumerate(wanted):
            error = found[at]
            if isinstance(error, FileNotFoundError):
                raise self._vanished(name) from error
            if isinstance(error, BaseException):
                if not _past_end(error):
                    with self._errors(f"cannot read {self.address / name}"):
                        raise error
                found[at] = b""
            if len(found[at]) != size:
                raise CorruptGalleryError(
                    f"{self.address / name}: expected {size} bytes at {start}, found {len(found[at])}; {PUSH_AGAIN}"
                )
        self._count(sum(map(len, found)), len(found))
        return list(found)

    def _vanished(self, name: str) -> CorruptGalleryError:
        return CorruptGalleryError(
            f"{self.address / name}: expected an object, found none; if the gallery was pushed and swept since it was "
            f"opened, open it again; else {PUSH_AGAIN}"
        )

    def _count(self, size: int, requests: int) -> None:
        with self._lock:
            self.fetched += size
            self.requests += requests

    def listing(self, folder: str) -> dict[str, Listed]:
        """Return the objects below a folder, by name."""
        fs = self._filesystem()
        with self._errors(f"cannot list {self.address / folder}"):
            fs.invalidate_cache()
            found = fs.find(f"{self._root}/{folder}", detail=True)
        start = len(self._root) + 1
        return {
            name[start:]: Listed(int(facts["size"]), str(facts.get("ETag", "")).strip('"'))
            for name, facts in found.items()
        }

    def upload(self, name: str, content: bytes | Path) -> None:
        """Make an object of bytes or of a file, under a name that nobody else uses."""
        path = f"{self._root}/{name}"
        with self._errors(f"cannot write {self.address / name}"):
            self._make_folder(path)
            if isinstance(content, bytes):
                self._filesystem().pipe_file(path, content)
            elif self.scheme in S3:
                self._filesystem().put_file(str(content), path, chunksize=PART, max_concurrency=UPLOADS)
            else:
                self._filesystem().put_file(str(content), path)

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects, if they are there."""
        for name in names:
            with self._errors(f"cannot delete {self.address / name}"), contextlib.suppress(FileNotFoundError):
                self._filesystem().rm_file(f"{self._root}/{name}")

    def replace(self, name: str, content: bytes, version: str | None) -> None:
        """Put an object in the place of the one that read_version returned.

        S3 compares them in one step (If-Match, If-None-Match), a folder under a lock, memory under a lock of this
        process. Other stores are read first: of two that replace at the same instant the later one wins.

        Raises:
            GalleryLockedError: another one is there now.
        """
        path = f"{self._root}/{name}"
        changed = GalleryLockedError(
            f"{self.address / name}: expected what was there when this push began, found that another push has "
            "replaced it; pull it, or push again"
        )
        with self._errors(f"cannot write {self.address / name}"):
            if self.scheme in S3:
                match = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
                try:
                    self._filesystem().pipe_file(path, content, **match)
                except (OSError, ValueError) as error:
                    if self.read(name) == content:  # it was put, the answer was lost, and a retry was refused
                        return
                    raise (changed if _code(error) in _CHANGED else error) from error
                return
            self._make_folder(path)
            with self._alone():
                if self.read_version(name)[1] != version:
                    raise changed
                if self.scheme in ("file", "local"):
                    write_whole(Path(path), content)
                else:
                    self._filesystem().pipe_file(path, content)

    def _alone(self) -> contextlib.AbstractContextManager[Any]:
        if self.scheme in ("file", "local"):
            return filelock.FileLock(f"{self._root}/{LOCK}")
        return _memory_lock if self.scheme == "memory" else contextlib.nullcontext()

    def _make_folder(self, path: str) -> None:
        if self.scheme in ("file", "local", "memory"):  # others have no folders; making one could make a bucket
            self._filesystem().makedirs(path.rpartition("/")[0], exist_ok=True)

    @contextlib.contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        """Raise what any store raises as one line."""
        try:
            yield
        except GalleryError:
            raise
        except Exception as error:  # each store has its own tree of errors
            cause = first_line(error)
            if type(error).__name__ in _NO_CREDENTIALS:
                advice = "; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            elif isinstance(error, PermissionError):
                advice = "; check the credentials and what they allow"
            elif isinstance(error, FileNotFoundError):
                advice = "; make the bucket first, or check its name"
            else:
                advice = ""
            raise GalleryError(f"{doing}: {cause.rstrip('.')}{advice}") from error


def is_upload_of(listed: Listed, path: Path) -> bool:
    """Return whether an object's ETag says that its content is a file's; False: it is not, or the ETag is no MD5."""
    if len(listed.etag) != 32 and "-" not in listed.etag:
        return False
    size = path.stat().st_size
    with path.open("rb") as file:
        parts = [hashlib.md5(part, usedforsecurity=False) for part in iter(lambda: file.read(PART), b"")]
        if size < 2 * PART:
            file.seek(0)
            return listed.etag == hashlib.md5(file.read(), usedforsecurity=False).hexdigest()
    whole = hashlib.md5(b"".join(part.digest() for part in parts), usedforsecurity=False)
    return listed.etag == f"{whole.hexdigest()}-{len(parts)}"


def _filesystem(scheme: str, address: Address) -> Any:
    try:
        import fsspec

        options: dict[str, Any] = {}
        if scheme in S3:
            options = {"config_kwargs": {"max_pool_connections": CONNECTIONS}, "use_listings_cache": False}
        return fsspec.filesystem(scheme, **options)
    except ImportError as error:
        package = "spade-faiss[s3]" if scheme in S3 else PACKAGES.get(scheme)
        if package is None and getattr(error, "name", None) == "fsspec":
            package = "fsspec"
        advice = "install the package that this names" if package is None else f"pip install '{package}'"
        raise OptionError(
            f"{address}: expected a package that reads {scheme}, found none ({first_line(error)}); {advice}"
        ) from error
    except ValueError as error:
        raise OptionError(
            f"{address}: expected a scheme that fsspec knows, as s3, found {scheme!r} ({first_line(error)})"
        ) from error


def _code(error: BaseException) -> str:
    """Return the code of S3's answer, if there is one."""
    response = getattr(error.__cause__, "response", None)
    return str(response["Error"].get("Code", "")) if isinstance(response, dict) and "Error" in response else ""


def _past_end(error: BaseException) -> bool:
    return _code(error) == "InvalidRange" or "range is not satisfiable" in str(error).lower()
