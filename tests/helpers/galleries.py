"""Features that were not made from images, and galleries of the toy extractor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

import spade_faiss as sf

OWN = sf.ExtractorSpec(name="own", level_shapes=((3, 5, 7), (2, 3, 3)), image_dim=6)


RandomFeatures = Callable[..., sf.Features]


def random_features_of(n: int, spec: sf.ExtractorSpec = OWN, seed: int = 0) -> sf.Features:
    """Standard normal features of n images, in the dtypes that a gallery of that spec stores."""
    rng = np.random.default_rng(seed)
    levels = [rng.standard_normal((n, *shape), np.float32).astype(spec.dtype) for shape in spec.level_shapes]
    return sf.Features(rng.standard_normal((n, spec.image_dim), np.float32), levels)


def make_gallery(
    folder: Path, normal: Path, options: sf.FeatureOptions | None = None
) -> tuple[sf.Gallery, sf.Extractor]:
    extractor = sf.load_extractor("toy", options=options)
    gallery = sf.Gallery.create(folder, extractor.spec, index=sf.IndexOptions(device="cpu"))
    gallery.add_images(normal, extractor)
    return gallery, extractor
