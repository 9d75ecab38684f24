"""ExtractorSpec: describes what made a gallery's features, and checks that features fit."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from ..arrays import Array, all_finite
from ..errors import FeatureError, OptionError, SpecMismatchError
from ..images.tiling import Tiling, shared
from ..images.view import View
from ..options import (
    MOST_BITS,
    FeatureOptions,
    ImageFeature,
    Patches,
    Precision,
    Runtime,
    StoredDtype,
    Tokens,
    is_count,
)
from .features import Features

DEFAULT_EXTRACTOR = "efficientnet_lite0"
IMAGENET_MEAN: tuple[float, ...] = (0.485, 0.456, 0.406)  # per channel in [0, 1]
IMAGENET_STD: tuple[float, ...] = (0.229, 0.224, 0.225)

NAMES_BYTES = 256  # about the size of an image's key, digest, checksum and path in a gallery without levels
OPTIONAL = (
    "bits",
    "weights_path",
    "tile",
    "overlap",
    "count_include_pad",
    "tokens",
    "image_feature",
    "precision",
    "runtime",
)  # fields that earlier releases do not know: written only if they say something
# What counts where a field is None.
IN_EFFECT = {
    "bits": MOST_BITS,
    "count_include_pad": False,
    "tokens": "plain",
    "image_feature": "pooled",
    "precision": "float32",
    "runtime": "any",
}
LARGEST_IMAGE = 1e17  # largest value of an image feature: the squared distance of two in 8000 dimensions fits float32


@dataclass(frozen=True)
class ExtractorSpec:
    """Describes what made a gallery's features. Features of another spec cannot be compared, and are refused.

    Features of your own need a name, the level shapes and the image dimension; omit the rest.

    Attributes:
        name: of the extractor.
        level_shapes: (c, h, w) of each level, the finest first.
        image_dim: d, dimensions of the image feature.
        dtype: the levels' type.
        neighbourhood: see FeatureOptions.
        level_names: as the network calls them.
        resized: (height, width) px; None: features that no extractor made from images.
        crop: (height, width) px.
        mean: per channel in [0, 1].
        std: likewise.
        weights_sha256: SHA-256 of the network's state: names, shapes and values.
        weights: name of the weights' file; not compared.
        bits: see FeatureOptions; None: 16.
        weights_path: where that file was, absolute; not compared.
        tile: (height, width) px of the image; see FeatureOptions.
        overlap: px that tiles share.
        count_include_pad: see FeatureOptions; None: False.
        tokens: see FeatureOptions; None: plain.
        image_feature: see FeatureOptions; None: pooled.
        precision: see FeatureOptions; None: float32.
        runtime: that bfloat16 was computed by; None: any, as float32 agrees to the last digits.

    Example:
        >>> sf.ExtractorSpec("own", level_shapes=((64, 28, 28), (128, 14, 14)), image_dim=512)
        ExtractorSpec('own', levels 64x28x28 128x14x14 float16, image 512)
    """

    name: str
    level_shapes: tuple[tuple[int, int, int], ...]
    image_dim: int
    dtype: StoredDtype = "float16"
    neighbourhood: int = 1
    level_names: tuple[str, ...] = ()
    resized: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    weights_sha256: str = ""
    weights: str = ""
    bits: int | None = None
    weights_path: str = field(default="", compare=False)
    tile: tuple[int, int] | None = None
    overlap: int | None = None
    count_include_pad: bool | None = None
    tokens: Tokens | None = None
    image_feature: ImageFeature | None = None
    precision: Precision | None = None
    runtime: Runtime | None = None

    def __post_init__(self) -> None:
        for each in fields(self):  # tuples, so that specs can be compared and hashed
            object.__setattr__(self, each.name, _frozen(getattr(self, each.name)))
        self.options()  # checks dtype, neighbourhood, sizes and level names
        shapes = self.level_shapes
        shaped = isinstance(shapes, tuple) and all(
            isinstance(shape, tuple) and len(shape) == 3 and all(map(is_count, shape)) for shape in shapes
        )
        for name, ok, expected in (
            ("name", isinstance(self.name, str) and self.name, "a name"),
            ("level_shapes", shaped and shapes, "(c, h, w) of at least one level"),
            ("image_dim", is_count(self.image_dim), "a number >= 1"),
            ("level_names", isinstance(self.level_names, tuple), "names of levels"),
            ("resized and crop", (self.resized is None) == (self.crop is None), "both or none"),
            ("tile", self.tile is None or self.resized is not None, "none for features that no images made"),
            ("mean", _is_floats(self.mean), "numbers"),
            ("std", _is_floats(self.std), "numbers"),
            ("weights_sha256", isinstance(self.weights_sha256, str), "a digest"),
            ("weights", isinstance(self.weights, str), "where the weights came from"),
            ("weights_path", isinstance(self.weights_path, str), "a path"),
        ):
            if not ok:
                found = [getattr(self, part) for part in name.split(" and ")]
                raise OptionError(f"extractor spec: {name}: expected {expected}, found {found}")

    def __repr__(self) -> str:
        parts = [repr(self.name)]
        if self.resized and self.crop:
            cropped = f" cropped to {_times(self.crop)}" if self.crop != self.resized else ""
            parts.append(f"{_times(self.resized)} px{cropped}")
        parts.append(f"levels {' '.join(map(_times, self.level_shapes))} {self.dtype}")
        if self.bits is not None:
            parts.append(f"{self.bits} bits")
        if self.tile is not None:
            parts.append(f"tiles of {_times(self.tile)} px")
        if self.tokens == "normalised":
            parts.append("normalised tokens")
        if self.neighbourhood > 1:
            parts.append(f"neighbourhood {self.neighbourhood}{' with padding' if self.count_include_pad else ''}")
        if self.precision is not None:
            parts.append(f"{self.precision} by {self.runtime}")
        image = "class token" if self.image_feature == "class_token" else "image"
        return f"ExtractorSpec({', '.join([*parts, f'{image} {self.image_dim}'])})"

    @property
    def view(self) -> View:
        """The view of an image that the network gets.

        Raises:
            FeatureError: the features were not made from images.
        """
        if self.resized is None or self.crop is None:
            raise FeatureError(f"extractor {self.name!r} takes features, not images: use Gallery.append and search")
        return View(self.resized, self.crop)

    @property
    def tiling(self) -> Tiling:
        """How images are cut into tiles that are viewed each; without tiles, the image is the one tile.

        Raises:
            FeatureError: the features were not made from images.
        """
        return Tiling(self.view, self.tile, self.overlap)

    @property
    def bytes_per_image(self) -> int:
        """Bytes of one image's features on disk."""
        values = sum(c * h * w for c, h, w in self.level_shapes)
        return int(values * np.dtype(self.dtype).itemsize + 4 * self.image_dim)

    def bytes_with(self, patches: Patches) -> int:
        """Return about the bytes of one image in a gallery that stores patches, or recomputes them.

        Example:
            >>> toy.spec.bytes_with("stored"), toy.spec.bytes_with("recompute")
            (552, 304)
        """
        return self.bytes_per_image if patches == "stored" else 4 * self.image_dim + NAMES_BYTES

    def options(
        self, batch_size: int = FeatureOptions.batch_size, device: str = "auto", runtime: Runtime = "auto"
    ) -> FeatureOptions:
        """Return the options that make features of this spec.

        Example:
            >>> toy.spec.options(batch_size=4).levels
            ('stride4', 'stride8', 'stride16')
            >>> sf.load_extractor("toy", options=toy.spec.options()).spec == toy.spec
            True
        """
        return FeatureOptions(
            image_size=self.resized,
            crop=self.crop,
            levels=self.level_names or None,
            normalisation="imagenet" if (self.mean, self.std) == (IMAGENET_MEAN, IMAGENET_STD) else "trained",
            neighbourhood=self.neighbourhood,
            count_include_pad=self.count_include_pad or False,
            bits=self.bits,
            tile=self.tile,
            overlap=self.overlap,
            tokens=self.tokens,
            image_feature=self.image_feature,
            dtype=self.dtype,
            batch_size=batch_size,
            device=device,
            runtime=(self.runtime or runtime) if runtime == "auto" else runtime,
            precision=self.precision or "float32",
        )

    def require(self, other: ExtractorSpec, where: str) -> None:
        """Check that another spec's features can be compared with this one's.

        Args:
            other: the other spec.
            where: what an error starts with.

        Raises:
            SpecMismatchError: a field differs; the message names each, with both values.

        Example:
            >>> other = sf.load_extractor("toy", options=sf.FeatureOptions(neighbourhood=3))
            >>> gallery.spec.require(other.spec, "toy.gallery")
            Traceback (most recent call last):
            spade_faiss.errors.SpecMismatchError: toy.gallery: ... neighbourhood: expected 1, found 3; ...
        """
        names = [each.name for each in fields(self) if each.name not in ("weights", "weights_path")]
        differing = [name for name in names if self._value(name) != other._value(name)]
        if differing:
            sides = "; ".join(f"{n}: expected {self._value(n)}, found {other._value(n)}" for n in differing)
            raise SpecMismatchError(
                f"{where}: features of another extractor or other settings: {sides}; "
                "use the gallery's own, or make another gallery"
            )

    def _value(self, name: str) -> Any:
        """Return the value of a field in effect."""
        if name == "overlap":
            return shared(self.tile, self.overlap)
        value = getattr(self, name)
        return IN_EFFECT.get(name) if value is None else value

    def check(self, features: Features) -> None:
        """Check features against this spec.

        Raises:
            FeatureError: a shape differs, or a value is NaN or infinite; the message names image, level and values.

        Example:
            >>> toy.spec.check(sf.Features(np.zeros((2, 11), np.float32), [np.zeros((2, 3, s, s)) for s in (8, 4, 2)]))
            Traceback (most recent call last):
            spade_faiss.errors.FeatureError: image features: expected shape (2, 12), found (2, 11)
        """
        n, level_shapes = len(features.image), [tuple(level.shape) for level in features.levels]
        expected = [(n, *shape) for shape in self.level_shapes]
        if level_shapes != expected:
            raise FeatureError(f"levels: expected shapes {expected}, found {level_shapes}")
        if features.image.shape != (n, self.image_dim):
            raise FeatureError(f"image features: expected shape {(n, self.image_dim)}, found {features.image.shape}")
        for name, array in [("image feature", features.image)] + [
            (f"level {number}", level) for number, level in enumerate(features.levels)
        ]:
            if array.dtype.kind != "f":
                raise FeatureError(f"{name}: expected float16 or float32, found {array.dtype}")
            if not all_finite(array):
                row = int(np.flatnonzero(~np.isfinite(array.reshape(n, -1)).all(axis=1))[0])
                raise FeatureError(f"{name} of image {row} of {n}: expected finite values, found NaN or infinity")

    def cast(self, features: Features) -> Features:
        """Check features and return them in the stored dtypes, contiguous.

        Raises:
            FeatureError: as for check(), or a value does not fit float16.

        Example:
            >>> own = sf.ExtractorSpec("own", level_shapes=((3, 8, 8),), image_dim=4)
            >>> features = own.cast(sf.Features(np.ones((2, 4)), [np.ones((2, 3, 8, 8))]))  # float64
            >>> features.image.dtype.name, features.levels[0].dtype.name
            ('float32', 'float16')
        """
        self.check(features)
        levels = []
        for number, level in enumerate(features.levels):
            levels.append(_cast(level, self.dtype, f"level {number}"))
        image = _cast(features.image, "float32", "image features")
        if np.abs(image).max(initial=0) > LARGEST_IMAGE:
            raise FeatureError(
                f"image features: expected values within ±{LARGEST_IMAGE:g}, whose squared distances float32 holds, "
                f"found {np.abs(image).max():.6g}; scale them"
            )
        return Features(image, levels)

    def to_json(self) -> dict[str, Any]:
        """Return the spec as JSON values, without the fields in OPTIONAL that have their defaults.

        Example:
            >>> values = toy.spec.to_json()
            >>> values["name"], values["image_dim"], values["crop"]
            ('toy', 12, (32, 32))
        """
        return {name: value for name, value in asdict(self).items() if value not in (None, "") or name not in OPTIONAL}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ExtractorSpec:
        """Read what to_json wrote.

        Raises:
            TypeError: a field is missing or unknown.
            OptionError: a value has another type or is outside its range.

        Example:
            >>> sf.ExtractorSpec.from_json(toy.spec.to_json()) == toy.spec
            True
        """
        return cls(**values)


def _times(sizes: tuple[int, ...]) -> str:
    """Return (3, 8, 8) as 3x8x8."""
    return "x".join(map(str, sizes))


def _frozen(value: Any) -> Any:
    """Turn lists into tuples, at any depth."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _is_floats(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(part, (int, float)) for part in value)


def _cast(array: Array, dtype: StoredDtype, what: str) -> Array:
    """Return a finite array in a dtype, contiguous; FeatureError if a value does not fit."""
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(array, dtype=dtype)
    if array.dtype != stored.dtype and not all_finite(stored):
        limit = float(np.finfo(dtype).max)
        advice = "make the gallery with dtype float32" if dtype == "float16" else "scale them"
        raise FeatureError(
            f"{what}: expected values within ±{limit:.6g}, which {dtype} holds, "
            f"found {np.abs(array).max():.6g}; {advice}"
        )
    return stored
