"""The files of a result folder: what an image's are called, what an earlier run left, where none may be written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..datasets.category import Category
from ..errors import ImageError, OutputError
from ..images.sources import ImageFile
from ..images.suffixes import image_suffixes
from ..system.atomic_files import output_errors, write_whole

PARTS = {"map": ("maps", ".npy"), "matches": ("matches", ".npz"), "overlay": ("overlays", ".png")}
RESULTS, SCALE, SKIPPED, RUN = "results.jsonl", "scale.json", "skipped.jsonl", "run.json"
PAGE = "report.html"
EVALUATED = ("curves.json", "curves.csv", "results.csv", "metrics.json")  # of an evaluation
MADE = (
    "gallery.json",
    "cluster.json",
)  # of a gallery or a cluster, if they have FORMAT; other programs have such names
FORMAT = b'"format": "spade-faiss '
NAME_BYTES = 255  # that a file system takes
# Errors that come from one image's name, or from what lies in its place.
ONE_IMAGE = frozenset({errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EINVAL, errno.EILSEQ})
ONE_FOLDER = ONE_IMAGE | {errno.EACCES, errno.EPERM, errno.ELOOP}


class OutputNames:
    """The paths of the images' files in a result folder: their keys, or a name that the file system takes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._taken: set[str] = set()  # what names are on file systems that ignore case and form

    def choices(self, key: str) -> Iterator[dict[str, str]]:
        """Yield the relative paths of an image's files, by part, best first."""
        path = PurePosixPath(key)
        folded = unicodedata.normalize("NFC", key).casefold()
        own = _paths(key)
        short = len(path.name.encode(errors="surrogateescape")) + len(".npy") <= NAME_BYTES
        # Another key's file is there already only if the file system takes both names for one.
        if short and not (folded in self._taken and any((self.folder / own[part]).exists() for part in PARTS)):
            self._taken.add(folded)
            yield own
        digest = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:16]
        yield _paths(str(path.with_name(f"{_cut(path.name, NAME_BYTES - 24)}~{digest}")))
        plain = re.sub(r"[^A-Za-z0-9._-]", "_", path.name)[:100]
        yield _paths(f"{plain}~{digest}")


def _paths(stem: str) -> dict[str, str]:
    return {part: f"{folder}/{stem}{suffix}" for part, (folder, suffix) in PARTS.items()}


def _cut(name: str, size: int) -> str:
    return name.encode(errors="surrogateescape")[:size].decode(errors="ignore")


def write_files(folder: Path, paths: dict[str, str], contents: dict[str, bytes]) -> None:
    """Write an image's files; after an error there are none.

    Raises:
        OSError: a file cannot be written.
    """
    written = []
    try:
        for part, content in contents.items():
            path = folder / paths[part]
            path.parent.mkdir(parents=True, exist_ok=True)
            written.append(path)
            path.write_bytes(content)
    except OSError:
        for path in written:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        raise


def concerns_one_image(error: OutputError) -> bool:
    """Return whether an error is about one image's files, so that others can still be written."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in ONE_FOLDER


def json_line(values: dict[str, Any]) -> str:
    """Return a line of JSON in UTF-8, with escapes for what UTF-8 cannot hold: a path whose bytes are no text."""
    text = json.dumps(values, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(values)
    return text + "\n"


def clear_earlier_run(folder: Path) -> None:
    """Delete what an earlier run wrote into a result folder, as far as its results.jsonl names it.

    Raises:
        OutputError: a file cannot be deleted.
    """
    results = folder / RESULTS
    if not (results.is_file() and (folder / SCALE).is_file()):
        return
    folders: set[Path] = set()
    with output_errors(f"cannot replace the results in {folder}"):
        with results.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                for path in _named(line):
                    if _removed(folder / path):
                        folders |= {folder / above for above in path.parents if above.parts}
        for path in sorted(folders, key=lambda path: -len(path.parts)):
            with contextlib.suppress(OSError):  # something else is in it
                path.rmdir()
        # A report is written last: until then the page would be of other results. The results say what else there is.
        for name in (SKIPPED, RUN, PAGE, SCALE, RESULTS):
            _removed(folder / name)


def clear_earlier_evaluation(folder: Path) -> None:
    """Delete the metrics, curves and reports that an earlier evaluation wrote, as far as its metrics.json names them.

    Raises:
        OutputError: a file cannot be deleted.
    """
    metrics = folder / "metrics.json"
    if not (metrics.is_file() and (folder / "results.csv").is_file()):
        return
    with output_errors(f"cannot replace the results in {folder}"):
        for place in _places(metrics.read_bytes()):
            if _removed(folder / place / PAGE) and place.parts:
                with contextlib.suppress(OSError):  # something else is in it
                    (folder / place).rmdir()
        for name in EVALUATED:  # metrics.json last: it says what else there is
            _removed(folder / name)


def _places(metrics: bytes) -> Iterator[PurePosixPath]:
    """Yield the relative folders where an evaluation's reports may be: of its draws, its categories and itself."""
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):  # cut short, or edited
        for category in json.loads(metrics)["categories"]:
            seeds = [f"seed-{int(draw['seed'])}" for draw in category.get("draws", ())]
            name = PurePosixPath(category["category"])
            for above in [PurePosixPath(), *([name] if name.name == str(name) != ".." else [])]:
                yield from (above / seed for seed in seeds)
                yield above
    yield PurePosixPath()


