"""gallery.json of a gallery in an object store: the gallery's manifest, and the object that each of its files is.

An object's name holds the xxh3-128 of its content and a random number. It is written once and never again, so that
neither another gallery's history nor a push at the same time can change what a commit names.
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from ..errors import CorruptGalleryError
from ..index.metadata import checked_count
from ..store.manifest import CHECKSUM, END, Manifest

FILE = "gallery.json"
FORMAT = "spade-faiss gallery in an object store"
FORMAT_VERSION = 1
OBJECTS = "objects"
BESIDE = ("calibration.json", "trusted.json")  # files beside the manifest, which change without a commit
ROWS = ".rows"  # what a shard holds besides levels, as an object of its own
SUFFIX = r"\.(?:h5|rows|faiss|npy|json)"
OBJECT_NAME = re.compile(OBJECTS + r"/([0-9a-f]{32})-[0-9a-f]{8}" + SUFFIX)


def rows_of(shard: str) -> str:
    """Return the name of a shard's rows, beside that of the shard: shards/000000.rows."""
    return str(PurePosixPath(shard).with_suffix(ROWS))


def new_object(file: str, checksum: str) -> str:
    """Return a name that no object has, for the content of a gallery's file."""
    return f"{OBJECTS}/{checksum}-{secrets.token_hex(4)}{PurePosixPath(file).suffix}"


@dataclass(frozen=True)
class StoredObject:
    """The object that a file of the gallery is."""

    object: str  # its name
    bytes: int

    @property
    def checksum(self) -> str:
        """xxh3-128 of its content, 32 hexadecimal digits."""
        return self.object[len(OBJECTS) + 1 :][:32]

    @property
    def local_name(self) -> str:
        """Its name in a local cache."""
        return self.checksum + PurePosixPath(self.object).suffix


@dataclass(frozen=True)
class Commit:
    """One generation of a gallery in an object store."""

    manifest_bytes: bytes  # gallery.json of the gallery, as it is in the folder
    manifest: Manifest
    objects: dict[str, StoredObject]  # by the file that each is
    condemned: tuple[str, ...] = ()  # objects that may be deleted at any time: no later commit names one
    push: str = ""  # a random number, so that no content ever comes again; earlier releases wrote none

    @cached_property
    def content(self) -> bytes:
        """The bytes of this commit."""
        head = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "manifest": self.manifest_bytes.decode(),
            "condemned": list(self.condemned),
            **({"push": self.push} if self.push else {}),
        }
        lines = ",\n  ".join(
            json.dumps({"file": file, "object": one.object, "bytes": one.bytes}) for file, one in self.objects.items()
        )
        body = f'{json.dumps(head, indent=1)[:-2]},\n "objects": [\n  {lines}\n ]'.encode()
        return body + CHECKSUM + xxhash.xxh3_64_hexdigest(body).encode() + END

    def is_same(self, other: Commit) -> bool:
        """Return whether another commit names the same objects, whoever pushed it."""
        return (self.manifest_bytes, self.objects, self.condemned) == (
            other.manifest_bytes, other.objects, other.condemned,
        )  # fmt: skip

    @property
    def checksum(self) -> str:
        """What tells this commit from others, 32 hexadecimal digits."""
        return xxhash.xxh3_128_hexdigest(self.content)

    @property
    def files(self) -> dict[str, StoredObject]:
        """The files that the manifest names, with their objects."""
        manifest = self.manifest
        entries = (*manifest.shards, manifest.index, manifest.keys)
        return {entry.file: self.objects[entry.file] for entry in entries if entry}

    def shards_checksum(self, manifest: Manifest) -> str:
        """Return a checksum over what this commit has as each shard of a manifest, perhaps of another generation."""
        lines = [
            f"{entry.file} {one.checksum if (one := self.objects.get(entry.file)) else None}\n"
            for entry in manifest.shards
        ]
        return xxhash.xxh3_128_hexdigest("".join(lines).encode())

    def checksums(self) -> dict[str, str]:
        """Return xxh3-128 of the gallery's own gallery.json, and of the files beside it: all that is ever replaced."""
        beside = {name: self.objects[name].checksum for name in BESIDE if name in self.objects}
        return {FILE: xxhash.xxh3_128_hexdigest(self.manifest_bytes), **beside}

    @classmethod
    def parse(cls, content: bytes, path: Path) -> Commit:
        """Return the commit that an object's bytes describe.

        Args:
            content: all of the object.
            path: its address, for errors.

        Raises:
            CorruptGalleryError: it is damaged, something else, or of a format version that this release does not read.
        """
        try:
            values = json.loads(content)
            if not isinstance(values, dict) or values.get("format") != FORMAT:
                raise ValueError(f"it does not say format {FORMAT!r}; upload galleries with push")
            if (version := values.get("format_version")) != FORMAT_VERSION:
                raise CorruptGalleryError(
                    f"{path}: expected format version {FORMAT_VERSION}, found {version}; "
                    "open it with the release that pushed it, or push it again"
                )
            body, _, rest = content.rpartition(CHECKSUM)
            if rest != xxhash.xxh3_64_hexdigest(body).encode() + END:
                raise ValueError("its content is not what was pushed (checksum)")
            manifest = values["manifest"].encode()
            objects = {one["file"]: _stored(one) for one in values["objects"]}
            condemned = tuple(name for name in values["condemned"] if OBJECT_NAME.fullmatch(name))
            push = str(values.get("push", ""))
        except CorruptGalleryError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CorruptGalleryError(f"{path}: damaged or edited: {type(error).__name__}: {error}") from error
        commit = cls(manifest, Manifest.parse(manifest, path), objects, condemned, push)
        commit._require_objects(path)
        return commit

    def _require_objects(self, path: Path) -> None:
        """Refuse a commit that does not have each file of the manifest, with its size, or has files of another name."""
        manifest = self.manifest
        sizes = {entry.file: entry.bytes for entry in (*manifest.shards, manifest.index, manifest.keys) if entry}
        for file, size in sizes.items():
            one = self.objects.get(file)
            if one is None or one.bytes != size:
                found = "none" if one is None else f"one of {one.bytes}"
                raise CorruptGalleryError(f"{path}: {file}: expected an object of {size} bytes, found {found}")
        rows = {rows_of(shard.file) for shard in manifest.shards}
        for file in sorted(rows - self.objects.keys()):
            raise CorruptGalleryError(f"{path}: {file}: expected an object, found none")
        if others := [file for file in self.objects if file not in sizes and file not in rows and file not in BESIDE]:
            raise CorruptGalleryError(
                f"{path}: expected objects of the gallery's own files, found one of {others[0]!r}; push it again"
            )


def _stored(values: dict[str, Any]) -> StoredObject:
    if not OBJECT_NAME.fullmatch(values["object"]):
        raise ValueError(f"{values['object']!r} is no name of an object")
    return StoredObject(values["object"], checked_count(values["bytes"], "bytes"))
