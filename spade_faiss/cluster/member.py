"""A member of a cluster: one gallery, and what a federation asks of it. Arrays go in, and arrays come out.

`MemberGallery` does the work, in this process or in another. A `Member` is how a federation reaches it: `call` begins
a piece of work, and what it returns waits for the answer, so that all members work at the same time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from ..arrays import Array, Ids
from ..detect.matching import scaled
from ..errors import GalleryError, MemberError
from ..extractors.registry import Extractor
from ..gallery.gallery import Gallery
from ..images.sources import ImageFile
from ..options import SearchOptions
from ..patch_search.matched import patches_at
from ..patch_search.search import search_finite, search_levels_finite
from ..pyramids.cache import PyramidCache
from ..pyramids.reader import PyramidSource
from ..pyramids.recomputed import pyramids_of
from ..store.manifest import Manifest
from ..store.trusted import FILE as TRUSTED
from ..store.trusted import read_trusted_file
from ..system.devices import as_arrays, torch_device
from ..system.forks import remember
from .manifest import MemberEntry, gallery_digest

Found = tuple[Array, Array]  # (h, w, kappa) squared distances and (h, w, kappa, 3) matches
KEPT = 4  # queries at most whose neighbours are kept as they were prepared
Answer = Callable[[], Any]  # waits for the answer to a call


class Member(Protocol):
    """How a federation reaches a member."""

    @property
    def name(self) -> str:
        """The member's name in its cluster."""
        ...

    def call(self, method: str, *args: Any) -> Answer:
        """Begin a method of MemberGallery; returns what waits for its answer.

        The answer raises what the method raised, or MemberError: the member is lost, or its files are.
        """
        ...

    def share(self, value: Any) -> Any:
        """Return an argument in a form that several calls, of several members, can be given without copying it."""
        ...

    def close(self) -> None:
        """Let go of the member."""
        ...


@contextmanager
def as_member_errors(name: str) -> Iterator[None]:
    """Raise what is wrong with a member's files as a MemberError that names it: it cannot answer, and others can."""
    try:
        yield
    except MemberError:
        raise
    except OSError as error:  # as every GalleryError is
        raise MemberError(f"member {name!r}: {error}") from error


class LocalMember:
    """A member in this process, which answers when it is waited for."""

    def __init__(self, entry: MemberEntry, gallery: MemberGallery) -> None:
        self.name = entry.name
        self.gallery = gallery

    def call(self, method: str, *args: Any) -> Answer:
        """See Member."""

        def answer() -> Any:
            with as_member_errors(self.name):
                return getattr(self.gallery, method)(*args)

        return answer

    def share(self, value: Any) -> Any:
        """See Member."""
        return value

    def close(self) -> None:
        """See Member."""
        self.gallery.close()


class LostMember:
    """A member that could not be opened."""

    def __init__(self, name: str, error: MemberError) -> None:
        self.name = name
        self._error = error

    def call(self, method: str, *args: Any) -> Answer:
        """See Member; raises why it could not be opened."""
        raise self._error

    def share(self, value: Any) -> Any:
        """See Member."""
        return value

    def close(self) -> None:
        """See Member."""


