"""Routes of galleries: facts, the normal set, thresholds, statistics, exports."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import ValidationError

from ...detect.audit import find_suspects
from ...errors import ImageError
from ...images.decode import decode
from ...report.drawing import encode, fit
from .. import judging
from ..calibrations import Order
from ..errors import ServiceError
from ..exports import Exported, export
from ..generations import Generation
from ..normal_set import ADDED
from ..service import Service
from .access import ERRORS, Curator, Name, Ours, Reader, author
from .answers import Audit, Change, Changes, FalseAlarms, Galleries, GalleryAnswer, InspectedImage, NormalImages
from .bodies import IMAGES, images_of
from .middleware import request_id_of

router = APIRouter(prefix="/v1", responses=ERRORS)
SHOWN = 480  # px of a normal image's small picture
AUDITED = 500  # normal images that an audit queries at the most
LAST = Annotated[int, Query(ge=1, le=10_000, description="so many of the newest parts")]
JUDGED_ONLY = Annotated[bool, Query(description="leave out parts without a verdict by the gallery's thresholds")]
RATE = Annotated[float, Query(gt=0, lt=1, allow_inf_nan=False)]


async def _loaded(service: Service, name: str) -> Generation:
    _, generation = await service.loaded(name)
    return generation


@router.get("/galleries", response_model=Galleries, summary="All galleries.")
async def galleries(service: Ours, caller: Reader) -> Any:
    """Answer with the facts of each; of one that is not loaded, its name."""
    return {"galleries": await service.helped(lambda: [service.facts(served) for served in service.registry])}


@router.get("/galleries/{name}", response_model=GalleryAnswer, summary="The facts of a gallery.")
async def gallery(service: Ours, caller: Reader, name: Name) -> Any:
    """Answer with its facts; it is loaded if it is not."""
    await _loaded(service, name)
    return await service.helped(service.facts, service.registry.named(name))


@router.get("/galleries/{name}/normal", response_model=NormalImages, summary="The normal set.")
async def normal(
    service: Ours,
    caller: Reader,
    name: Name,
    search: Annotated[str, Query(max_length=200)] = "",
    first: Annotated[int, Query(ge=0, le=2**40)] = 0,
    count: Annotated[int, Query(ge=1, le=500)] = 60,
) -> Any:
    """Answer with keys that hold a text, the newest first."""
    generation = await _loaded(service, name)

    def found() -> dict[str, Any]:
        keys = generation.gallery.keys()[::-1]
        chosen = [key for key in keys if search.lower() in key.lower()]
        images = [{"key": key, "added": key.startswith(f"{ADDED}/")} for key in chosen[first : first + count]]
        return {"total": len(keys), "found": len(chosen), "images": images}

    return await service.helped(found)


NORMAL_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            **IMAGES["requestBody"]["content"],  # type: ignore[dict-item]
            "application/json": {"schema": InspectedImage.model_json_schema()},
        },
    }
}


@router.post(
    "/galleries/{name}/normal", response_model=Change, openapi_extra=NORMAL_BODY, summary="Add a normal image."
)
async def add_normal(request: Request, service: Ours, caller: Curator, name: Name) -> Any:
    """Add an image, or an inspected one by its id, in one commit; answer with the new generation."""
    service.registry.named(name)
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json":
        try:
            wanted = InspectedImage.model_validate_json(await request.body())
        except ValidationError as error:
            raise ServiceError(422, "bad_parameter", "Expected JSON with the id of an inspection.") from error
        line = await service.helped(service.inspections.named, wanted.inspection)
        if line["gallery"] != name:
            raise ServiceError(
                409, "other_gallery", f"That part was inspected by gallery {line['gallery']}, not {name}."
            )
        content = await service.helped(service.inspections.artifact, wanted.inspection, "picture")
        uid: str | None = wanted.inspection
    else:
        images, _ = await images_of(request, service.settings)
        if len(images) != 1:
            raise ServiceError(422, "bad_parameter", f"Expected one image, found {len(images)}.")
        content, uid = images[0][1], None
    change = await service.errand(service.normal_set.add, name, content, author(request, caller), uid)
    return _told(service, change)


def _told(service: Service, change: dict[str, Any]) -> dict[str, Any]:
    service.metrics.changes.labels(change["gallery"], change["what"]).inc()
    service.events.tell("change", change)
    return change


@router.delete("/galleries/{name}/normal/{key:path}", response_model=Change, summary="Take a normal image out.")
async def remove_normal(
    request: Request, service: Ours, caller: Curator, name: Name, key: Annotated[str, Path(max_length=2000)]
) -> Any:
    """Take an image out by its key, in one commit; answer with the new generation."""
    return _told(service, await service.errand(service.normal_set.remove, name, key, author(request, caller)))


@router.get("/galleries/{name}/picture", response_class=Response, summary="The picture of a normal image.")
async def normal_picture(
    service: Ours,
    caller: Reader,
    name: Name,
    key: Annotated[str, Query(max_length=2000)],
    size: Annotated[int | None, Query(ge=16, le=4096, description="px of the longer side; none: as it is")] = None,
) -> Response:
    """Answer with a JPEG, from the file if it is at hand: a gallery keeps no pixels."""
    generation = await _loaded(service, name)

    def made() -> bytes:
        try:
            pixels = generation.source_images(service.normal_set.folders(name)).decode(key)
        except ImageError as error:
            known, file = key in generation.gallery, service.normal_set.added_file(name, key)
            if known or file is None:
                raise ServiceError(404, "picture_missing" if known else "unknown_key", f"{key!r}: {error}.") from error
            pixels = decode(file)  # a neighbour in earlier inspections, taken out since
        return encode(fit(pixels, size) if size else pixels, "JPEG", 90)

    content = await service.helped(made)
    return Response(content, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=60"})


@router.get("/galleries/{name}/audit", response_model=Audit, summary="The normal images least like the others.")
async def audit(service: Ours, caller: Curator, name: Name, top: Annotated[int, Query(ge=1, le=200)] = 24) -> Any:
    """Query normal images against the others, at most 500 of them: this takes about as long as so many inspections."""
    generation = await _loaded(service, name)

    def found() -> dict[str, Any]:
        sample = min(len(generation.gallery), AUDITED)
        suspects = find_suspects(generation.detector.uncalibrated(), sample=sample)[:top]
        return {"generation": generation.number, "suspects": [asdict(one) for one in suspects]}

    return await service.errand(found)


@router.get("/changes", response_model=Changes, summary="The audit log.")
async def changes(
    service: Ours,
    caller: Reader,
    gallery: Annotated[str | None, Query(max_length=64)] = None,
    last: Annotated[int, Query(ge=1, le=1000)] = 50,
) -> Any:
    """Answer with who changed what, newest first."""
    return {"changes": await service.helped(service.changes.last, gallery, last)}


@router.post("/changes/{number}/undo", response_model=Change, summary="Take a change back.")
async def undo(request: Request, service: Ours, caller: Curator, number: Annotated[int, Path(ge=1, le=2**53)]) -> Any:
    """Take a change back by another commit."""
    return _told(service, await service.errand(service.normal_set.undo, number, author(request, caller)))


@router.put("/galleries/{name}/false-alarms", response_model=Change, summary="Judge by another false-alarm rate.")
async def set_rate(request: Request, service: Ours, caller: Curator, name: Name, body: FalseAlarms) -> Any:
    """Write the thresholds of the rate into the gallery's calibration: every process judges by them from now on."""
    made = service.normal_set.set_false_alarms
    return _told(service, await service.errand(made, name, body.false_alarms, author(request, caller)))


