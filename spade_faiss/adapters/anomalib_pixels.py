"""Between anomalib's tensors and this package's pixels, without a difference to what the image files give."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torchvision.transforms.v2 import InterpolationMode, Resize
from torchvision.tv_tensors import Image, Mask

from ..arrays import Pixels
from ..errors import ImageError
from ..images.view import View

CHANNELS = 3
ROUNDING = 1e-4  # of [0, 1], that resizing in floating point may exceed it by
EXPECTED = "expected (n, 3, H, W) tensors of floating point in [0, 1], as anomalib's datamodules give"


def pixels_of(images: torch.Tensor) -> list[Pixels]:
    """Return a batch of images as (H, W, 3) uint8 arrays; what was read from 8 bits comes back as it was.

    Args:
        images: (n, 3, H, W) floating point in [0, 1], RGB.

    Raises:
        ImageError: other channels, other types, values outside [0, 1], NaN.
    """
    found = f"{tuple(images.shape)} {str(images.dtype).removeprefix('torch.')}"
    if images.ndim != 4 or images.shape[1] != CHANNELS:
        advice = "convert grey images and those with an alpha channel to RGB in the datamodule"
        raise ImageError(f"image: {EXPECTED}, found {found}; {advice}")
    if not images.is_floating_point():
        raise ImageError(
            f"image: {EXPECTED}, found {found}; scale it by the largest value of its type in the datamodule"
        )
    low, high = (float(value) for value in torch.aminmax(images)) if images.numel() else (0.0, 0.0)
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # NaN compares as False
        raise ImageError(
            f"image: {EXPECTED}, found values from {low:.4g} to {high:.4g}; leave Normalize out of the augmentations "
            "and of the pre_processor, as the extractor normalises"
        )
    bytes_ = (images.detach().clamp(0, 1) * 255).round().to(torch.uint8)
    return list(np.ascontiguousarray(bytes_.permute(0, 2, 3, 1).cpu().numpy()))


class ViewResize(Resize):  # type: ignore[misc]
    """Resize as this package resizes image files: Pillow's antialiased bilinear filter, on 8 bits.

    anomalib's datamodules run a Resize of the model's pre-processor when they read an image, before images are put
    together to a batch. Masks go to the nearest pixel, as with any Resize.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        """Take the (height, width) in pixels."""
        super().__init__(size=list(size), interpolation=InterpolationMode.BILINEAR, antialias=True)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize (..., 3, H, W) images in [0, 1], or (..., H, W) masks."""
        if isinstance(inpt, Mask) or not isinstance(inpt, torch.Tensor) or inpt.ndim < 3:
            return super().transform(inpt, params)
        height, width = self.size
        if tuple(inpt.shape[-2:]) == (height, width):
            return inpt
        view = View((height, width), (height, width))
        batch = inpt.reshape(-1, *inpt.shape[-3:])
        resized = torch.from_numpy(np.stack([view.resize(pixels) for pixels in pixels_of(batch)]))
        values = (resized.permute(0, 3, 1, 2).to(inpt.dtype) / 255).reshape(*inpt.shape[:-2], height, width)
        return Image(values.to(inpt.device))
