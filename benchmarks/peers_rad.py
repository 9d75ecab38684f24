"""anomalib's Rad over folders of images, to compare maps and scores with: pip install 'spade-faiss[peers]'."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm.models.vision_transformer as vit
import torch

import spade_faiss as sf
from spade_faiss.images.view import View

BACKBONE = "vit_base_patch16_dinov3"  # Rad's default
SUFFIXES = (".bmp", ".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class RadResult:
    """What Rad says of n images, before anomalib's normalisation by the validation set."""

    files: list[Path]
    maps: np.ndarray  # (n, H, W) float32, of the view that the network gets: smoothed, 1 - cosine
    scores: np.ndarray  # (n,) float32


def run_rad(
    normal: Path, test: Path, weights: Path | None = None, backbone: str = BACKBONE, **options: Any
) -> RadResult:
    """Run anomalib's Rad: fill its bank with one folder's images, score those of another.

    Pixels are those that spade-faiss's view makes, 8-bit, so that only what follows is compared.

    Args:
        normal: folder of normal images, subfolders too.
        test: folder of the images to score.
        weights: a state dict of the backbone (.pth); None: random weights, drawn with seed 0.
        backbone: a vision transformer of timm's.
        options: of RadModel, and image_size and crop, each a side in px; by default 512 and 448.
    """
    from anomalib.models.image.rad.torch_model import RadModel

    sizes = sf.FeatureOptions(image_size=options.pop("image_size", 512), crop=options.pop("crop", 448))
    view = View(*sizes.sizes((0, 0)))
    files = files_in(test)
    own = vit.resample_abs_pos_embed  # Rad replaces it for the whole process
    torch.manual_seed(0)
    try:
        model = RadModel(backbone, pre_trained=False, **options)
        if weights is not None:
            model.feature_extractor.feature_extractor.load_state_dict(torch.load(weights, weights_only=True))
        model.train()
        for pixels in batches(files_in(normal), view):
            model(pixels)
        model.build_memory_bank()
        model.eval()
        found = [model(pixels) for pixels in batches(files, view)]
    finally:
        vit.resample_abs_pos_embed = own
    maps = torch.cat([batch.anomaly_map[:, 0] for batch in found])
    return RadResult(files, maps.numpy(), torch.cat([batch.pred_score for batch in found]).numpy())


def files_in(folder: Path) -> list[Path]:
    """Return the images in a folder and its subfolders, in the order of their paths."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def batches(files: Sequence[Path], view: View, size: int = 8) -> Iterator[torch.Tensor]:
    """Yield (n, 3, H, W) float32 pixels, normalised with ImageNet's mean and std."""
    from PIL import Image

    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for start in range(0, len(files), size):
        views = [view.apply(np.asarray(Image.open(path).convert("RGB"))) for path in files[start : start + size]]
        yield (torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).float() / 255 - mean) / std
