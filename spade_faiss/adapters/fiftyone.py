"""FiftyOne: what a query found as fields of its samples; a gallery as a backend of its similarity search."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import GalleryNotFoundError, OptionError, WorkerError, first_line
from ..gallery.gallery import Gallery
from ..labels.masks import mask_png
from ..report.results import Result, Results
from ..system.atomic_files import output_errors
from .sample_files import by_content, by_place

BACKEND = "spade-faiss"
CONFIG = "spade_faiss.adapters.fiftyone_similarity.SpadeSimilarityConfig"
INSIDE = 255  # value of a region's pixels in a mask
HOTTEST = 255  # value of a map where the scale is brightest; the app leaves pixels of 0 as they are
DOCUMENT = 12_000_000  # bytes of a map and a mask in a sample: the database refuses documents of 16 MiB
NAME = re.compile(r"[^\W_]\w*")  # that fields' names may begin with

Heat = NDArray[np.uint8]  # (H, W)
Mask = NDArray[np.bool_]  # (H, W)


@dataclass(frozen=True)
class Added:
    """Which samples have results now, and what was left out."""

    samples: int  # samples that have them
    without_results: list[str]  # ids of samples that the results do not have
    without_sample: list[str]  # keys of results that the data set does not have


def to_fiftyone(
    dataset: Any,
    results: str | Path | Results,
    field: str = "spade",
    root: str | Path | None = None,
    normal: str | Path | None = None,
    media: str | Path | None = None,
) -> Added:
    """Add what a query found to the samples of a FiftyOne data set.

    All results are read before a sample is changed, so that an error leaves the data set as it was. Samples of other
    images are left alone, as are results of images that no sample has: what is returned names both.

    Each sample whose image was queried gets these fields, with `field` before their names:

    - `_verdict`: Classification: "normal", "anomalous", or "unjudged" without a calibration; its confidence is the
      calibrated score, with the image score, the p-value, the thresholds and the gallery's generation beside it;
    - `_map`: Heatmap of the pixel scores on the run's fixed scale: 0 where colour begins, 255 where it is brightest;
    - `_regions`: Segmentation, 255 in regions; None without a calibration;
    - `_neighbours`: ids of the samples that are the nearest normal images, nearest first; None if no image is one;
    - `_neighbour_keys`: keys of all of these images, as not all may be samples.

    Args:
        dataset: a fiftyone.Dataset, or a view of one, of the images that were queried. It may have the normal ones too.
            Of groups, all slices that are images.
        results: folder that `query --output` wrote.
        field: what the fields' names begin with: letters, digits and "_". Values of an earlier call are replaced.
        root: the folder that was queried, where its files are now; None: they have not moved.
        normal: the folder that the gallery was built from; None: samples are its images by their names and contents,
            as long as the gallery is where it was.
        media: a folder to write maps and masks to as PNG files, those of each field in a folder of its name; None: into
            the database, which takes those of up to six million pixels.

    Raises:
        OptionError: fiftyone is not installed; no data set of images; no sample is in the results; a map that is too
            large for the database; or a field of that name that is of another kind or read-only.
        ImageError: a sample that may be a normal image has a file that cannot be read.
        ResultsError: as Results.open, or a map that is gone or damaged.
        OutputError: the folder `media` cannot be written. It may have some of the files then.
        WorkerError: FiftyOne's database does not answer. Some samples may have their fields then: call again.

    >>> from spade_faiss.adapters.fiftyone import to_fiftyone
    >>> to_fiftyone(dataset, "results").samples  # doctest: +SKIP
    5
    """
    opened = results if isinstance(results, Results) else Results.open(results)
    fo, by_key = load_fiftyone(), {result.key: result for result in opened}
    with _database():
        images = images_of(dataset)
        files = files_of(images)
        keys = _keys_of_samples(files, opened, root)
        neighbours = _samples_of_normal(files, opened, normal)
        _require_fields(fo, images._root_dataset, field)
        own, pictures = None if media is None else Path(media) / field, dict[str, Any]()
        for key in keys.values():  # of all, before a sample is changed; arrays are not kept
            made = _pictures(fo, by_key[key], opened, own)
            pictures[key] = None if own is None else made
        _declare(fo, images._root_dataset, field)
        for sample in images.select(list(keys)).iter_samples(autosave=True, progress=False):
            key = keys[sample.id]
            values = pictures[key] or _pictures(fo, by_key[key], opened, own)
            for name, value in (values | _facts(fo, by_key[key], opened, neighbours)).items():
                sample[f"{field}_{name}"] = value
    others = [one for one in files if one not in keys]
    return Added(len(keys), others, [key for key in by_key if key not in pictures])


def register() -> None:
    """Let `compute_similarity(backend="spade-faiss")` use galleries, in this process; see fiftyone_similarity.

    Raises:
        OptionError: fiftyone is not installed.
        WorkerError: FiftyOne's database does not start.
    """
    load_fiftyone()
    import fiftyone.brain

    fiftyone.brain.brain_config.similarity_backends[BACKEND] = {"config_cls": CONFIG}


def load_fiftyone() -> Any:
    """Import fiftyone and start its database, unless it runs.

    Raises:
        OptionError: it is not installed.
        WorkerError: its database does not start.
    """
    try:
        import fiftyone

        fiftyone.list_datasets()  # the first question starts it
    except ImportError as error:
        raise OptionError(
            f"fiftyone: expected the package, found none ({first_line(error)}); pip install 'spade-faiss[fiftyone]'"
        ) from error
    except Exception as error:  # it has no error of its own for this: a timeout, a permission, the database's own
        raise WorkerError(
            f"fiftyone: expected its database to start, found {type(error).__name__}: {first_line(error)}; look at "
            "log/mongo.log in fiftyone.config.database_dir, or name a running one in FIFTYONE_DATABASE_URI"
        ) from error
    return fiftyone


def images_of(dataset: Any) -> Any:
    """Return the images of a data set or a view: itself, or all slices of groups that are images.

    Raises:
        OptionError: it is something else.
    """
    from fiftyone.core.collections import SampleCollection

    expected = "dataset: expected a fiftyone.Dataset of images or a view of one"
    if not isinstance(dataset, SampleCollection):
        raise OptionError(f"{expected}, found {type(dataset).__name__}; fiftyone.load_dataset opens one by its name")
    if dataset._is_generated or dataset._is_dynamic_groups:
        raise OptionError(f"{expected}, found a {type(dataset).__name__} of {dataset._root_dataset.name}; give that")
    in_groups = dataset.media_type == "group"
    kinds = dataset.group_media_types.values() if in_groups else [dataset.media_type or "image"]  # None: it is empty
    if "image" not in kinds:
        raise OptionError(f"{expected}, found {', '.join(kinds)} in {dataset.name}; query frames as image files")
    return dataset.select_group_slices(media_type="image") if in_groups else dataset


def files_of(images: Any) -> dict[str, str]:
    """Return the path of each sample's file, by the sample's id."""
    return dict(zip(*images.values(["id", "filepath"]), strict=True))


@contextmanager
def _database() -> Iterator[None]:
    """Raise errors of the database in one line.

    Raises:
        WorkerError: it does not answer.
    """
    from pymongo.errors import ConnectionFailure

    try:
        yield
    except ConnectionFailure as error:
        raise WorkerError(
            f"fiftyone: expected its database to answer, found {type(error).__name__}: {str(error)[:120]}; "
            "start it again"
        ) from error


def _keys_of_samples(files: dict[str, str], results: Results, root: str | Path | None) -> dict[str, str]:
    """Return the key of each sample that the results have, by the sample's id."""
    if root is None:
        paths = {os.path.realpath(result.path): result.key for result in results}
        keys = {sample: paths.get(os.path.realpath(file), "") for sample, file in files.items()}
    else:
        keys = by_place(files, root)
    known = {result.key for result in results}
    found = {sample: key for sample, key in keys.items() if key in known}
    if not found:
        raise OptionError(
            f"dataset: expected samples of images in {results.folder}, found none among {len(files)}; add the images "
            "that were queried, or, if their files have moved, give root, the folder that was queried"
        )
    return found


