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
    """Turns images into features: a spec, a batch size and one method. Any object with these will do.

    An attribute `device`, "cpu" or "cuda:N", is optional: off the CPU, extraction overlaps with the patch search.

    Example:
        >>> class Brightness:
        ...     spec = sf.ExtractorSpec("brightness", ((1, 2, 2),), image_dim=1, resized=(8, 8), crop=(8, 8))
        ...     batch_size = 16
        ...     def extract(self, views):
        ...         cells = np.stack(views).reshape(-1, 1, 2, 4, 2, 12).mean(axis=(3, 5))
        ...         return self.spec.cast(sf.Features(cells.mean(axis=(2, 3)), [cells]))
        >>> Brightness().extract([np.full((8, 8, 3), 50, np.uint8)]).image
        array([[50.]], dtype=float32)
    """

    spec: ExtractorSpec
    batch_size: int

    def extract(self, views: Sequence[Pixels]) -> Features:
        """Extract the features of n images.

        Args:
            views: n arrays (crop height, crop width, 3) uint8 RGB, as spec.view makes them of images.

        Returns:
            features that fit the spec; see ExtractorSpec.cast.

        Example:
            >>> view = toy.spec.view.apply(np.zeros((40, 48, 3), np.uint8))
            >>> features = toy.extract([view, view])
            >>> features.image.shape, [level.shape for level in features.levels]
            ((2, 12), [(2, 3, 8, 8), (2, 3, 4, 4), (2, 3, 2, 2)])
        """
        ...


def load_extractor(
    name: str = DEFAULT_EXTRACTOR, weights: str | Path | None = None, options: FeatureOptions | None = None
) -> Extractor:
    """Load an extractor by name.

    Args:
        name: "efficientnet_lite0" (its weights are installed with the package), "wide_resnet50_2" or another
            torchvision ResNet, "timm:<model>" for a timm model with intermediate features, or "toy".
        weights: a .pth or .safetensors file; nothing is downloaded then. None: the library's cache or a download.
        options: image size, crop, levels, neighbourhood, dtype, batch size, device, runtime; None: the defaults.

    Raises:
        OptionError: an unknown name, options that do not fit the extractor, or OpenVINO was asked for and cannot run
            it: it is not installed, cannot convert the network, or computes other features than torch.
        WeightsError: weights that could not be downloaded (the message names the file to bring) or do not fit.
        DeviceError: an unknown device, or a GPU that is not there.

    Example:
        >>> sf.load_extractor("toy", options=sf.FeatureOptions(image_size=64, strides=(8, 16))).spec.level_shapes
        ((3, 8, 8), (3, 4, 4))
    """
    options = options or FeatureOptions()
    if name == "toy":
        if weights is not None:
            raise OptionError(f"extractor toy has no weights, found weights {weights}")
        if options.runtime == "openvino" or options.precision != "float32":
            is_runtime = options.runtime == "openvino"
            asked = options.runtime if is_runtime else options.precision
            instead = "runtime='auto'" if is_runtime else "precision='float32'"
            raise OptionError(f"extractor toy has no network, found {asked}; take {instead}")
        return ToyExtractor(options)
    from .networks import load_network  # late: torch takes seconds to import

    return load_network(name, None if weights is None else Path(weights), options)
