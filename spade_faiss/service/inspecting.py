"""From the bytes of an image to a line of the log: limits, decoding, search, judgement, record."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..arrays import Pixels
from ..detect.calibration import Judgement
from ..detect.detection import Detection
from ..detect.explanation import match_arrays
from ..detect.query import Decoded
from ..detect.regions import Labels, Region, find_regions
from ..images.decode import decode
from ..images.view import View
from .errors import ServiceError
from .generations import Generation
from .pictures import KINDS, pack, thumbnail
from .pool import Found

logger = logging.getLogger("spade_faiss.service")


@dataclass(frozen=True)
class Prepared:
    """An image that is within the limits, decoded, on its way to the pool."""

    name: str
    content: bytes
    sha256: str
    media_type: str
    pixels: Pixels
    image: Decoded


@dataclass(frozen=True)
class Wish:
    """What a request asks for beside the verdict."""

    map: str = "none"
    matches: bool = False
    k: int | None = None
    threshold: float | None = None


def new_id() -> str:
    """Return an id for an inspection, as nobody can guess."""
    return secrets.token_hex(8)


def digest(content: bytes) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    return hashlib.sha256(content).hexdigest()


def checked_format(content: bytes, pixels: int) -> str:
    """Return the format of an image, by its header alone: nothing is decoded before it is known to be small enough.

    Raises:
        ServiceError: it is no image of a format that is taken, or has too many pixels.
    """
    if not content:
        raise ServiceError(422, "bad_image", "Expected an image, found an empty body (0 bytes).")
    try:
        with Image.open(io.BytesIO(content), formats=list(KINDS)) as image:
            kind, (width, height) = str(image.format), image.size
    except Exception as error:  # decoders raise nearly anything, and a bomb its own error
        if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
            raise _too_many(pixels, None) from error
        raise ServiceError(
            422, "bad_image", f"Expected an image ({', '.join(KINDS)}), found {len(content)} bytes of something else."
        ) from error
    if width * height > pixels:
        raise _too_many(pixels, (width, height))
    return kind


def _too_many(limit: int, size: tuple[int, int] | None) -> ServiceError:
    found = "more" if size is None else f"{size[0]} x {size[1]}"
    return ServiceError(413, "too_many_pixels", f"Expected an image of at most {limit} pixels, found {found}.")


def prepare(name: str, content: bytes, generation: Generation, pixels: int) -> Prepared:
    """Check and decode an image, and make the network's views.

    Raises:
        ServiceError: it is not within the limits.
        ImageError: it is damaged.
    """
    start = time.perf_counter()
    kind = checked_format(content, pixels)
    spec = generation.gallery.spec
    if spec.resized is None:
        raise ServiceError(409, "not_of_images", "The features of this gallery were not made from images.")
    decoded = decode(content, name, spec.bits)
    size = decoded.shape[0], decoded.shape[1]
    image = Decoded(spec.tiling.views(decoded), size, time.perf_counter() - start)
    return Prepared(name, content, digest(content), KINDS[kind].media_type, decoded, image)


def judged(found: Found, threshold: float | None) -> Judgement | None:
    """Return the judgement of a detection; with a threshold, by that image score in place of the calibrated one."""
    detection, calibration = found.detection, found.generation.calibration
    if threshold is None:
        return detection.judgement
    own = detection.judgement
    regions: list[Region] = []
    labels = None
    if detection.image_score > threshold and calibration is not None and own is not None:
        least = found.generation.detector.score.min_region
        regions, labels = find_regions(detection.anomaly_map, calibration.pixel_threshold, least)
        suspicious = own.peak > calibration.pixel_threshold and bool(regions)
    else:
        suspicious = detection.image_score > threshold
    score = detection.image_score / (detection.image_score + threshold) if threshold > 0 else 1.0
    if not suspicious:
        regions, labels = [], None
    p_value = own.p_value if own is not None else float("nan")
    return Judgement("anomalous" if suspicious else "normal", p_value, score, regions, labels, own.peak if own else 0.0)


def outer_rings(labels: Labels | None, count: int) -> list[list[list[float]]]:
    """Return the outline of each of the first regions, without its holes: [x, y] in pixels, the last as the first.

    Args:
        labels: (H, W); see detect.regions.Labels.
        count: how many regions.
    """
    if labels is None or not count:
        return []
    from scipy import ndimage  # here: only answers with regions need it

    from ..labels.outlines import outlines

    found: list[list[list[float]]] = []
    for number, box in enumerate(ndimage.find_objects(labels, count), start=1):
        [[ring, *_]] = outlines(labels[box] == number, box[1].start, box[0].start)
        found.append(np.round(np.concatenate([ring, ring[:1]]), 2).tolist())
    return found


def facts_of(found: Found, judgement: Judgement | None, wish: Wish) -> dict[str, Any]:
    """Return what the log keeps of a detection as JSON values."""
    detection, generation = found.detection, found.generation
    height, width = detection.anomaly_map.shape
    regions = judgement.regions if judgement else []
    outlines = outer_rings(judgement.labels, len(regions)) if judgement else []
    neighbours = detection.neighbours
    return {
        "width": width,
        "height": height,
        "region": list(detection.region),
        "regions": [
            {**asdict(region), "box": list(region.box), "polygon": outline}
            for region, outline in zip(regions, outlines, strict=True)
        ],
        "neighbours": [
            {"key": key, "sq_distance": float(sq_distance)}
            for key, sq_distance in zip(neighbours.keys, neighbours.sq_distances, strict=True)
        ],
        "thresholds": thresholds_of(generation, wish),
        "seconds": {stage: round(seconds, 6) for stage, seconds in detection.seconds.items()}
        | {"wait": round(found.waited, 6)},
        "notes": generation.detector.told,
        "scale": [generation.scale.low, generation.scale.high],
    }


def thresholds_of(generation: Generation, wish: Wish) -> dict[str, Any] | None:
    """Return what parts are judged by: None, nothing."""
    calibration = generation.calibration
    if calibration is None or wish.k is not None:
        return None if wish.threshold is None else {"image": wish.threshold, "pixel": None, "false_alarms": None}
    return {
        "image": calibration.image_threshold if wish.threshold is None else wish.threshold,
        "pixel": calibration.pixel_threshold,
        "false_alarms": calibration.false_alarms if wish.threshold is None else None,
    }


def columns_of(found: Found, judgement: Judgement | None) -> dict[str, Any]:
    """Return a detection as columns of the log."""
    detection, calibration = found.detection, found.generation.calibration
    p_value = judgement.p_value if judgement and np.isfinite(judgement.p_value) else None
    return {
        "verdict": judgement.verdict if judgement else None,
        "image_score": detection.image_score,
        "score": judgement.score if judgement else None,
        "p_value": p_value,
        "map_max": detection.map_max,
        "peak": judgement.peak if judgement else None,
        "generation": found.generation.number,
        "calibration": calibration.generation if calibration else None,
        "stale": found.generation.is_stale,
        "searched": detection.is_searched,
    }


def artifacts_of(prepared: Prepared, detection: Detection, view: View) -> dict[str, bytes]:
    """Return what is kept of an inspection: the picture as it came, a small one, the map, the matches."""
    return {
        "picture": prepared.content,
        "thumbnail": thumbnail(prepared.pixels),
        "map": pack(detection.anomaly_map),
        "matches": json.dumps(matches_of(detection, view)).encode(),
    }


def matches_of(detection: Detection, view: View) -> Mapping[str, Any]:
    """Return the nearest normal patch of each cell as JSON values, and how cells lie in an image."""
    arrays = match_arrays(detection)
    height, width = detection.anomaly_map.shape
    whole = [[0, 0, width, height]]
    found = {name: arrays[name][..., 0] if arrays[name].shape[-1] else arrays[name] for name in
             ("neighbour", "row", "column", "sq_distance")}  # fmt: skip
    if "tiles" not in arrays:
        found = {name: values[None] for name, values in found.items()}
    searched = bool(arrays["sq_distance"].size)
    distances = np.where(np.isfinite(found["sq_distance"]), found["sq_distance"], -1) if searched else np.empty(0)
    return {
        "keys": arrays["keys"].tolist(),
        "grid": arrays["grid"].tolist(),
        "tiles": arrays["tiles"].tolist() if "tiles" in arrays else whole,
        "resized": list(view.resized),
        "crop": list(view.crop),
        "neighbour": found["neighbour"].reshape(len(found["neighbour"]), -1).tolist() if searched else [],
        "row": found["row"].reshape(len(found["row"]), -1).tolist() if searched else [],
        "column": found["column"].reshape(len(found["column"]), -1).tolist() if searched else [],
        "sq_distance": np.round(distances.reshape(len(distances), -1), 6).tolist() if searched else [],
    }
