"""Opening sets whose layout tells each image's role by its folder or its name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..errors import ImageError
from ..images.sources import ImageFile, find_images
from ..system.prefetch import read_ahead
from .annotations import find_annotations, photo_name, refuse_annotations
from .category import GOOD, Category, Sample, checked_category, few, images_of
from .masks import load_rows, read_marks
from .pairing import pair_with_masks, split

ROLES: dict[str, tuple[str, str]] = {  # layout: folder of the training images, folder of the test images by kind
    "mvtec": ("train/good", "test"),
    "loco": ("train/good", "test"),
    "mvtec_ad_2": ("train/good", "test_public"),
    "btad": ("train/ok", "test"),
}
GOOD_NAMES = frozenset({"good", "ok", "normal"})  # of folders of defect-free images
TRUTH_NAMES = frozenset({"gt", "ground_truth"})  # of folders of masks, in mvtec_3d


def below(images: Iterable[ImageFile], start: str) -> dict[str, ImageFile]:
    """Return the images whose keys start with `start`, by the rest of the key."""
    return {image.key.removeprefix(start): image for image in images if image.key.startswith(start)}


def open_folders(path: Path, layout: str) -> list[Category]:
    """Open a layout of folders: mvtec, loco, mvtec_ad_2 or btad."""
    train, test = (f"{folder}/" for folder in ROLES[layout])
    truth = f"{test}ground_truth/" if layout == "mvtec_ad_2" else "ground_truth/"
    good = f"{Path(train).name}/"
    images = images_of(path)
    trained = below(images, train)
    tested = {key: image for key, image in below(images, test).items() if not image.key.startswith(truth)}
    for part, found in ((train, trained), (test, tested)):
        advice = "leave photos alone in it, with the masks in ground_truth/"
        refuse_annotations(path / part, find_annotations(found), len(found), advice)
    masks = {key: mask for key, mask in below(images, truth).items() if not key.startswith(good)}
    kinds = {key: GOOD if key.startswith(good) else key.split("/")[0] for key in tested}
    for key, kind in kinds.items():
        if key == kind:
            raise ImageError(f"{tested[key].path}: expected in a folder named after its kind, found beside those")
        _check_kind(tested[key], kind, key.split("/")[:-1], f"{test}{good}")
    normal, samples = list(trained.values()), pair_with_masks(tested, kinds, masks, layout == "loco")
    return [checked_category(path, Category(path.resolve().name, normal, samples, layout, bool(masks)))]


def _check_kind(image: ImageFile, kind: str, folders: list[str], good: str) -> None:
    """Raise an ImageError if an image counts as a defect, although a folder's name says that it has none."""
    misplaced = [folder for folder in folders if folder.casefold() in GOOD_NAMES]
    if kind != GOOD and misplaced:
        raise ImageError(f"{image.path}: expected the defect-free test images in {good}, found a folder {misplaced[0]}")


def open_mvtec_3d(path: Path) -> list[Category]:
    """Open MVTec 3D-AD, or a set like it: a kind has its photos in rgb/, its masks in gt/ or ground_truth/."""
    images = images_of(path)
    tested: dict[str, ImageFile] = {}
    masks: dict[str, ImageFile] = {}
    for key, image in below(images, "test/").items():
        kind, *rest = key.split("/")
        if len(rest) < 2:
            raise ImageError(f"{image.path}: expected in a folder as test/KIND/rgb/, found in {image.path.parent}")
        folder, *name = rest
        if folder == "rgb":
            tested["/".join([kind, *name])] = image
        elif folder in TRUTH_NAMES and kind != GOOD:
            masks["/".join([kind, *name])] = image
    kinds = {key: key.split("/")[0] for key in tested}
    for key, kind in kinds.items():
        _check_kind(tested[key], kind, key.split("/")[:-1], "test/good/rgb/")
    normal, samples = list(below(images, "train/good/rgb/").values()), pair_with_masks(tested, kinds, masks)
    return [checked_category(path, Category(path.resolve().name, normal, samples, "mvtec_3d", bool(masks)))]


def open_kolektor_sdd2(path: Path) -> list[Category]:
    """Open KolektorSDD2: N.png beside its mask N_GT.png. An image is normal if its mask marks nothing.

    Training images with a defect are left out.
    """
    images = images_of(path)
    train, test = (_with_truth(below(images, f"{part}/")) for part in ("train", "test"))
    normal = [sample.path for sample in train if not sample.anomalous]
    kept = [image for image in below(images, "train/").values() if image.path in set(normal)]
    return [checked_category(path, Category(path.resolve().name, kept, test, "kolektor_sdd2", True))]


