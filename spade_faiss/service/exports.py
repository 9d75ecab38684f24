"""The log as files for other programs: CSV, JSON lines, COCO, masks."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..detect.regions import Region, find_regions
from ..labels.coco import coco
from ..labels.masks import mask_png
from ..labels.regions import LabelledImage
from .errors import ServiceError
from .log.inspections import Inspections, Line, as_result
from .pictures import unpack

FIELDS = (
    "number", "id", "at", "gallery", "name", "sha256", "verdict", "label", "image_score", "score", "p_value", "map_max",
    "generation", "ms", "width", "height",
)  # fmt: skip
FACTS = ("id", "sha256", "verdict", "label", "image_score", "score", "p_value", "generation")  # for label tools
LeftOut = dict[str, str]  # id, name, why
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet would run a cell that begins so


@dataclass(frozen=True)
class Exported:
    """A file to download."""

    content: bytes
    media_type: str
    name: str
    left_out: int = 0  # inspections that were asked for and are not in it


def export(inspections: Inspections, gallery: str, kind: str, last: int, judged_only: bool = False) -> Exported:
    """Return the newest inspections of a gallery as a file.

    Args:
        inspections: the log.
        gallery: its name.
        kind: csv, jsonl, coco or masks.
        last: how many.
        judged_only: leave out those that were not judged; see is_judged.

    Raises:
        ServiceError: coco or masks of inspections of which some were not judged.
    """
    lines, left_out = inspections.last(gallery, last), list[LeftOut]()
    if judged_only:
        left_out = [_left_out(line, "not_judged") for line in lines if not is_judged(line)]
        lines = [line for line in lines if is_judged(line)]
    if kind == "csv":
        return Exported(_csv(lines), "text/csv; charset=utf-8", "inspections.csv", len(left_out))
    if kind == "jsonl":
        text = "".join(json.dumps(as_result(line)) + "\n" for line in lines)
        return Exported(text.encode(), "application/x-ndjson", "inspections.jsonl", len(left_out))
    _require_judged(lines)
    images = _labelled(inspections, lines, left_out)
    if kind == "coco":
        found = coco((image for _, image in images), "polygons")
        found["info"]["left_out"] = left_out
        return Exported(json.dumps(found).encode(), "application/json", "coco.json", len(left_out))
    return Exported(_masks(images, left_out), "application/zip", "masks.zip", len(left_out))


def _left_out(line: Line, why: str) -> LeftOut:
    """Say which inspection is not in a file, and why: the code of its error, if it has one."""
    result = as_result(line)
    return {"id": result["id"], "name": result["name"], "why": result["error"]["code"] if result["error"] else why}


def _csv(lines: Sequence[Line]) -> bytes:
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow([*FIELDS, "regions", "error"])
    for line in lines:
        result = as_result(line)
        cells = [result[name] for name in FIELDS]
        regions = len(result["regions"]) if is_judged(line) else ""  # 0 would stand for a normal part
        cells += [regions, result["error"]["code"] if result["error"] else ""]
        writer.writerow([_harmless(cell) for cell in cells])
    return buffer.getvalue().encode()


def _harmless(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell


def is_judged(line: Line) -> bool:
    """Return whether the gallery's thresholds have judged a part: only then do no regions mean that it is normal."""
    return (line["facts"].get("thresholds") or {}).get("pixel") is not None


def _require_judged(lines: Sequence[Line]) -> None:
    """Check that every part that was inspected was judged; those that failed are in no file of labels.

    Raises:
        ServiceError: the newest that was not, and how many there are.
    """
    unjudged = [line for line in lines if line["error"] is None and not is_judged(line)]
    if unjudged:
        raise ServiceError(
            409, "not_judged",
            f"Expected a verdict by the gallery's thresholds for each of {len(lines)} parts, found {len(unjudged)} "
            f"without, the newest is {unjudged[0]['uid']}: they have no regions, as if they were normal. Calibrate the "
            "gallery and inspect them again, or leave them out with judged_only=true.",
        )  # fmt: skip


def labelled(inspections: Inspections, line: Line) -> LabelledImage | None:
    """Return an inspection as label tools take it.

    None where nothing was inspected, and where a part has regions whose map was let go of: it would look like one
    without.
    """
    result = as_result(line)
    if result["width"] is None:
        return None
    logged, thresholds = result["regions"], result["thresholds"]
    regions, labels = list[Region](), np.zeros((result["height"], result["width"]), np.uint8)
    if logged:
        try:
            scores = unpack(inspections.artifact(line["uid"], "map"))
        except ServiceError:
            return None
        # Smaller ones did not count, if there are any.
        regions, labels = find_regions(scores, thresholds["pixel"], min(one["area"] for one in logged))
    facts = {name: result[name] for name in FACTS}
    return LabelledImage(line.id, result["name"], labels, regions, thresholds, facts)


def _labelled(
    inspections: Inspections, lines: Sequence[Line], left_out: list[LeftOut]
) -> Iterator[tuple[Line, LabelledImage]]:
    """Yield inspections as label tools take them; those that they cannot take are added to `left_out`."""
    for line in lines:
        image = labelled(inspections, line)
        if image is not None:
            yield line, image
        else:
            left_out.append(_left_out(line, "map_not_kept"))


def _masks(images: Iterable[tuple[Line, LabelledImage]], left_out: list[LeftOut]) -> bytes:
    """Return a zip file of a mask for each part, what is known of them, and which parts have none."""
    buffer, index = io.BytesIO(), list[dict[str, Any]]()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for line, image in images:
            file = f"{line['uid']}.png"
            archive.writestr(file, mask_png(image.mask))
            index.append({"file": file, "name": image.name, "thresholds": image.thresholds, **image.facts})
        archive.writestr("index.json", json.dumps(index, indent=1))
        archive.writestr("left_out.json", json.dumps(left_out, indent=1))
    return buffer.getvalue()
