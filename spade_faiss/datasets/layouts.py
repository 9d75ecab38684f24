"""Opening labelled data sets, whose layouts are recognised by their folders."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import ImageError, OptionError
from ..images.sources import ImageFile, find_images
from ..options import is_count
from .category import GOOD, Category, Sample, checked_category, few
from .masks import load_rows
from .pairing import pair_with_masks, split

LAYOUTS: dict[str, tuple[str, ...]] = {  # name: patterns of what its folder holds, training before test images
    "mvtec": ("train/good", "test"),  # ground_truth/KIND/NAME_mask.png; VisA's converted form: NAME.png
    "loco": ("train/good", "test", "ground_truth/*/*/*"),  # a folder of masks for each image
    "mvtec_ad_2": ("train/good", "test_public"),
    "btad": ("train/ok", "test"),
    "visa": ("split_csv/1cls.csv",),
    "magnetic_tile": ("MT_*/Imgs",),
    "shanghaitech": ("testing/frames",),
}
SETTINGS = {"magnetic_tile": "seed", "shanghaitech": "every"}  # the settings of open_dataset, by layout


def open_dataset(path: str | Path, layout: str | None = None, **settings: int) -> list[Category]:
    """Open a labelled data set: a category's folder, or a folder of such folders.

    Layouts: mvtec (also VisA converted to it), loco, mvtec_ad_2 (its public test set), btad, visa (raw), magnetic_tile
    (raw), shanghaitech (a category for each scene with test videos). Validation images are left out.

    Args:
        path: the folder.
        layout: its layout; None: recognised by the folder.
        settings: shanghaitech: every=N (default 1) takes frames 0, N, 2N, ... of each video, for training and testing.
            magnetic_tile: seed=N (default 0) draws 80 % of the normal images to train with.

    Raises:
        ImageError: no layout fits, or several do; images, or the masks of some images, are missing.
        OptionError: an unknown layout, or a setting that the layout does not have.
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
    own: dict[str, Any] = {"visa": _open_visa, "magnetic_tile": _open_magnetic_tile, "shanghaitech": _open_shanghaitech}
    opener = own.get(name, partial(_open_folders, layout=name))
    return [category for folder in folders for category in opener(folder, **settings)]


def _recognise(root: Path, layout: str | None) -> tuple[str, list[Path]]:
    """Return the layout's name, and the folders that have it: the root itself, else folders in it."""
    inside = sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    for folders in ([root], inside):
        found = {name: [path for path in folders if _fits(path, name)] for name in LAYOUTS if layout in (None, name)}
        if layout is None:  # every loco folder also fits mvtec
            found["mvtec"] = [path for path in found["mvtec"] if path not in found["loco"]]
        found = {name: fitting for name, fitting in found.items() if fitting}
        if len(found) > 1:
            fits = "; ".join(f"{name}: {few(path.name for path in fitting)}" for name, fitting in found.items())
            raise ImageError(f"{root}: fits several layouts ({fits}); name one, as in layout={next(iter(found))!r}")
        for name, fitting in found.items():
            for path in folders:  # an incomplete category must not be omitted silently
                if (path / "train").is_dir() and not any(_fits(path, other) for other in LAYOUTS):
                    raise ImageError(f"{path}: expected {' and '.join(LAYOUTS[name])}, as beside it, found a part")
            return name, fitting
    known = (f"{name}: {' and '.join(LAYOUTS[name])}" for name in LAYOUTS if layout in (None, name))
    raise ImageError(
        f"{root}: expected a data set, or a folder of categories, in a known layout ({'; '.join(known)}), found "
        f"{few(path.name for path in inside)}; for others, name the folders of normal and of abnormal images"
    )


def _fits(path: Path, layout: str) -> bool:
    """Return whether a folder has a layout."""
    return all(any(path.glob(pattern)) for pattern in LAYOUTS[layout])


def _below(images: Iterable[ImageFile], start: str) -> dict[str, ImageFile]:
    """Return the images whose keys start with `start`, by the rest of the key."""
    return {image.key.removeprefix(start): image for image in images if image.key.startswith(start)}


def _open_folders(path: Path, layout: str) -> list[Category]:
    """Open a layout of folders: mvtec, loco, mvtec_ad_2 or btad."""
    train, test = (f"{folder}/" for folder in LAYOUTS[layout][:2])
    truth = f"{test}ground_truth/" if layout == "mvtec_ad_2" else "ground_truth/"
    good = f"{Path(train).name}/"
    images = find_images([path])
    tested = {key: image for key, image in _below(images, test).items() if not image.key.startswith(truth)}
    masks = {key: mask for key, mask in _below(images, truth).items() if not key.startswith(good)}
    kinds = {key: GOOD if key.startswith(good) else key.split("/")[0] for key in tested}
    for key, kind in kinds.items():
        if key == kind:
            raise ImageError(f"{tested[key].path}: expected in a folder named after its kind, found beside those")
    normal, samples = list(_below(images, train).values()), pair_with_masks(tested, kinds, masks, layout == "loco")
    return [checked_category(path, Category(path.resolve().name, normal, samples, layout, bool(masks)))]


