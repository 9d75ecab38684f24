"""A category of any folders, and the pairing of images with masks by name."""

from __future__ import annotations

import os
import random
from pathlib import Path

from ..errors import ImageError
from ..images.sources import ImageFile, find_images
from .category import GOOD, Category, Sample, _category, few


def from_folders(
    normal: str | Path,
    abnormal: str | Path,
    masks: str | Path | None = None,
    test_normal: str | Path | None = None,
    seed: int = 0,
) -> Category:
    """Make a category of any folders, each searched to any depth: images without and with defects, masks of the latter.

    A mask is called NAME or NAME_mask, with any suffix, in a subfolder of the same name as its image. A defect's kind
    is the subfolder that it is in, or "abnormal". Keys start with the role: normal/, abnormal/ or test_normal/.

    Without `test_normal`, 20 % of the normal images, drawn with the seed, are held out for testing: then build the
    gallery with `gallery.add_images(category.normal, extractor)`, not from the folder.

    Raises:
        ImageError: a folder without images, an image in two roles, or masks of only some of the images.
    """
    found: dict[str, dict[str, ImageFile]] = {}
    roles: dict[str, str] = {}  # of files, by their real paths
    folders = {"normal": normal, "abnormal": abnormal, "masks": masks, "test_normal": test_normal}
    for role, folder in folders.items():
        images = find_images([folder]) if folder is not None else []
        found[role] = {image.key: ImageFile(image.path, f"{role}/{image.key}") for image in images}
        for image in images:
            other = roles.setdefault(os.path.realpath(image.path), role)
            if other != role:
                raise ImageError(f"{image.path}: expected in one of the folders {other} and {role}, found in both")
    train, held_out = list(found["normal"].values()), list(found["test_normal"].values())
    if test_normal is None:
        train, held_out = _split(train, seed)
    kinds = {key: key.split("/")[0] if "/" in key else "abnormal" for key in found["abnormal"]}
    if GOOD in kinds.values():
        raise ImageError(f"{abnormal}: expected only defects, found a folder {GOOD}; name that as test_normal")
    test = _samples(found["abnormal"], kinds, found["masks"])
    test += [Sample(image.path, image.key, GOOD, False) for image in held_out]
    parent = Path(abnormal).resolve().parent
    return _category(parent, parent.name or "folders", "folders", train, test, masks is not None)


def _samples(
    images: dict[str, ImageFile], kinds: dict[str, str], masks: dict[str, ImageFile], grouped: bool = False
) -> list[Sample]:
    """Pair test images (by their names below some folder) with masks: the same name, or NAME_mask, with any suffix.

    Grouped: the masks of NAME are those in the folder NAME. The masks of normal images are not looked at.
    """
    paths: dict[str, set[Path]] = {}
    for key, mask in masks.items():
        name = key.rpartition("/" if grouped else ".")[0]
        paths.setdefault(name, set()).add(mask.path.parent if grouped else mask.path)
    samples = []
    owners: dict[Path, Path] = {}
    for key, image in images.items():
        kind, name = kinds[key], key.rpartition(".")[0]
        found = sorted(paths.get(name, set()) | paths.get(f"{name}_mask", set())) if kind != GOOD else []
        if len(found) > 1:
            raise ImageError(f"{image.path}: expected one mask, found {few(found)}")
        if found and owners.setdefault(found[0], image.path) != image.path:
            raise ImageError(f"{image.path}: expected a mask of its own, found {found[0]} of {owners[found[0]]}")
        samples.append(Sample(image.path, image.key, kind, kind != GOOD, found[0] if found else None))
    return samples


def _split(images: list[ImageFile], seed: int) -> tuple[list[ImageFile], list[ImageFile]]:
    """Draw 80 % of the images (761 of 952) to train with; returns them and the others, each in the given order."""
    draw = random.Random(seed)  # of its methods, random() alone is promised the same numbers in all Python versions
    order = sorted(range(len(images)), key=lambda _: draw.random())
    cut = len(images) * 4 // 5
    return [images[i] for i in sorted(order[:cut])], [images[i] for i in sorted(order[cut:])]
