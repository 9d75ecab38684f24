"""What layouts share: pairing test images with masks by name, and holding out normal images."""

from __future__ import annotations

import random
from pathlib import Path

from ..errors import ImageError
from ..images.sources import ImageFile
from .annotations import photo_name
from .category import GOOD, Sample, few


def pair_with_masks(
    images: dict[str, ImageFile], kinds: dict[str, str], masks: dict[str, ImageFile], grouped: bool = False
) -> list[Sample]:
    """Pair test images with masks of the same name, or NAME_mask, NAME_GT or the like, with any suffix.

    NAME may have the image's suffix too, as in 000.jpg.png, unless that is the mask of another image, 000.jpg.bmp.

    Args:
        images: test images by their names below some folder.
        kinds: the kind of each image, by the same names; GOOD images get no mask.
        masks: masks by their names below some folder.
        grouped: whether the masks of NAME are all those in the folder NAME.

    Returns:
        a sample for each image, in their order.

    Raises:
        ImageError: an image with several masks, or a mask of several images.
    """
    named = {key.rpartition(".")[0] for key in images}
    paths: dict[str, set[Path]] = {}
    for key, mask in masks.items():
        name = key.rpartition("/" if grouped else ".")[0]
        paths.setdefault(name, set()).add(mask.path.parent if grouped else mask.path)
        folder, slash, stem = name.rpartition("/")
        if not grouped and name not in named and (photo := photo_name(stem)) is not None:
            paths.setdefault(f"{folder}{slash}{photo}", set()).add(mask.path)
    samples = []
    owners: dict[Path, Path] = {}
    for key, image in images.items():
        kind, name = kinds[key], key.rpartition(".")[0]
        own = paths.get(name, set()) | (paths.get(key, set()) if key not in named else set())
        found = sorted(own) if kind != GOOD else []
        if len(found) > 1:
            raise ImageError(f"{image.path}: expected one mask, found {few(found)}")
        if found and owners.setdefault(found[0], image.path) != image.path:
            raise ImageError(f"{image.path}: expected a mask of its own, found {found[0]} of {owners[found[0]]}")
        samples.append(Sample(image.path, image.key, kind, kind != GOOD, found[0] if found else None))
    return samples


def split(images: list[ImageFile], seed: int) -> tuple[list[ImageFile], list[ImageFile]]:
    """Draw 80 % of the images (761 of 952) to train with; return them and the others, each in the given order."""
    draw = random.Random(seed)  # only its random() is guaranteed to give the same numbers in all Python versions
    order = sorted(range(len(images)), key=lambda _: draw.random())
    cut = len(images) * 4 // 5
    return [images[i] for i in sorted(order[:cut])], [images[i] for i in sorted(order[cut:])]
