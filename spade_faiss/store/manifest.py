"""gallery.json: what a gallery consists of. A file that it does not name does not exist."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..errors import CorruptGalleryError, GalleryNotFoundError
from ..extractors.spec import ExtractorSpec
from ..index.metadata import IndexFacts, checked_count
from ..options import IndexOptions, Patches
from ..system.atomic_files import write_whole
from .shard_format import ShardSchema

FILE = "gallery.json"
FORMAT = "spade-faiss gallery"
FORMAT_VERSION = 1

# Names are made here and matched whole: nothing in a manifest can point outside its folder.
SHARD_NAME = re.compile(r"shards/\d{6,9}\.h5")
INDEX_NAME = re.compile(r"index/image-\d{6,9}\.faiss")
KEYS_NAME = re.compile(r"index/keys-\d{6,9}\.npy")
HEX = re.compile(r"([0-9a-f]{2})*")

CHECKSUM = b',\n "xxh3": "'  # covers what stands before it; its 16 digits and END follow
END = b'"\n}\n'
MANY_ROWS, LARGE_IMAGE = 2**24, 2**26  # images, bytes of one: above these the sizes of files are compared

Bits = bytes  # an alias, because `bytes` is a number in the classes below


@dataclass(frozen=True)
class ShardEntry:
    """One shard file, and which of its rows are removed."""

    file: str
    images: int  # rows, removed ones included
    bytes: int
    removed: Bits = b""  # a bit a row, the first row's the highest of its byte; empty where no row is removed

    @cached_property
    def removed_count(self) -> int:
        """Number of removed rows."""
        return int.from_bytes(self.removed, "big").bit_count()

    @property
    def removed_mask(self) -> NDArray[np.bool_]:
        """Whether each row is removed, (images,)."""
        if not self.removed:
            return np.zeros(self.images, np.bool_)
        return np.unpackbits(np.frombuffer(self.removed, np.uint8), count=self.images).view(np.bool_)

    def is_removed(self, row: int) -> bool:
        """Return whether a row is removed, without unpacking the others."""
        return bool(self.removed) and bool(self.removed[row // 8] & (128 >> row % 8))

    def without(self, rows: Iterable[int]) -> ShardEntry:
        """Return a copy with more rows removed."""
        mask = self.removed_mask
        mask[list(rows)] = True
        return replace(self, removed=np.packbits(mask).tobytes())


@dataclass(frozen=True)
class IndexEntry:
    """The file of the image index, which covers ids 0 to images - 1."""

    file: str
    images: int
    trained: int  # images of the gallery when it was last built from the shards
    bytes: int
    xxh3: str
    facts: IndexFacts


@dataclass(frozen=True)
class KeysEntry:
    """The file of the key table, which covers ids 0 to images - 1."""

    file: str
    images: int
    bytes: int
    xxh3: str


@dataclass(frozen=True)
class Manifest:
    """One generation of a gallery. The id of an image is its row, counted through all shards in this order."""

    spec: ExtractorSpec
    index_options: IndexOptions
    shard_bytes: int  # size at which a shard is closed
    generation: int = 0
    next_shard: int = 0  # numbers are never used again: a reader of an older generation may still read that name
    shards: tuple[ShardEntry, ...] = ()
    index: IndexEntry | None = None
    keys: KeysEntry | None = None
    created_by: str = ""
    recipe: str | None = None  # names the default query options; a later release may know others. None: plain defaults
    patches: Patches = "stored"  # "recompute": shards hold paths of image files instead of levels

    @cached_property
    def rows(self) -> int:
        """Rows of all shards, removed ones included. Ids are below this."""
        return sum(shard.images for shard in self.shards)

    @cached_property
    def removed(self) -> int:
        """Number of removed rows."""
        return sum(shard.removed_count for shard in self.shards)

    @property
    def schema(self) -> ShardSchema:
        """What the shards hold of each image."""
        return ShardSchema(self.spec, self.patches)

    def _require_on_disk(self, folder: Path) -> None:
        """Refuse large counts that the files do not bear out: memory is allocated before shards are opened.

        Raises:
            ValueError: the shards' files have less than half of the bytes that they need; some may be missing.
        """
        if self.rows <= MANY_ROWS and self.spec.bytes_per_image <= LARGE_IMAGE:
            return
        sizes = [path.stat().st_size for shard in self.shards if (path := folder / shard.file).is_file()]
        if 2 * sum(sizes) < (least := self.rows * self.schema.least_bytes):
            raise ValueError(f"shards: expected {least} bytes for {self.rows} images, found {sum(sizes)}")

    def on(self, device: str) -> Manifest:
        """Return a copy with a device for the image index. A device belongs to this machine, so it is not written."""
        return replace(self, index_options=replace(self.index_options, device=device))

    def write(self, folder: Path) -> None:
        """Commit this generation."""
        values = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "images": self.rows - self.removed,
            **asdict(replace(self, shards=())),
            "spec": self.spec.to_json(),
        }
        values["index_options"].pop("device")  # belongs to the machine
        del values["shards"]
        # One line a shard, at the end: there may be ten thousand of them.
        head = json.dumps(values, indent=1).removesuffix("\n}")
        shards = ",\n  ".join(_line(shard) for shard in self.shards)
        content = f'{head},\n "shards": [\n  {shards}\n ]'.encode()
        write_whole(folder / FILE, content + CHECKSUM + xxhash.xxh3_64_hexdigest(content).encode() + END)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the last generation that was committed.

        Raises:
            GalleryNotFoundError: the folder has no gallery.json.
            CorruptGalleryError: gallery.json is damaged, or has a format version that this release does not read.
        """
        path = folder / FILE
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise GalleryNotFoundError(
                f"{folder}: expected a gallery (a folder with {FILE}), found none; make one with Gallery.create"
            ) from error
        except OSError as error:
            raise CorruptGalleryError(f"{path}: cannot be read: {error.strerror or error}") from error
        manifest = cls.parse(content, path)
        try:
            manifest._require_on_disk(folder)
        except ValueError as error:
            raise _damaged(path, error) from error
        return manifest

    @classmethod
    def parse(cls, content: bytes, path: Path) -> Manifest:
        """Return the generation that the bytes of a gallery.json describe.

        Args:
            content: all of the file.
            path: where it came from, for errors.

        Raises:
            CorruptGalleryError: it is damaged, or has a format version that this release does not read.
        """
        try:
            values = json.loads(content)
            if not isinstance(values, dict) or values.get("format") != FORMAT:
                raise ValueError(f"it does not say format {FORMAT!r}")
            version = values.get("format_version")
            if version != FORMAT_VERSION:
                raise CorruptGalleryError(
                    f"{path}: expected format version {FORMAT_VERSION}, found {version}; "
                    "open it with the release that made it, or build it again"
                )
            # It is missing from galleries of early releases and from edited ones. No flipped bit removes it.
            if "xxh3" in values:
                body, _, rest = content.rpartition(CHECKSUM)
                if rest != xxhash.xxh3_64_hexdigest(body).encode() + END:
                    raise ValueError("its content is not what was written (checksum)")
                del values["xxh3"]
            return cls._parse(values)
        except CorruptGalleryError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise _damaged(path, error) from error

    @classmethod
    def _parse(cls, values: dict[str, Any]) -> Manifest:
        if unknown := set(values) - {"format", "format_version", "images", *(field.name for field in fields(cls))}:
            raise ValueError(f"it has fields that this release does not know: {', '.join(sorted(unknown))}")
        shards = tuple(_shard(entry) for entry in _list(values["shards"]))
        index = None if values["index"] is None else _index(values["index"])
        keys = None if values["keys"] is None else KeysEntry(**_typed(values["keys"], {"file", "xxh3"}))
        manifest = cls(
            spec=ExtractorSpec.from_json(values["spec"]),
            index_options=IndexOptions(**values["index_options"]),
            shard_bytes=checked_count(values["shard_bytes"]),
            generation=checked_count(values["generation"]),
            next_shard=checked_count(values["next_shard"]),
            shards=shards,
            index=index,
            keys=keys,
            created_by=str(values["created_by"]),
            recipe=values.get("recipe"),
            patches=values.get("patches", "stored"),
        )
        if manifest.patches not in get_args(Patches):
            raise ValueError(f"patches: expected {' or '.join(get_args(Patches))}, found {manifest.patches!r}")
        if not isinstance(manifest.recipe, (str, type(None))):
            raise ValueError(f"recipe: expected text, found {manifest.recipe!r}")
        for shard in shards:
            if (least := shard.images * manifest.schema.least_bytes) > shard.bytes:
                raise ValueError(f"{shard.file}: expected at least {least} bytes, found {shard.bytes}")
        if len({shard.file for shard in shards}) != len(shards):
            raise ValueError("a shard is named twice")
        if index is not None and (not INDEX_NAME.fullmatch(index.file) or index.images > manifest.rows):
            raise ValueError(f"index {index.file!r} of {index.images} images is not one of this gallery's")
        if keys is not None and (not KEYS_NAME.fullmatch(keys.file) or keys.images > manifest.rows):
            raise ValueError(f"key table {keys.file!r} of {keys.images} images is not one of this gallery's")
        if values["images"] != manifest.rows - manifest.removed:
            raise ValueError(
                f"images: expected {manifest.rows - manifest.removed} from the shards, found {values['images']}"
            )
        return manifest


