"""Tensors of the Open Inference Protocol v2: JSON, and the binary extension."""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...arrays import Pixels
from ...report.drawing import encode
from ..errors import ServiceError

LENGTH_HEADER = "inference-header-content-length"
INPUT = "image"
OUTPUTS = ("verdict", "image_score", "score", "p_value", "inspection", "anomaly_map")
DATATYPES = {"verdict": "BYTES", "inspection": "BYTES"}  # the others are FP32
MOST_AXES = 4
MOST_DIGITS = 20  # of a length: Python reads no number of thousands of them


@dataclass(frozen=True)
class Wanted:
    """An output that a request asks for."""

    name: str
    binary: bool


@dataclass(frozen=True)
class InferRequest:
    """A request to infer, read."""

    id: str
    images: list[bytes]
    outputs: list[Wanted]


def bad(message: str) -> ServiceError:
    """Return the error of a request that is not as the protocol has it."""
    return ServiceError(400, "bad_tensor", message)


def read(body: bytes, header_length: str | None, most: int) -> InferRequest:
    """Read a request to infer.

    Args:
        body: of the request.
        header_length: the header that says where JSON ends and binary tensors begin; None: all is JSON.
        most: images.

    Raises:
        ServiceError: it is not as the protocol has it.
    """
    length = len(body)
    if header_length is not None:
        if not header_length.isdecimal() or len(header_length) > MOST_DIGITS or int(header_length) > length:
            raise bad(f"Expected {LENGTH_HEADER} of 0 to {length}, found {header_length!r}.")
        length = int(header_length)
    try:
        values = json.loads(body[:length])
        inputs = values["inputs"]
        parameters = values.get("parameters") or {}
        outputs = values.get("outputs") or []
        if not isinstance(inputs, list) or len(inputs) != 1 or inputs[0]["name"] != INPUT:
            raise bad(f"Expected one input, {INPUT!r}.")
        images = _images(inputs[0], body[length:], most)
        all_binary = bool(parameters.get("binary_data_output", False))
        wanted = [Wanted(str(one["name"]), _is_binary(one, all_binary)) for one in outputs]
        unknown = [one.name for one in wanted if one.name not in OUTPUTS]
        if unknown:
            raise bad(f"Expected outputs among {', '.join(OUTPUTS)}, found {unknown[0]!r}.")
        names = [one.name for one in wanted]
        if repeated := [name for name in OUTPUTS if names.count(name) > 1]:  # maps are large
            raise bad(f"Expected each output once, found {repeated[0]!r} {names.count(repeated[0])} times.")
        if not wanted:
            wanted = [Wanted(name, all_binary) for name in OUTPUTS if name != "anomaly_map"]
        request_id = str(values.get("id") or "")
        request_id.encode()
        return InferRequest(request_id, images, wanted)
    except ServiceError:
        raise
    except UnicodeEncodeError as error:  # half of a surrogate pair
        raise bad(f"Expected an id that UTF-8 can write, found {str(error.object)[:80]!r}.") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise bad(f"Expected an inference request of version 2, found something else: {error!r}.") from error


def _is_binary(output: dict[str, Any], default: bool) -> bool:
    return bool((output.get("parameters") or {}).get("binary_data", default))


def _images(tensor: dict[str, Any], binary: bytes, most: int) -> list[bytes]:
    """Return the image files of the input: BYTES [n], or UINT8 [n, H, W, 3] pixels, which become PNGs."""
    shape, kind = tensor["shape"], tensor["datatype"]
    if not isinstance(shape, list) or not shape or not all(isinstance(n, int) and n > 0 for n in shape):
        raise bad(f"Expected a shape of numbers above 0, found {shape!r}.")
    if len(shape) > MOST_AXES:
        raise bad(f"Expected at most {MOST_AXES} axes, found {len(shape)}.")
    size = (tensor.get("parameters") or {}).get("binary_data_size")
    if size is not None and (not isinstance(size, int) or size != len(binary)):
        raise bad(f"Expected {size!r} bytes of binary data, found {len(binary)}.")
    if kind == "BYTES":
        found = _split(binary) if size is not None else [_from_text(one) for one in _flat(tensor["data"])]
        if len(found) != math.prod(shape):
            raise bad(f"Expected {math.prod(shape)} images, as the shape says, found {len(found)}.")
    elif kind == "UINT8":
        found = [encode(pixels) for pixels in _pixels(tensor, shape, binary if size is not None else None)]
    else:
        raise bad(f"Expected datatype BYTES or UINT8, found {kind!r}.")
    if len(found) > most:
        raise ServiceError(413, "too_many_images", f"Expected at most {most} images in a request, found {len(found)}.")
    return found