def remove_files(paths: Iterable[Path]) -> None:
    """Delete files that a run is about to write again, or not.

    Raises:
        OutputError: one cannot be deleted.
    """
    for path in paths:
        with output_errors(f"cannot replace {path}"):
            _removed(path)


def _named(line: str) -> Iterator[Path]:
    """Yield the files that a line of results.jsonl names; earlier releases did not write them, but always the same."""
    try:
        values = json.loads(line)
        usual = _paths(values["key"])
    except (ValueError, TypeError, KeyError):  # cut short, or edited
        return
    for part, (place, _) in PARTS.items():
        path = PurePosixPath(str(values.get(part, usual[part])))
        if len(path.parts) > 1 and path.parts[0] == place and ".." not in path.parts:
            yield Path(path)


def _removed(path: Path) -> bool:
    try:
        if path.is_file() and not path.is_symlink():
            path.unlink()
            return True
    except (FileNotFoundError, NotADirectoryError, ValueError):
        pass
    except OSError as error:
        if error.errno not in ONE_IMAGE:
            raise
    return False


def map_paths(folder: Path, category: Category) -> dict[str, Path]:
    """Return where each test image's map goes: FOLDER/CATEGORY/test/KIND/NAME.tiff in MVTec's layout, others alike.

    Raises:
        ImageError: two maps would go to one place.
    """
    paths: dict[str, Path] = {}
    owners: dict[Path, Path] = {}
    for sample in category.test:
        path = paths[sample.key] = (folder / category.name / sample.key).with_suffix(".tiff")
        other = owners.setdefault(path, sample.path)
        if other != sample.path:
            raise ImageError(f"{sample.path}: expected a name of its own for its map, found {path} of {other}")
    return paths


def write_map(path: Path, scores: NDArray[np.float32]) -> None:
    """Write an (H, W) map; after an error there is none, or the earlier one.

    Raises:
        OutputError: it cannot be written.
    """
    content = io.BytesIO()
    Image.fromarray(scores).save(content, "TIFF")
    with output_errors(f"cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content.getvalue())


def refuse_in_gallery(output: Path, expected: str = "a folder for results") -> None:
    """Refuse a place for results that is a gallery, or in one.

    Raises:
        OutputError: it is.
    """
    place = Path(os.path.realpath(output))
    gallery = next((above for above in (place, *place.parents) if _is_gallery(above)), None)
    if gallery is not None:
        raise OutputError(f"{output}: expected {expected}, found the gallery {gallery}; choose another folder")


def refuse_foreign(output: Path) -> None:
    """Refuse a folder for results that is somebody else's: in a gallery, or of images.

    Raises:
        OutputError: it is.
    """
    refuse_in_gallery(output)
    place = Path(os.path.realpath(output))
    if not place.is_dir() or (place / RESULTS).is_file():
        return
    suffixes = image_suffixes()
    with output_errors(f"cannot write {output}"), os.scandir(place) as entries:
        image = min(
            (one.name for one in entries if Path(one.name).suffix.lower() in suffixes and one.is_file()), default=None
        )
    if image is not None:
        raise OutputError(
            f"{output}: expected a folder for results apart from images, found {image} in it; choose another folder"
        )


def _is_gallery(folder: Path) -> bool:
    """Return whether a folder is a gallery, which may be damaged, or a cluster."""
    for path in (folder / name for name in MADE):
        with contextlib.suppress(OSError):
            if FORMAT in path.read_bytes() or (folder / "shards").is_dir():
                return True
    return False


def refuse_among_images(output: Path, sources: Sequence[Path], images: Sequence[ImageFile]) -> None:
    """Refuse a folder for results that would mix them with the images which are read.

    A new or earlier result folder inside a source is left out of its images, so it may be there.

    Raises:
        OutputError: it is a source, it holds images of a source, or images lie among the earlier results in it.
    """
    real = os.path.realpath(output)
    own = tuple(f"{real}/{place}/" for place, _ in PARTS.values())
    roots = {os.path.realpath(source) for source in sources if source.is_dir()}
    inside = any(f"{real}/".startswith(f"{root}/") for root in roots)
    places: dict[Path, str] = {}
    for image in images:
        place = places.get(image.path.parent)
        if place is None:
            place = places[image.path.parent] = os.path.realpath(image.path.parent) + "/"
        if place.startswith(own) or (inside and place.startswith(f"{real}/")):
            raise OutputError(
                f"{output}: expected a folder for results apart from the images, found {image.path} in it; "
                "choose another folder"
            )
    if real in roots:
        raise OutputError(f"{output}: expected a folder for results, found the images' own; choose another folder")
