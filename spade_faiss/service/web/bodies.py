"""Images in the body of a request: one as it is, or several as multipart."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ..errors import ServiceError
from ..settings import ServiceSettings

NAME_HEADER = "x-name"  # what a camera calls its image
FIELD_BYTES = 1 << 16  # of a text field in multipart
IMAGES = {
    "requestBody": {
        "required": True,
        "content": {
            "image/png": {"schema": {"type": "string", "format": "binary"}},
            "image/jpeg": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"image": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                    "required": ["image"],
                }
            },
        },
    }
}


async def images_of(request: Request, settings: ServiceSettings) -> tuple[list[tuple[str, bytes]], bool]:
    """Read the images of a request, in bounded time.

    Returns:
        name and content of each; and whether they came as multipart, and are answered as a list.

    Raises:
        ServiceError: another content type, no image, or it takes too long.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _in_time(_parts(request, settings.queue), settings.body_seconds), True
    if kind.startswith("image/"):
        name = request.headers.get(NAME_HEADER, "").strip() or "image"
        return [(printable(name), await _in_time(request.body(), settings.body_seconds))], False
    raise ServiceError(
        415, "wrong_content_type", f"Expected Content-Type image/* or multipart/form-data, found {kind or 'none'!r}."
    )


async def _in_time(reading: Any, seconds: float) -> Any:
    try:
        return await asyncio.wait_for(reading, seconds)
    except asyncio.TimeoutError as error:
        raise ServiceError(408, "too_slow", f"Expected the whole request within {seconds:g} s.") from error
    except ClientDisconnect as error:
        raise ServiceError(499, "client_gone", "The client has gone.") from error


async def _parts(request: Request, most: int) -> list[tuple[str, bytes]]:
    try:
        async with request.form(max_files=most, max_fields=most, max_part_size=FIELD_BYTES) as form:
            files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
            found = [(printable(file.filename or "image"), await file.read()) for file in files]
    except HTTPException as error:  # 400, bad_request; of too many files only its words tell
        if "Too many files" not in error.detail:
            raise
        raise ServiceError(
            413, "too_many_images", f"Expected at most {most} images in a request, found more."
        ) from error
    if not found:
        raise ServiceError(422, "no_image", "Expected at least one file in the multipart body, found none.")
    return found


def printable(name: str) -> str:
    """Return a name that came from outside as a line of text: it is shown, and never a path."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)[:300]
