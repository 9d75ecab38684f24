"""Label Studio's JSON: tasks with predictions, which a person corrects."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from .._version import __version__
from ..detect.regions import Region
from .outlines import joined, outlines
from .regions import LabelledImage, RegionMask
from .run_lengths import brush_rle
from .shapes import Shapes

KINDS: dict[Shapes, str] = {"masks": "brushlabels", "polygons": "polygonlabels"}
LOCAL_FILES = "/data/local-files/?d="  # what Label Studio calls a file of a local storage


@dataclass(frozen=True)
class Controls:
    """The names that a labelling configuration gives its tags."""

    from_name: str = "label"  # of BrushLabels or PolygonLabels
    to_name: str = "image"  # of Image
    data: str = "image"  # what Image reads, as value="$image"


def label_studio(
    images: Iterable[LabelledImage],
    shapes: Shapes = "masks",
    label: str = "anomaly",
    prefix: str = LOCAL_FILES,
    controls: Controls | None = None,
) -> list[dict[str, Any]]:
    """Return a task for each image, with its regions as a prediction.

    Args:
        images: to write; each is let go of before the next.
        shapes: "masks": brush masks; "polygons": outlines, with a cut to each hole.
        label: of the regions.
        prefix: what goes before an image's name to make its URL.
        controls: names of the tags; None: as Controls has them.

    Raises:
        OptionError: polygons without contourpy.
    """
    controls = controls or Controls()
    return [
        {
            "data": {
                controls.data: prefix + quote(image.name, errors="surrogateescape"),
                "name": image.name,
                "thresholds": image.thresholds,
                **image.facts,
            },
            "predictions": [prediction(image, shapes, label, controls)],
        }
        for image in images
    ]


def prediction(image: LabelledImage, shapes: Shapes, label: str, controls: Controls) -> dict[str, Any]:
    """Return an image's regions as Label Studio takes them from a model.

    The scores that it sorts and filters by lie in [0, 1]: the image's is its calibrated score, a region's is
    peak / (peak + threshold), and 0.5 is a threshold. A region's text has its peak and the threshold as they are.
    """
    score = image.facts.get("score")
    found: dict[str, Any] = {
        "model_version": f"spade-faiss {__version__}, generation {image.facts.get('generation')}",
        "result": [_result(one, image, shapes, label, controls) for one in enumerate(image.region_masks(), start=1)],
    }
    return found if score is None else {**found, "score": score}


def _result(
    numbered: tuple[int, tuple[Region, RegionMask]],
    image: LabelledImage,
    shapes: Shapes,
    label: str,
    controls: Controls,
) -> dict[str, Any]:
    number, (region, mask) = numbered
    height, width = image.size
    threshold = (image.thresholds or {}).get("pixel")
    found: dict[str, Any] = {
        "id": f"region-{number}",
        "from_name": controls.from_name,
        "to_name": controls.to_name,
        "type": KINDS[shapes],
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        "value": {**_value(mask, shapes), KINDS[shapes]: [label]},
        "meta": {"text": [f"peak {region.peak:.6g}"]},
    }
    if threshold is not None:
        found["score"] = region.peak / (region.peak + threshold)
        found["meta"] = {"text": [f"peak {region.peak:.6g}, threshold {threshold:.6g}"]}
    return found


def _value(mask: RegionMask, shapes: Shapes) -> dict[str, Any]:
    if shapes == "masks":
        return {"format": "rle", "rle": brush_rle(mask)}
    height, width = mask.size
    [part] = outlines(mask.inside, mask.left, mask.top)  # a region is connected
    return {"points": (joined(part) * (100 / width, 100 / height)).tolist(), "closed": True}  # percent
