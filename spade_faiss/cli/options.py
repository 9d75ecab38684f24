"""What several commands share: options and arguments, the objects that they make, and how a command ends."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..detect.measure_baseline import SAMPLE
from ..extractors.registry import Extractor, load_extractor
from ..gallery.gallery import Gallery
from ..images.sources import ImageFile
from ..ingest.pipeline import Skipped
from ..options import MIB, FeatureOptions, IndexOptions, ScoreOptions, SearchOptions
from ..report.report import CARDS

if TYPE_CHECKING:
    from ..detect.detector import Detector


EXIT_SKIPPED = 3
CACHE_MIB, DEVICE_CACHE_MIB = SearchOptions.cache_bytes // MIB, SearchOptions.device_cache_bytes // MIB

Options = TypeVar("Options", FeatureOptions, IndexOptions, SearchOptions, ScoreOptions)
Command = TypeVar("Command", bound=Callable[..., Any])


class Size(click.ParamType):  # type: ignore[type-arg,unused-ignore] # generic from click 8.4 on
    """Pixels: 224, or 224x448 for height x width."""

    name = "PX|HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Turn the text into a (height, width)."""
        parts = str(value).lower().split("x")
        if len(parts) > 2 or not all(part.isdecimal() and int(part) for part in parts):
            self.fail(f"expected pixels, as 224 or 224x448 (height x width), found {value!r}", param, ctx)
        return int(parts[0]), int(parts[-1])


class Bytes(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Bytes with a unit: 4GB, 512MiB."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Turn the text into bytes."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?", str(value).strip(), re.IGNORECASE)
        size = (
            0 if not found else float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " ")
        )
        if size < 1:
            self.fail(f"expected a size, as 4GB or 512MiB, found {value!r}", param, ctx)
        return int(size)


