"""Routes of Label Studio's ML back end: a gallery gives predictions for its tasks. No URL is fetched.

Label Studio keeps what it gets as the task's prediction and does not ask again, so that an empty one for an image that
cannot be read would stand for a normal part. An error for the request makes it keep none.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qs, urlsplit
from xml.etree import ElementTree

from fastapi import APIRouter, Depends, Request

from ..._version import __version__
from ...errors import ImageError, SpadeError
from ...images.regular_file import read_regular
from ...labels.label_studio import KINDS, Controls, prediction
from ...labels.regions import LabelledImage
from ...labels.shapes import Shapes
from ..errors import ServiceError, as_service_error
from ..exports import is_judged, labelled
from ..generations import Generation
from ..inspecting import prepare
from ..service import Post, Service
from ..tokens import Caller
from .access import ERRORS, Name, Ours, needs
from .bodies import printable
from .middleware import request_id_of

router = APIRouter(prefix="/label-studio/{name}", responses=ERRORS)
BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}
}
# Label Studio knows no tokens: it sends a name and a password.
Reader = Annotated[Caller, Depends(needs("read", as_password=True))]
Inspector = Annotated[Caller, Depends(needs("inspect", as_password=True))]
TAGS: dict[str, Shapes] = {"brushlabels": "masks", "polygonlabels": "polygons"}
LOCAL_FILES = "/data/local-files/"
INSPECTED = re.compile(r"/v1/inspections/([0-9a-zA-Z]{1,64})/picture")
NAMED = 5  # tasks that an error names at the most


@router.get("/health", response_model=dict[str, Any], summary="Whether Label Studio may ask.")
async def health(service: Ours, caller: Reader, name: Name) -> Any:
    """Answer as Label Studio expects it."""
    service.registry.named(name)
    return {"status": "UP", "model_class": f"spade-faiss {__version__}", "v2": True}


@router.post("/setup", openapi_extra=BODY, response_model=dict[str, Any], summary="Check a labelling configuration.")
async def setup(request: Request, service: Ours, caller: Inspector, name: Name) -> Any:
    """Answer with the model's version, if the project's configuration has tags for regions."""
    body = await _json(request)
    controls_of(body.get("schema"))
    _, generation = await service.loaded(name)
    _require_thresholds(name, generation.calibration)
    return {"model_version": f"spade-faiss {__version__}, generation {generation.number}"}


@router.post("/predict", openapi_extra=BODY, response_model=dict[str, Any], summary="Predict regions of tasks.")
async def predict(request: Request, service: Ours, caller: Inspector, name: Name) -> Any:
    """Answer with a prediction for each task, in their order; if one has no image that can be inspected, none is."""
    service.registry.named(name)
    body = await _json(request)
    controls, shapes, label = controls_of(body.get("label_config"))
    tasks, most = body.get("tasks"), service.settings.queue
    if not isinstance(tasks, list) or not 0 < len(tasks) <= most:
        found = f"{len(tasks)} of them" if isinstance(tasks, list) else "none"
        raise ServiceError(422, "bad_task", f"Expected a list of 1 to {most} (--queue) tasks, found {found}.")
    await _require_images(service, name, tasks, controls)
    results = []
    for image in [_image_of(task, controls) for task in tasks]:
        uid = _earlier(image) or await _inspected(service, request, (name, caller.name), image)
        inspected = await service.helped(_labelled, service, name, uid)
        results.append(await service.helped(prediction, inspected, shapes, label, controls))
    return {"results": results}


async def _require_images(service: Service, name: str, tasks: list[Any], controls: Controls) -> None:
    """Read and decode the images of all tasks, before one of them is inspected.

    Raises:
        ServiceError: that of the first that cannot be, naming all of these tasks.
    """
    _, generation = await service.loaded(name)
    checks = [service.helped(_problem, service, generation, (name, task, controls)) for task in tasks]
    found = enumerate(zip(tasks, await asyncio.gather(*checks), strict=True))
    problems = [(_name_of(task, number), error) for number, (task, error) in found if error is not None]
    if problems:
        told = [f"Task {task}: {error.message}" for task, error in problems[:NAMED]]
        more = [f"{len(problems) - NAMED} more tasks likewise."] if len(problems) > NAMED else []
        none = ["No task was inspected."] if len(tasks) > 1 else []
        first = problems[0][1]
        raise ServiceError(first.status, first.code, " ".join(told + more + none), first.headers)


def _problem(service: Service, generation: Generation, of: tuple[str, Any, Controls]) -> ServiceError | None:
    """Return why a task's image cannot be inspected, or was not; None: it can."""
    name, task, controls = of
    try:
        image = _image_of(task, controls)
        if earlier := _earlier(image):
            _labelled(service, name, earlier)
        else:
            _require_thresholds(name, generation.calibration)
            prepare(*content_of(image, service), generation, service.settings.pixels)
    except (ServiceError, SpadeError) as error:
        return as_service_error(error)
    return None


def _name_of(task: Any, number: int) -> str:
    """Return a task's id in Label Studio, or else its place in the request."""
    return printable(str(task.get("id", number) if isinstance(task, dict) else number))


def _require_thresholds(name: str, calibration: object) -> None:
    if calibration is None:
        raise ServiceError(
            409, "not_calibrated", f"Gallery {name} is not calibrated, so that it has no regions; calibrate it first."
        )