def _pixels(tensor: dict[str, Any], shape: list[int], binary: bytes | None) -> list[Pixels]:
    full = [1, *shape] if len(shape) == 3 else shape
    if len(full) != 4 or full[3] != 3:
        raise bad(f"Expected UINT8 of shape [n, H, W, 3] or [H, W, 3], found {shape}.")
    values = np.frombuffer(binary, np.uint8) if binary is not None else np.array(_flat(tensor["data"]))
    if values.size != math.prod(full):
        raise bad(f"Expected {math.prod(full)} values, as the shape says, found {values.size}.")
    if values.dtype != np.uint8:
        if values.dtype.kind not in "iu" or values.min() < 0 or values.max() > 255:
            raise bad("Expected whole numbers from 0 to 255.")
        values = values.astype(np.uint8)
    return list(values.reshape(full))


def _flat(data: Any) -> list[Any]:
    while isinstance(data, list) and data and isinstance(data[0], list):
        data = [value for part in data for value in part]
    if not isinstance(data, list):
        raise bad("Expected data as a list.")
    return data


def _from_text(text: Any) -> bytes:
    if not isinstance(text, str):
        raise bad("Expected image files as base64 text in data, or as binary data.")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise bad(f"Expected image files as base64 text in data: {error}.") from error


def _split(binary: bytes) -> list[bytes]:
    """Split a BYTES tensor: each element has its length before it, as 4 bytes, little-endian."""
    found, at = [], 0
    while at < len(binary):
        if at + 4 > len(binary):
            raise bad("Expected a length of 4 bytes before each element.")
        [length] = struct.unpack_from("<I", binary, at)
        if at + 4 + length > len(binary):
            raise bad("Expected elements that end within the binary data.")
        found.append(binary[at + 4 : at + 4 + length])
        at += 4 + length
    return found


def written(head: dict[str, Any], outputs: Sequence[tuple[Wanted, Any]]) -> tuple[bytes, int | None]:
    """Write an answer to a request to infer.

    Args:
        head: model_name, model_version, id.
        outputs: each with its values: a list of str, or an array of float32.

    Returns:
        the body; and the length of its JSON, None: all of it.
    """
    tensors, binaries = [], list[bytes]()
    for wanted, values in outputs:
        text = DATATYPES.get(wanted.name) == "BYTES"
        array: NDArray[Any] = np.array(values, np.object_ if text else np.float32)
        tensor: dict[str, Any] = {
            "name": wanted.name,
            "datatype": "BYTES" if text else "FP32",
            "shape": list(array.shape),
        }
        if wanted.binary:
            content = b"".join(_prefixed(one) for one in values) if text else array.astype("<f4").tobytes()
            tensor["parameters"] = {"binary_data_size": len(content)}
            binaries.append(content)
        else:
            tensor["data"] = list(values) if text else [_number(one) for one in array.ravel().tolist()]
        tensors.append(tensor)
    body = json.dumps({**head, "outputs": tensors}, allow_nan=False).encode()
    return (body + b"".join(binaries), len(body)) if binaries else (body, None)


def _number(value: float) -> float | None:
    """Return a number as JSON has it: not a number is null."""
    return value if value == value else None


def _prefixed(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<I", len(content)) + content
