"""The log as files for other programs: CSV, JSON lines, COCO, masks."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..detect.regions import find_regions
from .errors import ServiceError
from .inspections import Inspections, Line, as_result
from .outlines import outline
from .pictures import mask_png, unpack

FIELDS = (
    "number", "id", "at", "gallery", "name", "sha256", "verdict", "label", "image_score", "score", "p_value", "map_max",
    "generation", "ms", "width", "height",
)  # fmt: skip
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet would run a cell that begins so


@dataclass(frozen=True)
class Exported:
    """A file to download."""

    content: bytes
    media_type: str
    name: str


def export(inspections: Inspections, gallery: str, kind: str, last: int) -> Exported:
    """Return the newest inspections of a gallery as a file.

    Args:
        inspections: the log.
        gallery: its name.
        kind: csv, jsonl, coco or masks.
        last: how many.
    """
    lines = inspections.last(gallery, last)
    if kind == "csv":
        return Exported(_csv(lines), "text/csv; charset=utf-8", "inspections.csv")
    if kind == "jsonl":
        text = "".join(json.dumps(as_result(line)) + "\n" for line in lines)
        return Exported(text.encode(), "application/x-ndjson", "inspections.jsonl")
    if kind == "coco":
        return Exported(json.dumps(_coco(inspections, lines)).encode(), "application/json", "coco.json")
    return Exported(_masks(inspections, lines), "application/zip", "masks.zip")


def _csv(lines: Sequence[Line]) -> bytes:
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow([*FIELDS, "regions", "error"])
    for line in lines:
        result = as_result(line)
        cells = [result[name] for name in FIELDS]
        cells += [len(result["regions"]), result["error"]["code"] if result["error"] else ""]
        writer.writerow([_harmless(cell) for cell in cells])
    return buffer.getvalue().encode()


def _harmless(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell


def region_masks(inspections: Inspections, line: Line) -> list[NDArray[np.bool_]]:
    """Return the (H, W) masks of an inspection's regions, from the map that was kept; none if it was not."""
    thresholds, regions = line["facts"].get("thresholds"), line["facts"].get("regions", [])
    if not regions or not thresholds or thresholds["pixel"] is None:
        return []
    try:
        scores = unpack(inspections.artifact(line["uid"], "map"))
    except ServiceError:
        return []
    _, labels = find_regions(scores, thresholds["pixel"])
    return [labels == number for number in range(1, len(regions) + 1)]


def _coco(inspections: Inspections, lines: Sequence[Line]) -> dict[str, Any]:
    """Return COCO annotations: a region is a polygon, or with holes an uncompressed run-length mask."""
    images, annotations = list[dict[str, Any]](), list[dict[str, Any]]()
    for line in lines:
        result = as_result(line)
        if result["width"] is None:
            continue
        image = {name: result[name] for name in ("width", "height", "sha256", "verdict", "label", "image_score")}
        images.append({"id": line.id, "file_name": result["name"], **image})
        for region, mask in zip(result["regions"], region_masks(inspections, line), strict=False):
            left, top, right, bottom = region["box"]
            known = {"id": len(annotations) + 1, "image_id": line.id, "category_id": 1}
            box = {"bbox": [left, top, right - left, bottom - top], "area": region["area"]}
            annotations.append(known | box | _segmentation(mask) | {"score": region["peak"]})
    categories = [{"id": 1, "name": "anomaly"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def _segmentation(mask: NDArray[np.bool_]) -> dict[str, Any]:
    corners, has_holes = outline(mask)
    if has_holes:  # COCO calls what has a run-length mask a crowd
        return {"iscrowd": 1, "segmentation": {"size": list(mask.shape), "counts": run_lengths(mask)}}
    return {"iscrowd": 0, "segmentation": [np.round(corners[:-1], 2).ravel().tolist()]}


def run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """Return the runs of 0 and 1 in a mask, column by column, beginning with those of 0."""
    flat = np.concatenate([[False], mask.ravel(order="F")])
    starts = np.flatnonzero(np.diff(flat.astype(np.int8)) != 0)
    found: list[int] = np.diff(np.concatenate([[0], starts, [mask.size]])).tolist()
    return found


def _masks(inspections: Inspections, lines: Sequence[Line]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for line in lines:
            masks = region_masks(inspections, line)
            if masks:
                archive.writestr(f"{line['uid']}.png", mask_png(np.any(masks, axis=0)))
        names = [{"file": f"{line['uid']}.png", "name": line["name"], "verdict": line["verdict"]} for line in lines]
        archive.writestr("index.json", json.dumps(names, indent=1))
    return buffer.getvalue()
