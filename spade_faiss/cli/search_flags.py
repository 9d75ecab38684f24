"""The options of a query that say how it is searched and scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, get_args

import click

from ..options import (
    MIB,
    Fusion,
    ImageScore,
    LevelWeights,
    Matching,
    Metric,
    Positions,
    ScoreOptions,
    SearchOptions,
    TilePlaces,
)
from .flags import Window, changed, flag

CACHE_MIB, DEVICE_CACHE_MIB = SearchOptions.cache_bytes // MIB, SearchOptions.device_cache_bytes // MIB


@dataclass(frozen=True)
class SearchFlags:
    """How a query is searched and scored; None: as the gallery was calibrated, or as its recipe says."""

    k: Annotated[
        int | None,
        flag(
            "-k",
            type=int,
            help="Neighbours whose patches are searched.  [default: as the recipe says, else 50; or all images]",
        ),
    ]
    kappa: Annotated[int | None, flag("--kappa", type=int, help="Nearest patches averaged into a pixel's score.")]
    k_score: Annotated[
        int | None, flag("--k-score", type=int, help="Neighbours averaged into the image score.  [default: -k]")
    ]
    nprobe: Annotated[
        int | None, flag("--nprobe", type=int, help="IVF: number of lists to visit.  [default: as the index was made]")
    ]
    level_weights: Annotated[
        str | None,
        flag(
            "--level-weights",
            type=click.Choice(get_args(LevelWeights)),
            help="Weigh levels equally, or divide each by its spread among normal images.",
        ),
    ]
    engine: Annotated[
        str | None, flag("--engine", help="Patch search: auto, or, unless distinct, flat, pyramid, bounds.")
    ]
    tile_places: Annotated[
        str | None,
        flag(
            "--tile-places",
            type=click.Choice(get_args(TilePlaces)),
            help="Compare a tile with normal tiles from anywhere in their images, or at its own place.  [default: any]",
        ),
    ]
    matching: Annotated[
        str | None,
        flag(
            "--matching",
            type=click.Choice(get_args(Matching)),
            help="Match patches of all levels together, or each level's apart, on its own grid.",
        ),
    ]
    metric: Annotated[
        str | None,
        flag("--metric", type=click.Choice(get_args(Metric)), help="Distance of patches: squared L2, or 1 - cosine."),
    ]
    window: Annotated[
        int | float | str | None,
        flag(
            "--window",
            type=Window(),
            help="Match a patch only within this distance of its position: cells of the level (2), a share of its "
            "sides (0.1), or all.",
        ),
    ]
    distinct: Annotated[
        bool | None,
        flag(
            "--distinct/--no-distinct",
            default=None,
            help="Whether the nearest patches of a pixel lie in as many neighbours.  [default: as the recipe says]",
        ),
    ]
    leave_out: Annotated[
        float | None,
        flag(
            "--leave-out",
            type=float,
            help="Share of the neighbours that no verdict is to rest on, 0 to 0.5: those without which an image is the "
            "most anomalous are left out, as a defect may hide among them.  [default: as the recipe says]",
        ),
    ]
    block_mib: Annotated[
        int | None, flag("--block-mib", type=click.IntRange(1), help="Memory limit of flat's gallery, in MiB.")
    ]
    cache_mib: Annotated[
        int | None,
        flag(
            "--cache-mib",
            type=click.IntRange(0),
            help=f"Memory limit of the cache of recently used levels, in MiB.  [default: {CACHE_MIB}]",
        ),
    ]
    device_cache_mib: Annotated[
        int | None,
        flag(
            "--device-cache-mib",
            type=click.IntRange(0),
            help=f"Memory limit of that cache on a GPU, for every engine but flat.  [default: {DEVICE_CACHE_MIB}]",
        ),
    ]
    no_verify: Annotated[
        bool, flag("--no-verify", is_flag=True, help="Do not compare what is read with its checksums.")
    ]
    image_score: Annotated[
        str | None,
        flag(
            "--image-score",
            type=click.Choice(get_args(ImageScore)),
            help="Score an image by the distance to its nearest images (knn), by the map's maximum (map_max), by the "
            "map's maximum or mean, whichever is rarer among normal images (map), or by the mean of the map's highest "
            "1 % (map_top).",
        ),
    ]
    positions: Annotated[
        str | None,
        flag(
            "--positions",
            type=click.Choice(get_args(Positions)),
            help="Leave the map as it is, or damp it where normal images are far from each other, as at borders.",
        ),
    ]
    fusion: Annotated[
        str | None,
        flag(
            "--fusion",
            type=click.Choice(get_args(Fusion)),
            help="Make one map of levels that are searched apart: by the mean of their distances, or by how many times "
            "larger they are than among normal images, and then by the geometric or harmonic mean, or the root of "
            "the harmonic mean of squares.",
        ),
    ]
    sigma: Annotated[float | None, flag("--sigma", type=float, help="Gaussian smoothing of the map, in px at 224 px.")]
    truncate: Annotated[float | None, flag("--truncate", type=float, help="Sigmas at which that Gaussian is cut.")]

    def search_options(self, device: str) -> SearchOptions:
        """Return the options of retrieval and patch search."""
        return changed(
            SearchOptions(device=device, verify_reads=not self.no_verify),
            k=self.k,
            kappa=self.kappa,
            k_score=self.k_score,
            nprobe=self.nprobe,
            level_weights=self.level_weights,
            engine=self.engine,
            tile_places=self.tile_places,
            matching=self.matching,
            metric=self.metric,
            window=self.window,
            distinct=self.distinct,
            leave_out=self.leave_out,
            block_bytes=_bytes(self.block_mib),
            cache_bytes=_bytes(self.cache_mib),
            device_cache_bytes=_bytes(self.device_cache_mib),
        )

    def score_options(self) -> ScoreOptions:
        """Return the options of scoring."""
        return changed(
            ScoreOptions(),
            image_score=self.image_score,
            positions=self.positions,
            fusion=self.fusion,
            sigma=self.sigma,
            truncate=self.truncate,
        )


def _bytes(mib: int | None) -> int | None:
    return None if mib is None else mib * MIB