def _samples_of_normal(files: dict[str, str], results: Results, normal: str | Path | None) -> dict[str, str]:
    """Return the sample of each normal image that is one, by its key."""
    if normal is not None:
        return {key: sample for sample, key in by_place(files, normal).items()}
    try:
        gallery = Gallery.open(results.run.gallery)
    except GalleryNotFoundError:
        return {}  # moved: the keys say what the neighbours are
    with gallery:
        rows = by_content(files, gallery.snapshot(), "normal")
        return dict(zip(gallery.keys(list(rows.values())), rows, strict=True))


def _facts(fo: Any, result: Result, results: Results, neighbours: dict[str, str]) -> dict[str, Any]:
    line, thresholds = result.line, results.run.thresholds or {}
    nearest = [one["key"] for one in line.get("neighbours", [])]
    verdict = fo.Classification(
        label=line.get("verdict") or "unjudged",
        confidence=line.get("score"),
        image_score=line["image_score"],
        p_value=line.get("p_value"),
        image_threshold=thresholds.get("image"),
        pixel_threshold=thresholds.get("pixel"),
        generation=results.run.generation,
    )
    own = [neighbours[key] for key in nearest if key in neighbours]
    return {"verdict": verdict, "neighbours": own, "neighbour_keys": nearest}


def _pictures(fo: Any, result: Result, results: Results, folder: Path | None) -> dict[str, Any]:
    """Return an image's map and regions as labels, whose pictures are in them, or in files of a folder.

    Raises:
        ResultsError: the map is gone or damaged.
        OptionError: it is too large for the database.
        OutputError: its file cannot be written.
    """
    scores = result.anomaly_map()
    # Without thresholds an empty mask would stand for a normal image.
    mask = result.labels(scores) > 0 if results.run.thresholds else None
    heat = np.rint(results.scale.apply(scores) * HOTTEST).astype(np.uint8)
    return _stored(fo, result, heat, mask) if folder is None else _written(fo, result, heat, mask, folder)


