"""Opening labelled data sets, whose layouts are recognised by their folders."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import ImageError, OptionError
from ..images.suffixes import image_suffixes
from ..options import is_count
from .category import Category, few
from .folder_layouts import (
    ROLES,
    open_folders,
    open_kolektor_sdd,
    open_kolektor_sdd2,
    open_magnetic_tile,
    open_mvtec_3d,
    open_shanghaitech,
)
from .table_layouts import REAL_IAD_TABLES, VISA_TABLE, is_resolution_of_real_iad, open_real_iad, open_visa

LAYOUTS: dict[str, tuple[str, ...]] = {  # name: patterns of what its folder holds, training before test images
    "mvtec": ROLES["mvtec"],  # ground_truth/KIND/NAME_mask.png; VisA's converted form: NAME.png
    "loco": (*ROLES["loco"], "ground_truth/*/*/*"),  # a folder of masks for each image
    "mvtec_ad_2": ROLES["mvtec_ad_2"],
    "mvtec_3d": ("train/good/rgb", "test/*/rgb"),  # masks in test/KIND/gt or test/KIND/ground_truth
    "btad": ROLES["btad"],
    "visa": (VISA_TABLE,),
    "real_iad": (REAL_IAD_TABLES,),
    "kolektor_sdd": ("kos*/*_label.bmp",),
    "kolektor_sdd2": ("train/*_GT.png", "test/*_GT.png"),
    "magnetic_tile": ("MT_*/Imgs",),
    "shanghaitech": ("testing/frames",),
}
SETTINGS = {"magnetic_tile": "seed", "kolektor_sdd": "seed", "shanghaitech": "every"}  # of open_dataset, by layout
STRICTER = {"mvtec": ("loco", "mvtec_3d")}  # layouts whose folders all have a plainer one too
UNREAD: dict[str, tuple[tuple[str, ...], str]] = {  # what sets are that are not read: patterns, advice
    "a category of Real-IAD without its tables": (("OK/*/*", "NG/*/*/*"), "open the folder that holds realiad_jsons"),
    "3D-ADAM as published": (("*/MechMind-*/*",), "its form for anomalib, with CATEGORY/train/good/rgb, is read"),
    "Eyecandies": (("train/data/*_image_*.png",), "copy photos of one light into train/good and test/KIND"),
    "DAGM 2007": (("Class*/Train/Label",), "copy photos and labels into folders for normal, abnormal and masks"),
    "a class of DAGM 2007": (("Train/Label",), "copy photos and labels into folders for normal, abnormal and masks"),
    "Real3D-AD": (("train/*.pcd",), "it holds no photos"),
}

OTHERS = "for others, name the folders of normal and of abnormal images (from_folders, --normal and --abnormal)"
NO_LAYOUT = "a gallery takes a folder of normal images without a layout (Gallery.add_images, build GALLERY FOLDER)"


def open_dataset(path: str | Path, layout: str | None = None, **settings: int) -> list[Category]:
    """Open a labelled data set: a category's folder, or a folder of such folders.

    Layouts: mvtec (also MPDD, and VisA converted to it), loco, mvtec_ad_2 (its public test set), mvtec_3d (MVTec 3D-AD,
    and 3D-ADAM converted to it), btad, visa (raw), real_iad, kolektor_sdd, kolektor_sdd2, magnetic_tile (raw),
    shanghaitech (a category for each scene with test videos). Validation images are left out.

    Args:
        path: the folder.
        layout: its layout; None: recognised by the folder.
        settings: shanghaitech: every=N (default 1) takes frames 0, N, 2N, ... of each video, for training and testing.
            magnetic_tile, kolektor_sdd: seed=N (default 0) draws 80 % of the normal images to train with.

    Returns:
        the categories in the order of their names, each with its normal images to build from and its test images.

    Raises:
        ImageError: no layout fits, or several do; images, or the masks of some images, are missing; annotations lie
            among photos.
        OptionError: an unknown layout, or a setting that the layout does not have.

    Example:
        >>> from spade_faiss.datasets import open_dataset
        >>> for folder in ("tiles/train", "tiles/test"):
        ...     _ = shutil.copytree("normal", f"{folder}/good")
        >>> _ = shutil.copytree("test", "tiles/test/scratch")
        >>> [tiles] = open_dataset("tiles")
        >>> tiles.layout, len(tiles.normal), len(tiles.test), tiles.masks
        ('mvtec', 12, 13, False)
    """
    root = Path(path)
    if layout is not None and layout not in LAYOUTS:
        raise OptionError(f"layout: expected one of {', '.join(LAYOUTS)}, found {layout!r}")
    if not root.is_dir():
        raise ImageError(f"{root}: expected the folder of a data set, found {'a file' if root.exists() else 'nothing'}")
    name, folders = _recognise(root, layout)
    for setting, value in settings.items():
        if setting != SETTINGS.get(name):
            raise OptionError(f"{setting}: not a setting of the layout {name}, which {root} has")
        if not is_count(value) and (setting, value) != ("seed", 0):
            raise OptionError(f"{setting}: expected a whole number >= {int(setting != 'seed')}, found {value!r}")
    own: dict[str, Callable[..., list[Category]]] = {
        "visa": open_visa,
        "real_iad": open_real_iad,
        "mvtec_3d": open_mvtec_3d,
        "kolektor_sdd": open_kolektor_sdd,
        "kolektor_sdd2": open_kolektor_sdd2,
        "magnetic_tile": open_magnetic_tile,
        "shanghaitech": open_shanghaitech,
    }
    opener: Any = own.get(name) or partial(open_folders, layout=name)
    try:
        return [category for folder in folders for category in opener(folder, **settings)]
    except ImageError as error:
        raise ImageError(f"{error}; {_assumed(name, layout)}") from error


def takes_setting(path: Path, layout: str | None, setting: str) -> bool:
    """Return whether open_dataset takes a setting for this folder; True also where it will say what is wrong.

    Raises:
        ImageError: no layout fits, or several do.
    """
    if not path.is_dir() or layout not in (None, *LAYOUTS):
        return True
    return SETTINGS.get(_recognise(path, layout)[0]) == setting


def _assumed(name: str, layout: str | None) -> str:
    """Return which layout an error was found under, and how to name another."""
    if layout is not None:
        return f"layout {name}, as given"
    return f"layout {name}, guessed from the folders; layout=NAME names another"


def _recognise(root: Path, layout: str | None) -> tuple[str, list[Path]]:
    """Return the layout's name, and the folders that have it: the root itself, else folders in it."""
    try:
        inside = sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    except OSError as error:
        raise ImageError(f"{root}: folder cannot be listed: {error.strerror or error}") from error
    for folders in ([root], inside):
        found = {name: [path for path in folders if _fits(path, name)] for name in LAYOUTS if layout in (None, name)}
        if layout is None:
            found["loco"] = [path for path in found["loco"] if not _has_folders_of_tests(path)]
            for plain, stricter in STRICTER.items():
                taken = [path for name in stricter for path in found[name]]
                found[plain] = [path for path in found[plain] if path not in taken]
        found = {name: fitting for name, fitting in found.items() if fitting}
        if len(found) > 1:
            fits = "; ".join(f"{name}: {few(path.name for path in fitting)}" for name, fitting in found.items())
            raise ImageError(f"{root}: fits several layouts ({fits}); name one with layout=NAME")
        for name, fitting in found.items():
            for path in folders:  # an incomplete category must not be omitted silently
                if _has_part(path, name) and not any(_fits(path, other) for other in LAYOUTS):
                    wanted = f"{' and '.join(LAYOUTS[name])}, as beside it"
                    raise ImageError(f"{path}: expected {wanted}, found a part; {_assumed(name, layout)}")
            return name, fitting
    for path in [root, *inside]:
        for what, (patterns, advice) in UNREAD.items():
            if all(any(path.glob(pattern)) for pattern in patterns):
                raise ImageError(f"{path}: expected a known layout, found {what}, which is not read; {advice}")
    known = (f"{name}: {' and '.join(LAYOUTS[name])}" for name in LAYOUTS if layout in (None, name))
    images = _images_in(root)
    held = [few(path.name for path in inside)] if inside or not images else []
    if images:
        held.append(f"{len(images)} image{'s' if len(images) > 1 else ''} directly in it ({few(images)})")
    raise ImageError(
        f"{root}: expected a data set, or a folder of categories, in a known layout ({'; '.join(known)}), found "
        f"{' and '.join(held)}; {f'{NO_LAYOUT}; {OTHERS}' if images else OTHERS}"
    )


def _images_in(folder: Path) -> list[str]:
    """Return the names of the images that lie directly in a folder."""
    suffixes = image_suffixes()
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file()
    )


def _fits(path: Path, layout: str) -> bool:
    """Return whether a folder has a layout."""
    if layout == "real_iad" and is_resolution_of_real_iad(path):
        return True
    return all(any(path.glob(pattern)) for pattern in LAYOUTS[layout])


def _has_part(path: Path, layout: str) -> bool:
    """Return whether a folder has a folder of a layout, in whatever case, though it may not have the layout."""
    parts = {"train", *(pattern.split("/")[0].casefold() for pattern in LAYOUTS[layout])}
    names = [folder.name.casefold() for folder in path.glob("*") if folder.is_dir()]
    return any(fnmatchcase(name, part) for name in names for part in parts)


def _has_folders_of_tests(path: Path) -> bool:
    """Return whether the folders in ground_truth/KIND are those of test images, one for each camera, not of masks."""
    return any((path / "test" / folder.relative_to(path / "ground_truth")).is_dir() for folder in _truth_folders(path))


def _truth_folders(path: Path) -> list[Path]:
    return [folder for folder in path.glob("ground_truth/*/*") if folder.is_dir()]
