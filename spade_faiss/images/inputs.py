"""What a caller may give as an image: a path, a file's bytes, an open file, a PIL image, an array, a tensor."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Union

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..arrays import Pixels
from ..errors import ImageError
from .regular_file import read_regular

if TYPE_CHECKING:
    import torch

ImageLike = Union[str, "os.PathLike[str]", bytes, BinaryIO, Image.Image, NDArray[np.uint8], "torch.Tensor"]

ACCEPTED = (
    "expected a path, a PIL image, an (H, W, 3) or (H, W) uint8 array, a (3, H, W), (H, W, 3) or (H, W) uint8 torch "
    "tensor, or a file that is open in binary mode"
)


def opened(image: ImageLike, name: str) -> bytes | Image.Image | Pixels:
    """Return an image that a caller gave, as a file's bytes, a PIL image, or (H, W, 3) uint8 pixels.

    Raises:
        ImageError: a file cannot be read, or it is none of the things that are accepted.
    """
    if isinstance(image, (str, os.PathLike)):
        return read_file(Path(os.fspath(image)))
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image)
    if isinstance(image, np.ndarray):
        return _of_array(image, name)
    if "torch" in sys.modules and isinstance(image, sys.modules["torch"].Tensor):
        return _of_tensor(image, name)
    if callable(getattr(image, "read", None)):
        return _of_file(image, name)
    advice = "; query_batch takes several" if isinstance(image, Sequence) else ""
    raise ImageError(f"{name}: {ACCEPTED}, found {type(image).__name__}{advice}")


def held(image: Any) -> Any:
    """Return an image so that it stays as it is while its giver goes on, who may close a file or refill an array.

    What cannot be read is returned as it is: whoever decodes it says why. So are a PIL image, and what is no image.
    """
    if isinstance(image, np.ndarray):
        return image.copy()
    if isinstance(image, (bytearray, memoryview)):
        return bytes(image)
    if "torch" in sys.modules and isinstance(image, sys.modules["torch"].Tensor):
        return image.detach().clone()
    if callable(getattr(image, "read", None)):
        with suppress(ImageError):
            return _of_file(image, "")
    return image


def require_several(images: Any) -> None:
    """Refuse one image where several are expected: a path would count as a sequence of letters, an array as rows.

    Raises:
        ImageError: it is one image, or cannot be iterated.
    """
    one = isinstance(images, (str, os.PathLike, bytes, bytearray, Image.Image, io.IOBase))
    one = one or getattr(images, "ndim", 4) < 4  # an array or a tensor
    if one or not can_be_iterated(images):
        raise ImageError(f"images: expected several images, found one {type(images).__name__}; query takes one")


def can_be_iterated(items: Any) -> bool:
    """Return whether items can be taken one by one: by `iter`, or, as those of torch's data sets, by their numbers."""
    return hasattr(items, "__iter__") or hasattr(items, "__getitem__")


def read_file(path: Path) -> bytes:
    """Read an image file's bytes.

    Raises:
        ImageError: the file cannot be read, is empty or larger than memory, or has a name that is not UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ImageError(f"{os.fsencode(path)!r}: expected a name in UTF-8, as keys are; rename the file") from error
    try:
        content = read_regular(path)
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not content:
        raise ImageError(f"{path}: expected an image, found an empty file (0 bytes)")
    return content


def _of_array(array: NDArray[Any], name: str) -> Pixels:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise ImageError(f"{name}: expected an (H, W, 3) or (H, W) uint8 array, found {array.shape} {array.dtype}")
    return array if array.ndim == 3 else np.repeat(array[:, :, None], 3, axis=2)


def _of_tensor(tensor: Any, name: str) -> Pixels:
    """Return the pixels of a tensor: uint8 only, as other types have no one range, and channels first or last."""
    shape, kind = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    first, last = (len(shape) == 3 and shape[at] == 3 for at in (0, -1))
    if kind != "uint8":
        advice = "of [0, 1], convert it with (tensor * 255).round().to(torch.uint8)"
    elif first and last:
        advice = "its channels may be first or last; give tensor.permute(1, 2, 0).numpy() or tensor.numpy()"
    elif first or last or len(shape) == 2:
        array = tensor.detach().cpu().numpy()
        return _of_array(np.moveaxis(array, 0, -1) if first else array, name)
    elif len(shape) == 4:
        advice = "a batch; query_batch takes several images"
    else:
        advice = "give its three channels, or one as (H, W)"
    raise ImageError(f"{name}: expected a (3, H, W), (H, W, 3) or (H, W) uint8 tensor, found {shape} {kind}: {advice}")


def _of_file(file: Any, name: str) -> bytes:
    """Read an open file from its start, as Pillow does."""
    try:
        if getattr(file, "seekable", lambda: False)():
            file.seek(0)
        content = file.read()
    except (OSError, ValueError) as error:  # ValueError: it is closed
        raise ImageError(f"{name}: cannot be read: {error}") from error
    if not isinstance(content, (bytes, bytearray, memoryview)):
        raise ImageError(f"{name}: expected a file that is open in binary mode ('rb'), found {type(file).__name__}")
    if not len(content):
        raise ImageError(f"{name}: expected an image, found an empty file (0 bytes)")
    return bytes(content)