def together(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Make one decorator of several, in the order in which help lists them."""
    return lambda command: functools.reduce(lambda inner, option: option(inner), reversed(options), command)


gallery = click.argument("gallery", type=click.Path(path_type=Path))
sources = click.argument("sources", type=click.Path(path_type=Path), nargs=-1, required=True)
quiet = click.option("--quiet", is_flag=True, help="No progress and no notes on stderr.")
as_json_lines = click.option("--json", "as_lines", is_flag=True, help="Print JSON, for a program to read.")
strict = click.option("--strict", is_flag=True, help="Stop at the first image that cannot be taken.")
device = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
network = together(
    click.option(
        "--weights", type=click.Path(path_type=Path), help="Weights file (.pth, .safetensors), never the network."
    ),
    click.option(
        "--batch-size", type=int, default=FeatureOptions.batch_size, show_default=True, help="Images in a pass."
    ),
    device,
)
normals = together(
    click.option("--sample", type=int, help="Query so many of the normal images.  [default: all]"),
    click.option("--seed", type=int, default=0, show_default=True, help="Of the sample."),
    click.option("--group", help="Regular expression on keys: images of one group are left out together."),
)
originals = click.option(
    "--normal",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="DIR",
    help="A source that GALLERY was built from, for its images: a report shows them, and patches that are not stored "
    "are recomputed from them. May be given again.",
)
workers = click.option(
    "--workers", type=int, default=1, show_default=True, metavar="N",
    help="Processes that decode, extract and write; each loads the network.",
)  # fmt: skip
wait = click.option(
    "--wait", type=click.FloatRange(0), default=0, metavar="SECONDS",
    help="Wait so long for another process that is writing to GALLERY.  [default: fail at once]",
)  # fmt: skip
replace = click.option(
    "--replace", is_flag=True, help="Take changed images under a key that is in the gallery already."
)
report = together(
    click.option("--no-report", is_flag=True, help="Write no report.html."),
    click.option(
        "--report-images", type=click.IntRange(0), default=CARDS, show_default=True, metavar="N",
        help="Images of the highest scores that report.html shows; its table has all.",
    ),
)  # fmt: skip

index = together(
    click.option("--recall", type=float, help="Share of the nearest images that it is to find.  [default: 0.99]"),
    click.option("--memory", type=Bytes(), help="What it may take, as 4GB.  [default: half of this machine's]"),
    click.option("--nlist", type=int, help="IVF: number of lists.  [default: from the number of images]"),
    click.option("--nprobe", type=int, help="IVF: lists visited by a search.  [default: as many as the recall needs]"),
    click.option("--train-images", type=int, help="IVF: size of the training sample.  [default: from nlist]"),
)

search = together(
    click.option("-k", type=int, help="Neighbours whose patches are searched.  [default: 50, or all images if fewer]"),
    click.option("--kappa", type=int, help="Nearest patches averaged."),
    click.option("--k-score", type=int, help="Neighbours averaged into the image score.  [default: -k]"),
    click.option("--nprobe", type=int, help="IVF: lists visited.  [default: as the index was made]"),
    click.option("--level-weights", type=click.Choice(["equal", "spread"]),
                 help="Levels as they are, or each over its spread among normal images."),
    click.option("--engine", help="Of the patch search: auto, flat or pyramid."),
    click.option("--block-mib", type=int, help="Memory of the flat engine's gallery."),
    click.option("--cache-mib", type=click.IntRange(0),
                 help=f"Memory for the levels of normal images needed last.  [default: {CACHE_MIB}]"),
    click.option("--device-cache-mib", type=click.IntRange(0),
                 help=f"Likewise on a GPU, for engine pyramid there.  [default: {DEVICE_CACHE_MIB}]"),
    click.option("--no-verify", is_flag=True, help="Do not compare what is read with its checksums."),
    click.option("--image-score", type=click.Choice(["knn", "map_max", "map"]),
                 help="Distance to the nearest images, the map's maximum, or its maximum or mean."),
    click.option("--positions", type=click.Choice(["equal", "damped"]),
                 help="The map as it is, or damped where normal images are far from each other, as at borders."),
    click.option("--sigma", type=float, help="Smoothing, px at 224 px."),
)  # fmt: skip


def detector_of(
    opened: Gallery,
    weights: Path | None,
    given: dict[str, Any],
    calibrated: bool = True,
    normal: Sequence[Path | ImageFile] = (),
) -> Detector:
    """Make a detector over a gallery, whose image files may be in `normal`: options not given are the gallery's."""
    from ..detect.detector import Detector

    given = given | {
        f"{name}_bytes": None if given[f"{name}_mib"] is None else given[f"{name}_mib"] * MIB
        for name in ("block", "cache", "device_cache")
    }
    given["verify_reads"] = not given["no_verify"]
    search, score = replaced(SearchOptions(), given), replaced(ScoreOptions(), given)
    detector = Detector(opened, extractor_of(opened, weights, given), search, score, calibrated, normal)
    if calibrated and detector.calibration is None and detector.needs_baseline and not given["quiet"]:
        n = min(SAMPLE, len(opened))
        click.echo(
            f"spade-faiss: note: {n} normal images are compared first, for a scale; calibrate keeps it", err=True
        )
    return detector


def replaced(options: Options, given: dict[str, Any]) -> Options:
    """Return options with what was given on the command line in place of theirs."""
    names = {field.name for field in dataclasses.fields(options)}
    return dataclasses.replace(
        options, **{name: value for name, value in given.items() if name in names and value is not None}
    )


def output(what: str) -> Callable[[Command], Command]:
    """Make the option --output, with a help text that says what is written."""
    return click.option("--output", type=click.Path(path_type=Path), help=what)


def extractor_of(opened: Gallery, weights: Path | None, given: dict[str, Any]) -> Extractor:
    """Load the extractor that made a gallery."""
    return load_extractor(opened.spec.name, weights, opened.spec.options(given["batch_size"], given["device"]))


def name_skipped(skipped: Sequence[Skipped]) -> None:
    """Name the inputs that were skipped, on stderr."""
    for item in skipped:
        click.echo(f"spade-faiss: skipped: {item.reason}", err=True)


def exit_status(skipped: Sequence[Skipped]) -> None:
    """End with the exit status of a command that skipped inputs, if any were."""
    if skipped:
        sys.exit(EXIT_SKIPPED)
