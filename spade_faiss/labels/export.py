"""Results of a query as the file of a label tool."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import OptionError, OutputError, ResultsError
from ..report.output_files import PAGE, PARTS, RESULTS, RUN, SCALE, SKIPPED, refuse_in_gallery
from ..report.results import Result, Results
from ..system.atomic_files import output_errors, write_whole
from .coco import coco
from .cvat import cvat
from .label_studio import LOCAL_FILES, label_studio
from .masks import mask_png
from .regions import LabelledImage
from .shapes import Shapes

Format = Literal["coco", "labelstudio", "cvat", "masks"]
INDEX = "index.json"  # of a folder of masks
OWN = {(name,) for name in (RESULTS, SCALE, SKIPPED, RUN, PAGE, *(place for place, _ in PARTS.values()))}


def export(
    results: str | Path | Results,
    output: str | Path,
    format: Format = "coco",
    shapes: Shapes = "masks",
    label: str = "anomaly",
    prefix: str = LOCAL_FILES,
) -> int:
    """Write the regions that a query found as the file of a label tool.

    Args:
        results: folder that `query --output` wrote, of a calibrated gallery.
        output: file to write; for masks a folder, new or empty.
        format: "coco", "labelstudio" or "cvat"; "masks": a PNG for each image, 255 in regions and 0 elsewhere, named
            by the image's key with .png added, and index.json with what is known of each image.
        shapes: "masks": the regions' pixels; "polygons": outlines that have the same pixels, for people to drag.
        label: name of the regions' class.
        prefix: what goes before an image's key to make its URL in Label Studio.

    Returns:
        the number of images.

    Raises:
        ResultsError: no result folder, one that is unfinished, of another release or damaged, or without thresholds.
        OptionError: an unknown format, masks as polygons, polygons without contourpy, or a label that is empty or that
            XML cannot hold.
        OutputError: the file cannot be written, is one of the results or lies in a gallery, or the folder for masks is
            not empty. Nothing is left of what was written.

    >>> from spade_faiss.labels import export
    >>> export("results", "regions.json", format="coco", shapes="polygons")  # doctest: +SKIP
    14
    """
    opened = results if isinstance(results, Results) else Results.open(results)
    if opened.run.thresholds is None:
        raise ResultsError(
            f"{opened.folder}: expected results of a calibrated gallery, found no thresholds, so that there are no "
            "regions; run `calibrate`, then `query` again"
        )
    for name, value, kinds in (("format", format, Format), ("shapes", shapes, Shapes)):
        if value not in get_args(kinds):
            raise OptionError(f"{name}: expected one of {', '.join(get_args(kinds))}, found {value!r}")
    if not label.strip():
        raise OptionError(f"label: expected the name of a class, found {label!r}")
    _require_apart(opened.folder, Path(output))
    if format == "masks":
        if shapes != "masks":
            raise OptionError("shapes: expected 'masks' with format 'masks', found 'polygons'; choose another format")
        _write_masks(opened, Path(output))
    else:
        content = _content(opened, format, shapes, label, prefix)
        with output_errors(f"cannot write {output}"):
            Path(output).parent.mkdir(parents=True, exist_ok=True)
            write_whole(Path(output), content)
    return len(opened)


def labelled(number: int, result: Result) -> LabelledImage:
    """Return a result as every format takes it."""
    line = result.line
    facts = {name: line.get(name) for name in ("verdict", "image_score", "map_max", "p_value", "score")}
    facts["generation"] = result.run.generation
    return LabelledImage(number, result.key, result.labels(), result.regions, result.run.thresholds, facts)


def _images(results: Results) -> Iterator[LabelledImage]:
    return (labelled(number, result) for number, result in enumerate(results, start=1))


def _content(results: Results, format: Format, shapes: Shapes, label: str, prefix: str) -> bytes:
    if format == "cvat":
        return cvat(_images(results), shapes, label)
    images = _images(results)
    made: Any = coco(images, shapes, label) if format == "coco" else label_studio(images, shapes, label, prefix)
    return json.dumps(made).encode()


def _require_apart(results: Path, output: Path) -> None:
    """Refuse to write over what the query has written, or into a gallery.

    Raises:
        OutputError: the output is one of the query's files, or lies in one of its folders or in a gallery.
    """
    refuse_in_gallery(output, "a place for labels")
    own, real = results.resolve(), output.resolve()
    if real.is_relative_to(own) and real.relative_to(own).parts[:1] in OWN:
        raise OutputError(f"{output}: expected a new file, found one of the results in {results}; choose another name")


def _write_masks(results: Results, output: Path) -> None:
    """Write a mask for each image, then what is known of them; after an error, nothing is left.

    Raises:
        OutputError: the folder is not empty, or cannot be written.
    """
    written = list[Path]()
    try:
        with output_errors(f"cannot write {output}"):
            if output.exists() and (not output.is_dir() or any(output.iterdir())):
                raise OutputError(
                    f"{output}: expected a new or empty folder for masks, found another; choose another one"
                )
            _make_folder(output, written)
        index = []
        for result, image in zip(results, _images(results), strict=True):
            place, suffix = PARTS["map"]
            name = result.line["map"].removeprefix(f"{place}/").removesuffix(suffix) + ".png"
            with output_errors(f"cannot write {output / name}"):
                _make_folder((output / name).parent, written)
                written.append(output / name)
                (output / name).write_bytes(mask_png(image.mask))
            index.append({"file": name, "name": image.name, "thresholds": image.thresholds, **image.facts})
        with output_errors(f"cannot write {output / INDEX}"):
            write_whole(output / INDEX, (json.dumps(index, indent=1) + "\n").encode())
    except BaseException:
        for path in reversed(written):
            with suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
        raise


def _make_folder(folder: Path, made: list[Path]) -> None:
    """Make a folder and those above it, and note which were made."""
    for one in (*reversed(folder.parents), folder):
        if not one.is_dir():
            one.mkdir()
            made.append(one)
