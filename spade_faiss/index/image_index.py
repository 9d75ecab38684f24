"""The FAISS index over image features: build, search, save and load."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import xxhash
from numpy.typing import NDArray

from ..arrays import ROUNDING, Array, Ids
from ..errors import CorruptGalleryError, NotEnoughImagesError, OptionError
from ..options import MIB, IndexOptions
from ..system.atomic_files import storage_errors, whole_file
from ..system.devices import gpu_lock
from .exact import compared, nearest_of_all
from .factory import kinds
from .faiss_calls import one_thread, placed, search_parameters
from .metadata import IndexFacts
from .training import ImageFeatures, Principal, train
from .tuning import tune

GPU_MAX_K = 2048  # neighbours that FAISS's GPU indexes return at most
SPARE = 2  # neighbours fetched beyond k, to notice when rounding may have kept one out
OVERFETCH = 64  # neighbours fetched beyond k at first, to replace removed ones
EXACT = (faiss.IndexFlat, faiss.IndexIVFFlat)  # distances are exact except for rounding


@dataclass(frozen=True)
class IndexFile:
    """The file of an index, as it was saved."""

    path: Path
    checksum: str  # that ImageIndex.save returned
    dimension: int  # d of the image features
    facts: IndexFacts


@dataclass
class _Search:
    """One search: which images count, and how many to fetch from FAISS."""

    without: Ids  # ids that must not be returned
    removed: NDArray[np.bool_] | None  # whether each row is removed
    k: int
    available: int  # images that count
    wanted: int  # of those fetched, so many must count: k, or more candidates than k
    fetch: int
    nprobe: int  # 0: the index has no lists

    def usable(self, ids: Ids) -> NDArray[np.bool_]:
        """Return which of the images found count."""
        usable = ids >= 0
        if len(self.without):
            usable &= ~np.isin(ids, self.without)
        if self.removed is not None:
            usable &= ~self.removed[ids]
        return usable


class ImageIndex:
    """Nearest images by squared L2. A row's number is its id."""

    def __init__(
        self, index: Any, options: IndexOptions, facts: IndexFacts, features: ImageFeatures | None = None
    ) -> None:
        """Wrap a FAISS index.

        Args:
            index: on the CPU.
            options: device, and nprobe if one was given.
            facts: how it was made and is searched.
            features: the image features in it, which are compared exactly with queries if the index holds codes. None:
                distances are those between codes.
        """
        self.facts = facts
        self.stands_in = False  # whether it replaces a kind that needs more images
        self._index = index
        self._options = options
        self._features = features
        self._exact = isinstance(index, EXACT)
        self._tail: Any = None  # index of the newer images, beside a mapped one, which cannot grow
        self._on_device: Any = None

    @classmethod
    def build(cls, features: ImageFeatures, d: int, options: IndexOptions) -> ImageIndex:
        """Train if the kind needs it, add all image features of d dimensions, and tune to the recall wanted.

        Raises:
            OptionError: too few images for the kind.
        """
        n = len(features)
        principal = lru_cache(lambda: Principal.of(features))
        best: ImageIndex | None = None
        for kind in kinds(options, n, d, lambda: principal().variances if n else np.ones(d)):
            index = faiss.index_factory(kind.dimensions or d, kind.inner)
            if kind.dimensions:
                index = faiss.IndexPreTransform(principal().transform(kind.dimensions), index)
            built = cls(index, options, IndexFacts(kind.factory, kind.reason, mapped=kind.mapped), features)
            built._fill(features, options)
            if best is None or (built.facts.recall or 0) > (best.facts.recall or 0):
                best = built
            if built.facts.recall is None or built.facts.recall >= options.recall or options.nprobe:
                return built
        assert best is not None
        return best

    def _fill(self, features: ImageFeatures, options: IndexOptions) -> None:
        """Train, add and tune."""
        if not self._index.is_trained and len(features):
            train(self._index, features, options, self.facts.factory)
        for block in features.blocks():
            self.add(block)
        balance = self._imbalance()
        self.facts = replace(self.facts, imbalance=balance, imbalance_trained=balance)
        self.tune()

    def tune(self) -> None:
        """Choose how many lists to visit and candidates to compare for the recall wanted; see tuning.tune."""
        ivf = faiss.try_extract_index_ivf(self._index)
        self.facts = replace(self.facts, imbalance=self._imbalance())
        if self._features is None or len(self) < 2 or isinstance(self._index, faiss.IndexFlat):
            return

        def search(queries: Array, fetch: int, nprobe: int) -> Ids:
            return self._search(queries, fetch, nprobe)[1]

        nlist, given = ivf.nlist if ivf else None, self._options.nprobe
        visited = [min(nlist, given)] if nlist and given else None
        found = tune(search, nlist, not self._exact, self._features, self._options.recall, visited)
        self.facts = replace(self.facts, **asdict(found))

    def _imbalance(self) -> float:
        ivf = faiss.try_extract_index_ivf(self._index)
        return max(1.0, float(ivf.invlists.imbalance_factor())) if ivf and len(self) else 1.0

    def __len__(self) -> int:
        return int(self._index.ntotal) + (int(self._tail.ntotal) if self._tail else 0)

    @property
    def dimension(self) -> int:
        """Dimensions of the image features."""
        return int(self._index.d)

    def add(self, features: Array) -> None:
        """Append image features, (n, d) float32."""
        if not len(features):
            return
        growing = self._index
        if self._is_mapped():  # adding to it would end the process inside FAISS
            growing = self._tail = self._tail or faiss.IndexFlatL2(self.dimension)
        growing.add(np.ascontiguousarray(features, dtype=np.float32))
        self._on_device = None

    def _is_mapped(self) -> bool:
        ivf = faiss.try_extract_index_ivf(self._index)
        return bool(ivf) and isinstance(faiss.downcast_InvertedLists(ivf.invlists), faiss.OnDiskInvertedLists)

    def search(
        self,
        queries: Array,
        k: int,
        without: Ids | None = None,
        nprobe: int | None = None,
        removed: NDArray[np.bool_] | None = None,
    ) -> tuple[Ids, NDArray[np.float32]]:
        """Find the k nearest images of each query.

        Args:
            queries: (m, d) float32.
            k: how many.
            without: ids that must not be returned, such as the query's own.
            nprobe: IVF lists to visit; raised where they hold fewer than k images. None: as tuned.
            removed: whether each row is removed, (len(self),); None: no row is.

        Returns:
            ids (m, k) int64 and squared distances (m, k) float32, ascending; ties in the order of ids.

        Raises:
            NotEnoughImagesError: there are fewer than k images.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        search = self._planned(k, without, nprobe, removed)
        ivf = faiss.try_extract_index_ivf(self._index)
        while True:
            distances, ids = self._search(queries, search.fetch, search.nprobe)
            usable = search.usable(ids)
            found = usable.sum(axis=1).min(initial=k)
            indexed = slice(min(search.fetch, int(self._index.ntotal)))  # the tail's distances are no measure for codes
            chosen = usable[:, indexed].sum(axis=1).min(initial=search.wanted)
            # Lists that end before they gave as many candidates as wanted have no more of them.
            if found >= k and (chosen >= search.wanted or (ids < 0).any()):
                break
            if search.fetch == len(self) and found >= k:
                break
            if search.fetch == len(self) and (not ivf or search.nprobe == ivf.nlist):
                if self._features is not None:  # a graph yields no more if most of what it leads through is removed
                    return nearest_of_all(queries, k, search.without, removed, self._features)
                raise NotEnoughImagesError(
                    f"index {self._options.kind}: expected {k} neighbours of {search.available} images, "
                    f"found {found} for one query; use a smaller K or another kind of index"
                )
            search.fetch = min(len(self), 2 * search.fetch)
            search.nprobe = min(ivf.nlist, 2 * search.nprobe) if ivf and found < k else search.nprobe
        if isinstance(self._index, faiss.IndexFlat):
            self._settle(queries, ids, distances, np.where(usable, distances, np.inf), search)
            usable = search.usable(ids)
        elif not self._exact and self._features is not None:
            for part in (indexed, slice(indexed.stop, None)):
                usable[:, part] &= usable[:, part].cumsum(axis=1) <= search.wanted
            distances = compared(queries, ids, usable, self._features)
        distances[~usable] = np.inf
        order = np.lexsort((ids, distances), axis=1)[:, :k]
        return np.take_along_axis(ids, order, 1), np.take_along_axis(distances, order, 1)

    def stored(self, first: int, count: int) -> NDArray[np.float32] | None:
        """Return the image features of some rows as the index has them, (count, d); None: it is not flat."""
        if not isinstance(self._index, faiss.IndexFlat):
            return None
        found: NDArray[np.float32] = self._index.reconstruct_n(first, count)
        return found

    def _planned(self, k: int, without: Ids | None, nprobe: int | None, removed: NDArray[np.bool_] | None) -> _Search:
        """Plan a search; see search."""
        if k < 1:
            raise OptionError(f"k: expected a number >= 1, found {k}")
        without = np.empty(0, np.int64) if without is None else np.unique(without)
        without = without[(without >= 0) & (without < len(self))]
        unusable = len(without)
        if removed is not None:
            unusable += int(np.count_nonzero(removed)) - int(np.count_nonzero(removed[without]))
        available = len(self) - unusable
        if k > available:
            raise NotEnoughImagesError(f"expected at least K = {k} normal images, found {available}; use a smaller K")
        wanted = k if self._exact else min(available, int(np.ceil(k * self.facts.candidates)))
        fetch = min(len(self), max(wanted, k + SPARE) + min(unusable, OVERFETCH))
        ivf = faiss.try_extract_index_ivf(self._index)
        return _Search(without, removed, k, available, wanted, fetch, self._nprobe(ivf.nlist, nprobe) if ivf else 0)

    def _search(self, queries: Array, fetch: int, nprobe: int) -> tuple[Array, Ids]:
        index = self._placed() if fetch <= GPU_MAX_K else self._index
        params = search_parameters(index, nprobe) if nprobe else None
        # A query among codes ends before a second thread is awake, and would wait for it on a busy machine.
        threads = one_thread() if len(queries) == 1 and not self._exact else contextlib.nullcontext()
        with gpu_lock if index is not self._index else threads:
            distances, ids = index.search(queries, min(fetch, int(index.ntotal)), params=params)
        if self._tail:
            tail, at = self._tail.search(queries, min(fetch, int(self._tail.ntotal)))
            distances, ids = np.hstack([distances, tail]), np.hstack([ids, at + int(self._index.ntotal)])
        return distances, ids

    def _settle(self, queries: Array, ids: Ids, distances: Array, usable: Array, search: _Search) -> None:
        """Replace the distances of a flat index by sums of squares, in place.

        For batches FAISS computes |q|^2 + |x|^2 - 2 q x, whose rounding swallows small distances. If rounding may also
        have kept an image out of those fetched (as with copies), the query is searched again alone, which FAISS does by
        sums of squares. What is returned is added up in one order in either case, so that the distance of a pair
        does not depend on what else is searched: galleries that are searched apart are merged by it.
        """

        def exactly(query: Array, found: Ids) -> Array:
            difference = self._index.reconstruct_batch(found) - query
            sums: Array = np.einsum("ij,ij->i", difference, difference)
            return sums

        for row, query in enumerate(queries):
            exact = exactly(query, ids[row])
            farthest = np.partition(np.where(np.isfinite(usable[row]), exact, np.inf), search.k - 1)[search.k - 1]
            doubt = ROUNDING * np.sqrt(len(query)) * (2 * np.linalg.norm(query) + np.sqrt(farthest)) ** 2
            if ids.shape[1] < len(self) and distances[row, -1] - doubt <= farthest:
                ids[row] = self._alone(query, ids.shape[1], search)
                exact = exactly(query, ids[row])
            distances[row] = exact

    def _alone(self, query: Array, number: int, search: _Search) -> Ids:
        """Search for one query; returns the ids of so many images, of which k count, those first."""
        fetch = number
        while True:
            ids: Ids = self._index.search(query[None], fetch)[1][0]
            usable = search.usable(ids)
            if usable.sum() >= search.k or fetch == len(self):
                return np.concatenate([ids[usable], ids[~usable]])[:number]
            fetch = min(len(self), 2 * fetch)

    def _nprobe(self, nlist: int, wanted: int | None) -> int:
        return min(nlist, wanted or self._options.nprobe or self.facts.nprobe or max(8, nlist // 16))

    def _placed(self) -> Any:
        if self._on_device is None:
            self._on_device = placed(self._index, self._options.device)
        return self._on_device

    def save(self, path: Path) -> str:
        """Write the index's file; returns its checksum (xxh3-64, hexadecimal)."""
        digest = xxhash.xxh3_64()
        with storage_errors(f"cannot write {path}"), whole_file(path) as file:

            def write(block: bytes) -> None:  # FAISS's own writer prints errors on stderr
                digest.update(block)
                file.write(block)

            faiss.write_index(self._index, faiss.PyCallbackIOWriter(write))
        return digest.hexdigest()

    @classmethod
    def load(
        cls, file: IndexFile, options: IndexOptions, features: ImageFeatures | None = None, grows: bool = False
    ) -> ImageIndex:
        """Read an index's file. FAISS trusts what it reads: a file with another checksum never reaches it.

        Args:
            file: the file; if its facts say `mapped`, lists stay in it.
            options: see ImageIndex.
            features: see ImageIndex.
            grows: read a mapped index into memory too, so that it can be added to and saved.

        Raises:
            CorruptGalleryError: the file is missing, is not what was written, or has another dimension.
        """
        try:
            found = _file_checksum(file.path)
            if found != file.checksum:
                raise CorruptGalleryError(f"{file.path}: expected checksum {file.checksum}, found {found}")
            index = faiss.read_index(str(file.path), faiss.IO_FLAG_MMAP if file.facts.mapped and not grows else 0)
        except (OSError, RuntimeError) as error:
            raise CorruptGalleryError(str(error).splitlines()[0]) from error
        if index.d != file.dimension:
            raise CorruptGalleryError(f"{file.path}: expected an index of {file.dimension} dimensions, found {index.d}")
        return cls(index, options, file.facts, features)


def _file_checksum(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(16 * MIB):
            digest.update(block)
    return digest.hexdigest()
