"""A category of a labelled set: images to train with, samples to test with."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import ImageError
from ..images.passed_over import UNREAD_FORMATS
from ..images.sources import ImageFile, Listing, find_images
from .masks import Marks, read_marks

GOOD = "good"  # kind of a sample without a defect


@dataclass(frozen=True)
class Sample:
    """A test image, its label, and where its mask is."""

    path: Path
    key: str  # path relative to the category's folder, with forward slashes
    kind: str  # the defect type, or GOOD
    anomalous: bool
    mask: Path | None = None  # an image, a folder of images to unite, or a .npy of a whole video
    frame: int | None = None  # this image's row in the .npy


@dataclass(frozen=True)
class Category:
    """One kind of object or scene: images without defects to train with, and samples to test with."""

    name: str
    normal: list[ImageFile]
    test: list[Sample]
    layout: str
    masks: bool  # whether pixel metrics are possible; then every anomalous sample has a mask

    def mask_of(self, sample: Sample, image_size: tuple[int, int]) -> NDArray[np.bool_]:
        """Return a test image's (H, W) bool mask, True where anomalous; see marks_of."""
        return self.marks_of(sample, image_size).anomalous

    def marks_of(self, sample: Sample, image_size: tuple[int, int], ignore_label: int | None = None) -> Marks:
        """Return what a test image's mask says of each pixel; see masks.read_marks.

        Nothing is anomalous in a normal sample. An anomalous sample's mask may mark nothing. Several masks are united.

        Args:
            sample: one of `test`.
            image_size: (height, width) of the decoded image. A mask is never resized to fit.
            ignore_label: pixels of this value count as neither normal nor anomalous, unless another mask marks them.

        Raises:
            ImageError: an anomalous sample has no mask, or one that cannot be read or has another size.
        """
        if not sample.anomalous:
            return Marks(np.zeros(image_size, bool))
        if sample.mask is None:
            raise ImageError(f"{sample.path}: expected a mask, as the image is anomalous, found none in {self.name}")
        try:
            files = find_images([sample.mask])
            parts = [read_marks(file.path, sample.frame, image_size, ignore_label) for file in files]
        except ImageError as error:
            raise ImageError(f"{sample.path}: its mask {error}") from error
        anomalous = np.logical_or.reduce([part.anomalous for part in parts])
        ignored = [part.ignored for part in parts if part.ignored is not None]
        return Marks(anomalous, np.logical_or.reduce(ignored) & ~anomalous if ignored else None)


def images_of(folder: str | Path) -> Listing:
    """List the images of a folder, as find_images does, with a warning of files in formats that are not read."""
    images = find_images([folder])
    if unread := images.passed_over.only(UNREAD_FORMATS):
        warnings.warn(f"{folder}: {unread}", stacklevel=4)
    return images


def checked_category(path: Path, category: Category) -> Category:
    """Return the category if it has training and test images and, if it has masks, one for each anomalous sample.

    Raises:
        ImageError: something is missing; the message starts with the path.
    """
    name, normal, test = category.name, category.normal, category.test
    if not normal or not test:
        raise ImageError(f"{path}: expected images to train and to test {name} with, found {len(normal)}, {len(test)}")
    bare = [sample.key for sample in test if sample.anomalous and sample.mask is None]
    if bare and category.masks:
        raise ImageError(f"{path}: expected a mask for each anomalous image, or no masks, found none of {few(bare)}")
    return category


def few(names: Iterable[object]) -> str:
    """Return the first three names for a message, and how many more there are."""
    listed = [str(name) for name in names]
    return (", ".join(listed[:3]) or "nothing") + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