def _open_visa(path: Path) -> list[Category]:
    """Open the raw VisA set by its table of one-class splits."""
    normal: dict[str, list[ImageFile]] = {}
    test: dict[str, list[Sample]] = {}
    named: set[str] = set()
    for (name, part, label, image, mask), where in sorted(_visa_rows(path), key=lambda row: row[0][3]):
        if (part, label) not in (("train", "normal"), ("test", "normal"), ("test", "anomaly")):
            raise ImageError(f"{where}: expected train,normal or test,normal or test,anomaly, found {part},{label}")
        if image in named or image.split("/")[0] != name:
            raise ImageError(f"{where}: expected an image in {name}/ that no other line names, found {image!r}")
        named.add(image)
        source = ImageFile(_inside(path, image, where), image.removeprefix(f"{name}/"))
        drawn = _inside(path, mask, where) if mask else None
        if part == "train":
            normal.setdefault(name, []).append(source)
        else:
            kind, bad = (GOOD, False) if label == "normal" else (label, True)
            sample = Sample(source.path, source.key, kind, bad, drawn if bad else None)
            test.setdefault(name, []).append(sample)
    masks = any(sample.mask for samples in test.values() for sample in samples)
    found = [
        Category(n, normal.get(n, []), test.get(n, []), "visa", masks) for n in sorted(normal.keys() | test.keys())
    ]
    return [checked_category(path, category) for category in found]


def _visa_rows(path: Path) -> list[tuple[list[str], str]]:
    """Read VisA's table: (object, split, label, image, mask) of each line, and where the line is."""
    table = path / LAYOUTS["visa"][0]
    columns = ("object", "split", "label", "image", "mask")
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.DictReader(file)
            lacking = sorted(set(columns) - set(lines.fieldnames or ()))
            if lacking:
                raise csv.Error(f"expected columns {', '.join(columns)}, found no {', '.join(lacking)}")
            return [([line[name] or "" for name in columns], f"{table} line {lines.line_num}") for line in lines]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ImageError(f"{table}: cannot be read: {error}") from error


def _inside(root: Path, name: str, where: str) -> Path:
    """Return the path of a file that a table names; it must be in the data set, with all links followed."""
    try:
        real = (root / name).resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ImageError(f"{where}: expected a file in {root}, found nothing called {name!r}") from error
    if not real.is_file() or not real.is_relative_to(root.resolve()) or {"", ".", ".."} & set(name.split("/")):
        raise ImageError(f"{where}: expected a file that is inside {root}, found {name!r}")
    return root / name


def _open_magnetic_tile(path: Path, seed: int = 0) -> list[Category]:
    """Open the raw Magnetic Tile set: photos are JPEG, masks PNG, defects in folders MT_KIND."""
    images = {key: image for key, image in _below(find_images([path]), "MT_").items() if "/Imgs/" in key}
    photos = {key: image for key, image in images.items() if image.path.suffix.lower() in (".jpg", ".jpeg")}
    bad = {key: image for key, image in photos.items() if not key.startswith("Free/")}
    masks = {key: image for key, image in images.items() if key not in photos and not key.startswith("Free/")}
    normal, held_out = split([image for key, image in photos.items() if key not in bad], seed)
    test = pair_with_masks(bad, {key: key.split("/")[0].lower() for key in bad}, masks)
    test += [Sample(image.path, image.key, GOOD, False) for image in held_out]
    return [checked_category(path, Category(path.resolve().name, normal, test, "magnetic_tile", bool(masks)))]


def _open_shanghaitech(path: Path, every: int = 1) -> list[Category]:
    """Open ShanghaiTech Campus: a category for each scene, which is the start of its videos' names."""
    images = find_images([path])
    normal: dict[str, list[ImageFile]] = {}
    test: dict[str, list[Sample]] = {}
    for video, frames in _videos(images, "training/frames/").items():
        normal.setdefault(video.rpartition("_")[0], []).extend(frames[::every])
    if not normal:
        raise ImageError(
            f"{path}: expected training frames in training/frames/VIDEO/, found none; extract them from the set's "
            "training/videos/VIDEO.avi first: ffmpeg -i training/videos/VIDEO.avi -q:v 2 training/frames/VIDEO/%06d.jpg"
        )
    for video, frames in _videos(images, "testing/frames/").items():
        anomalous = load_rows(path / f"testing/test_frame_mask/{video}.npy", len(frames), 1) > 0
        mask = path / f"testing/test_pixel_mask/{video}.npy"
        if drawn := mask.is_file():
            load_rows(mask, len(frames), 3)
        for row, frame in list(enumerate(frames))[::every]:
            bad = bool(anomalous[row])
            kind, own = ("anomaly", mask if drawn else None) if bad else (GOOD, None)
            test.setdefault(video.rpartition("_")[0], []).append(Sample(frame.path, frame.key, kind, bad, own, row))
    masks = any(path.glob("testing/test_pixel_mask/*.npy"))
    name = path.resolve().name  # for videos whose names tell no scene
    found = [Category(s or name, normal.get(s, []), test[s], "shanghaitech", masks) for s in sorted(test)]
    return [checked_category(path, category) for category in found]


def _videos(images: Iterable[ImageFile], folder: str) -> dict[str, list[ImageFile]]:
    """Group frames by video, in the order of their numbers, which may have different numbers of digits."""
    videos: dict[str, list[ImageFile]] = {}
    for key, image in sorted(_below(images, folder).items(), key=lambda item: (len(item[0]), item[0])):
        videos.setdefault(key.rpartition("/")[0], []).append(image)
    return dict(sorted(videos.items()))
