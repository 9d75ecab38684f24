"""gallery.json: the truth about a gallery. What it does not name does not exist."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

from .errors import CorruptGalleryError, GalleryNotFoundError
from .features import ExtractorSpec
from .options import IndexOptions, Patches
from .recipes import RECIPES
from .storage import write_whole

FILE = "gallery.json"
FORMAT = "spade-faiss gallery"
FORMAT_VERSION = 1

MOST_CANDIDATES = 100  # for each neighbour; more than is ever tried

# Names are made here and matched whole: nothing in a manifest can point outside its folder.
SHARD_NAME = re.compile(r"shards/\d{6,9}\.h5")
INDEX_NAME = re.compile(r"index/image-\d{6,9}\.faiss")


@dataclass(frozen=True)
class ShardEntry:
    """One shard file. `removed` are rows in it that no longer count, ascending."""

    file: str
    images: int  # rows, removed ones included
    bytes: int
    removed: tuple[int, ...] = ()


@dataclass(frozen=True)
class IndexFacts:
    """How an image index was made and is searched, and what was measured of that."""

    factory: str = "Flat"  # FAISS's name for it
    reason: str = ""  # why it was taken
    nprobe: int | None = None  # IVF lists visited; None: there are none, or it was not tuned
    candidates: float = 1.0  # for each neighbour, compared exactly
    recall: float | None = None  # share of the k nearest that it finds, of held-out normal images; None: not measured
    k: int = 0  # neighbours that the recall was measured for
    imbalance: float = 1.0  # FAISS's imbalance factor of its lists; 1: all of one length
    imbalance_trained: float = 1.0  # the same when it was built
    mapped: bool = False  # its lists stay in the file

    @property
    def is_exact(self) -> bool:
        """Whether it finds the nearest images always."""
        return self.factory == "Flat"

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> IndexFacts:
        """Read it back.

        Raises:
            ValueError, TypeError: the values are not what was written.
        """
        if set(values) != {field.name for field in fields(cls)}:
            raise ValueError(f"index: expected all facts and no others, found {', '.join(values)}")
        facts = cls(**values)
        numbers = {
            "candidates": (facts.candidates, 1, MOST_CANDIDATES),
            "recall": (0.0 if facts.recall is None else facts.recall, 0, 1),
            "imbalance": (facts.imbalance, 1, math.inf),
            "imbalance_trained": (facts.imbalance_trained, 1, math.inf),
        }
        for name, (number, least, most) in numbers.items():
            if not isinstance(number, (int, float)) or not least <= number <= most or math.isinf(number):
                raise ValueError(f"{name}: expected a number from {least} to {most}, found {number!r}")
        if not (isinstance(facts.factory, str) and isinstance(facts.reason, str) and isinstance(facts.mapped, bool)):
            raise ValueError("index: expected factory and reason as text, and mapped as true or false")
        _count(facts.k, "k")
        _count(0 if facts.nprobe is None else facts.nprobe, "nprobe")
        return facts


@dataclass(frozen=True)
class IndexEntry:
    """The file of the image index, which holds the image features of ids 0 to images - 1."""

    file: str
    images: int
    trained: int  # images that there were when it was last built from the shards
    bytes: int
    xxh3: str
    facts: IndexFacts


@dataclass(frozen=True)
class Manifest:
    """One generation of a gallery. The id of an image is its row, counted through all shards in this order."""

    spec: ExtractorSpec
    index_options: IndexOptions
    shard_bytes: int  # a shard is closed when it has grown to this
    generation: int = 0
    next_shard: int = 0  # numbers are never used again: a reader of an older generation may still read that name
    shards: tuple[ShardEntry, ...] = ()
    index: IndexEntry | None = None
    created_by: str = ""
    recipe: str | None = None  # whose query options are the gallery's defaults; None: the plain defaults
    patches: Patches = "stored"  # recompute: shards hold no levels, but where the image files are

    @property
    def rows(self) -> int:
        """Rows of all shards, removed ones included: ids are below this."""
        return sum(shard.images for shard in self.shards)

    @property
    def removed(self) -> int:
        """Rows that no longer count."""
        return sum(len(shard.removed) for shard in self.shards)

    @property
    def bytes_per_image(self) -> int:
        """Bytes of one image in a shard, about."""
        return self.spec.bytes_with(self.patches)

    def on(self, device: str) -> Manifest:
        """Return it with a device for the image index: of this machine, not of the gallery."""
        return replace(self, index_options=replace(self.index_options, device=device))

    def write(self, folder: Path) -> None:
        """Commit this generation."""
        values = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "images": self.rows - self.removed,
            **asdict(self),
        }
        values["index_options"].pop("device")  # of the machine, not of the gallery
        write_whole(folder / FILE, json.dumps(values, indent=1).encode())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the last generation that was committed.

        Raises:
            GalleryNotFoundError: there is no gallery at that path.
            CorruptGalleryError: gallery.json is damaged, or of a format version that this release does not read.
        """
        path = folder / FILE
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise GalleryNotFoundError(
                f"{folder}: expected a gallery (a folder with {FILE}), found none; make one with `spade-faiss build`"
            ) from error
        except OSError as error:
            raise CorruptGalleryError(f"{path}: cannot be read: {error.strerror or error}") from error
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
            return cls._parse(values)
        except CorruptGalleryError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CorruptGalleryError(f"{path}: damaged or edited: {type(error).__name__}: {error}") from error

    @classmethod
    def _parse(cls, values: dict[str, Any]) -> Manifest:
        shards = tuple(_shard(entry) for entry in _list(values["shards"]))
        index = None if values["index"] is None else _index(values["index"])
        manifest = cls(
            spec=ExtractorSpec.from_json(values["spec"]),
            index_options=IndexOptions(**values["index_options"]),
            shard_bytes=_count(values["shard_bytes"]),
            generation=_count(values["generation"]),
            next_shard=_count(values["next_shard"]),
            shards=shards,
            index=index,
            created_by=str(values["created_by"]),
            recipe=values.get("recipe"),
            patches=values.get("patches", "stored"),
        )
        if manifest.patches not in get_args(Patches):
            raise ValueError(f"patches: expected {' or '.join(get_args(Patches))}, found {manifest.patches!r}")
        if manifest.recipe is not None and manifest.recipe not in RECIPES:
            raise ValueError(f"recipe {manifest.recipe!r} is not one that this release knows: {', '.join(RECIPES)}")
        if len({shard.file for shard in shards}) != len(shards):
            raise ValueError("a shard is named twice")
        if index is not None and (not INDEX_NAME.fullmatch(index.file) or index.images > manifest.rows):
            raise ValueError(f"index {index.file!r} of {index.images} images is not one of this gallery's")
        if values["images"] != manifest.rows - manifest.removed:
            raise ValueError(
                f"images: expected {manifest.rows - manifest.removed} from the shards, found {values['images']}"
            )
        return manifest


def _shard(values: dict[str, Any]) -> ShardEntry:
    removed = tuple(_count(row) for row in _list(values.pop("removed")))
    entry = ShardEntry(**_typed(values, {"file"}), removed=removed)
    if not SHARD_NAME.fullmatch(entry.file):
        raise ValueError(f"{entry.file!r} is no name of a shard")
    if list(removed) != sorted(set(removed)) or any(row >= entry.images for row in removed):
        raise ValueError(f"{entry.file}: removed rows are not ascending rows below {entry.images}")
    return entry


def _index(values: dict[str, Any]) -> IndexEntry:
    facts = IndexFacts.from_json(values.pop("facts"))
    return IndexEntry(**_typed(values, {"file", "xxh3"}), facts=facts)


def _typed(values: dict[str, Any], texts: set[str]) -> dict[str, Any]:
    """Check that some values are text, and all others counts."""
    for name, value in values.items():
        if name not in texts:
            _count(value, name)
        elif not isinstance(value, str):
            raise ValueError(f"{name}: expected text, found {value!r}")
    return values


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"expected a list, found {value!r}")
    return value


def _count(value: Any, name: str = "a count") -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name}: expected a number >= 0, found {value!r}")
    return value
