"""Routes of Label Studio's ML back end: a gallery gives predictions for its tasks. No URL is fetched."""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qs, urlsplit
from xml.etree import ElementTree

from fastapi import APIRouter, Depends, Request

from .._version import __version__
from ..errors import ImageError
from ..images.regular_file import read_regular
from ..labels.label_studio import KINDS, Controls, prediction
from ..labels.shapes import Shapes
from .access import ERRORS, Name, Ours, needs
from .errors import ServiceError
from .exports import labelled
from .middleware import request_id_of
from .service import Post, Service
from .tokens import Caller

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
    return {"model_version": f"spade-faiss {__version__}, generation {generation.number}"}


@router.post("/predict", openapi_extra=BODY, response_model=dict[str, Any], summary="Predict regions of tasks.")
async def predict(request: Request, service: Ours, caller: Inspector, name: Name) -> Any:
    """Inspect the images of tasks, and answer with a prediction for each, in their order."""
    service.registry.named(name)
    body = await _json(request)
    controls, shapes, label = controls_of(body.get("label_config"))
    tasks = body.get("tasks")
    if not isinstance(tasks, list) or not 0 < len(tasks) <= service.settings.queue:
        raise ServiceError(422, "bad_task", f"Expected 1 to {service.settings.queue} tasks in a list.")
    results = []
    for image_url in [_image_of(task, number, controls) for number, task in enumerate(tasks)]:
        uid = await _inspected(service, request, (name, caller.name), image_url)
        line = await service.helped(service.inspections.named, uid)
        image = await service.helped(labelled, service.inspections, line)
        if image is None:
            raise ServiceError(404, "not_kept", f"The map of inspection {uid} is not kept any more.")
        results.append(prediction(image, shapes, label, controls))
    return {"results": results}


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


def _image_of(task: Any, number: int, controls: Controls) -> str:
    data = task.get("data") if isinstance(task, dict) else None
    found = data.get(controls.data) if isinstance(data, dict) else None
    if not isinstance(found, str) or not found:
        raise ServiceError(422, "bad_task", f"Expected data.{controls.data} in task {number}, found none.")
    return found


async def _inspected(service: Service, request: Request, of: tuple[str, str], image: str) -> str:
    """Return the id of an image's inspection: of an earlier one, or of a new one."""
    address = _parsed(image)
    if address.scheme == "" and (earlier := INSPECTED.fullmatch(address.path)):
        line = await service.helped(service.inspections.named, earlier[1])
        if line["gallery"] != of[0]:
            raise ServiceError(422, "bad_task", f"Expected an inspection of {of[0]}, found one of another gallery.")
        return earlier[1]
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
    return name, _read(root, name, service.settings.body_bytes)


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