@router.post("/galleries/{name}/calibrate", response_model=GalleryAnswer, summary="Calibrate in the background.")
async def calibrate(request: Request, service: Ours, caller: Curator, name: Name, body: FalseAlarms) -> Any:
    """Begin to find thresholds from the normal images; the answer does not wait for them."""
    await _loaded(service, name)
    service.calibrations.ask(Order(name, body.false_alarms, caller.name, request_id_of(request)))
    return await service.helped(service.facts, service.registry.named(name))


@router.get("/galleries/{name}/rejudge", response_model=dict[str, Any], summary="Verdicts at another rate.")
async def rejudge(service: Ours, caller: Reader, name: Name, false_alarms: RATE, last: LAST = 200) -> Any:
    """Answer with the verdicts that the newest parts would have, and which would change. Nothing is changed."""
    generation = await _loaded(service, name)
    calibration = generation.calibration
    if calibration is None:
        raise ServiceError(409, "not_calibrated", f"Gallery {name} is not calibrated; calibrate it first.")
    lines = await service.helped(service.inspections.last, name, last)
    return await service.helped(judging.rejudged, lines, calibration, false_alarms)


@router.get("/galleries/{name}/statistics", response_model=dict[str, Any], summary="Counts, scores, drift.")
async def statistics(service: Ours, caller: Reader, name: Name, last: LAST = 200) -> Any:
    """Answer with counts since the reset, and scores, drift and trend of the newest parts."""
    generation = await _loaded(service, name)
    calibration = generation.calibration

    def found() -> dict[str, Any]:
        lines = service.inspections.last(name, last, after=service.inspections.since(name))
        trend = [
            {"id": line["uid"], "at": line["at"], "score": line["score"], "verdict": line["verdict"],
             "p_value": line["p_value"]}
            for line in reversed(lines)
        ]  # fmt: skip
        return {
            "counts": service.inspections.counts(name),
            "histogram": judging.histogram(lines, calibration),
            "drift": judging.drift(lines, calibration),
            "trend": trend,
            "rates": judging.rates(calibration) if calibration else [],
            "false_alarms": calibration.false_alarms if calibration else None,
            "queue": service.pool.depth,
        }

    return await service.helped(found)


@router.post("/galleries/{name}/statistics/reset", response_model=dict[str, Any], summary="Count from now on.")
async def reset(service: Ours, caller: Curator, name: Name) -> Any:
    """Begin the statistics of a gallery again. The log keeps all its lines."""
    service.registry.named(name)
    await service.helped(service.inspections.reset, name)
    service.events.tell("reset", {"gallery": name})
    return {"counts": await service.helped(service.inspections.counts, name)}


@router.get("/galleries/{name}/export", response_class=Response, summary="Inspections as a file.")
async def exported(
    service: Ours,
    caller: Reader,
    name: Name,
    kind: Annotated[Literal["csv", "jsonl", "coco", "masks"], Query()] = "csv",
    last: LAST = 1000,
    judged_only: JUDGED_ONLY = False,
) -> Response:
    """Answer with the newest parts as CSV, JSON lines, COCO annotations, or a ZIP of masks.

    COCO and masks need a verdict by the gallery's thresholds for each part, as without one it has no regions, like a
    normal part. Parts that could not be read are left out, and defects whose map is no longer kept: the header
    X-Left-Out says how many, `info.left_out` of COCO and `left_out.json` beside the masks which and why.
    """
    service.registry.named(name)
    made: Exported = await service.errand(export, service.inspections, name, kind, last, judged_only)
    headers = {"Content-Disposition": f'attachment; filename="{name}-{made.name}"', "X-Left-Out": str(made.left_out)}
    return Response(made.content, media_type=made.media_type, headers=headers)
