"""Extractors by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ..arrays import Pixels
from ..errors import OptionError
from ..options import FeatureOptions
from .features import Features
from .spec import DEFAULT_EXTRACTOR, ExtractorSpec
from .toy import ToyExtractor


class Extractor(Protocol):
    """Images to features. An extractor is its spec, a batch size and one method."""

    spec: ExtractorSpec
    batch_size: int

    def extract(self, views: Sequence[Pixels]) -> Features:
        """Extract features of n images, each (crop height, crop width, 3) uint8: what spec.view made of it."""
        ...


def load_extractor(
    name: str = DEFAULT_EXTRACTOR, weights: str | Path | None = None, options: FeatureOptions | None = None
) -> Extractor:
    """Load an extractor by name.

    Args:
        name: "efficientnet_lite0" (its weights are installed with the package), "wide_resnet50_2" or another
            torchvision ResNet, "timm:<model>" for a timm model with intermediate features, or "toy".
        weights: a .pth or .safetensors file, which never touches the network. None: the library's download and cache.
        options: image size, crop, levels, neighbourhood, dtype, batch size, device.

    Raises:
        OptionError: no extractor of that name, or options that do not fit it.
        WeightsError: no weights to be had, naming the file to bring; or weights that do not fit.
    """
    options = options or FeatureOptions()
    if name == "toy":
        if weights is not None:
            raise OptionError(f"extractor toy has no weights, found weights {weights}")
        return ToyExtractor(options)
    from .networks import load_network  # torch takes seconds to import, which `info` and `verify` need not wait for

    return load_network(name, None if weights is None else Path(weights), options)
