"""Telling annotations from photos: masks, labels and depth maps that lie in the photos' folders."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import ImageError
from ..images.sources import ImageFile
from .category import few

WORDS = "ground_?truth|gt|masks?|bin_?mask|labels?|seg|segmentation|annotations?|anno|depth|xyz"
AFTER = re.compile(rf"(?P<photo>.+?)[ _.-](?:{WORDS})(?:[ _-]?\d+)?", re.IGNORECASE)  # NAME_mask
BEFORE = re.compile(rf"(?:{WORDS})[ _.-](?P<photo>.+)", re.IGNORECASE)  # mask_NAME
FOLDERS = frozenset({"gt", "groundtruth", "ground_truth", "mask", "masks", "annotations", "depth", "xyz"})
MAPS = frozenset({"depth", "xyz"})  # folders of annotations that are no masks
PHOTOS = frozenset({"rgb", "image", "images", "img", "imgs", "photos"})  # folders of photos beside FOLDERS
FEW_VALUES = 16  # a picture with no more values than this is a mask or a label picture, not a photo


def photo_name(stem: str) -> str | None:
    """Return the name of the photo that an annotation's name tells, without suffixes; None: it tells none."""
    match = AFTER.fullmatch(stem) or BEFORE.fullmatch(stem)
    return match["photo"] if match else None


def find_annotations(images: Mapping[str, ImageFile]) -> list[ImageFile]:
    """Return the images that are annotations of other images.

    They are in a folder such as gt/, masks/ or xyz/; or have a photo's name with _mask, _GT, ... added; or have exactly
    a photo's name but for the suffix, and few values, or those of a depth map.

    Args:
        images: by their keys below the folder that was named, whose own name does not count.
    """
    found: dict[str, ImageFile] = {}
    same_name: dict[str, list[str]] = {}
    stems = {_stem(key).casefold() for key in images}
    for key, image in images.items():
        same_name.setdefault(key.rpartition(".")[0], []).append(key)
        photo = photo_name(_stem(key))
        if FOLDERS.intersection(part.casefold() for part in key.split("/")[:-1]) or (
            photo is not None and (photo.casefold() in stems or _has_few_values(image.path))
        ):
            found[key] = image
    for keys in same_name.values():
        drawn = [key for key in keys if len(keys) > 1 and key not in found and _is_drawn(images[key].path)]
        if len(drawn) < len(keys):
            found |= {key: images[key] for key in drawn}
    return [image for key, image in images.items() if key in found]


def refuse_annotations(where: object, annotations: Iterable[ImageFile], total: int, advice: str) -> None:
    """Raise an ImageError that names annotations among photos, if there are any."""
    paths = [image.path for image in annotations]
    if paths:
        raise ImageError(
            f"{where}: expected photos, found {len(paths)} of {total} images to be annotations (masks, labels or depth "
            f"maps) of others: {few(paths)}; {advice}"
        )


def without_roles(key: str) -> str:
    """Return a key without the folders that tell photos from annotations."""
    *folders, name = key.split("/")
    return "/".join([folder for folder in folders if folder.casefold() not in FOLDERS | PHOTOS] + [name])


def _stem(key: str) -> str:
    return key.rpartition("/")[2].rpartition(".")[0]


def _is_drawn(path: Path) -> bool:
    """Return whether a picture is a mask or a label picture, or a depth map of more than 8 bits."""
    try:
        with Image.open(path) as image:
            deep = image.mode[0] in "IF"
    except Exception:  # decoders raise nearly anything; what cannot be read is reported when it is needed
        return False
    return deep or _has_few_values(path)


def _has_few_values(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            if image.mode in ("RGB", "RGBA", "CMYK", "YCbCr"):
                return image.getcolors(FEW_VALUES) is not None
            return len(np.unique(np.asarray(image))) <= FEW_VALUES
    except Exception:  # as above
        return False
