"""Chooses the FAISS factory string: what the names of kinds stand for, and what `auto` takes for what reason.

The choice depends on the gallery and its memory limit, not on the device. `auto` never takes HNSW: on two cores it took
4 to 7 times as long to build as lists, was no faster at the same recall, and did not reach 0.99 where images come in
clusters (benchmarks/scaling.py measures both).
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
IVF_FROM = 50_000  # images from which `auto` takes another kind than flat: below, a flat scan takes about 25 ms
POINTS_A_LIST = 39  # FAISS's own minimum of training points for a list
VARIANCE = 0.9  # share of the image features' variance that codes keep; candidates are compared exactly afterwards
STEP = 32  # numbers of principal dimensions are multiples of this, for FAISS's compiled loops
ID_BYTES = 8  # of a list's entry, besides its code
# Codes, and how many dimensions one byte holds. PQ takes more time than SQ, in training and in every search.
SCALAR = (("SQ8", 1), ("SQ4", 2))
PRODUCT = (("PQ{}", 2), ("PQ{}", 4), ("PQ{}", 8))

Spectrum = Callable[[], Array]  # variances of the image features' principal directions, descending


@dataclass(frozen=True)
class Kind:
    """A FAISS factory string, and why it was chosen."""

    factory: str
    reason: str
    dimensions: int | None = None  # principal ones, if the factory string begins with PCA
    mapped: bool = False  # its lists stay in the file, and the system reads those that a search visits

    @property
    def inner(self) -> str:
        """The factory string without the principal dimensions."""
        return self.factory.partition(",")[2] if self.dimensions else self.factory


def kinds(options: IndexOptions, n: int, d: int, spectrum: Spectrum) -> Iterator[Kind]:
    """Yield the kinds of index to try for n image features of d dimensions, the preferred one first.

    Each later one keeps more of each vector, and is tried if those before it do not reach the recall.

    Args:
        options: kind, memory, lists.
        n: number of images.
        d: dimensions of an image feature.
        spectrum: computes the variances of the principal directions; called for kinds with codes.

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
    """Yield kinds with codes of principal dimensions, fewest first; a step is (number, factory prefix, in words)."""
    name, memory, lists = options.kind, memory_of(options), _lists(options, n)
    for m, first, kept in steps:
        dimensions = m if first else None
        if name == "hnsw":
            yield Kind(f"{first}HNSW32_SQ8", f"hnsw over 8-bit codes: {kept}", dimensions)
            return  # longer codes do not help where the graph does not lead
        codes = [*SCALAR, *PRODUCT[1:]] if name == "auto" else SCALAR if name == "ivf-sq" else PRODUCT
        made = [(code.format(m // per_byte), n * (m // per_byte + ID_BYTES)) for code, per_byte in codes if m % 8 == 0]
        made = made or [("SQ8", n * (m + ID_BYTES))]
        fitting = [(code, size) for code, size in made if size <= memory]
        if fitting or name != "auto":  # a kind that was named is made, even if it exceeds the memory
            code, size = (fitting or made[-1:])[0]
            reason = f"{exact}; {_size(size)} in codes, of {_size(memory)} of memory; {kept}"
            yield Kind(f"{first}{lists},{code}", f"{_name_of(code)}: {reason}", dimensions)
    for m, first, kept in steps if name == "auto" else []:
        reason = f"codes of {_size(n * (m + ID_BYTES))} for {_size(memory)} of memory, read as they are needed"
        yield Kind(f"{first}{lists},SQ8", f"ivf-sq in the file: {reason}; {kept}", m if first else None, mapped=True)


def _name_of(code: str) -> str:
    return "ivf-sq" if code.startswith("SQ") else "ivf-pq"


def _dimensions(share: Array, d: int) -> Iterator[int]:
    """Yield numbers of principal dimensions: enough to keep VARIANCE, then twice as many, up to all."""
    m = -(-(int(np.searchsorted(share, VARIANCE)) + 1) // STEP) * STEP
    while 2 * m <= d:
        yield m
        m *= 2
    yield d


def number_of_lists(options: IndexOptions, n: int) -> int:
    """Return the number of IVF lists for n images.

    Raises:
        OptionError: `options` ask for more lists than images.
    """
    if options.nlist is not None and n and options.nlist > n:
        raise OptionError(f"nlist: expected at most the number of images, {n}, found {options.nlist}")
    # 4 sqrt(N), from FAISS's guidelines: at nprobe = nlist / 16 a query visits about as many centroids as vectors.
    return options.nlist or max(1, min(int(4 * np.sqrt(n)), n // POINTS_A_LIST))


def _lists(options: IndexOptions, n: int) -> str:
    return f"IVF{number_of_lists(options, n)}"


def about_bytes(n: int, d: int) -> int:
    """Estimate the bytes of an `auto` index of n image features of d dimensions, before their variances are known."""
    return 4 * n * d if n < IVF_FROM else n * (d // 10 + ID_BYTES)


def memory_of(options: IndexOptions) -> int:
    """Return the memory limit of the index in bytes; by default half of this machine's memory."""
    if options.memory is not None:
        return options.memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):  # not on Windows
        return 4096 * MIB


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def check_kind(options: IndexOptions, d: int) -> None:
    """Check that FAISS can build an index of this kind for d dimensions.

    Raises:
        OptionError: FAISS cannot, or the kind does not fit a gallery.
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
