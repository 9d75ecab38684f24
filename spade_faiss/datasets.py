"""Labelled data sets: training normals, test samples and their masks, told apart by how their folders are laid out."""

from __future__ import annotations

import csv
import os
import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ImageError, OptionError
from .images import Source, find_images
from .masks import load_rows, read_mask
from .options import is_count

GOOD = "good"  # the kind of a sample without a defect

LAYOUTS: dict[str, tuple[str, ...]] = {  # name: what its folder holds, as patterns; training before test images
    "mvtec": ("train/good", "test"),  # ground_truth/KIND/NAME_mask.png; VisA's converted form: NAME.png
    "loco": ("train/good", "test", "ground_truth/*/*/*"),  # a folder of masks for each image
    "mvtec_ad_2": ("train/good", "test_public"),
    "btad": ("train/ok", "test"),
    "visa": ("split_csv/1cls.csv",),
    "magnetic_tile": ("MT_*/Imgs",),
    "shanghaitech": ("testing/frames",),
}
SETTINGS = {"magnetic_tile": "seed", "shanghaitech": "every"}  # what open_dataset takes for a layout


@dataclass(frozen=True)
class Sample:
    """A test image, its label, and where its mask is."""

    path: Path
    key: str  # path relative to the category folder, with forward slashes
    kind: str  # the defect type, or GOOD
    anomalous: bool
    mask: Path | None = None  # an image, a folder of images to unite, or a .npy of a whole video; None: there is none
    frame: int | None = None  # this image's row of the .npy


@dataclass(frozen=True)
class Category:
    """One kind of object or scene: images without defects to train with, and samples to test with."""

    name: str
    normal: list[Source]
    test: list[Sample]
    layout: str
    masks: bool  # whether pixel metrics are possible; then every anomalous sample has a mask

    def mask_of(self, sample: Sample, image_size: tuple[int, int]) -> NDArray[np.bool_]:
        """Return a test image's (H, W) bool mask: True where any channel of its mask is above 0.

        All False for a normal sample. An anomalous one's mask may mark nothing, and is returned as it is.

        Args:
            sample: one of `test`.
            image_size: the decoded image's (height, width). A mask is never resized to fit.

        Raises:
            ImageError: an anomalous sample has no mask, or one that cannot be read or is of another size.
        """
        if not sample.anomalous:
            return np.zeros(image_size, bool)
        if sample.mask is None:
            raise ImageError(f"{sample.path}: expected a mask, as the image is anomalous, found none in {self.name}")
        try:
            parts = [read_mask(part.path, sample.frame, image_size) for part in find_images([sample.mask])]
        except ImageError as error:
            raise ImageError(f"{sample.path}: its mask {error}") from error
        return np.asarray(np.logical_or.reduce(parts))


def open_dataset(path: str | Path, layout: str | None = None, **settings: int) -> list[Category]:
    """Open a labelled data set: a category's folder, or a folder of such folders.

    Layouts: mvtec (also VisA converted to it), loco, mvtec_ad_2 (its public test set), btad, visa (raw), magnetic_tile
    (raw), shanghaitech (a category for each scene with test videos). Validation images are left out.

    Args:
        path: the folder.
        layout: its layout, where the folder alone does not tell.
        settings: shanghaitech: every=N (default 1) takes frames 0, N, 2N, ... of each video, for training and testing.
            magnetic_tile: seed=N (default 0) of the draw of 80 % of the normal images to train with.

    Raises:
        ImageError: no layout fits, or several do; images, or the masks of some images, are missing.
        OptionError: an unknown layout, or a setting that it does not take.
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
    found: dict[str, dict[str, Source]] = {}
    roles: dict[str, str] = {}  # of files, by their real paths
    folders = {"normal": normal, "abnormal": abnormal, "masks": masks, "test_normal": test_normal}
    for role, folder in folders.items():
        images = find_images([folder]) if folder is not None else []
        found[role] = {image.key: Source(image.path, f"{role}/{image.key}") for image in images}
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


def _recognise(root: Path, layout: str | None) -> tuple[str, list[Path]]:
    """Return the layout's name, and the folders that have it: the root itself, or else those in it."""
    inside = sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    for folders in ([root], inside):
        found = {name: [path for path in folders if _fits(path, name)] for name in LAYOUTS if layout in (None, name)}
        if layout is None:  # what fits loco also fits mvtec
            found["mvtec"] = [path for path in found["mvtec"] if path not in found["loco"]]
        found = {name: fitting for name, fitting in found.items() if fitting}
        if len(found) > 1:
            fits = "; ".join(f"{name}: {few(path.name for path in fitting)}" for name, fitting in found.items())
            raise ImageError(f"{root}: fits several layouts ({fits}); name one, as in layout={next(iter(found))!r}")
        for name, fitting in found.items():
            for path in folders:  # a category that is not complete must not be left out without a word
                if (path / "train").is_dir() and not any(_fits(path, other) for other in LAYOUTS):
                    raise ImageError(f"{path}: expected {' and '.join(LAYOUTS[name])}, as beside it, found a part")
            return name, fitting
    known = (f"{name}: {' and '.join(LAYOUTS[name])}" for name in LAYOUTS if layout in (None, name))
    raise ImageError(
        f"{root}: expected a data set, or a folder of categories, in a known layout ({'; '.join(known)}), found "
        f"{few(path.name for path in inside)}; for others, name the folders of normal and of abnormal images"
    )


def _fits(path: Path, layout: str) -> bool:
    return all(any(path.glob(pattern)) for pattern in LAYOUTS[layout])


