"""Arguments and groups of options that several commands share, and the objects that they make."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import click
from PIL import Image

from ..detect.measure_baseline import SAMPLE
from ..extractors.late import LateExtractor
from ..extractors.registry import Extractor
from ..options import MIB, FeatureOptions, Runtime, ScoreOptions, SearchOptions
from ..report.report import CARDS
from .flags import PATH, GalleryPlace, Seconds, Window, changed, flag, require_folders

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..detect.detector import Detector
    from ..gallery.reader import GalleryReader
    from ..images.sources import ImageFile
    from ..ingest.runs import Machines

CACHE_MIB, DEVICE_CACHE_MIB = SearchOptions.cache_bytes // MIB, SearchOptions.device_cache_bytes // MIB


def set_max_pixels(context: click.Context, _: click.Parameter, value: int | None) -> int | None:
    """Set Pillow's limit while a command runs; worker processes get it from there."""
    if value is not None:
        context.call_on_close(partial(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS))
        Image.MAX_IMAGE_PIXELS = value
    return value


gallery = click.argument("gallery", type=GalleryPlace(read_only=False))
gallery_to_read = click.argument("gallery", type=GalleryPlace(read_only=True))
gallery_if_any = click.argument("gallery", type=GalleryPlace(read_only=True), required=False)
sources = click.argument("sources", type=PATH, nargs=-1, required=True)

Quiet = Annotated[bool, flag("--quiet", is_flag=True, help="Show no progress and no notes on stderr.")]
AsJson = Annotated[bool, flag("--json", is_flag=True, help="Print JSON, for a program to read.")]
Files = Annotated[
    bool,
    flag(
        "--files/--no-files",
        default=True,
        help="If patches are recomputed, read the image files too.  [default: yes]",
    ),
]
Strict = Annotated[bool, flag("--strict", is_flag=True, help="Stop at the first image that cannot be taken.")]
Wait = Annotated[
    float,
    flag(
        "--wait",
        type=Seconds(),
        default=0,
        metavar="SECONDS",
        help="Seconds to wait for another writer.  [default: fail at once]",
    ),
]
Normal = Annotated[
    tuple[Path, ...],
    flag(
        "--normal",
        type=PATH,
        multiple=True,
        metavar="DIR",
        help="Look for the normal images' files in this folder, which GALLERY was built from: a report shows them, and "
        "patches that are not stored are recomputed from them. May be given again.",
    ),
]


@dataclass(frozen=True)
class WriteFlags:
    """Options of a command that only writes."""

    wait: Wait


@dataclass(frozen=True)
class NetworkFlags:
    """How the network is loaded and run."""

    weights: Annotated[
        Path | None,
        flag(
            "--weights", type=PATH, help="Load weights from this file (.pth, .safetensors) instead of downloading them."
        ),
    ]
    batch_size: Annotated[
        int,
        flag(
            "--batch-size",
            type=int,
            default=FeatureOptions.batch_size,
            show_default=True,
            help="Images in one pass through the network.",
        ),
    ]
    device: Annotated[
        str,
        flag(
            "--device",
            default="auto",
            show_default=True,
            help="Run on this device: cpu, cuda, cuda:N, or auto, which takes a GPU for what is faster there.",
        ),
    ]
    runtime: Annotated[
        Runtime,
        flag(
            "--runtime",
            type=click.Choice(get_args(Runtime)),
            default="auto",
            show_default=True,
            help="Run the network on the CPU by torch or by openvino. auto takes OpenVINO where it is installed and "
            "measured to be faster.",
        ),
    ]
    max_pixels: Annotated[
        int | None,
        flag(
            "--max-pixels",
            type=click.IntRange(1),
            metavar="N",
            callback=set_max_pixels,
            help=f"Decode images of up to N pixels.  [default: {Image.MAX_IMAGE_PIXELS}]",
        ),
    ]

    def extractor_of(self, opened: GalleryReader) -> Extractor:
        """Load the extractor that made a gallery."""
        return opened.load_extractor(self.weights, self.batch_size, self.device, self.runtime)

    def late_extractor_of(self, opened: GalleryReader) -> Extractor:
        """Load the extractor that made a gallery once it is needed: at once, if something else than usual is asked."""
        if self.weights or self.runtime != "auto":
            return self.extractor_of(opened)
        options = opened.spec.options(self.batch_size, self.device)
        return LateExtractor(opened.spec, options.batch_size, partial(self.extractor_of, opened))


