"""Which FAISS index for so many images: what the names stand for, and what `auto` takes, with its reasons.

The kind is the gallery's, for all who read it; the device is a machine's, and does not count. HNSW is never taken: on
two cores it took 4 to 7 times as long to build as lists, was no faster at the same recall, and did not reach 0.99 where
images come in clusters (benchmarks/scaling.py measures both).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import faiss
import numpy as np

from ..arrays import Array
from ..errors import OptionError
from ..options import MIB, IndexOptions

NAMES = ("flat", "ivf", "ivf-sq", "ivf-pq", "hnsw")
IVF_FROM = 50_000  # images from which `auto` leaves flat: below, a flat scan is over in some 25 ms
POINTS_A_LIST = 39  # FAISS's own minimum of training points for a list
VARIANCE = 0.9  # share of the image features' variance that codes keep: candidates are then compared exactly
STEP = 32  # principal dimensions come in multiples of this, for the compiled loops
ID_BYTES = 8  # of an entry in a list, besides its code
# Codes and the dimensions that a byte of them holds. PQ takes more time than SQ, in training and in every search.
SCALAR = (("SQ8", 1), ("SQ4", 2))
PRODUCT = (("PQ{}", 2), ("PQ{}", 4), ("PQ{}", 8))

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


def kinds(options: IndexOptions, n: int, d: int, spectrum: Spectrum) -> Iterator[Kind]:
    """Yield the indexes for n image features of d dimensions that are worth a try, the preferred one first.

    Those after it keep more of each vector, for when the recall wanted is not reached.

    Raises:
        OptionError: more lists than images.
    """
    name, memory = options.kind, memory_of(options)
    exact = f"{n} images of {d} dimensions take {_size(4 * n * d)} as they are"
    if name not in ("auto", *NAMES):
        yield Kind(name, f"{name}, as asked for")
    elif name == "flat" or (name == "auto" and n < IVF_FROM and 4 * n * d <= memory):
        yield Kind("Flat", f"flat, exact: {exact}")
    elif name == "ivf":
        yield Kind(f"{_lists(options, n)},Flat", f"ivf: {exact}, searched by lists")
    else:
        variances, steps = spectrum(), []
        share = np.cumsum(variances) / max(float(np.sum(variances)), 1e-30)
        for m in _dimensions(share, d):
            kept = f"{m} of {d} dimensions keep {share[m - 1]:.0%} of the variance" if m < d else f"all {d} dimensions"
            steps.append((m, f"PCA{m}," if m < d else "", f"{kept}; candidates are compared exactly"))
        yield from _of_codes(options, n, d, steps, exact)


def _of_codes(options: IndexOptions, n: int, d: int, steps: list[tuple[int, str, str]], exact: str) -> Iterator[Kind]:
    """Yield indexes over codes of some principal dimensions (number, factory string, in words), the least first."""
    name, memory, lists = options.kind, memory_of(options), _lists(options, n)
    for m, first, kept in steps:
        dimensions = m if first else None
        if name == "hnsw":
            yield Kind(f"{first}HNSW32_SQ8", f"hnsw over 8-bit codes: {kept}", dimensions)
            return  # where its graph does not lead, longer codes do not help
        codes = [*SCALAR, *PRODUCT[1:]] if name == "auto" else SCALAR if name == "ivf-sq" else PRODUCT
        made = [(code.format(m // per_byte), n * (m // per_byte + ID_BYTES)) for code, per_byte in codes if m % 8 == 0]
        made = made or [("SQ8", n * (m + ID_BYTES))]
        fitting = [(code, size) for code, size in made if size <= memory]
        if fitting or name != "auto":  # what was asked for by name is made, whatever it takes
            code, size = (fitting or made[-1:])[0]
            reason = f"{exact}; {_size(size)} in codes, of {_size(memory)} of memory; {kept}"
            yield Kind(f"{first}{lists},{code}", f"{_name_of(code)}: {reason}", dimensions)
    for m, first, kept in steps if name == "auto" else []:
        reason = f"codes of {_size(n * (m + ID_BYTES))} for {_size(memory)} of memory, read as they are needed"
        yield Kind(f"{first}{lists},SQ8", f"ivf-sq in the file: {reason}; {kept}", m if first else None, mapped=True)


def _name_of(code: str) -> str:
    return "ivf-sq" if code.startswith("SQ") else "ivf-pq"


def _dimensions(share: Array, d: int) -> Iterator[int]:
    """Yield numbers of principal dimensions: those that keep VARIANCE, then twice as many, up to all."""
    m = -(-(int(np.searchsorted(share, VARIANCE)) + 1) // STEP) * STEP
    while 2 * m <= d:
        yield m
        m *= 2
    yield d


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


def about_bytes(n: int, d: int) -> int:
    """Return about what `auto` will take for n image features of d dimensions: how many of these count is not known."""
    return 4 * n * d if n < IVF_FROM else n * (d // 10 + ID_BYTES)


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
        index = faiss.index_factory(d, next(kinds(options, 0, d, lambda: np.ones(d))).factory)
    except RuntimeError as error:
        raise OptionError(expected) from error
    if isinstance(index, faiss.IndexIDMap):
        raise OptionError(f"{expected}; leave IDMap away: ids are those of the gallery anyway")
    if isinstance(index, faiss.IndexLSH):
        raise OptionError(f"{expected}, whose distances are not squared L2")
