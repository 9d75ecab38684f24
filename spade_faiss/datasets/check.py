"""Looking at all test images and masks of a category before they are queried, which may take hours."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ..arrays import Pixels
from ..errors import ImageError
from ..images.decode import decode, image_bytes, read_file
from ..images.reading import decoding_gate
from ..system.prefetch import read_ahead
from ..system.progress import progress_bar
from .category import Category, Sample

NEARLY_ALL = 0.95  # a mask that marks more of an image may be inverted


@dataclass
class Checked:
    """What test images and masks are like; all by the samples' keys."""

    digests: dict[str, str] = field(default_factory=dict)  # of the images that can be read
    bad_images: dict[str, str] = field(default_factory=dict)  # why an image cannot be read
    bad_masks: dict[str, str] = field(default_factory=dict)  # why a mask does not fit
    nearly_all: list[str] = field(default_factory=list)  # whose mask marks nearly all pixels
    ignoring: list[str] = field(default_factory=list)  # whose mask has pixels of the label that is ignored
    only_ignored: list[str] = field(default_factory=list)  # of these, whose mask marks nothing else
    two_valued: list[str] = field(default_factory=list)  # images of two values, as masks have; none if most are so


@dataclass(frozen=True)
class _Look:
    """What one sample is like."""

    digest: str = ""
    image_error: str = ""
    mask_error: str = ""
    marked: float = 0.0  # share of the pixels
    ignoring: bool = False
    only_ignored: bool = False
    two_valued: bool = False


def check_category(
    category: Category,
    digest_of: Callable[[bytes], str],
    ignore_label: int | None = None,
    progress: bool = False,
    bits: int | None = None,
) -> Checked:
    """Decode all test images and masks of a category, several at once while they fit reading.DECODE_BYTES.

    Args:
        category: whose samples.
        digest_of: the digest of a file's bytes.
        ignore_label: see Category.marks_of.
        progress: a bar on stderr, where that is a terminal.
        bits: of the gallery that the images will be compared with, see decode: an image is read as its query reads it.
    """
    gate = decoding_gate()

    def look(sample: Sample) -> _Look:
        try:
            content = read_file(sample.path)
        except ImageError as error:
            return _Look(image_error=str(error))
        with gate.room(image_bytes(content)):
            try:
                pixels = decode(content, str(sample.path), bits)
            except ImageError as error:
                return _Look(image_error=str(error))
            return _look(category, sample, pixels, digest_of(content), ignore_label)

    threads, checked = min(8, os.cpu_count() or 1), Checked()
    looks = read_ahead(category.test, look, threads, 2 * threads)
    for sample, one in zip(category.test, progress_bar(looks, "check", progress, len(category.test)), strict=True):
        if one.image_error:
            checked.bad_images[sample.key] = one.image_error
            continue
        checked.digests[sample.key] = one.digest
        if one.mask_error:
            checked.bad_masks[sample.key] = one.mask_error
        for found, keys in (
            (one.marked > NEARLY_ALL, checked.nearly_all),
            (one.ignoring, checked.ignoring),
            (one.only_ignored, checked.only_ignored),
            (one.two_valued, checked.two_valued),
        ):
            if found:
                keys.append(sample.key)
    if 2 * len(checked.two_valued) > len(checked.digests):
        checked.two_valued = []  # such are the photos of this set
    return checked


def _look(category: Category, sample: Sample, pixels: Pixels, digest: str, ignore_label: int | None) -> _Look:
    two_valued = _has_two_values(pixels)
    if not category.masks or not sample.anomalous:
        return _Look(digest, two_valued=two_valued)
    try:
        marks = category.marks_of(sample, pixels.shape[:2], ignore_label)
    except ImageError as error:
        return _Look(digest, mask_error=str(error), two_valued=two_valued)
    share, ignoring = float(marks.anomalous.mean()), marks.ignored is not None and bool(marks.ignored.any())
    only_ignored = ignoring and not marks.anomalous.any()
    return _Look(digest, marked=share, ignoring=ignoring, only_ignored=only_ignored, two_valued=two_valued)


def _has_two_values(pixels: Pixels) -> bool:
    low, high = pixels.min(), pixels.max()
    return bool(low < high and ((pixels == low) | (pixels == high)).all() and (np.ptp(pixels, axis=2) == 0).all())
