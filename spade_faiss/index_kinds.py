"""Which FAISS index for so many images: what the names stand for, and what `auto` takes, with its reasons."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass

import faiss
import numpy as np

from .errors import OptionError
from .features import Array
from .options import MIB, IndexOptions

NAMES = ("flat", "ivf", "ivf-sq", "ivf-pq", "hnsw")
IVF_FROM = 50_000  # images from which `auto` leaves flat: below, a flat scan is over in some 25 ms
POINTS_A_LIST = 39  # FAISS's own minimum of training points for a list
VARIANCE = 0.9  # share of the image features' variance that codes keep: candidates are then compared exactly
STEP = 32  # principal dimensions come in multiples of this, for the compiled loops
ID_BYTES = 8  # of an entry in a list, besides its code
PQ_BYTES = (2, 4, 8)  # principal dimensions a byte of a product quantiser's code, the longest codes first

Spectrum = Callable[[], Array]  # variances of the image features' principal directions, descending


@dataclass(frozen=True)
class Kind:
    """A FAISS factory string, and why it was taken."""

    factory: str
    reason: str
    dimensions: int | None = None  # principal ones, that the factory string begins with; None: it does not
    mapped: bool = False  # its lists stay in the file, from where the system reads what a search visits

    @property
    def inner(self) -> str:
        """The factory string of what comes after the principal dimensions."""
        return self.factory.partition(",")[2] if self.dimensions else self.factory


def choose(options: IndexOptions, n: int, d: int, spectrum: Spectrum) -> Kind:
    """Choose the index for n image features of d dimensions.

    Raises:
        OptionError: more lists than images.
    """
    if options.kind not in ("auto", *NAMES):
        return Kind(options.kind, f"{options.kind}, as asked for")
    name, memory = options.kind, memory_of(options)
    exact = f"{n} images of {d} dimensions take {_size(4 * n * d)} as they are"
    if name == "flat" or (name == "auto" and n < IVF_FROM and 4 * n * d <= memory):
        return Kind("Flat", f"flat, exact: {exact}")
    if name == "ivf":
        return Kind(f"{_lists(options, n)},Flat", f"ivf: {exact}, searched by lists")
    m = principal_dimensions(spectrum(), d)
    dims, first, kept = None, "", f"fewer than {d} dimensions would lose too much"
    if m < d:
        dims, first, kept = m, f"PCA{m},", f"{m} of {d} dimensions keep {VARIANCE:.0%} of the variance"
    if name == "hnsw":
        return Kind(f"{first}HNSW32_SQ8", f"hnsw over 8-bit codes: {kept}; candidates are compared exactly", dims)
    lists, then = _lists(options, n), "candidates are compared exactly, with the stored image features"
    scalar, sizes = f"{first}{lists},SQ8", {m: _bytes(n, m)}
    sizes |= {max(1, m // step): _bytes(n, m // step) for step in PQ_BYTES if m % step == 0}
    if name == "ivf-sq" or (name == "auto" and sizes[m] <= memory):
        return Kind(scalar, f"ivf-sq: {exact}; {kept}, in 8-bit codes {_size(sizes[m])} of memory; {then}", dims)
    fitting = [code for code in sorted(sizes, reverse=True) if code < m and sizes[code] <= memory]
    if fitting or name == "ivf-pq":
        code = fitting[0] if fitting else min(sizes)
        reason = f"ivf-pq: 8-bit codes would take {_size(sizes[m])}, these {_size(sizes[code])}; {kept}; {then}"
        return Kind(f"{first}{lists},PQ{code}", reason, dims)
    reason = f"ivf-sq in the file: {_size(sizes[m])} of codes for {_size(memory)} of memory, read as they are needed"
    return Kind(scalar, f"{reason}; {then}", dims, mapped=True)


def principal_dimensions(variances: Array, d: int) -> int:
    """Return how many principal dimensions keep VARIANCE; d where that would save less than half."""
    share = np.cumsum(variances) / max(float(np.sum(variances)), 1e-30)
    wanted = int(np.searchsorted(share, VARIANCE)) + 1
    rounded = -(-wanted // STEP) * STEP
    return rounded if 2 * rounded <= d else d


def number_of_lists(options: IndexOptions, n: int) -> int:
    """Return the number of IVF lists for n images.

    Raises:
        OptionError: more lists than images were asked for.
    """
    if options.nlist is not None and n and options.nlist > n:
        raise OptionError(f"nlist: expected at most the number of images, {n}, found {options.nlist}")
    # 4 sqrt(N): a query then visits about as many centroids as vectors at nprobe = nlist / 16 (FAISS's guidelines).
    return options.nlist or max(1, min(int(4 * np.sqrt(n)), n // POINTS_A_LIST))


def _lists(options: IndexOptions, n: int) -> str:
    return f"IVF{number_of_lists(options, n)}"


def _bytes(n: int, code: int) -> int:
    return n * (code + ID_BYTES)


def memory_of(options: IndexOptions) -> int:
    """Return the memory that the index may take, in bytes: half of this machine's, where none was given."""
    if options.memory is not None:
        return options.memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):  # not on Windows
        return 4096 * MIB


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def check_kind(options: IndexOptions, d: int) -> None:
    """Check that FAISS can make such an index of d dimensions.

    Raises:
        OptionError: it cannot.
    """
    names = ", ".join(("auto", *NAMES))
    expected = f"index: expected {names} or a FAISS factory string for {d} dimensions, found {options.kind!r}"
    if re.search(r"\D0+(\D|$)", options.kind):  # HNSW0 and its like end the process inside FAISS
        raise OptionError(f"{expected}, with a zero in it")
    try:
        index = faiss.index_factory(d, choose(options, 0, d, lambda: np.ones(d)).factory)
    except RuntimeError as error:
        raise OptionError(expected) from error
    if isinstance(index, faiss.IndexIDMap):
        raise OptionError(f"{expected}; leave IDMap away: ids are those of the gallery anyway")
    if isinstance(index, faiss.IndexLSH):
        raise OptionError(f"{expected}, whose distances are not squared L2")
