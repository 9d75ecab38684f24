"""Arguments and groups of options that several commands share, and the objects that they make."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import click
from PIL import Image

from ..errors import GalleryError, OptionError, OutputError
from ..extractors.late import LateExtractor
from ..extractors.registry import Extractor
from ..options import FeatureOptions, Runtime
from ..report.output_files import refuse_foreign
from ..report.report import CARDS
from ..store.source_images import SourceImages
from .flags import PATH, GalleryPlace, Seconds, flag, require_folders
from .messages import LOG, note
from .search_flags import SearchFlags

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..detect.detector import Detector
    from ..gallery.reader import GalleryReader
    from ..images.sources import ImageFile
    from ..ingest.runs import Machines


def set_max_pixels(context: click.Context, _: click.Parameter, value: int | None) -> int | None:
    """Set Pillow's limit while a command runs; worker processes get it from there."""
    if value is not None:
        context.call_on_close(partial(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS))
        Image.MAX_IMAGE_PIXELS = value
    return value


def set_quiet(context: click.Context, _: click.Parameter, value: bool) -> bool:
    """Let what the package logs while a command runs not be printed."""
    if value:
        context.call_on_close(partial(LOG.setLevel, LOG.level))
        LOG.setLevel(logging.WARNING)
    return value


gallery = click.argument("gallery", type=GalleryPlace(read_only=False))
gallery_to_read = click.argument("gallery", type=GalleryPlace(read_only=True))
gallery_if_any = click.argument("gallery", type=GalleryPlace(read_only=True), required=False)
sources = click.argument("sources", type=PATH, nargs=-1, required=True)

Quiet = Annotated[
    bool,
    flag(
        "--quiet",
        is_flag=True,
        callback=set_quiet,
        help="Show no progress, and only notes that change what a result means.",
    ),
]
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

    def check(self) -> None:
        """Refuse a number of processes that cannot be, before anything is printed or computed.

        Raises:
            OptionError: it is not positive.
        """
        if self.workers is not None and self.workers < 1:
            raise OptionError(f"workers: expected a number >= 1, found {self.workers}")

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


def check_output(output: Path) -> None:
    """Refuse a folder for results that cannot be one, before anything is computed.

    Raises:
        OutputError: it is a file, or somebody else's folder.
    """
    if output.exists() and not output.is_dir():
        raise OutputError(f"cannot write {output}: expected a folder, or a name that is free, found a file")
    refuse_foreign(output)


def check_normal(opened: GalleryReader, normal: Sequence[Path], reads_files: bool, quiet: bool) -> None:
    """Note what --normal names in vain.

    Args:
        opened: the gallery.
        normal: what was given.
        reads_files: whether the command reads the images' files though patches are stored, as for a report.
        quiet: do not say that nothing needs the files; a folder that holds none of them is named all the same.

    Raises:
        click.UsageError: a path is no folder.
    """
    require_folders(normal)
    if normal and opened.patches == "stored" and not reads_files:
        if not quiet:
            note(f"--normal has no effect: {opened.path} stores its patches, and nothing else here reads image files")
        return
    originals = SourceImages(opened.snapshot())
    with contextlib.suppress(GalleryError):  # of damage; the command itself meets it, too
        for folder in normal:
            if originals.is_any_in(folder) is False:
                note(
                    f"--normal {folder}: expected files of the images in {opened.path}, found none; name the folder "
                    "that it was built from"
                )


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
    if calibrated and detector.calibration is None and not (detector.keep_baseline() or quiet):
        click.echo(
            "spade-faiss: note: normal images are compared with the others first, for a scale: "
            f"{detector.to_compare} queries at most; calibrate keeps it", err=True,
        )  # fmt: skip
    return detector
