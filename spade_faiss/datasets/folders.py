"""A category of any folders: images with and without defects, and masks."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import ImageError
from ..images.sources import ImageFile, find_images
from .category import GOOD, Category, Sample, checked_category
from .pairing import pair_with_masks, split


def from_folders(
    normal: str | Path,
    abnormal: str | Path,
    masks: str | Path | None = None,
    test_normal: str | Path | None = None,
    seed: int = 0,
) -> Category:
    """Make a category of any folders, each searched to any depth.

    A mask is called NAME or NAME_mask, with any suffix, in a subfolder of the same name as its image's. A defect's kind
    is the subfolder that holds it, or "abnormal". Keys start with the role: normal/, abnormal/ or test_normal/.

    Args:
        normal: images without defects, to train with.
        abnormal: images with defects.
        masks: masks of the images with defects; None: no pixel metrics.
        test_normal: images without defects, to test with. None: 20 % of the normal images, drawn with the seed, are
            held out. Then build the gallery with `gallery.add_images(category.normal, extractor)`, not from the folder.
        seed: seed of the draw.

    Raises:
        ImageError: a folder without images, an image in two roles, or masks of only some of the images.
    """
    found: dict[str, dict[str, ImageFile]] = {}
    roles: dict[str, str] = {}  # the role of each file, by its real path
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
        train, held_out = split(train, seed)
    kinds = {key: key.split("/")[0] if "/" in key else "abnormal" for key in found["abnormal"]}
    if GOOD in kinds.values():
        raise ImageError(f"{abnormal}: expected only defects, found a folder {GOOD}; name that as test_normal")
    test = pair_with_masks(found["abnormal"], kinds, found["masks"])
    test += [Sample(image.path, image.key, GOOD, False) for image in held_out]
    parent = Path(abnormal).resolve().parent
    category = Category(parent.name or "folders", train, test, "folders", masks is not None)
    return checked_category(parent, category)