class MemberGallery:
    """A member's gallery, at the generation that its cluster knows. Threads may share one."""

    def __init__(
        self,
        entry: MemberEntry,
        extractor: Extractor | None = None,
        normal: Sequence[str | Path | ImageFile] = (),
        cache_bytes: int = SearchOptions.cache_bytes,
    ) -> None:
        """Open the gallery.

        Args:
            entry: what the cluster knows of it.
            extractor: the one that made it, which recomputes patches that are not stored; None: the gallery's own is
                loaded when it is needed.
            normal: more places where image files may be, see Detector.
            cache_bytes: of levels that are kept in memory.

        Raises:
            MemberError: it cannot be opened, or is another gallery, or at another generation.
        """
        self.entry = entry
        self.extractor = extractor
        self._normal = tuple(normal)
        self._cache = PyramidCache(cache_bytes)
        self._kept: dict[bytes, list[Any]] = {}  # what a query has searched, until the spacing is asked for
        self._lock = threading.Lock()
        remember(self)
        try:
            self.gallery = Gallery.open(entry.path)
        except GalleryError as error:
            raise MemberError(f"member {entry.name!r}: {error}") from error
        found, digest = self.gallery.generation, gallery_digest(Path(entry.path))
        if found != entry.generation or digest != entry.manifest:
            if found == entry.generation:
                where = "another gallery of that generation"
            else:
                where = f"{found}, {'ahead' if found > entry.generation else 'behind'}"
            self.gallery.close()
            raise MemberError(
                f"member {entry.name!r}: expected {entry.path} at generation {entry.generation}, found {where}; "
                "if that is right, let the cluster take it up (Cluster.update)"
            )
        self._snapshot = self.gallery.snapshot()

    def after_fork(self) -> None:
        """Replace the inherited lock."""
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the gallery."""
        self.gallery.close()

    def manifest(self) -> Manifest:
        """Return what the gallery consists of."""
        return self._snapshot.manifest

    def process(self) -> int:
        """Return the id of the process that has the gallery open."""
        return os.getpid()

    def require_files(self) -> None:
        """Check that the files of the gallery are there, with the sizes that its manifest says.

        Raises:
            MemberError: one is not.
        """
        manifest = self.manifest()
        files = (*manifest.shards, manifest.index, manifest.keys)
        for name, size in [(file.file, file.bytes) for file in files if file]:
            path = self._snapshot.files.path(name)
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                raise MemberError(
                    f"member {self.entry.name!r}: expected {path} with {size} bytes, found "
                    f"{'no such file' if found is None else found}; copy the whole gallery"
                )

    # Names and image features.

    def search(self, features: Array, k: int, without: Ids, nprobe: int | None) -> tuple[Ids, Array]:
        """Find the nearest images: at most k, by rows, with squared distances (m, <= k); see Gallery.search."""
        k = min(k, len(self._snapshot) - int(np.count_nonzero(~self._snapshot.removed_mask[without])))
        if k < 1:
            return np.empty((len(features), 0), np.int64), np.empty((len(features), 0), np.float32)
        return self._snapshot.search(features, k, without, nprobe)

    def trusted(self) -> dict[str, str]:
        """Return the digests of the images that a person has confirmed, by key."""
        return read_trusted_file(self.gallery.file(TRUSTED))

    def find(self, keys: Sequence[str]) -> list[int | None]:
        """Return the rows of keys; None: not here."""
        return self._snapshot.find_exactly(keys)

    def features(self, rows: Ids) -> Array:
        """Return the image features of rows (n,): (n, d)."""
        return self._snapshot.rows.read(rows)

    def texts(self, rows: Ids, column: str) -> list[str]:
        """Return the keys, digests or sources of rows."""
        return self._snapshot.rows.texts(rows, column)

    def shown(self, row: int) -> str:
        """Return a key to show in messages, even if it is damaged."""
        return self._snapshot.shown(row)

    def image_checksums(self, rows: Ids) -> Array:
        """Return the checksums of the image features of rows."""
        return self._snapshot.rows.image_checksums(rows)

    def checksums(self, rows: Ids) -> Array:
        """Return the checksums of rows; see RowReader."""
        return self._snapshot.rows.checksums(rows)

    def key_hashes(self) -> Array:
        """Return the hashes of the keys of all images, ascending, and their rows: (2, n) uint64."""
        hashes = self._snapshot.indexes.key_table().hashes()
        kept: Array = hashes[:, ~self._snapshot.removed_mask[hashes[1].astype(np.int64)]]
        return kept

    # Patches.

    def levels(self, rows: Ids, verify: bool = True) -> list[Array]:
        """Return the pyramid levels of images: [(n, c, h, w), ...]."""
        return self._cache.read(self._pyramids(verify), rows)

    def match(
        self,
        query: list[Array],
        rows: Ids,
        options: Sequence[SearchOptions | None],
        scales: Sequence[float],
        keep: bool = False,
    ) -> list[Found]:
        """Find the nearest patches of a query, among those of some images.

        Args:
            query: levels [(c, h, w), ...].
            rows: of the images, in the order of the neighbours.
            options: one for each level that is searched apart; one alone: all levels are concatenated.
            scales: that levels are multiplied by, if they are concatenated.
            keep: whether nearest_patches will be asked for the same query and rows.

        Returns:
            for each of the options squared distances, and matches whose neighbour is a place among the rows.
        """
        first = options[0]
        assert first is not None
        neighbours = self.levels(rows, first.verify_reads)
        scan = not first.verify_reads
        if first.matching != "by_level":
            own, others = scaled(query, scales), scaled(neighbours, scales)
            return [tuple(as_arrays(search_finite(own, others, first, scan)))]
        if keep and first.distinct and not scan and torch_device(first.device) == "cpu":
            return self._searched(query, neighbours, rows, [one.kappa or 1 for one in options if one])
        found = []
        for own_level, level, option in zip(query, neighbours, options, strict=True):
            assert option is not None
            [one] = search_levels_finite([own_level], [level], option, scan)
            found.append(tuple(as_arrays(one)))
        return found

    def _searched(
        self, query: Sequence[Array], neighbours: Sequence[Array], rows: Ids, kappas: Sequence[int]
    ) -> list[Found]:
        """Search as match does, for distinct matches on the CPU, and keep the neighbours as they were prepared."""
        from ..patch_search.spacing import Searched  # here, as it takes torch and numba

        levels = zip(query, neighbours, kappas, strict=True)
        kept, found = zip(*(Searched.by(*one) for one in levels), strict=True)
        with self._lock:
            self._kept[_mark(query, rows)] = list(kept)
            while len(self._kept) > KEPT:
                del self._kept[next(iter(self._kept))]
        return list(found)

    def patches(self, rows: Ids, wanted: Sequence[tuple[Ids, Ids]]) -> list[Array]:
        """Return patches of some images, for each level those of (neighbours, cells), both (n,): [(n, c), ...]."""
        return [patches_at(level, *one) for level, one in zip(self.levels(rows), wanted, strict=True)]

    def nearest_patches(
        self,
        patches: Sequence[Array],
        rows: Ids,
        like: Sequence[Array],
        cells: Sequence[Ids],
        wanted: tuple[int, str | None],
    ) -> list[tuple[Array, Array]]:
        """Find the nearest patch of each of some images, for patches of each level; see spacing.nearest_of_each.

        Args:
            patches: of each level, (n, c).
            rows: of the images.
            like: levels [(c, h, w), ...] whose means are subtracted.
            cells: of each level, (n,) a patch of the query that was matched with each.
            wanted: the number of images, and the device.
        """
        from ..patch_search.spacing import nearest_of_each  # here, as it takes torch and numba

        count, device = min(wanted[0], len(rows)), wanted[1]
        with self._lock:
            kept = self._kept.pop(_mark(like, rows), None)
        if kept is not None:
            return [level.nearest(one, at, count) for level, one, at in zip(kept, patches, cells, strict=True)]
        levels = zip(patches, self.levels(rows), like, strict=True)
        return [nearest_of_each(one, level, mean, count, device) for one, level, mean in levels]

    def _pyramids(self, verify: bool) -> PyramidSource:
        if self.extractor is None and not self._snapshot.manifest.schema.has_levels:
            self.extractor = self.gallery.load_extractor()
        return pyramids_of(self._snapshot, self.extractor, self._normal, verify)  # type: ignore[arg-type]

    # What changes it, or reads all of it.

    def problems(self, files: bool = True) -> list[Any]:
        """Return what verify finds."""
        return self.gallery.verify(files, self._normal)


def _mark(query: Sequence[Array], rows: Ids) -> bytes:
    """Return what a query and the images that it is compared with are known by."""
    content = xxhash.xxh3_128(rows.tobytes())
    for level in query:
        content.update(level.tobytes())
    return content.digest()


def known(name: str, path: str | Path, node: str | None = None) -> tuple[MemberEntry, Gallery]:
    """Return what a cluster has to know of a gallery as it is now, and the gallery.

    Raises:
        MemberError: it cannot be opened.
    """
    folder = Path(path).absolute()
    digest = gallery_digest(folder)  # before: if a commit comes between, opening the member says so
    try:
        gallery = Gallery.open(folder)
    except GalleryError as error:
        raise MemberError(f"member {name!r}: {error}") from error
    return MemberEntry(name, str(folder), gallery.generation, len(gallery), digest, node), gallery
