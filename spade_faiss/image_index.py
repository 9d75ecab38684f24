"""The FAISS index over image features: which kind, training, search, its file."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import xxhash
from numpy.typing import NDArray

from .devices import faiss_device, free_gpu_bytes, gpu_lock, gpu_number, gpu_resources
from .errors import CorruptGalleryError, NotEnoughImagesError, OptionError
from .features import Array
from .options import MIB, IndexOptions
from .storage import TEMPORARY, publish, storage_errors

Ids = NDArray[np.int64]
Stream = Callable[[], Iterator[Array]]  # opens a new pass over all image features, in blocks of (n, d) float32

IVF_FROM = 100_000  # images from which `auto` takes ivf: below, a flat scan is over in some 50 ms
POINTS_A_LIST = 39  # FAISS's own minimum of training points for a list
TRAIN_A_LIST = 64  # training points for a list where there are enough
SEED = 0
ROUNDING = 4 * 2.0**-24  # of a float32 sum of d products, times sqrt(d); a few times what was ever seen
GPU_MAX_K = 2048  # of FAISS's GPU indexes
SPARE = 2  # neighbours fetched beyond k, to see that rounding has kept none out
OVERFETCH = 64  # neighbours fetched beyond k at first, to stand in for removed ones


def resolve_kind(options: IndexOptions, n: int) -> str:
    """Return the FAISS factory string for n images.

    Raises:
        OptionError: more lists than images.
    """
    kind = options.kind
    if kind == "auto":
        kind = "ivf" if n >= IVF_FROM else "flat"
    if kind == "flat":
        return "Flat"
    if kind != "ivf":
        return kind
    if options.nlist is not None and n and options.nlist > n:
        raise OptionError(f"nlist: expected at most the number of images, {n}, found {options.nlist}")
    # 4 sqrt(N): a query then visits about as many centroids as vectors at nprobe = nlist / 16 (FAISS's guidelines).
    nlist = options.nlist or max(1, min(int(4 * np.sqrt(n)), n // POINTS_A_LIST))
    return f"IVF{nlist},Flat"


def check_kind(options: IndexOptions, d: int) -> None:
    """Check that FAISS can make such an index of d dimensions.

    Raises:
        OptionError: it cannot.
    """
    expected = f"index: expected auto, flat, ivf or a FAISS factory string for {d} dimensions, found {options.kind!r}"
    if re.search(r"\D0+(\D|$)", options.kind):  # HNSW0 and its like end the process inside FAISS
        raise OptionError(f"{expected}, with a zero in it")
    try:
        index = faiss.index_factory(d, resolve_kind(options, 0))
    except RuntimeError as error:
        raise OptionError(expected) from error
    if isinstance(index, faiss.IndexIDMap):
        raise OptionError(f"{expected}; leave IDMap away: ids are those of the gallery anyway")
    if isinstance(index, faiss.IndexLSH):
        raise OptionError(f"{expected}, whose distances are not squared L2")


class ImageIndex:
    """Nearest images by squared L2. A row's number is its id."""

    def __init__(self, index: Any, options: IndexOptions, stands_in: bool = False) -> None:
        self.stands_in = stands_in  # for a kind that takes more images than there are
        self._index = index  # on the CPU
        self._options = options
        self._on_device: Any = None

    @classmethod
    def build(cls, stream: Stream, n: int, d: int, options: IndexOptions, stands_in: bool = False) -> ImageIndex:
        """Train, where the kind needs it, and add n image features of d dimensions.

        Raises:
            OptionError: the kind cannot be made of so few images.
        """
        factory = resolve_kind(options, n)
        index = faiss.index_factory(d, factory)
        if not index.is_trained and n:
            _train(index, _sample(stream, n, _train_images(index, n, options)), factory)
        built = cls(index, options, stands_in)
        if n:
            for block in stream():
                built.add(block)
        return built

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def dimension(self) -> int:
        """Dimensions of the image features."""
        return int(self._index.d)

    @property
    def description(self) -> str:
        """The kind, with its number of lists and of those visited."""
        ivf = faiss.try_extract_index_ivf(self._index)
        name = type(self._index).__name__
        return f"{name} (nlist {ivf.nlist}, nprobe {self._nprobe(ivf.nlist, None)})" if ivf else name

    def add(self, features: Array) -> None:
        """Append image features, (n, d) float32."""
        if len(features):
            self._index.add(np.ascontiguousarray(features, dtype=np.float32))
            self._on_device = None

    def search(
        self, queries: Array, k: int, without: Ids | None = None, nprobe: int | None = None
    ) -> tuple[Ids, NDArray[np.float32]]:
        """Find the k nearest images of each query.

        Args:
            queries: (m, d) float32.
            k: how many.
            without: ids that must not be returned, such as removed images.
            nprobe: IVF lists to visit; raised where they hold fewer than k images. None: as the index was made.

        Returns:
            ids (m, k) int64 and squared distances (m, k) float32, ascending; ties in the order of ids.

        Raises:
            NotEnoughImagesError: there are fewer than k images.
        """
        if k < 1:
            raise OptionError(f"k: expected a number >= 1, found {k}")
        without = np.empty(0, np.int64) if without is None else np.unique(without)
        without = without[(without >= 0) & (without < len(self))]
        available = len(self) - len(without)
        if k > available:
            raise NotEnoughImagesError(f"expected at least K = {k} normal images, found {available}; use a smaller K")
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        ivf = faiss.try_extract_index_ivf(self._index)
        fetch = min(len(self), k + SPARE + min(len(without), OVERFETCH))
        probes = self._nprobe(ivf.nlist, nprobe) if ivf else 0
        while True:
            distances, ids = self._search(queries, fetch, probes)
            usable = (ids >= 0) & ~np.isin(ids, without)
            if usable.sum(axis=1).min(initial=k) >= k:
                break
            if fetch == len(self) and (not ivf or probes == ivf.nlist):
                raise NotEnoughImagesError(
                    f"index {self._options.kind}: expected {k} neighbours of {available} images, "
                    f"found {int(usable.sum(axis=1).min())} for one query; use a smaller K or another kind of index"
                )
            fetch = min(len(self), 2 * fetch)
            probes = min(ivf.nlist, 2 * probes) if ivf else 0
        if isinstance(self._index, faiss.IndexFlat):
            self._settle(queries, ids, distances, np.where(usable, distances, np.inf), k)
            usable = ~np.isin(ids, without)
        distances[~usable] = np.inf
        order = np.lexsort((ids, distances), axis=1)[:, :k]
        return np.take_along_axis(ids, order, 1), np.take_along_axis(distances, order, 1)

    def _search(self, queries: Array, fetch: int, nprobe: int) -> tuple[Array, Ids]:
        index = self._placed() if fetch <= GPU_MAX_K else self._index
        params = _search_parameters(index, nprobe) if nprobe else None
        with gpu_lock if index is not self._index else contextlib.nullcontext():
            distances, ids = index.search(queries, fetch, params=params)
        return distances, ids

    def _settle(self, queries: Array, ids: Ids, distances: Array, usable: Array, k: int) -> None:
        """Put sums of squares, in place, where a flat index computed |q|^2 + |x|^2 - 2 q x, as it does for batches.

        Small distances drown in its rounding. Where that could also have kept an image out of those fetched (copies),
        the query is searched alone, which FAISS does by sums of squares.
        """
        for row, query in enumerate(queries):
            difference = self._index.reconstruct_batch(ids[row]) - query
            exact = np.einsum("ij,ij->i", difference, difference)
            farthest = np.partition(np.where(np.isfinite(usable[row]), exact, np.inf), k - 1)[k - 1]
            doubt = ROUNDING * np.sqrt(len(query)) * (2 * np.linalg.norm(query) + np.sqrt(farthest)) ** 2
            if ids.shape[1] < len(self) and distances[row, -1] - doubt <= farthest:
                distances[row], ids[row] = (found[0] for found in self._index.search(query[None], ids.shape[1]))
            else:
                distances[row] = exact

    def _nprobe(self, nlist: int, wanted: int | None) -> int:
        return min(nlist, wanted or self._options.nprobe or max(8, nlist // 16))

    def _placed(self) -> Any:
        if self._on_device is None:
            self._on_device = _place(self._index, self._options.device)
        return self._on_device

    def save(self, path: Path) -> str:
        """Write the index's file; returns its checksum (xxh3-64, hexadecimal)."""
        temporary = path.with_name(path.name + TEMPORARY)
        with storage_errors(f"cannot write {path}"):
            try:
                digest = xxhash.xxh3_64()
                with temporary.open("wb") as file:

                    def write(block: bytes) -> None:  # FAISS's own writing prints what goes wrong on stderr
                        digest.update(block)
                        file.write(block)

                    faiss.write_index(self._index, faiss.PyCallbackIOWriter(write))
                publish(temporary, path)
            except (OSError, RuntimeError):
                temporary.unlink(missing_ok=True)
                raise
        return digest.hexdigest()

    @classmethod
    def load(cls, path: Path, checksum: str, d: int, options: IndexOptions) -> ImageIndex:
        """Read an index's file. FAISS trusts what it reads: nothing reaches it whose checksum differs.

        Raises:
            CorruptGalleryError: the file is missing, is not what was written, or is of another dimension.
        """
        try:
            found = _file_checksum(path)
            if found != checksum:
                raise CorruptGalleryError(f"{path}: expected checksum {checksum}, found {found}")
            index = faiss.read_index(str(path))
        except (OSError, RuntimeError) as error:
            raise CorruptGalleryError(str(error).splitlines()[0]) from error
        if index.d != d:
            raise CorruptGalleryError(f"{path}: expected an index of {d} dimensions, found {index.d}")
        return cls(index, options)


def _search_parameters(index: Any, nprobe: int) -> Any:
    """Give nprobe with one call, never set on the index that threads share, through what wraps the IVF index."""
    if isinstance(index, faiss.IndexPreTransform):
        inner = _search_parameters(faiss.downcast_index(index.index), nprobe)
        return faiss.SearchParametersPreTransform(index_params=inner)
    if isinstance(index, faiss.IndexRefine):
        inner = _search_parameters(faiss.downcast_index(index.base_index), nprobe)
        return faiss.IndexRefineSearchParameters(k_factor=index.k_factor, base_index_params=inner)
    return faiss.SearchParametersIVF(nprobe=nprobe)


def _place(index: Any, wanted: str) -> Any:
    """Copy an index to the GPU where one was asked for, or is there and has room."""
    device = faiss_device(wanted)
    if device == "cpu":
        return index
    needed = index.ntotal * index.d * 4 + 256 * MIB
    if wanted == "auto" and needed > free_gpu_bytes(device):
        return index
    try:
        return faiss.index_cpu_to_gpu(gpu_resources(), gpu_number(device), index)
    except RuntimeError as error:  # no room, or a kind that FAISS has no GPU version of
        if wanted != "auto":
            raise OptionError(f"index cannot be put on {device}: {str(error).splitlines()[0]}") from error
        warnings.warn(f"image index stays on the CPU: {str(error).splitlines()[0]}", stacklevel=2)
        return index


def _train_images(index: Any, n: int, options: IndexOptions) -> int:
    ivf = faiss.try_extract_index_ivf(index)
    wanted = options.train_images or (max(TRAIN_A_LIST * ivf.nlist, 10_000) if ivf else 100_000)
    return min(n, wanted)


def _sample(stream: Stream, n: int, size: int) -> Array:
    """Draw a seeded sample without holding more than the sample and one block."""
    chosen = np.sort(np.random.default_rng(SEED).choice(n, size, replace=False))
    parts, start = [], 0
    for block in stream():
        low, high = np.searchsorted(chosen, (start, start + len(block)))
        parts.append(block[chosen[low:high] - start])
        start += len(block)
    return np.concatenate(parts)


def _train(index: Any, sample: Array, factory: str) -> None:
    ivf = faiss.try_extract_index_ivf(index)
    if ivf:
        ivf.cp.seed = SEED
        ivf.cp.min_points_per_centroid = 1  # the number of lists was chosen here, or by the user: no warning
    try:
        index.train(sample)
    except RuntimeError as error:
        reason = str(error).rpartition("failed: ")[2].strip()
        raise OptionError(
            f"index {factory}: cannot be trained on {len(sample)} images: {reason}; use flat, or fewer lists"
        ) from error


def _file_checksum(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(16 * MIB):
            digest.update(block)
    return digest.hexdigest()