@dataclass(frozen=True)
class IngestFlags:
    """How images are taken into a gallery."""

    workers: Annotated[
        int | None,
        flag(
            "--workers",
            type=int,
            metavar="N",
            help="Processes that decode, extract and write. Each loads the network.  [default: 1]",
        ),
    ]
    ray: Annotated[
        str | None,
        flag(
            "--ray",
            metavar="ADDRESS|local",
            help="Decode, extract and write on the machines of the Ray cluster at this address, which all see GALLERY "
            "and the images; local: on the CPUs of this machine. --workers then bounds the tasks at a time.",
        ),
    ]
    wait: Wait
    replace: Annotated[
        bool, flag("--replace", is_flag=True, help="Take changed images under a key that is in the gallery already.")
    ]
    strict: Strict
    quiet: Quiet

    def machines(self) -> int | Machines:
        """Return what makes shards: so many processes, or the machines of a Ray cluster."""
        if self.ray is None:
            return 1 if self.workers is None else self.workers
        from ..cluster.ray_build import RayMachines

        return RayMachines(self.ray, self.workers)


@dataclass(frozen=True)
class SampleFlags:
    """Which normal images are compared with the others."""

    sample: Annotated[int | None, flag("--sample", type=int, help="Number of normal images to query.  [default: all]")]
    seed: Annotated[int, flag("--seed", type=int, default=0, show_default=True, help="Seed of the sample.")]
    group: Annotated[
        str | None, flag("--group", help="Regular expression on keys. Images of one group are left out together.")
    ]


@dataclass(frozen=True)
class ReportFlags:
    """What a report shows."""

    no_report: Annotated[bool, flag("--no-report", is_flag=True, help="Write no report.html.")]
    report_images: Annotated[
        int,
        flag(
            "--report-images",
            type=click.IntRange(0),
            default=CARDS,
            show_default=True,
            metavar="N",
            help="Number of images that report.html shows, highest scores first. Its table lists all.",
        ),
    ]


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
            type=click.Choice(["equal", "spread"]),
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
            type=click.Choice(["any", "same"]),
            help="Compare a tile with normal tiles from anywhere in their images, or at its own place.  [default: any]",
        ),
    ]
    matching: Annotated[
        str | None,
        flag(
            "--matching",
            type=click.Choice(["concatenated", "by_level"]),
            help="Match patches of all levels together, or each level's apart, on its own grid.",
        ),
    ]
    metric: Annotated[
        str | None,
        flag("--metric", type=click.Choice(["l2", "cosine"]), help="Distance of patches: squared L2, or 1 - cosine."),
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
            type=click.Choice(["knn", "map_max", "map", "map_top"]),
            help="Score an image by the distance to its nearest images (knn), by the map's maximum (map_max), by the "
            "map's maximum or mean, whichever is rarer among normal images (map), or by the mean of the map's highest "
            "1 % (map_top).",
        ),
    ]
    positions: Annotated[
        str | None,
        flag(
            "--positions",
            type=click.Choice(["equal", "damped"]),
            help="Leave the map as it is, or damp it where normal images are far from each other, as at borders.",
        ),
    ]
    fusion: Annotated[
        str | None,
        flag(
            "--fusion",
            type=click.Choice(["mean", "relative", "harmonic", "harmonic_squares"]),
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


def detector_of(
    opened: GalleryReader,
    search: SearchFlags,
    network: NetworkFlags,
    normal: Sequence[Path | ImageFile] = (),
    calibrated: bool = True,
    quiet: bool = True,
) -> Detector:
    """Make a detector over a gallery, whose image files may be in `normal`, or a federation over a cluster.

    Says if it measures a scale first. Without a calibration it is to compare normal images with each other, and loads
    the network only if they are not stored.
    """
    from ..cluster.cluster import Cluster
    from ..cluster.federation import Federation
    from ..detect.detector import Detector

    require_folders(normal)
    options = search.search_options(network.device), search.score_options()
    extractor = network.extractor_of(opened) if calibrated else network.late_extractor_of(opened)
    if isinstance(opened, Cluster):
        detector: Detector = Federation(opened, extractor, *options, calibrated)
    else:
        detector = Detector(opened, extractor, *options, calibrated, normal)
    if calibrated and detector.calibration is None and detector.needs_baseline and not quiet:
        n = min(SAMPLE, len(opened))
        click.echo(
            f"spade-faiss: note: {n} normal images are compared first, for a scale; calibrate keeps it", err=True
        )
    return detector