def open_kolektor_sdd(path: Path, seed: int = 0) -> list[Category]:
    """Open KolektorSDD: kosNN/PartN.jpg beside its mask PartN_label.bmp.

    An image is normal if its mask marks nothing; 80 % of those are drawn to train with.
    """
    samples = _with_truth(below(images_of(path), ""))
    fine = [ImageFile(sample.path, sample.key) for sample in samples if not sample.anomalous]
    normal, held_out = split(fine, seed)
    drawn = {image.key for image in held_out}
    test = [sample for sample in samples if sample.anomalous or sample.key in drawn]
    return [checked_category(path, Category(path.resolve().name, normal, test, "kolektor_sdd", True))]


def _with_truth(images: dict[str, ImageFile]) -> list[Sample]:
    """Pair each photo with the mask beside it, which tells whether it is normal.

    Raises:
        ImageError: a photo without a mask, a mask without a photo, two files for one of them, or a mask that cannot be
            read.
    """
    # The published archive of KolektorSDD2 has a second "10301 (copy).png" and "10301_GT (copy).png".
    stems = _only(((key.rpartition(".")[0], image) for key, image in images.items()), "file of its name")
    stems = {
        stem: image
        for stem, image in stems.items()
        if not (stem.endswith(" (copy)") and stem.removesuffix(" (copy)") in stems)
    }
    photos = {stem: image for stem, image in stems.items() if _photo_of(stem) is None}
    named = ((_photo_of(stem), image) for stem, image in stems.items())
    masks = _only(((photo, image) for photo, image in named if photo is not None), "mask of its image")
    if bare := [image.path for stem, image in photos.items() if stem not in masks]:
        raise ImageError(f"{bare[0]}: expected a mask beside each image, found none of {few(bare)}")
    if alone := [image.path for stem, image in masks.items() if stem not in photos]:
        raise ImageError(f"{alone[0]}: expected an image beside each mask, found none of {few(alone)}")
    marked = read_ahead(photos, lambda stem: bool(read_marks(masks[stem].path).anomalous.any()))
    samples = []
    for (stem, image), bad in zip(photos.items(), marked, strict=True):
        samples.append(Sample(image.path, image.key, "defect" if bad else GOOD, bad, masks[stem].path if bad else None))
    return samples


def _only(images: Iterable[tuple[str, ImageFile]], what: str) -> dict[str, ImageFile]:
    """Return images by their names; raises an ImageError for two of one name."""
    found: dict[str, ImageFile] = {}
    for name, image in images:
        other = found.setdefault(name, image)
        if other is not image:
            raise ImageError(f"{image.path}: expected the only {what}, found {other.path} too")
    return found


def _photo_of(stem: str) -> str | None:
    folder, slash, name = stem.rpartition("/")
    photo = photo_name(name)
    return None if photo is None else f"{folder}{slash}{photo}"


def open_magnetic_tile(path: Path, seed: int = 0) -> list[Category]:
    """Open the raw Magnetic Tile set: photos are JPEG, masks PNG, defects in folders MT_KIND."""
    images = {key: image for key, image in below(images_of(path), "MT_").items() if "/Imgs/" in key}
    photos = {key: image for key, image in images.items() if image.path.suffix.lower() in (".jpg", ".jpeg")}
    bad = {key: image for key, image in photos.items() if not key.startswith("Free/")}
    masks = {key: image for key, image in images.items() if key not in photos and not key.startswith("Free/")}
    normal, held_out = split([image for key, image in photos.items() if key not in bad], seed)
    test = pair_with_masks(bad, {key: key.split("/")[0].lower() for key in bad}, masks)
    test += [Sample(image.path, image.key, GOOD, False) for image in held_out]
    return [checked_category(path, Category(path.resolve().name, normal, test, "magnetic_tile", bool(masks)))]


def open_shanghaitech(path: Path, every: int = 1) -> list[Category]:
    """Open ShanghaiTech Campus: a category for each scene, which is the start of its videos' names."""
    images = find_images([path])  # its videos are beside the frames that were made of them
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
    for key, image in sorted(below(images, folder).items(), key=lambda item: (len(item[0]), item[0])):
        videos.setdefault(key.rpartition("/")[0], []).append(image)
    return dict(sorted(videos.items()))