def _stored(fo: Any, result: Result, heat: Heat, mask: Mask | None) -> dict[str, Any]:
    if heat.nbytes + (0 if mask is None else mask.nbytes) > DOCUMENT:
        height, width = heat.shape
        raise OptionError(
            f"media: expected a folder for maps, as that of {result.key}, {width} x {height} px, is more than the "
            "database takes; give media"
        )
    return {
        "map": fo.Heatmap(map=heat, range=[0, HOTTEST]),
        "regions": None if mask is None else fo.Segmentation(mask=mask.astype(np.uint8) * INSIDE),
    }


def _written(fo: Any, result: Result, heat: Heat, mask: Mask | None, folder: Path) -> dict[str, Any]:
    from PIL import Image

    name = Path(result.line["map"]).with_suffix(".png")
    heatmap, regions = folder / name, folder / "regions" / name
    with output_errors(f"cannot write maps to {folder}"):
        heatmap.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(heat).save(heatmap)
        if mask is not None:
            regions.parent.mkdir(parents=True, exist_ok=True)
            regions.write_bytes(mask_png(mask))
    return {
        "map": fo.Heatmap(map_path=str(heatmap.resolve()), range=[0, HOTTEST]),
        "regions": None if mask is None else fo.Segmentation(mask_path=str(regions.resolve())),
    }


def _require_fields(fo: Any, dataset: Any, field: str) -> None:
    """Check that a data set takes all fields, before it gets the first.

    Raises:
        OptionError: no name, or a field of one of the names that is of another kind or read-only.
    """
    if not isinstance(field, str) or not NAME.fullmatch(field):
        raise OptionError(f"field: expected letters, digits and '_' that fields' names begin with, found {field!r}")
    schema = dataset.get_field_schema()
    for name, kind in _kinds(fo).items():
        found = schema.get(f"{field}_{name}", kind)
        if str(found) != str(kind) or found.read_only:
            raise OptionError(
                f"field: expected {field}_{name} of {dataset.name} to be a {kind} that can be written, found "
                f"{'a read-only one' if found.read_only else found}; choose another name"
            )


def _kinds(fo: Any) -> dict[str, Any]:
    """Return the type of each field, by the end of its name."""
    labels = {"verdict": fo.Classification, "map": fo.Heatmap, "regions": fo.Segmentation}
    kinds = {name: fo.EmbeddedDocumentField(label) for name, label in labels.items()}
    return kinds | {name: fo.ListField(fo.StringField()) for name in ("neighbours", "neighbour_keys")}


def _declare(fo: Any, dataset: Any, field: str) -> None:
    """Declare all fields, as a list is of text also where it is empty, and what the values of masks mean."""
    for name, kind in _kinds(fo).items():
        is_list = isinstance(kind, fo.ListField)
        holds = {"subfield": kind.field} if is_list else {"embedded_doc_type": kind.document_type}
        dataset.add_sample_field(f"{field}_{name}", type(kind), **holds)
    dataset.mask_targets = {**dataset.mask_targets, f"{field}_regions": {INSIDE: "anomaly"}}
    dataset.save()