def _category(path: Path, name: str, layout: str, normal: list[Source], test: list[Sample], masks: bool) -> Category:
    """Check that there are images to train and to test with and, if there are masks, one for each anomalous sample."""
    if not normal or not test:
        raise ImageError(f"{path}: expected images to train and to test {name} with, found {len(normal)}, {len(test)}")
    bare = [sample.key for sample in test if sample.anomalous and sample.mask is None]
    if bare and masks:
        raise ImageError(f"{path}: expected a mask for each anomalous image, or no masks, found none of {few(bare)}")
    return Category(name, normal, test, layout, masks)


def _below(images: Iterable[Source], start: str) -> dict[str, Source]:
    """Return the images whose keys start so, by the rest of the key."""
    return {image.key.removeprefix(start): image for image in images if image.key.startswith(start)}


def _samples(
    images: dict[str, Source], kinds: dict[str, str], masks: dict[str, Source], grouped: bool = False
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


def _split(images: list[Source], seed: int) -> tuple[list[Source], list[Source]]:
    """Draw 80 % of the images (761 of 952) to train with; returns them and the others, each in the given order."""
    draw = random.Random(seed)  # of its methods, random() alone is promised the same numbers in all Python versions
    order = sorted(range(len(images)), key=lambda _: draw.random())
    cut = len(images) * 4 // 5
    return [images[i] for i in sorted(order[:cut])], [images[i] for i in sorted(order[cut:])]


def few(names: Iterable[object]) -> str:
    """Return the first three names for a message, and how many more there are."""
    listed = [str(name) for name in names]
    return (", ".join(listed[:3]) or "nothing") + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def _open_folders(path: Path, layout: str) -> list[Category]:
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
    normal, samples = list(_below(images, train).values()), _samples(tested, kinds, masks, layout == "loco")
    return [_category(path, path.resolve().name, layout, normal, samples, bool(masks))]


def _open_visa(path: Path) -> list[Category]:
    table = path / LAYOUTS["visa"][0]
    columns = ("object", "split", "label", "image", "mask")
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.DictReader(file)
            lacking = sorted(set(columns) - set(lines.fieldnames or ()))
            if lacking:
                raise csv.Error(f"expected columns {', '.join(columns)}, found no {', '.join(lacking)}")
            rows = [([line[name] or "" for name in columns], f"{table} line {lines.line_num}") for line in lines]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ImageError(f"{table}: cannot be read: {error}") from error
    normal: dict[str, list[Source]] = {}
    test: dict[str, list[Sample]] = {}
    named: set[str] = set()
    for (name, split, label, image, mask), where in sorted(rows, key=lambda row: row[0][3]):
        if (split, label) not in (("train", "normal"), ("test", "normal"), ("test", "anomaly")):
            raise ImageError(f"{where}: expected train,normal or test,normal or test,anomaly, found {split},{label}")
        if image in named or image.split("/")[0] != name:
            raise ImageError(f"{where}: expected an image in {name}/ that no other line names, found {image!r}")
        named.add(image)
        source = Source(_inside(path, image, where), image.removeprefix(f"{name}/"))
        drawn = _inside(path, mask, where) if mask else None
        if split == "train":
            normal.setdefault(name, []).append(source)
        else:
            kind, bad = (GOOD, False) if label == "normal" else (label, True)
            sample = Sample(source.path, source.key, kind, bad, drawn if bad else None)
            test.setdefault(name, []).append(sample)
    masks = any(sample.mask for samples in test.values() for sample in samples)
    names = sorted(normal.keys() | test.keys())
    return [_category(path, name, "visa", normal.get(name, []), test.get(name, []), masks) for name in names]


def _inside(root: Path, name: str, where: str) -> Path:
    """Return the path of a file that a table names: one in the data set, also when all links are followed."""
    try:
        real = (root / name).resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ImageError(f"{where}: expected a file in {root}, found nothing called {name!r}") from error
    if not real.is_file() or not real.is_relative_to(root.resolve()) or {"", ".", ".."} & set(name.split("/")):
        raise ImageError(f"{where}: expected a file that is inside {root}, found {name!r}")
    return root / name


def _open_magnetic_tile(path: Path, seed: int = 0) -> list[Category]:
    images = {key: image for key, image in _below(find_images([path]), "MT_").items() if "/Imgs/" in key}
    photos = {key: image for key, image in images.items() if image.path.suffix.lower() in (".jpg", ".jpeg")}
    bad = {key: image for key, image in photos.items() if not key.startswith("Free/")}
    masks = {key: image for key, image in images.items() if key not in photos and not key.startswith("Free/")}
    normal, held_out = _split([image for key, image in photos.items() if key not in bad], seed)
    test = _samples(bad, {key: key.split("/")[0].lower() for key in bad}, masks)
    test += [Sample(image.path, image.key, GOOD, False) for image in held_out]
    return [_category(path, path.resolve().name, "magnetic_tile", normal, test, bool(masks))]


def _open_shanghaitech(path: Path, every: int = 1) -> list[Category]:
    images = find_images([path])
    normal: dict[str, list[Source]] = {}
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
    names = {scene: scene or path.resolve().name for scene in sorted(test)}
    return [_category(path, names[s], "shanghaitech", normal.get(s, []), test[s], masks) for s in names]


def _videos(images: Iterable[Source], folder: str) -> dict[str, list[Source]]:
    """Group frames by video, in the order of their numbers, which need not all have as many digits."""
    videos: dict[str, list[Source]] = {}
    for key, image in sorted(_below(images, folder).items(), key=lambda item: (len(item[0]), item[0])):
        videos.setdefault(key.rpartition("/")[0], []).append(image)
    return dict(sorted(videos.items()))
