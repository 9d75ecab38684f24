"""Labelled images that an iterable gives: an image, whether it is anomalous, and its mask."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ..errors import ImageError
from ..images.inputs import ImageLike, can_be_iterated
from .masks import Marks, MaskLike, given_marks

Labelled = tuple[ImageLike, bool, MaskLike | None]
EXPECTED = "samples: expected (image, label, mask), the mask None where there is none"


class GivenSamples:
    """Samples on their way through a detector, which takes their images ahead of what it finds."""

    def __init__(self, samples: Iterable[Labelled], ignore_label: int | None, skipping: bool = False) -> None:
        """Begin.

        Args:
            samples: read once, as they are needed.
            ignore_label: see masks.read_marks.
            skipping: whether anomalous images may lack a mask where others have one.
        """
        self._samples, self._ignore_label, self._skipping = samples, ignore_label, skipping
        self._waiting: deque[tuple[str, str, bool, MaskLike | None]] = deque()  # key, name, anomalous, mask
        self.masked: bool | None = None  # whether the anomalous images so far have masks; None: there was none
        self.bare: list[str] = []  # names of the anomalous images before the first mask

    def images(self) -> Iterator[tuple[str, ImageLike]]:
        """Yield each image with its number as a key.

        Raises:
            ImageError: an item is no sample.
        """
        if not can_be_iterated(self._samples) or isinstance(self._samples, (str, bytes, Mapping)):
            raise ImageError(f"{EXPECTED}, found {type(self._samples).__name__}")
        for number, item in enumerate(self._samples):
            if not isinstance(item, (tuple, list)) or len(item) != 3:
                size = f" of {len(item)}" if isinstance(item, (tuple, list, dict, str)) else ""
                raise ImageError(f"{EXPECTED}, found {type(item).__name__}{size} as item {number}")
            image, label, mask = item
            name = os.fspath(image) if isinstance(image, (str, os.PathLike)) else f"image {number}"
            self._waiting.append((name, name, _label(label, number), mask))
            yield name, image

    def of(self, key: str) -> tuple[str, bool, MaskLike | None]:
        """Return the name, label and mask of the next image that was found; those before it were skipped."""
        while (sample := self._waiting.popleft())[0] != key:
            pass
        return sample[1:]

    def marks(self, name: str, anomalous: bool, mask: MaskLike | None, image_size: tuple[int, ...]) -> Marks | None:
        """Return what an image's mask says of each pixel; None: the image, or so far the set, has none.

        Raises:
            ImageError: a mask that does not fit, one that marks something in a normal image, or masks of only some of
                the anomalous images.
        """
        height, width = image_size
        if anomalous:
            if self.masked and mask is None:
                raise ImageError(f"{name}: expected a mask, as the image is anomalous and others have one, found none")
            if self.bare and mask is not None and not self._skipping:
                raise ImageError(f"{name}: expected no mask, as anomalous images before it have none, found one")
            self.masked = mask is not None
            if mask is None:
                self.bare.append(name)
                return None
        if mask is None:  # a normal image, which counts if a mask comes yet
            return None if self.bare and not self._skipping else Marks(np.zeros((height, width), bool))
        marks = given_marks(mask, name, (height, width), self._ignore_label)
        if not anomalous and marks.anomalous.any():
            raise ImageError(f"{name}: expected an empty mask, as the image is labelled as normal, found marks in it")
        return marks


def _label(label: Any, number: int) -> bool:
    """Return whether a label says anomalous: True or 1; normal: False or 0.

    Raises:
        ImageError: it says something else.
    """
    if isinstance(label, (bool, np.bool_)) or (isinstance(label, (int, np.integer)) and label in (0, 1)):
        return bool(label)
    raise ImageError(
        f"samples: expected True or 1 as the label of an anomalous image, False or 0 of a normal one, found {label!r} "
        f"in item {number}"
    )