async def _json(request: Request) -> dict[str, Any]:
    try:
        body = await request.json()
    except (ValueError, RecursionError) as error:
        raise ServiceError(422, "bad_parameter", "Expected a JSON object in the body.") from error
    if not isinstance(body, dict):
        raise ServiceError(422, "bad_parameter", "Expected a JSON object in the body.")
    return body


def controls_of(config: object) -> tuple[Controls, Shapes, str]:
    """Return the tags of a labelling configuration that regions go to: BrushLabels first, else PolygonLabels.

    Raises:
        ServiceError: it is no XML, or has neither.
    """
    if config is None or config == "":
        return Controls(), "masks", "anomaly"
    try:
        if not isinstance(config, str) or "<!" in config:  # entities could grow
            raise ValueError("text without declarations")
        elements = list(ElementTree.fromstring(config).iter())
    except (ValueError, ElementTree.ParseError) as error:
        raise ServiceError(422, "bad_label_config", "Expected a labelling configuration as XML.") from error
    images = {one.get("name"): one.get("value", "") for one in elements if one.tag.lower() == "image"}
    for tag, shapes in TAGS.items():
        for one in elements:
            target = one.get("toName", "")
            if one.tag.lower() == tag and target in images:
                label = next((child.get("value", "") for child in one if child.tag == "Label"), "anomaly")
                return Controls(one.get("name", "label"), target, images[target].lstrip("$") or "image"), shapes, label
    raise ServiceError(422, "bad_label_config", f"Expected {' or '.join(KINDS.values())} of an Image, found neither.")


def _image_of(task: Any, controls: Controls) -> str:
    data = task.get("data") if isinstance(task, dict) else None
    found = data.get(controls.data) if isinstance(data, dict) else None
    if not isinstance(found, str) or not found:
        others = ", ".join(f"data.{printable(name)}" for name in data or ()) if isinstance(data, dict) else ""
        raise ServiceError(
            422, "bad_task",
            f"Expected the address of an image in data.{controls.data}, as the labelling configuration has it, found "
            f"{others[:300] or 'none'}.",
        )  # fmt: skip
    return found


def _earlier(image: str) -> str | None:
    """Return the id of the inspection whose picture an address is."""
    address = _parsed(image)
    found = INSPECTED.fullmatch(address.path) if not address.scheme and not address.netloc else None
    return found[1] if found else None


def _labelled(service: Service, name: str, uid: str) -> LabelledImage:
    """Return what an inspection has found.

    Raises:
        ServiceError: there is none, it is of another gallery, it failed, was not judged, or its map is not kept.
    """
    line = service.inspections.named(uid)
    if line["gallery"] != name:
        raise ServiceError(422, "bad_task", f"Expected an inspection of {name}, found one of another gallery.")
    image = labelled(service.inspections, line)
    if image is None:
        raise ServiceError(
            404, "not_kept", f"Expected inspection {uid} with its map, found none: it failed, or was too long ago."
        )
    if not is_judged(line):
        raise ServiceError(
            409, "not_judged",
            f"Expected inspection {uid} with a verdict by the gallery's thresholds, found none: it has no regions, as "
            "if it were normal. Calibrate the gallery and inspect the part again.",
        )  # fmt: skip
    return image


async def _inspected(service: Service, request: Request, of: tuple[str, str], image: str) -> str:
    """Return the id of an image's new inspection."""
    name, content = await service.helped(content_of, image, service)
    post = Post(of[0], [(name, content)], of[1], request_id_of(request))
    [answer] = await service.inspect(post, request.is_disconnected)
    if "status" in answer:
        error = answer["error"]
        raise ServiceError(answer["status"], error["code"], error["message"], answer["headers"])
    return str(answer["id"])


def content_of(image: str, service: Service) -> tuple[str, bytes]:
    """Return the name and the content of a task's image: a data: URI, or a file of Label Studio's local storage.

    Raises:
        ServiceError: it is anything else, or lies outside the folder of local files.
    """
    if image.startswith("data:"):
        head, comma, text = image.partition(",")
        try:
            if not comma or not head.endswith(";base64"):
                raise ValueError("base64")
            return "image", base64.b64decode(text, validate=True)
        except (ValueError, binascii.Error) as error:
            raise ServiceError(422, "bad_task", "Expected a data: URI of base64, found another.") from error
    address, root = _parsed(image), service.settings.label_files
    [name] = parse_qs(address.query).get("d", [""])[:1]
    if address.scheme or address.netloc or address.path != LOCAL_FILES or not name:
        raise ServiceError(
            422, "bad_task",
            f"Expected an image as a data: URI, as {LOCAL_FILES}?d=PATH or as an inspection's picture, found another "
            "address: nothing is fetched.",
        )  # fmt: skip
    if root is None:
        raise ServiceError(422, "no_local_files", "No folder of local files is served: start with --label-files DIR.")
    return printable(name), _read(root, name, service.settings.body_bytes)


def _parsed(image: str) -> Any:
    try:
        return urlsplit(image if not image.startswith("data:") else "")
    except ValueError as error:
        raise ServiceError(422, "bad_task", "Expected the address of an image, found none.") from error


def _read(root: Path, name: str, most: int) -> bytes:
    try:
        path = (root / name).resolve()
        if not path.is_relative_to(root.resolve()):
            raise ServiceError(422, "bad_task", "Expected a file in the folder of local files, found one outside.")
        if path.stat().st_size > most:
            raise ServiceError(413, "too_large", f"Expected a file of at most {most} bytes.")
        return read_regular(path)
    except (OSError, ValueError, ImageError) as error:
        raise ServiceError(422, "bad_task", "Expected a file in the folder of local files, found none.") from error
