"""Every option with its unit, its default and its check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar, get_args

import numpy as np

from .errors import OptionError

DEFAULT_K = 50  # the paper's K for MVTec AD
MIB = 2**20
LEAST_BITS, MOST_BITS = 8, 16  # that are significant in a value of 16
MOST_SIGMA = 10_000  # px; the Gaussian's kernel is several times as long

Normalisation = Literal["imagenet", "trained"]
StoredDtype = Literal["float16", "float32"]
Runtime = Literal["auto", "torch", "openvino"]  # what runs a network
Precision = Literal["float32", "bfloat16"]  # what a network multiplies in
Tokens = Literal["plain", "normalised"]
ImageFeature = Literal["pooled", "class_token"]
Patches = Literal["stored", "recompute"]  # a gallery stores pyramid levels, or re-extracts them from image files
Engine = Literal["auto", "flat", "pyramid", "bounds"]
TilePlaces = Literal["any", "same"]
Localise = Literal["all", "suspicious"]
ImageScore = Literal["knn", "map_max", "map", "map_top"]
Fusion = Literal["mean", "relative", "harmonic", "harmonic_squares"]
LevelWeights = Literal["equal", "spread"]
Positions = Literal["equal", "damped"]
Metric = Literal["l2", "cosine"]
Matching = Literal["concatenated", "by_level"]

WINDOWS = "cells >= 0, a share of each side above 0 and at most 1.0, or all"  # what is_window expects


def _check(ok: bool, name: str, expected: str, found: object) -> None:
    """Raise an OptionError that names the option unless `ok`."""
    if not ok:
        raise OptionError(f"{name}: expected {expected}, found {found!r}")


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it: NumPy's numbers as Python's, a list as a tuple."""
    if isinstance(value, np.generic):
        return value.item()
    return tuple(map(plain, value)) if isinstance(value, (list, tuple)) else value


def make_plain(options: Any) -> None:
    """Make the values of frozen options plain, before they are checked."""
    for field in fields(options):
        object.__setattr__(options, field.name, plain(getattr(options, field.name)))


def is_count(value: object) -> bool:
    """Return whether a value is a whole number >= 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_size(value: object) -> bool:
    """Return whether a value is a (height, width) in pixels."""
    return isinstance(value, tuple) and len(value) == 2 and all(is_count(side) for side in value)


def is_window(value: object) -> bool:
    """Return whether a value is a window of the patch search: cells >= 0, a share in (0, 1], "all" or None."""
    if isinstance(value, (bool, np.bool_)):
        return False
    if isinstance(value, (int, np.integer)):
        return bool(value >= 0)
    if isinstance(value, (float, np.floating)):
        return bool(0 < value <= 1)
    return value is None or (isinstance(value, str) and value == "all")


def is_share(value: object) -> bool:
    """Return whether a value is a number above 0 and at most 1."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1


def _as_size(value: Any) -> Any:
    """Turn a side in pixels into a (height, width)."""
    return (value, value) if is_count(value) else value


