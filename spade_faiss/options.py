"""Every setting with its unit, its default and its check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar, get_args

from .errors import OptionError

DEFAULT_K = 50  # the paper's, for MVTec AD
MIB = 2**20
MOST_SIGMA = 10_000  # px; a Gaussian's kernel is several times as long

Normalisation = Literal["imagenet", "trained"]
StoredDtype = Literal["float16", "float32"]
Patches = Literal["stored", "recompute"]  # whether a gallery keeps pyramid levels, or computes them from image files
Engine = Literal["auto", "flat", "pyramid"]
Localise = Literal["all", "suspicious"]
ImageScore = Literal["knn", "map_max", "map"]
LevelWeights = Literal["equal", "spread"]
Positions = Literal["equal", "damped"]


def _check(ok: bool, name: str, expected: str, found: object) -> None:
    if not ok:
        raise OptionError(f"{name}: expected {expected}, found {found!r}")


def is_count(value: object) -> bool:
    """Tell whether it is a whole number >= 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_size(value: object) -> bool:
    """Tell whether it is a (height, width) in pixels."""
    return isinstance(value, tuple) and len(value) == 2 and all(is_count(side) for side in value)


def _as_size(value: Any) -> Any:
    """Turn a side in pixels into a (height, width), and a list into a tuple."""
    return (value, value) if is_count(value) else tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class FeatureOptions:
    """What shapes the features of an image. Fixed when a gallery is made, and read from it ever after."""

    image_size: int | tuple[int, int] | None = None  # px, resized to this (height, width); None: the extractor's own
    crop: int | tuple[int, int] | None = None  # px, centre of the resized image (the paper: 256, crop 224); None: whole
    levels: tuple[str, ...] | None = None  # names of the pyramid levels, finest first; None: by their strides
    strides: tuple[int, ...] = (4, 8, 16)  # px an input cell, ascending, where no levels are named and strides differ
    # mean and std of pixels. trained: those that the weights were trained with; imagenet: ImageNet's, as is customary;
    # None: imagenet for efficientnet_lite0, whose weights were trained with 0.5 and 0.5, trained for all others
    normalisation: Normalisation | None = None
    neighbourhood: int = 1  # odd p: each level averaged over p x p positions, stride 1; 1: none, as in the paper
    dtype: StoredDtype = "float16"  # of the levels, stored and compared; image features are always float32
    batch_size: int = 16  # images in one pass through the network
    device: str = "auto"  # of the network: auto, cpu, cuda, cuda:N

    def __post_init__(self) -> None:
        # Sizes are (height, width) from here on, whichever way they were given.
        for name in ("image_size", "crop"):
            size = _as_size(getattr(self, name))
            _check(size is None or is_size(size), name, "pixels >= 1, a side or (height, width)", size)
            object.__setattr__(self, name, size)
        object.__setattr__(self, "levels", tuple(self.levels) if isinstance(self.levels, list) else self.levels)
        _check(is_count(self.neighbourhood) and self.neighbourhood % 2 == 1, "neighbourhood", "odd", self.neighbourhood)
        known = (None, *get_args(Normalisation))
        _check(self.normalisation in known, "normalisation", "imagenet or trained", self.normalisation)
        _check(self.dtype in get_args(StoredDtype), "dtype", "float16 or float32", self.dtype)
        _check(is_count(self.batch_size), "batch_size", "a number >= 1", self.batch_size)
        named = isinstance(self.levels, tuple) and self.levels and all(isinstance(name, str) for name in self.levels)
        _check(self.levels is None or bool(named), "levels", "names of at least one level", self.levels)
        object.__setattr__(self, "strides", tuple(self.strides))
        rising = (
            bool(self.strides) and all(map(is_count, self.strides)) and sorted(set(self.strides)) == [*self.strides]
        )
        _check(rising, "strides", "pixels, ascending", self.strides)

    def sizes(self, default: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return (resized, input): the (height, width) an image is resized to, and of the crop that the network sees.

        Args:
            default: the extractor's own input size (height, width).

        Raises:
            OptionError: the crop is larger than the resized image.
        """
        resized: tuple[int, int] = _as_size(self.image_size or self.crop) or default
        crop: tuple[int, int] = _as_size(self.crop) or resized
        _check(crop[0] <= resized[0] and crop[1] <= resized[1], "crop", f"at most the image size {resized}", crop)
        return resized, crop


@dataclass(frozen=True)
class IndexOptions:
    """The FAISS index over image features."""

    kind: str = "auto"  # auto, flat, ivf, ivf-sq, ivf-pq, hnsw, or any FAISS factory string
    nlist: int | None = None  # IVF: number of lists; None: from N
    nprobe: int | None = None  # IVF: lists visited by a search; None: as many as the recall needs
    train_images: int | None = None  # IVF: size of the training sample; None: from the number of lists
    # share of the nearest images to be found; measured on normal images when the index is made
    recall: float = 0.99
    memory: int | None = None  # bytes that `auto` may take for the index; None: half of the machine's memory
    device: str = "auto"  # auto (a GPU where there is one and the index fits), cpu, cuda, cuda:N

    def __post_init__(self) -> None:
        _check(
            isinstance(self.kind, str) and bool(self.kind),
            "index",
            "auto, flat, ivf, ivf-sq, ivf-pq, hnsw or a FAISS factory string",
            self.kind,
        )
        for name in ("nlist", "nprobe", "train_images", "memory"):
            value = getattr(self, name)
            _check(value is None or is_count(value), name, "a number >= 1", value)
        share = isinstance(self.recall, float) and 0 < self.recall <= 1
        _check(share or self.recall == 1, "recall", "a share above 0 and at most 1", self.recall)


@dataclass(frozen=True)
class SearchOptions:
    """Retrieval and patch search of a query."""

    k: int | None = None  # neighbours whose patches are searched; None: 50, or the gallery's size where that is less
    kappa: int = 1  # nearest patches averaged into a pixel's score
    k_score: int | None = None  # neighbours averaged into the image score; None: k
    engine: Engine = "auto"  # patch search
    nprobe: int | None = None  # IVF lists visited; None: as the index was made
    # equal: levels as the network gives them; spread: each over its spread among normal images, so that none outweighs
    # the others by having large activations
    level_weights: LevelWeights | None = None  # None: as the gallery's recipe says, or else equal
    block_bytes: int = 256 * MIB  # the most that the flat engine's temporary gallery may take at a time
    device: str = "auto"  # of the patch search: auto, cpu, cuda, cuda:N
    # Levels of normal images that are kept in memory, those needed last: K = 50 of wide_resnet50_2 are 134 MiB, of
    # efficientnet_lite0 13 MiB. Queries share neighbours; 0: none are kept
    cache_bytes: int = 512 * MIB
    # Likewise on a GPU, for engine pyramid there. It has not run on one yet. Each query in hand has copies of its
    # neighbours besides; those that do not fit the bound stay off the GPU. 0: none are kept
    device_cache_bytes: int = 512 * MIB
    verify_reads: bool = True  # compare what is read from a gallery's files with its checksums
    localise: Localise = "all"  # suspicious: no patch search for images whose kNN score is at or under the threshold

    def __post_init__(self) -> None:
        for name in ("k", "k_score", "nprobe"):
            value = getattr(self, name)
            _check(value is None or is_count(value), name, "a number >= 1", value)
        _check(is_count(self.kappa), "kappa", "a number >= 1", self.kappa)
        _check(is_count(self.block_bytes), "block_bytes", "a number of bytes >= 1", self.block_bytes)
        for name in ("cache_bytes", "device_cache_bytes"):
            value = getattr(self, name)
            _check(value is not False and (value == 0 or is_count(value)), name, "a number of bytes >= 0", value)
        _check(isinstance(self.verify_reads, bool), "verify_reads", "True or False", self.verify_reads)
        _check(
            self.level_weights in (None, *get_args(LevelWeights)),
            "level_weights",
            "equal or spread",
            self.level_weights,
        )
        _check(self.localise in get_args(Localise), "localise", "all or suspicious", self.localise)
        _check(self.engine in get_args(Engine), "engine", " or ".join(get_args(Engine)), self.engine)


@dataclass(frozen=True)
class ScoreOptions:
    """Distances to scores."""

    # knn: mean squared distance to the k_score nearest images; map_max: the map's maximum; map: the maximum or the
    # mean, whichever is rarer among normal images
    image_score: ImageScore | None = None  # None: as the gallery's recipe says, or else knn
    # damped: less where normal images are unusually far from each other, as at borders
    positions: Positions | None = None  # None: as the gallery's recipe says, or else equal
    min_region: int = 1  # px; smaller regions above the pixel threshold do not count
    sigma: float = 4.0  # px of Gaussian smoothing where the network's input shows the image at 224 px; 0: none

    def __post_init__(self) -> None:
        _check(
            self.image_score in (None, *get_args(ImageScore)), "image_score", "knn, map_max or map", self.image_score
        )
        _check(self.positions in (None, *get_args(Positions)), "positions", "equal or damped", self.positions)
        _check(is_count(self.min_region), "min_region", "pixels >= 1", self.min_region)
        number = isinstance(self.sigma, (int, float)) and not isinstance(self.sigma, bool)
        _check(number and 0 <= self.sigma <= MOST_SIGMA, "sigma", f"pixels >= 0, at most {MOST_SIGMA}", self.sigma)


QueryOptions = TypeVar("QueryOptions", SearchOptions, ScoreOptions)


def filled(options: QueryOptions, values: Mapping[str, Any]) -> QueryOptions:
    """Return options in which each that is None has the value of its name, where there is one."""
    unset = {field.name for field in fields(options) if getattr(options, field.name) is None}
    return replace(options, **{name: value for name, value in values.items() if name in unset})
