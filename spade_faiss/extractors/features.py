"""Features of images: image features and pyramid levels."""

from __future__ import annotations

from dataclasses import dataclass

from ..arrays import Array
from ..errors import FeatureError


@dataclass(frozen=True)
class Features:
    """Features of n images.

    Attributes:
        image: (n, d) float32, one image feature per row.
        levels: pyramid levels, finest first, each (n, c, h, w) float16 or float32.

    Example:
        >>> features = sf.Features(np.zeros((3, 12), np.float32), [np.zeros((3, 3, 8, 8), np.float16)])
        >>> len(features), features[1:].levels[0].shape  # a slice or a list selects images
        (3, (2, 3, 8, 8))
    """

    image: Array
    levels: list[Array]

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, rows: slice | list[int]) -> Features:
        return Features(self.image[rows], [level[rows] for level in self.levels])


def require_rows(features: Features, images: int, extractor: str) -> Features:
    """Return features, if they are of so many images: else rows would be taken for those of others.

    Raises:
        FeatureError: they are of another number.
    """
    found = {len(features.image), *map(len, features.levels)}
    if found != {images}:
        numbers = " and ".join(map(str, sorted(found)))
        raise FeatureError(f"extractor {extractor}: expected features of {images}, found {numbers}")
    return features
