"""COCO's JSON of instances, as pycocotools and trainers read it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .._version import __version__
from .outlines import COCO_TOLERANCE, joined, outlines
from .regions import LabelledImage, RegionMask
from .run_lengths import coco_counts
from .shapes import Shapes


def coco(images: Iterable[LabelledImage], shapes: Shapes = "masks", label: str = "anomaly") -> dict[str, Any]:
    """Return images and their regions as COCO annotations.

    COCO has no place for what is known of an image: its scores, thresholds and the gallery's generation stand beside
    its size, where readers pass over them. A region's `score` is its peak.

    Args:
        images: to write; each is let go of before the next.
        shapes: "masks": run lengths; "polygons": outlines, with a cut to each hole, as COCO has no holes.
        label: name of the category.

    Raises:
        OptionError: polygons without contourpy.
    """
    entries, annotations = list[dict[str, Any]](), list[dict[str, Any]]()
    for image in images:
        height, width = image.size
        entry = {"id": image.number, "file_name": image.name, "width": width, "height": height}
        entries.append({**entry, "thresholds": image.thresholds, **image.facts})
        for region, mask in image.region_masks():
            left, top, right, bottom = region.box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image.number,
                    "category_id": 1,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": region.area,
                    "iscrowd": 0,  # trainers leave crowds out
                    "segmentation": _segmentation(mask, shapes),
                    "score": region.peak,
                }
            )
    return {
        "info": {"description": f"spade-faiss {__version__}"},
        "images": entries,
        "annotations": annotations,
        "categories": [{"id": 1, "name": label}],
    }


def _segmentation(mask: RegionMask, shapes: Shapes) -> Any:
    if shapes == "masks":
        return {"size": list(mask.size), "counts": coco_counts(mask)}
    return [joined(part).ravel().tolist() for part in outlines(mask.inside, mask.left, mask.top, COCO_TOLERANCE)]
