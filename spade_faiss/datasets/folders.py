"""A category of any folders: images with and without defects, and masks."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import ImageError
from ..images.sources import ImageFile
from .annotations import MAPS, find_annotations, refuse_annotations, without_roles
from .category import GOOD, Category, Sample, checked_category, images_of
from .folder_layouts import GOOD_NAMES
from .pairing import pair_with_masks, split

ADVICE = "name a folder of photos alone; masks=FOLDER names the masks, also where they lie beside the photos"
Images = dict[str, ImageFile]  # by their keys below a folder


def from_folders(
    normal: str | Path,
    abnormal: str | Path,
    masks: str | Path | None = None,
    test_normal: str | Path | None = None,
    seed: int = 0,
) -> Category:
    """Make a category of any folders, each searched to any depth.

    A mask is called NAME, NAME_mask, NAME_GT or the like, with any suffix, in a subfolder of the same name as its
    image's. Masks may lie beside the images or in folders like gt/ there, if `masks` names such a folder, or the whole
    folder. A defect's kind is the subfolder that holds it, or "abnormal". Keys start with the role: normal/, abnormal/
    or test_normal/.

    Args:
        normal: images without defects, to train with.
        abnormal: images with defects.
        masks: masks of the images with defects; None: no pixel metrics.
        test_normal: images without defects, to test with. None: 20 % of the normal images, drawn with the seed, are
            held out. Then build the gallery with `gallery.add_images(category.normal, extractor)`, not from the folder.
        seed: seed of the draw.

    Raises:
        ImageError: a folder without images, an image in two roles, annotations among the images, or masks of only some
            of the images.
    """
    drawn = _listed(masks) if masks is not None else {}
    folders = {"normal": normal, "abnormal": abnormal, "test_normal": test_normal}
    found = {role: _listed(folder) if folder is not None else {} for role, folder in folders.items()}
    beside = _take_masks_out(found, folders, drawn, masks)
    _check_roles({**found, "masks": drawn})
    files = {
        role: {key: ImageFile(image.path, f"{role}/{key}") for key, image in found[role].items()} for role in found
    }
    train, held_out = list(files["normal"].values()), list(files["test_normal"].values())
    if test_normal is None:
        train, held_out = split(train, seed)
    photos = files["abnormal"]
    if beside:  # KIND/rgb/NAME goes with KIND/gt/NAME
        plain = {without_roles(key): image for key, image in photos.items()}
        photos = plain if len(plain) == len(photos) else photos
        for key, mask in beside.items():
            other = drawn.setdefault(without_roles(key), mask)
            if other.path != mask.path:
                raise ImageError(f"{mask.path}: expected the only mask of its name, found {other.path} too")
    kinds = {key: key.split("/")[0] if "/" in key else "abnormal" for key in photos}
    for kind in kinds.values():
        if kind.casefold() in GOOD_NAMES:
            raise ImageError(f"{abnormal}: expected only defects, found a folder {kind}; name that as test_normal")
    test = pair_with_masks(photos, kinds, drawn)
    test += [Sample(image.path, image.key, GOOD, False) for image in held_out]
    parent = Path(abnormal).resolve().parent
    category = Category(parent.name or "folders", train, test, "folders", masks is not None)
    return checked_category(parent, category)


def _listed(folder: str | Path) -> Images:
    return {image.key: image for image in images_of(folder)}


def _take_masks_out(
    found: dict[str, Images],
    folders: dict[str, str | Path | None],
    drawn: Images,
    masks: str | Path | None,
) -> Images:
    """Take the annotations that `masks` names out of the photos, and photos and depth maps out of the masks.

    Returns:
        the masks that lay among the images with defects, by their keys there.

    Raises:
        ImageError: other annotations lie among the photos.
    """
    named = {os.path.realpath(mask.path) for mask in drawn.values()}
    within = os.path.realpath(masks) + os.sep if masks is not None else ""
    beside: Images = {}
    taken: set[str] = set()
    for role, images in found.items():
        total, root = len(images), os.path.realpath(folders[role] or "") + os.sep
        real = {key: os.path.realpath(image.path) for key, image in images.items()}
        annotations, given = find_annotations(images), {key for key, path in real.items() if path in named}
        if within == root or not within.startswith(root):  # else all files of a folder of masks inside are masks
            given &= {image.key for image in annotations}
        refuse_annotations(folders[role], [image for image in annotations if image.key not in given], total, ADVICE)
        for key in given:
            image = images.pop(key)
            taken.add(real[key])
            if role == "abnormal" and not _is_map(key):
                beside[key] = image
    if taken:
        photos = {os.path.realpath(image.path) for images in found.values() for image in images.values()}
        for key, mask in list(drawn.items()):
            if os.path.realpath(mask.path) in photos or _is_map(key):
                del drawn[key]
    return beside


def _is_map(key: str) -> bool:
    return bool(MAPS.intersection(key.casefold().split("/")[:-1]))


def _check_roles(found: dict[str, Images]) -> None:
    """Raise an ImageError if an image has two roles."""
    roles: dict[str, str] = {}  # the role of each file, by its real path
    for role in ("normal", "abnormal", "masks", "test_normal"):
        for image in found[role].values():
            other = roles.setdefault(os.path.realpath(image.path), role)
            if other != role:
                raise ImageError(f"{image.path}: expected in one of the folders {other} and {role}, found in both")
