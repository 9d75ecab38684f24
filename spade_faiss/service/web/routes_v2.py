"""Routes of the Open Inference Protocol v2: a gallery is a model, and its generation the model's version."""

from __future__ import annotations

import base64
import io
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Path, Request, Response

from ..._version import __version__
from ..errors import ServiceError
from ..generations import Generation
from ..inspecting import Wish
from ..service import Post, Service
from . import tensors
from .access import V2_ERRORS, Inspector, Name, Ours, Reader
from .middleware import request_id_of
from .tensors import LENGTH_HEADER, Wanted

router = APIRouter(prefix="/v2", responses=V2_ERRORS)
Version = Annotated[str, Path(max_length=20, description="generation of the gallery", examples=["4"])]
EXTENSIONS = ["binary_tensor_data"]
INFER_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["inputs"],
                    "properties": {"inputs": {"type": "array", "items": {"type": "object"}}},
                    "example": {
                        "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": ["iVBORw0KGgo="]}]
                    },
                }
            }
        },
    }
}


@router.get("", response_model=dict[str, Any], summary="The server.")
async def server() -> Any:
    """Answer with name, version and extensions."""
    return {"name": "spade-faiss", "version": __version__, "extensions": EXTENSIONS}


async def _model(service: Service, name: str, version: str | None) -> Generation:
    """Return the newest generation of a gallery, which must be the version that is asked for."""
    _, generation = await service.loaded(name)
    generation.require(name, version)
    return generation


@router.get("/models/{name}", response_model=dict[str, Any], summary="A gallery as a model.")
@router.get("/models/{name}/versions/{version}", response_model=dict[str, Any], summary="... of one generation.")
async def metadata(service: Ours, caller: Reader, name: Name, version: Version | None = None) -> Any:
    """Answer with its inputs and outputs."""
    generation = await _model(service, name, version)
    outputs = [
        {"name": one, "datatype": tensors.DATATYPES.get(one, "FP32"), "shape": [-1, -1, -1] if "map" in one else [-1]}
        for one in tensors.OUTPUTS
    ]
    return {
        "name": name,
        "versions": [str(generation.number)],
        "platform": "spade-faiss",
        "inputs": [{"name": tensors.INPUT, "datatype": "BYTES", "shape": [-1]}],
        "outputs": outputs,
    }


@router.get("/models/{name}/ready", response_model=dict[str, Any], summary="Whether a gallery takes images.")
@router.get("/models/{name}/versions/{version}/ready", response_model=dict[str, Any], summary="... one generation.")
async def model_ready(service: Ours, caller: Reader, name: Name, version: Version | None = None) -> Any:
    """Answer with 200 if it does."""
    generation = await _model(service, name, version)
    return {"name": name, "version": str(generation.number), "ready": True}


@router.post("/models/{name}/infer", response_model=dict[str, Any], openapi_extra=INFER_BODY, summary="Infer.")
@router.post(
    "/models/{name}/versions/{version}/infer",
    response_model=dict[str, Any],
    openapi_extra=INFER_BODY,
    summary="... in one generation.",
)
async def infer(
    request: Request, service: Ours, caller: Inspector, name: Name, version: Version | None = None
) -> Response:
    """Answer with tensors of n values for n images: verdict, scores, ids of the inspections, maps of equal size."""
    generation = await _model(service, name, version)
    body = await request.body()
    wanted = await service.helped(tensors.read, body, request.headers.get(LENGTH_HEADER), service.settings.queue)
    has_map = any(one.name == "anomaly_map" for one in wanted.outputs)
    images = [(f"{wanted.id or 'image'}", content) for content in wanted.images]
    post = Post(name, images, caller.name, request_id_of(request), Wish("npy" if has_map else "none"), version)
    answers = await service.inspect(post, request.is_disconnected)
    for answer in answers:
        if "status" in answer:
            raise ServiceError(answer["status"], answer["error"]["code"], answer["error"]["message"])
    head = {"model_name": name, "model_version": str(answers[0]["generation"] or generation.number), "id": wanted.id}
    content, length = await service.helped(
        lambda: tensors.written(head, [(one, _values(one, answers)) for one in wanted.outputs])
    )
    if length is None:
        return Response(content, media_type="application/json")
    return Response(content, media_type="application/octet-stream", headers={LENGTH_HEADER: str(length)})


def _values(wanted: Wanted, answers: list[dict[str, Any]]) -> Any:
    if wanted.name == "verdict":
        return [answer["verdict"] or "" for answer in answers]
    if wanted.name == "inspection":
        return [answer["id"] for answer in answers]
    if wanted.name == "anomaly_map":
        maps = [np.load(io.BytesIO(base64.b64decode(one["map"]["base64"])), allow_pickle=False) for one in answers]
        if len({one.shape for one in maps}) > 1:
            raise ServiceError(422, "bad_parameter", "Expected images of one size for the output anomaly_map.")
        return np.stack(maps)
    return [float("nan") if answer[wanted.name] is None else answer[wanted.name] for answer in answers]
