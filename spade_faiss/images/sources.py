"""Listing the image files under files and folders, and their keys."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from pathlib import Path

from ..errors import ImageError
from . import passed_over as why
from .keys import comparable
from .passed_over import PassedOver, own_folders, system_file, system_folder
from .suffixes import SHOWN, UNREAD, image_suffixes

KINDS = ((stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"))


@dataclass(frozen=True)
class ImageFile:
    """An image file and its key.

    `find_images` sets the key to the path relative to the listed folder, with forward slashes; the key of a file that
    is listed by itself is its name.
    """

    path: Path
    key: str  # names the image in a gallery
    photo: str = field(default="", compare=False)  # key of the photo that it is named as an annotation of, if any


@dataclass(frozen=True)
class Unlisted:
    """A file or a folder that should be taken and cannot be, and why: the message starts with its path."""

    path: Path
    reason: str


class Listing(list[ImageFile]):
    """The images of sources, and what was not taken.

    Attributes:
        passed_over: what is no image, or is not the user's, counted by reason.
        unlisted: what may hold images and cannot be read: folders, broken links.
        plain_keys: None, or, if files of several sources would have the same key, what the keys of the images would
            be by their own sources; the images have keys from the nearest common folder.
        notes: sentences about these images for the user.
        chosen: whether all images were given as ImageFiles, as those of a labelled set.
    """

    def __init__(self, images: Iterable[ImageFile] = ()) -> None:
        super().__init__(images)
        self.passed_over = PassedOver()
        self.unlisted: list[Unlisted] = []
        self.plain_keys: list[str] | None = None
        self.notes: list[str] = []
        self.chosen = False

    def replaced(self, images: Iterable[ImageFile]) -> Listing:
        """Return a copy with other images."""
        copy = Listing(images)
        copy.__dict__.update(self.__dict__)
        return copy


def find_images(sources: Sequence[str | Path | ImageFile]) -> Listing:
    """List the images of files and folders, as list_sources does, but refuse a folder that cannot be listed whole.

    Raises:
        ImageError: as list_sources; or a folder or a link in a source cannot be read.
    """
    listing = list_sources(sources)
    for one in listing.unlisted:
        raise ImageError(one.reason)
    return listing


def list_sources(sources: Sequence[str | Path | ImageFile]) -> Listing:
    """List the images of files and folders (searched to any depth), each folder in the order of its keys.

    In folders, images are the files with a suffix that Pillow knows here; see image_suffixes. What is hidden, what a
    NAS or a system has put there, and results and galleries of this program are passed over and counted. Links are
    followed: a folder with two names is listed under both, but once where links lead in a circle. An ImageFile is kept
    as it is. A file that two sources hold is listed once. If two files would have the same key, all keys are
    paths from the nearest folder that holds all sources.

    Args:
        sources: files, folders and ImageFiles; or a Listing, which is returned.

    Returns:
        the images in the order of the sources.

    Raises:
        ImageError: a source does not exist, cannot be listed or holds no image, or two images have the same key.
    """
    if isinstance(sources, Listing):
        return sources
    listing, places = Listing(), _Places()
    listing.chosen = all(isinstance(source, ImageFile) for source in sources)
    for source in sources:
        if isinstance(source, ImageFile):
            places.add(source, None)
            continue
        images = _list_source(Path(source), listing)
        if len(sources) == 1:
            listing.extend(images)
            return listing
        for image in images:
            places.add(image, Path(source))
    places.fill(listing)
    return listing


class _Places:
    """The images of several sources: each file once, each key once."""

    def __init__(self) -> None:
        self._images: list[ImageFile] = []
        self._sources: list[Path | None] = []  # that each image was found in; None: given as an ImageFile
        self._known: dict[str, int] = {}  # absolute path -> number of the image
        self._roots: dict[Path, str] = {}  # source -> its real path
        self._given: dict[str, ImageFile] = {}  # by key

    def add(self, image: ImageFile, source: Path | None) -> None:
        """Add an image, unless another source has its file already."""
        if source is not None:
            root = self._roots.get(source)
            if root is None:
                root = self._roots[source] = os.path.realpath(source)
            path = root if source == image.path else f"{root}/{image.key}"
            if path in self._known:
                return
            self._known[path] = len(self._images)
        elif self._given.get(image.key) == image:
            return
        else:
            self._given[image.key] = image
        self._images.append(image)
        self._sources.append(source)

    def fill(self, listing: Listing) -> None:
        """Put the images into a listing; raises ImageError for two with the same key."""
        collision = _collision(self._images)
        if collision is None:
            listing.extend(self._images)
            return
        common = self._common()
        moved = [
            image if source is None or common is None else replace(image, key=_below(image.path, common))
            for image, source in zip(self._images, self._sources, strict=True)
        ]
        if common is None or _collision(moved) is not None:
            first, second = collision
            raise ImageError(
                f"two images would have the key {first.key!r}: {first.path} and {second.path}; "
                "give a folder that holds both sources, so that their keys differ"
            )
        listing.extend(moved)
        listing.plain_keys = [image.key for image in self._images]
        first, second = collision
        listing.notes.append(
            f"several sources hold {first.key}: keys are paths from {common}, as {_below(second.path, common)}"
        )

    def _common(self) -> Path | None:
        """Return the nearest folder that holds all sources; None: there is none, or they were not given as paths."""
        roots = [source if source.is_dir() else source.parent for source in self._roots]
        try:
            return Path(os.path.commonpath([_absolute(root) for root in roots])) if roots else None
        except ValueError:  # on several drives
            return None


def _below(path: Path, folder: Path) -> str:
    return Path(_absolute(path)).relative_to(folder).as_posix()


def _absolute(path: Path) -> str:
    return os.path.normpath(path.absolute())  # links are kept, as their names are what the user sees


def _collision(images: Sequence[ImageFile]) -> tuple[ImageFile, ImageFile] | None:
    """Return the first two images with the same key."""
    known: dict[str, ImageFile] = {}
    for image in images:
        other = known.setdefault(image.key, image)
        if other is not image and other != image:
            return other, image
    return None


def without_twin_names(listing: Listing) -> Listing:
    """Return a listing in which no two keys differ in Unicode normalisation alone; the second of such is unlisted.

    A gallery compares keys by their normal form, as file systems and archives change it. Linux can hold both.
    """
    if all(image.key.isascii() for image in listing):
        return listing
    kept, known, plain = listing.replaced(()), dict[str, ImageFile](), listing.plain_keys
    kept.unlisted = list(listing.unlisted)
    kept.plain_keys = None if plain is None else []
    for number, image in enumerate(listing):
        other = known.setdefault(comparable(image.key), image)
        if other.key == image.key:
            kept.append(image)
            if plain is not None and kept.plain_keys is not None:
                kept.plain_keys.append(plain[number])
            continue
        reason = f"{image.path}: its name differs from that of {other.path} in Unicode normalisation only; rename one"
        kept.unlisted.append(Unlisted(image.path, reason))
    return kept


def _list_source(source: Path, listing: Listing) -> list[ImageFile]:
    """List the images of a file or a folder."""
    try:
        mode = source.stat().st_mode
    except OSError as error:
        found = "a link to nothing" if source.is_symlink() else "nothing there"
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            found = error.strerror or str(error)
        raise ImageError(f"{source}: expected an image or a folder of images, found {found}") from error
    if stat.S_ISREG(mode):
        return [ImageFile(source, source.name)]
    if not stat.S_ISDIR(mode):
        raise ImageError(f"{source}: expected an image or a folder of images, found {_kind(mode)}")
    walk = _Walk(source)
    images = walk.images()
    if not images:
        reasons = [str(walk.passed_over)] if walk.passed_over else []
        reasons += [one.reason for one in walk.unlisted[:1]]
        raise ImageError("; ".join([f"{source}: expected a folder with images ({SHOWN}), found none in it", *reasons]))
    listing.passed_over.update(walk.passed_over)
    listing.unlisted += walk.unlisted
    return images


def _kind(mode: int) -> str:
    return next((name for is_kind, name in KINDS if is_kind(mode)), "something else")


@dataclass(frozen=True)
class _Folder:
    """A folder of a walk."""

    path: str
    key: str  # of its images, up to their names
    real: str
    above: tuple[str, ...]  # real paths of the folders above it, for links that lead back
    known: frozenset[str] = frozenset()  # real paths that are not listed again, as a link of a circle led here


class _Walk:
    """Lists the images of a folder, to any depth."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.passed_over = PassedOver()
        self.unlisted: list[Unlisted] = []
        self._images: list[ImageFile] = []
        self._suffixes = image_suffixes()
        self._listed: set[str] = set()  # real paths
        self._back: list[tuple[int, str, _Folder]] = []  # what links of a circle lead to: a heap by depth and key
        self._inner_folders: dict[str, list[str]] = {}  # of a folder, all as real paths

    def images(self) -> list[ImageFile]:
        """Return the images in the order of their keys.

        Raises:
            ImageError: the folder itself cannot be listed. One below it that cannot is unlisted.
        """
        todo = [_Folder(str(self.source), "", os.path.realpath(self.source), ())]
        while todo := todo or self._not_yet_listed():
            folder = todo.pop()
            self._listed.add(folder.real)
            try:
                with os.scandir(folder.path) as found:
                    entries = sorted(found, key=lambda entry: entry.name)
            except OSError as error:
                reason = f"{folder.path}: folder cannot be listed: {error.strerror or error}"
                if not folder.key:
                    raise ImageError(reason) from error
                self.unlisted.append(Unlisted(Path(folder.path), reason))
                continue
            todo += self._of_folder(folder, entries)
        return sorted(self._images, key=lambda image: image.key)

    def _of_folder(self, folder: _Folder, entries: Sequence[os.DirEntry[str]]) -> list[_Folder]:
        """Take the images of a folder; returns the folders in it that are to be searched."""
        own = own_folders([entry.name for entry in entries])
        if own is not None:
            self.passed_over.add(own[0], folder.key.rstrip("/"))
        inner = []
        for entry in entries:
            try:
                if entry.is_dir():
                    if own is None or entry.name not in own[1]:
                        inner += self._inner(folder, entry)
                elif entry.is_file():
                    self._take(folder, entry, own is not None)
                else:
                    self._take_other(folder, entry)
            except OSError as error:
                if error.errno == errno.ELOOP and Path(entry.name).suffix.lower() not in self._suffixes:
                    self.passed_over.add(why.LOOPS, entry.name)
                    continue
                reason = f"{entry.path}: cannot be read: {error.strerror or error}"
                self.unlisted.append(Unlisted(Path(entry.path), reason))
        return inner

    def _inner(self, folder: _Folder, entry: os.DirEntry[str]) -> list[_Folder]:
        """Return a folder within another if it is to be searched."""
        name = entry.name
        if system_folder(name):
            self.passed_over.add(why.SYSTEM_FOLDERS, name)
            return []
        if name.startswith("."):
            self.passed_over.add(why.HIDDEN, name)
            return []
        real, above = f"{folder.real}/{name}", (folder.real, *folder.above)
        if entry.is_symlink() or os.name == "nt":
            real = os.path.realpath(entry.path)
        if real in above or real in folder.known:
            self.passed_over.add(why.LOOPS, name)
            return []
        inner = _Folder(entry.path, f"{folder.key}{name}/", real, above, folder.known)
        if entry.is_symlink() and self._leads_to(real, folder.real):
            heappush(self._back, (inner.key.count("/"), inner.key, inner))
            return []
        return [inner]

    def _not_yet_listed(self) -> list[_Folder]:
        """Return the next folder that only links of a circle lead to, at the end of all others; none is left: []."""
        while self._back:
            _, _, folder = heappop(self._back)
            if folder.real not in self._listed:
                return [replace(folder, known=frozenset(self._listed))]
            self.passed_over.add(why.LOOPS, Path(folder.path).name)
        return []

    def _leads_to(self, start: str, goal: str) -> bool:
        """Return whether folders and links lead from one folder to another, both real paths."""
        todo, seen = [start], {start}
        while todo:
            for inner in self._folders_in(todo.pop()):
                if inner == goal:
                    return True
                if inner not in seen:
                    seen.add(inner)
                    todo.append(inner)
        return False

    def _folders_in(self, real: str) -> list[str]:
        """Return the real paths of the folders in a folder that would be searched; what cannot be listed has none."""
        if real not in self._inner_folders:
            found = self._inner_folders[real] = []
            with suppress(OSError), os.scandir(real) as entries:
                for entry in entries:
                    with suppress(OSError):  # a link to itself
                        if not entry.name.startswith(".") and not system_folder(entry.name) and entry.is_dir():
                            found.append(os.path.realpath(entry.path) if entry.is_symlink() else entry.path)
        return self._inner_folders[real]

    def _take(self, folder: _Folder, entry: os.DirEntry[str], own: bool) -> None:
        """Take a file if it is an image; `own`: it lies in a folder that this program has written."""
        name, suffix = entry.name, Path(entry.name).suffix.lower()
        example = system_file(name)
        if example is not None:
            self.passed_over.add(why.SYSTEM_FILES, example)
        elif name.startswith("."):
            self.passed_over.add(why.HIDDEN, name)
        elif suffix in self._suffixes:
            self._images.append(ImageFile(Path(entry.path), f"{folder.key}{name}"))
        elif suffix in UNREAD:
            self.passed_over.add(why.UNREAD_FORMATS, suffix)
        elif not own:
            self.passed_over.add(why.OTHER_FILES, suffix)

    def _take_other(self, folder: _Folder, entry: os.DirEntry[str]) -> None:
        """Take what is neither a file nor a folder: a link to nothing may have been either."""
        suffix = Path(entry.name).suffix.lower()
        if system_file(entry.name) or entry.name.startswith("."):
            self.passed_over.add(why.HIDDEN, entry.name)
            return
        mode = entry.stat(follow_symlinks=False).st_mode
        if not stat.S_ISLNK(mode) and suffix not in self._suffixes:
            self.passed_over.add(why.SPECIAL, entry.name)
        elif stat.S_ISLNK(mode) and suffix in self._suffixes:
            self._images.append(ImageFile(Path(entry.path), f"{folder.key}{entry.name}"))  # reading it says why not
        elif stat.S_ISLNK(mode) and suffix:
            self.passed_over.add(why.OTHER_FILES, suffix)
        else:
            found = "a link to nothing, perhaps to a folder" if stat.S_ISLNK(mode) else _kind(mode)
            reason = f"{entry.path}: expected an image or a folder, found {found}"
            self.unlisted.append(Unlisted(Path(entry.path), reason))