@dataclass(frozen=True)
class FeatureOptions:
    """What determines an image's features. All but batch_size, device and runtime are fixed when a gallery is created.

    A size is a (height, width); a single number is a square's side.

    Example:
        >>> sf.FeatureOptions(image_size=256, crop=224).crop
        (224, 224)
        >>> sf.FeatureOptions(neighbourhood=2)
        Traceback (most recent call last):
        spade_faiss.errors.OptionError: neighbourhood: expected odd, found 2
    """

    image_size: int | tuple[int, int] | None = None  # px an image is resized to; None: the extractor's own input size
    crop: int | tuple[int, int] | None = None  # px, centre of the resized image (paper: 224 of 256); None: all of it
    levels: tuple[str, ...] | None = None  # names of the pyramid levels, finest first; None: chosen by `strides`
    # px of input per cell, ascending. Ignored if `levels` is given, or if all levels of the network have one grid
    strides: tuple[int, ...] = (4, 8, 16)
    # Vision transformers only: the blocks whose tokens are the levels, as shares of the depth, above 0 to 1, ascending.
    # 0.25 is block depth / 4, counted from 0 and rounded down; 1 is the last. Ignored if `levels` is given; None: the
    # blocks that end a quarter, half and three quarters of the depth
    blocks: tuple[float, ...] | None = None
    # Vision transformers only. normalised: each token of a level passes the network's final norm and is scaled to unit
    # length, so that squared distances are 2 (1 - cosine); plain, None: tokens as their block gives them
    tokens: Tokens | None = None
    # What images are retrieved by. class_token: a vision transformer's class token after the block of the last level,
    # normalised as above; pooled, None: the network's own pooled feature, before its classifier
    image_feature: ImageFeature | None = None
    # Mean and std of pixels. trained: those that the weights were trained with; imagenet: ImageNet's; None: imagenet
    # for efficientnet_lite0 (customary, though its weights were trained with 0.5 and 0.5), trained for all others
    normalisation: Normalisation | None = None
    neighbourhood: int = 1  # odd p: each level is averaged over p x p positions with stride 1; 1: no averaging (paper)
    # Whether that average counts cells beyond the border as zeros. Cells at the border, which see the network's own
    # padding, then shrink, and differ less from each other; False: only cells on the map count
    count_include_pad: bool = False
    dtype: StoredDtype = "float16"  # levels are stored and compared in it; image features are always float32
    batch_size: int = 16  # images in one pass through the network
    device: str = "auto"  # where the network runs: auto (a GPU if torch sees one), cpu, cuda, cuda:N
    # What runs the network on the CPU: torch; openvino, converted from torch's network; auto: OpenVINO where it is
    # installed, gives torch's features and has been faster in a measurement, or what the environment variable
    # SPADE_FAISS_RUNTIME says
    runtime: Runtime = "auto"
    # What the network multiplies in. bfloat16 is faster on some processors and moves features by percents, by each
    # runtime in its own way: features of other precisions, and of bfloat16 by another runtime, cannot be compared
    precision: Precision = "float32"
    # How many bits are significant, 8 to 16, in image files of 16 bits a value that do not say so; None: 16. Larger
    # values are refused
    bits: int | None = None
    # px of the image: larger images are cut into tiles of this size, each an image of the gallery, so that small things
    # are not shrunk away; None: each image is seen whole
    tile: int | tuple[int, int] | None = None
    overlap: int | None = None  # px at least that neighbouring tiles share; None: 1/8 of a tile's shorter side

    def __post_init__(self) -> None:
        make_plain(self)
        # From here on sizes are (height, width), however they were given.
        for name in ("image_size", "crop", "tile"):
            size = _as_size(getattr(self, name))
            _check(size is None or is_size(size), name, "pixels >= 1, a side or (height, width)", size)
            object.__setattr__(self, name, size)
        _check(is_count(self.neighbourhood) and self.neighbourhood % 2 == 1, "neighbourhood", "odd", self.neighbourhood)
        _check(isinstance(self.count_include_pad, bool), "count_include_pad", "True or False", self.count_include_pad)
        known = (None, *get_args(Normalisation))
        _check(self.normalisation in known, "normalisation", "imagenet or trained", self.normalisation)
        _check(self.dtype in get_args(StoredDtype), "dtype", "float16 or float32", self.dtype)
        _check(self.runtime in get_args(Runtime), "runtime", "auto, torch or openvino", self.runtime)
        _check(self.precision in get_args(Precision), "precision", "float32 or bfloat16", self.precision)
        few = is_count(self.bits) and LEAST_BITS <= int(self.bits or 0) <= MOST_BITS
        _check(self.bits is None or few, "bits", f"a number from {LEAST_BITS} to {MOST_BITS}", self.bits)
        tile, overlap = self.tile, self.overlap
        most = min(tile) // 2 if isinstance(tile, tuple) else 0
        shared = overlap is None or (tile is not None and (is_count(overlap) or overlap == 0) and overlap <= most)
        expected = f"pixels from 0 to {most}, half a tile" if tile else "none without tiles (tile=HxW)"
        _check(shared, "overlap", expected, overlap)
        _check(is_count(self.batch_size), "batch_size", "a number >= 1", self.batch_size)
        named = (
            isinstance(self.levels, tuple)
            and self.levels
            and all(name and isinstance(name, str) for name in self.levels)
        )
        _check(self.levels is None or bool(named), "levels", "names of at least one level", self.levels)
        strides = self.strides if isinstance(self.strides, tuple) else ()
        rising = bool(strides) and all(map(is_count, strides)) and sorted(set(strides)) == [*strides]
        _check(rising, "strides", "pixels, ascending", self.strides)
        self._check_tokens()

    def _check_tokens(self) -> None:
        """Check what is for vision transformers only; see above."""
        shares = self.blocks if isinstance(self.blocks, tuple) else ()
        rising = bool(shares) and all(map(is_share, shares)) and sorted(set(shares)) == [*shares]
        _check(self.blocks is None or rising, "blocks", "shares of the depth, above 0 to 1, ascending", self.blocks)
        _check(self.tokens in (None, *get_args(Tokens)), "tokens", "plain or normalised", self.tokens)
        known = (None, *get_args(ImageFeature))
        _check(self.image_feature in known, "image_feature", "pooled or class_token", self.image_feature)

    @property
    def tile_size(self) -> tuple[int, int] | None:
        """The (height, width) of a tile in pixels of the image; None: each image is seen whole."""
        size: tuple[int, int] | None = _as_size(self.tile)
        return size

    def sizes(self, default: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return (resized, crop): the (height, width) an image is resized to, and that of the crop the network sees.

        Args:
            default: the extractor's own input size (height, width) in pixels.

        Raises:
            OptionError: the crop is larger than the resized image.

        Example:
            >>> sf.FeatureOptions(image_size=256, crop=224).sizes(default=(320, 320))
            ((256, 256), (224, 224))
            >>> sf.FeatureOptions().sizes(default=(320, 320))
            ((320, 320), (320, 320))
        """
        resized: tuple[int, int] = _as_size(self.image_size or self.crop) or default
        crop: tuple[int, int] = _as_size(self.crop) or resized
        _check(crop[0] <= resized[0] and crop[1] <= resized[1], "crop", f"at most the image size {resized}", crop)
        return resized, crop


@dataclass(frozen=True)
class IndexOptions:
    """The FAISS index over image features.

    Example:
        >>> sf.IndexOptions("ivf", recall=0.95, memory=4 * 2**30).recall
        0.95
        >>> sf.IndexOptions(recall=95)
        Traceback (most recent call last):
        spade_faiss.errors.OptionError: recall: expected a share above 0 and at most 1, found 95
    """

    kind: str = "auto"  # auto, flat, ivf, ivf-sq, ivf-pq, hnsw, or any FAISS factory string
    nlist: int | None = None  # IVF: number of lists; None: chosen by the number of images
    nprobe: int | None = None  # IVF: number of lists that a search visits; None: as many as `recall` needs
    train_images: int | None = None  # IVF: size of the training sample; None: chosen by the number of lists
    recall: float = 0.99  # share of the true nearest images to find; measured on normal images when the index is built
    memory: int | None = None  # bytes that an index of kind `auto` may take; None: half of the machine's memory
    device: str = "auto"  # auto (a GPU from 10 000 images on), cpu, cuda, cuda:N

    def __post_init__(self) -> None:
        make_plain(self)
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
    """Retrieval and patch search of a query.

    Example:
        >>> sf.Detector(gallery, toy, sf.SearchOptions(k=3, kappa=2)).query("test/000.png").matches.shape
        (8, 8, 2, 3)
        >>> sf.SearchOptions(engine="fast")
        Traceback (most recent call last):
        spade_faiss.errors.OptionError: engine: expected auto or flat or pyramid or bounds, found 'fast'
    """

    k: int | None = None  # neighbours whose patches are searched; None: as the recipe says, else 50, or all images
    kappa: int | None = None  # nearest patches averaged into a pixel's score; None: as the recipe says, else 1
    k_score: int | None = None  # neighbours averaged into the image score; None: k
    engine: Engine = "auto"  # the patch search's: auto (the fastest, as expected), flat, pyramid or bounds
    nprobe: int | None = None  # number of IVF lists that a search visits; None: the index's own
    # equal: levels as the network gives them; spread: each level divided by its spread among normal images, so that
    # large activations do not outweigh the other levels; None: as the gallery's recipe says, else equal
    level_weights: LevelWeights | None = None
    # l2: squared L2; cosine: 1 - cos, from 0 to 2, which ignores the length of features; None: as the gallery's recipe
    # says, else l2
    metric: Metric | None = None
    # How far from its own position a patch may be matched, in rows and in columns: a whole number is cells of the
    # level, a fraction a share of its sides; all: everywhere; None: as the gallery's recipe says, else all
    window: int | float | str | None = None
    # concatenated: a patch is all levels on the finest grid; by_level: each level is searched apart, on its own grid;
    # None: as the gallery's recipe says, else concatenated
    matching: Matching | None = None
    # Where in their images the tiles may lie that a tile is compared with: anywhere, or at its own place, where parts
    # lie alike in all images; None: as the gallery was calibrated, else any
    tile_places: TilePlaces | None = None
    # Whether a patch's kappa matches lie in as many neighbours, so that one defect among the normal images does not
    # excuse its like; None: as the gallery's recipe says, else False
    distinct: bool | None = None
    # Share of the neighbours, at most 0.5, that no verdict is to rest on: so many of them, rounded down, are left out
    # of an image's comparison, those without which it is the most anomalous, so that a defect which hides in a few
    # normal images does not excuse its like. 0: none; None: as the gallery's recipe says, else 0
    leave_out: float | None = None
    block_bytes: int = 256 * MIB  # memory limit of the flat engine's temporary gallery
    device: str = "auto"  # where patches are searched: auto (a GPU where it is faster), cpu, cuda, cuda:N
    # Memory limit of the cache of normal images' levels; queries share neighbours. The most recent are kept. K = 50
    # images take 134 MiB for wide_resnet50_2 and 13 MiB for efficientnet_lite0. 0: no cache. What searches of levels
    # apart have prepared of neighbours is kept too, in up to half as much on top: 46 MiB for 50 of the latter
    cache_bytes: int = 512 * MIB
    # The same for the cache on a GPU, which every engine but flat uses there. Copies of the
    # current queries' neighbours come on top. 0: no cache
    device_cache_bytes: int = 512 * MIB
    verify_reads: bool = True  # whether to compare what is read from a gallery's files with its checksums
    localise: Localise = "all"  # suspicious: no patch search for images whose kNN score does not exceed the threshold

    def __post_init__(self) -> None:
        make_plain(self)
        for name in ("k", "kappa", "k_score", "nprobe"):
            value = getattr(self, name)
            _check(value is None or is_count(value), name, "a number >= 1", value)
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
        _check(self.metric in (None, *get_args(Metric)), "metric", "l2 or cosine", self.metric)
        _check(is_window(self.window), "window", WINDOWS, self.window)
        if isinstance(self.window, float) and self.window == 1:  # as a number it would equal one cell
            object.__setattr__(self, "window", "all")
        _check(self.matching in (None, *get_args(Matching)), "matching", "concatenated or by_level", self.matching)
        _check(self.tile_places in (None, *get_args(TilePlaces)), "tile_places", "any or same", self.tile_places)
        known = self.distinct is None or isinstance(self.distinct, bool)
        _check(known, "distinct", "True or False", self.distinct)
        share = (self.leave_out in (None, 0) and self.leave_out is not False) or is_share(self.leave_out)
        _check(share and (self.leave_out or 0) <= 0.5, "leave_out", "a share from 0 to 0.5", self.leave_out)
        _check(self.localise in get_args(Localise), "localise", "all or suspicious", self.localise)
        _check(self.engine in get_args(Engine), "engine", " or ".join(get_args(Engine)), self.engine)


@dataclass(frozen=True)
class ScoreOptions:
    """How distances become scores and maps.

    Example:
        >>> sharp = sf.Detector(gallery, toy, score=sf.ScoreOptions(sigma=0)).query("test/000.png")
        >>> bool(sharp.anomaly_map.max() > detector.query("test/000.png").anomaly_map.max())
        True
    """

    # knn: mean squared distance to the k_score nearest images; map_max: the map's maximum; map: the maximum or the
    # mean, whichever is rarer among normal images; map_top: the mean of the highest 1 % of the map's pixels; None: as
    # the gallery's recipe says, else knn
    image_score: ImageScore | None = None
    # damped: scores are lowered where normal images are unusually far from each other, for instance at borders;
    # None: as the gallery's recipe says, else equal
    positions: Positions | None = None
    # How levels that are searched apart become one map. mean: of their distances; relative: each distance as a multiple
    # of what it is among normal images, and where the match lies, then the geometric mean; harmonic: as relative, then
    # the harmonic mean; harmonic_squares: the root of the harmonic mean of squares; None: as the recipe says, else mean
    fusion: Fusion | None = None
    min_region: int = 1  # px; smaller regions above the pixel threshold are ignored
    # px of Gaussian smoothing, as if the network's view of the image had 224 px; 0: none; None: as the recipe says,
    # else 4
    sigma: float | None = None
    truncate: float | None = None  # sigmas at which the Gaussian is cut; None: as the recipe says, else 4

    def __post_init__(self) -> None:
        make_plain(self)
        known = (None, *get_args(ImageScore))
        _check(self.image_score in known, "image_score", "knn, map_max, map or map_top", self.image_score)
        _check(
            self.fusion in (None, *get_args(Fusion)),
            "fusion",
            "mean, relative, harmonic or harmonic_squares",
            self.fusion,
        )
        _check(self.positions in (None, *get_args(Positions)), "positions", "equal or damped", self.positions)
        _check(is_count(self.min_region), "min_region", "pixels >= 1", self.min_region)
        for name, least, most in (("sigma", 0, MOST_SIGMA), ("truncate", 1, 10)):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most
            unit = "pixels" if name == "sigma" else "sigmas"
            _check(value is None or number, name, f"{unit} >= {least}, at most {most}", value)


QueryOptions = TypeVar("QueryOptions", SearchOptions, ScoreOptions)


def filled(options: QueryOptions, values: Mapping[str, Any]) -> QueryOptions:
    """Return the options with each None replaced by the value of that name, if `values` has one."""
    unset = {field.name for field in fields(options) if getattr(options, field.name) is None}
    return replace(options, **{name: value for name, value in values.items() if name in unset})
