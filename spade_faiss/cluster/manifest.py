"""cluster.json: the members of a cluster, each at one generation, and the calibration that holds for all of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import filelock
import xxhash

from .._version import __version__
from ..detect.calibration import Calibration
from ..errors import CorruptGalleryError, GalleryLockedError, GalleryNotFoundError, OptionError
from ..index.metadata import checked_count
from ..store.manifest import FILE as GALLERY_FILE
from ..system.atomic_files import storage_errors, write_whole
from ..system.failpoints import failpoint
from ..system.sealed_json import sealed, unsealed

FILE = "cluster.json"
LOCK = "cluster.lock"
FORMAT = "spade-faiss cluster"
FORMAT_VERSION = 1
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")  # of a member: part of messages and of cache keys, never a path


@dataclass(frozen=True)
class MemberEntry:
    """A member: a gallery on the disk of its machine, at one generation."""

    name: str
    path: str  # of the gallery, absolute, on the machine that has it
    generation: int
    images: int
    manifest: str  # xxh3-64 of its gallery.json, hexadecimal: another gallery can have the same generation
    node: str | None = None  # address of the machine in the Ray cluster; None: any machine that sees the path

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name):
            raise OptionError(f"member: expected a name of letters, digits, . _ and -, found {self.name!r}")


@dataclass(frozen=True)
class ClusterManifest:
    """One generation of a cluster. Global ids count the rows of all members in this order."""

    members: tuple[MemberEntry, ...]
    generation: int = 0
    place_by: str | None = None  # regular expression whose match in a key names its member; None: by the key's hash
    calibration: Calibration | None = None
    created_by: str = f"spade-faiss {__version__}"

    def __post_init__(self) -> None:
        require_different([member.name for member in self.members], "name")
        require_different([f"{member.node or ''}:{member.path}" for member in self.members], "gallery")

    def names(self) -> list[str]:
        """Return the names of the members."""
        return [member.name for member in self.members]

    def images(self) -> list[tuple[str, int, str]]:
        """Return what says which images the members have, wherever they lie: name, generation and checksum of each."""
        return [(member.name, member.generation, member.manifest) for member in self.members]

    def member(self, name: str) -> MemberEntry:
        """Return a member by its name.

        Raises:
            OptionError: no member has it.
        """
        for member in self.members:
            if member.name == name:
                return member
        raise OptionError(f"member: expected {' or '.join(self.names())}, found {name!r}")

    def followed_by(self, members: Sequence[MemberEntry]) -> ClusterManifest:
        """Return the next generation, with these members; the same where none has changed."""
        if tuple(members) == self.members:
            return self
        return replace(self, members=tuple(members), generation=self.generation + 1)

    def write(self, folder: Path) -> None:
        """Put it in the place of the last one, at once and whole.

        Raises:
            GalleryError: the file cannot be written.
        """
        values: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(self)}
        values["members"] = [asdict(member) for member in self.members]
        values["calibration"] = self.calibration.to_json() if self.calibration else None
        values |= {"format": FORMAT, "format_version": FORMAT_VERSION}
        with storage_errors(f"cannot write {folder / FILE}"):
            write_whole(folder / FILE, sealed(values))
        failpoint("committed the cluster")

    @classmethod
    def read(cls, folder: Path) -> ClusterManifest:
        """Read the last generation.

        Raises:
            GalleryNotFoundError: there is no cluster.json.
            CorruptGalleryError: it was damaged or edited, or is of another format version.
        """
        path = folder / FILE
        try:
            values, whole = unsealed(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise GalleryNotFoundError(
                f"{folder}: expected a cluster (a folder with {FILE}), found none; make one with Cluster.create"
            ) from error
        except (OSError, ValueError, RecursionError) as error:
            raise CorruptGalleryError(f"{path}: cannot be read: {error}") from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise CorruptGalleryError(f"{path}: damaged or edited: it does not say format {FORMAT!r}")
        if (version := values.get("format_version")) != FORMAT_VERSION:
            raise CorruptGalleryError(
                f"{path}: expected format version {FORMAT_VERSION}, found {version}; open it with the release that "
                "made it"
            )
        if not whole:
            raise CorruptGalleryError(f"{path}: damaged or edited (checksum)")
        try:
            return cls(
                tuple(_member(member) for member in values["members"]),
                checked_count(values["generation"]),
                values["place_by"],
                Calibration.from_json(values["calibration"]) if values["calibration"] else None,
                str(values["created_by"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CorruptGalleryError(f"{path}: not as it is written: {error!r}") from error


def _member(values: dict[str, Any]) -> MemberEntry:
    for name in ("generation", "images"):
        checked_count(values[name], name)
    if not all(isinstance(values[name], str) for name in ("path", "manifest")):
        raise ValueError("path, manifest: expected text")
    return MemberEntry(**values)


def require_different(values: Sequence[str], what: str) -> None:
    """Check that no two members have the same name, or gallery.

    Raises:
        OptionError: two have.
    """
    for value in values:
        if values.count(value) > 1:
            raise OptionError(f"members: expected each {what} once, found {value.removeprefix(':')!r} twice")


def gallery_digest(path: Path) -> str:
    """Return the checksum of a gallery's gallery.json; "": there is none."""
    try:
        return xxhash.xxh3_64_hexdigest((path / GALLERY_FILE).read_bytes())
    except OSError:
        return ""


@contextmanager
def writing(folder: Path, timeout: float) -> Iterator[None]:
    """Hold the lock of those who change a cluster.

    Raises:
        GalleryLockedError: another process holds it for longer than the timeout in seconds.
    """
    try:
        with filelock.FileLock(folder / LOCK, timeout=timeout):
            yield
    except filelock.Timeout as error:
        raise GalleryLockedError(
            f"{folder}: another process is changing it; wait until it has finished (timeout=SECONDS), or stop it"
        ) from error
