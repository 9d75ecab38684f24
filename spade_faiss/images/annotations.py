"""Masks and label pictures among photos: recognised by pairs of names, and by content of few values."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .regular_file import read_regular
from .sources import ImageFile, Listing

# What ends the name of an annotation beside its photo: N_GT.png of N.png.
ENDING = re.compile(
    r"[ ._-](gt|masks?|labels?|labelids?|segs?|segmentations?|segmap|annotations?|annot?|ground[ _-]?truth|depth|trimap"
    r"|alpha|matte|bw|defect[ _-]?mask)$",
    re.IGNORECASE,
)
FOLDER = re.compile(  # what a folder of annotations is called
    r"(gts?|(\w+[ _-])?masks?|labels?|segs?|segmentations?|segmentationclass|segmentationobject|annotations?"
    r"|ground[ _-]?truths?|depths?|xyz|mattes?)$",
    re.IGNORECASE,
)
SAMPLE = 24  # images whose content is looked at before anything else happens
SAMPLE_PIXELS = 100_000_000  # of all of these together, as decoding them takes time
NEAR, MOST = 12, 0.995  # grey levels of JPEG's noise about the two values; the share of the pixels that are so near
SIDE = 512  # px; of larger pictures, rows and columns in between are left out
LOSSLESS = (".bmp", ".gif", ".png", ".tif", ".tiff")


def with_photos(listing: Listing) -> Listing:
    """Set `photo` of each image that is named as an annotation of another, to the key of that image.

    Images are paired as N.png and N_GT.png or N_mask.png in one folder; rgb/N.png and gt/N.png, or N.png and
    masks/N.png; a.jpg and a.png, if some such pairs hold pictures of two values. Nothing is paired if the photos
    themselves have two values only, as scanned drawings do, and if every image was chosen by the caller.
    """
    pairs = [] if listing.chosen else list(_pairs(listing))
    by_key = {image.key: image for image in listing}
    if not pairs or 2 * len(_masks_in([by_key[pair.photo] for pair in pairs])) > min(len(pairs), SAMPLE):
        return listing
    unsure = [by_key[pair.key] for pair in pairs if not pair.certain]
    every = bool(_masks_in(unsure))
    photos = {pair.key: pair.photo for pair in pairs if pair.certain or every}
    return listing.replaced(replace(image, photo=photos.get(image.key, "")) for image in listing)


def notes(listing: Listing, skipped: bool) -> list[str]:
    """Return a sentence that names the images which look like masks or other annotations, if there are any.

    Args:
        listing: the images, from with_photos.
        skipped: whether a paired image of two values is skipped, and named then.
    """
    named = [image for image in listing if image.photo]
    masks = _masks_in(named)
    if named and not (skipped and masks):
        looks = "look like masks of other images, by their names and pixels"
        how = looks if masks else "are named as annotations of other images"
        return [f"{_count([image.key for image in named])} {how}; they are taken as images all the same"]
    if named or listing.chosen or len(listing) < 2:
        return []
    masks, looked_at = _masks_in(listing, flat=False), min(len(listing), SAMPLE)
    if masks and 2 * len(masks) <= looked_at:
        found = _count([image.key for image in masks])
        return [f"{found} of {looked_at} looked at have two values only, as masks do; they are taken as images"]
    return []


@dataclass(frozen=True)
class _Pair:
    """The key of an image that is named as an annotation, and that of its photo."""

    key: str
    photo: str
    certain: bool  # False: the names differ in their suffixes only, and may be those of two photos


def _count(keys: Sequence[str]) -> str:
    return f"{len(keys)} image{'s' * (len(keys) != 1)} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"


def _pairs(listing: Iterable[ImageFile]) -> Iterator[_Pair]:
    """Yield the images that are named as annotations of others."""
    photos: dict[str, list[str]] = {}  # key without its suffix -> keys
    for image in listing:
        photos.setdefault(_stem(image.key), []).append(image.key)
    moved = _moved(photos)
    for stem, keys in photos.items():
        partner = photos.get(ENDING.sub("", stem)) if ENDING.search(stem) else None
        if partner is None:
            partner = next((moved[sign] for sign in _signs(stem) if sign in moved), None)
        if partner is not None:
            yield from (_Pair(key, partner[0], True) for key in keys)
            continue
        lossy = [key for key in keys if not key.lower().endswith(LOSSLESS)]
        if lossy:  # it is the photo
            yield from (_Pair(key, lossy[0], False) for key in keys if key not in lossy)


def _stem(key: str) -> str:
    return PurePosixPath(key).with_suffix("").as_posix()


def _signs(stem: str) -> Iterator[str]:
    """Yield the path of a file in a folder of annotations without that folder, and without an ending of its name."""
    parts = stem.split("/")
    for at, part in enumerate(parts[:-1]):
        if FOLDER.fullmatch(part):
            rest = "/".join(parts[:at] + parts[at + 1 :])
            yield from dict.fromkeys((rest, ENDING.sub("", rest)))


def _moved(photos: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return the photos by their paths without one folder, for those that annotations ask for."""
    wanted = {sign for stem in photos for sign in _signs(stem)}
    found: dict[str, list[str]] = {}
    for stem, keys in photos.items() if wanted else ():
        parts = stem.split("/")
        if any(FOLDER.fullmatch(part) for part in parts[:-1]):
            continue
        for rest in (stem, *("/".join(parts[:at] + parts[at + 1 :]) for at in range(len(parts) - 1))):
            if rest in wanted:
                found.setdefault(rest, keys)
    return found


def two_valued(pixels: NDArray[np.uint8], flat: bool = True) -> bool:
    """Return whether a picture has two values only, up to the noise of JPEG.

    Args:
        pixels: (H, W, 3) or (H, W).
        flat: count a picture of one value, which may be the mask of a good part.
    """
    step = max(1, min(pixels.shape[:2]) // SIDE)
    shown = pixels[::step, ::step].astype(np.int32)
    if shown.ndim == 3:
        colours = shown[..., 0] << 16 | shown[..., 1] << 8 | shown[..., 2]
        shown = shown[..., 0] if np.ptp(shown, axis=2).max(initial=0) <= NEAR else colours
    if (n := len(np.unique(shown))) <= 2:  # exactly, as 0 and 1 or black and red
        return flat or n == 2
    low, high = int(shown.min()), int(shown.max())
    near = (shown - low <= NEAR) | (high - shown <= NEAR)
    return 4 * NEAR < high - low <= 255 and bool(near.mean() >= MOST)


def _masks_in(images: Sequence[ImageFile], flat: bool = True) -> list[ImageFile]:
    """Return those of a few images from all over a list that have two values only."""
    found, left = [], SAMPLE_PIXELS
    for image in images[:: max(1, len(images) // SAMPLE)][:SAMPLE]:
        try:
            with Image.open(io.BytesIO(read_regular(image.path))) as picture:
                picture.draft("L", (SIDE, SIDE))  # a JPEG is decoded at a smaller scale
                left -= picture.width * picture.height
                if left < 0:
                    break
                grey = np.asarray(picture if picture.mode in ("L", "P") else picture.convert("RGB"))
        except Exception:  # decoders raise nearly anything: it is said when the image is taken
            continue
        if two_valued(grey, flat):
            found.append(image)
    return found