def _damaged(path: Path, error: Exception) -> CorruptGalleryError:
    return CorruptGalleryError(
        f"{path}: damaged or edited: {type(error).__name__}: {error}; nothing can repair this file: put a copy of it "
        "back, or build the gallery again"
    )


def _line(shard: ShardEntry) -> str:
    return json.dumps(
        {"file": shard.file, "images": shard.images, "bytes": shard.bytes, "removed": shard.removed.hex()}
    )


def _shard(values: dict[str, Any]) -> ShardEntry:
    text = _typed(values, {"file", "removed"}).pop("removed")
    entry = ShardEntry(**values, removed=bytes.fromhex(text) if HEX.fullmatch(text) else b"")
    if not SHARD_NAME.fullmatch(entry.file):
        raise ValueError(f"{entry.file!r} is no name of a shard")
    unused = -entry.images % 8  # bits at the end
    whole = len(entry.removed) == (entry.images + unused) // 8 and entry.removed_count
    if text and not (whole and entry.removed[-1] % (1 << unused) == 0):
        raise ValueError(f"{entry.file}: removed: expected a bit for each of {entry.images} rows, found {text[:80]!r}")
    return entry


def _index(values: dict[str, Any]) -> IndexEntry:
    facts = IndexFacts.from_json(values.pop("facts"))
    return IndexEntry(**_typed(values, {"file", "xxh3"}), facts=facts)


def _typed(values: dict[str, Any], texts: set[str]) -> dict[str, Any]:
    """Check that some values are text, and all others counts."""
    for name, value in values.items():
        if name not in texts:
            checked_count(value, name)
        elif not isinstance(value, str):
            raise ValueError(f"{name}: expected text, found {value!r}")
    return values


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"expected a list, found {value!r}")
    return value
