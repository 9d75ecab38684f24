"""Routes of inspections: post images, look at what was found, say what it is."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Query, Request, Response

from ...report.colour_scale import Scale
from ...report.drawing import encode
from ..errors import ServiceError
from ..inspecting import Wish
from ..log.inspections import as_result
from ..pictures import MEDIA_TYPES, SHOWN, map_as, overlay_layer, unpack
from ..service import Post
from .access import ERRORS, Inspector, Name, Ours, Reader, Uid
from .answers import Inspection, Inspections, Label
from .bodies import IMAGES, images_of
from .middleware import request_id_of

router = APIRouter(prefix="/v1", responses=ERRORS)
Threshold = Annotated[
    float | None,
    Query(
        ge=0, allow_inf_nan=False, description="image score above which a part is suspicious, instead of the gallery's"
    ),
]
Neighbours = Annotated[
    int | None,
    Query(ge=1, le=10_000, description="neighbours that are searched; thresholds do not hold for another number"),
]


@router.post(
    "/galleries/{name}/inspect",
    openapi_extra=IMAGES,
    response_model=Inspection | Inspections,
    response_model_exclude_none=False,
    summary="Inspect one image (image/*), or several (multipart).",
)
async def inspect(
    request: Request,
    service: Ours,
    caller: Inspector,
    name: Name,
    map: Literal["none", "png", "npy", "tiff"] = "none",  # the parameter's name in URLs
    matches: Annotated[bool, Query(description="whether to answer with the matched normal patches")] = False,
    k: Neighbours = None,
    threshold: Threshold = None,
) -> Any:
    """Answer with a verdict for each image, once it is in the log."""
    service.registry.named(name)
    service.pool.require_room(1)  # a full queue is told before the body is read
    images, is_list = await images_of(request, service.settings)
    post = Post(name, images, caller.name, request_id_of(request), Wish(map, matches, k, threshold))
    answers = await service.inspect(post, request.is_disconnected)
    if is_list:
        for answer in answers:
            answer.pop("status", None), answer.pop("headers", None)
        return {"inspections": answers}
    [answer] = answers
    if "status" in answer:
        error = answer["error"]
        raise ServiceError(answer["status"], error["code"], error["message"], answer["headers"])
    return answer


@router.get("/inspections", response_model=Inspections, summary="The newest inspections.")
async def newest(
    service: Ours,
    caller: Reader,
    gallery: Annotated[str | None, Query(max_length=64)] = None,
    last: Annotated[int, Query(ge=1, le=1000)] = 50,
    before: Annotated[int | None, Query(ge=0, le=2**53, description="older than this number")] = None,
    after: Annotated[int | None, Query(ge=0, le=2**53, description="newer than this number")] = None,
) -> Any:
    """Answer with lines of the log, newest first."""
    lines = await service.helped(service.inspections.last, gallery, last, before, after)
    return {"inspections": [as_result(line) for line in lines]}


@router.get("/inspections/{uid}", response_model=Inspection, summary="One inspection.")
async def one(service: Ours, caller: Reader, uid: Uid) -> Any:
    """Answer with a line of the log."""
    line = await service.helped(service.inspections.named, uid)
    return as_result(line) | {"notes": line["facts"].get("notes", [])}


def _file(content: bytes, media_type: str) -> Response:
    return Response(content, media_type=media_type, headers={"Cache-Control": "private, max-age=86400, immutable"})


@router.get("/inspections/{uid}/picture", response_class=Response, summary="The image as it came.")
async def picture(service: Ours, caller: Reader, uid: Uid) -> Response:
    """Answer with the file; one that browsers do not show becomes a PNG."""
    line = await service.helped(service.inspections.named, uid)
    content = await service.helped(service.inspections.artifact, uid, "picture")
    media_type = line["facts"].get("media_type", "application/octet-stream")
    if media_type in SHOWN:
        return _file(content, media_type)
    from ...images.decode import decode

    pixels = await service.helped(decode, content)
    return _file(await service.helped(encode, pixels), "image/png")


@router.get("/inspections/{uid}/thumbnail", response_class=Response, summary="A small picture.")
async def small(service: Ours, caller: Reader, uid: Uid) -> Response:
    """Answer with a JPEG."""
    return _file(await service.helped(service.inspections.artifact, uid, "thumbnail"), "image/jpeg")


@router.get("/inspections/{uid}/map", response_class=Response, summary="The anomaly map.")
async def anomaly_map(
    service: Ours, caller: Reader, uid: Uid, kind: Literal["png", "npy", "tiff", "layer"] = "png"
) -> Response:
    """Answer with the map's values (npy, tiff), coloured (png), or as a layer to lay over the image."""
    line = await service.helped(service.inspections.named, uid)
    content = await service.helped(service.inspections.artifact, uid, "map")

    def made() -> bytes:
        scores, scale = unpack(content), Scale(*line["facts"]["scale"])
        return overlay_layer(scores, scale) if kind == "layer" else map_as(kind, scores, scale)

    return _file(await service.helped(made), MEDIA_TYPES.get(kind, "image/png"))


@router.get("/inspections/{uid}/neighbours", response_model=dict[str, Any], summary="The nearest normal images.")
async def neighbours(service: Ours, caller: Reader, uid: Uid) -> Any:
    """Answer with keys and squared distances, nearest first."""
    line = await service.helped(service.inspections.named, uid)
    return {"generation": line["generation"], "neighbours": line["facts"].get("neighbours", [])}


@router.get("/inspections/{uid}/matches", response_model=dict[str, Any], summary="The matched normal patches.")
async def matches(service: Ours, caller: Reader, uid: Uid) -> Any:
    """Answer with the normal patch that each patch was matched with, by cells of the finest grid."""
    return json.loads(await service.helped(service.inspections.artifact, uid, "matches"))


@router.put("/inspections/{uid}/label", response_model=Inspection, summary="Say what a part is.")
async def label(service: Ours, caller: Inspector, uid: Uid, body: Label) -> Any:
    """Keep a person's word: a real defect, or not sure; null takes it back."""
    line = await service.helped(service.inspections.label, uid, body.label, caller.name)
    service.events.tell("label", {"id": uid, "label": body.label})
    return as_result(line)


@router.get("/inspections/{uid}/score-at", response_model=dict[str, Any], summary="The score of one pixel.")
async def score_at(
    service: Ours,
    caller: Reader,
    uid: Uid,
    x: Annotated[int, Query(ge=0, le=2**31)],
    y: Annotated[int, Query(ge=0, le=2**31)],
) -> Any:
    """Answer with the anomaly map at a pixel."""
    scores = unpack(await service.helped(service.inspections.artifact, uid, "map"))
    if y >= scores.shape[0] or x >= scores.shape[1]:
        raise ServiceError(422, "bad_parameter", f"Expected a pixel of {scores.shape[1]} x {scores.shape[0]}.")
    return {"x": x, "y": y, "score": float(np.float64(scores[y, x]))}
