"""Commands that change a gallery: build, add, remove, trust, compact, reindex."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args

import click

from ..errors import ImageError
from ..extractors.registry import Extractor, load_extractor
from ..extractors.spec import DEFAULT_EXTRACTOR
from ..gallery.gallery import Gallery
from ..gallery.info import info_of
from ..gallery.reader import GalleryReader
from ..images.sources import ImageFile
from ..index.factory import NAMES
from ..ingest.estimate import estimate
from ..ingest.pipeline import IngestReport, Skipped
from ..options import (
    LEAST_BITS,
    MIB,
    MOST_BITS,
    FeatureOptions,
    IndexOptions,
    Normalisation,
    Patches,
    Precision,
    StoredDtype,
)
from ..recipes import DEFAULT_RECIPE, RECIPES, recipe_named
from ..report.result_folder import write_skipped
from ..store.create import SKIPPED, discard_folder
from . import options as args
from .dataset_options import LabelledFlags, training_images
from .flags import PATH, Bytes, Size, changed, flag, takes
from .info_commands import held, index_line
from .messages import exit_status, name_notes, name_skipped, note, one_line, with_options


@dataclass(frozen=True)
class FeatureFlags:
    """What shapes the features of a new gallery; None: as the recipe says."""

    image_size: Annotated[tuple[int, int] | None, flag("--image-size", type=Size(), help="Resize images to this size.")]
    crop: Annotated[
        tuple[int, int] | None, flag("--crop", type=Size(), help="Use the centre of the resized image, of this size.")
    ]
    levels: Annotated[
        str | None, flag("--levels", help="Names of the pyramid levels, finest first, separated by commas.")
    ]
    normalisation: Annotated[
        str | None,
        flag(
            "--normalisation",
            type=click.Choice(get_args(Normalisation)),
            help="Mean and standard deviation that pixels are normalised with.",
        ),
    ]
    neighbourhood: Annotated[
        int | None, flag("--neighbourhood", type=int, help="Average each level over P x P positions; P is odd.")
    ]
    count_include_pad: Annotated[
        bool | None,
        flag(
            "--count-include-pad/--no-count-include-pad",
            default=None,
            help="Whether that average counts positions beyond the border as zeros.  [default: as the recipe says]",
        ),
    ]
    dtype: Annotated[
        str | None, flag("--dtype", type=click.Choice(get_args(StoredDtype)), help="Number type of the stored levels.")
    ]
    precision: Annotated[
        str | None,
        flag(
            "--precision",
            type=click.Choice(get_args(Precision)),
            help="Number type that the network multiplies in: bfloat16 is faster on some processors, and moves "
            "features by percents.  [default: float32]",
        ),
    ]
    tile: Annotated[
        tuple[int, int] | None,
        flag("--tile", type=Size(), help="Cut larger images into tiles of this size.  [default: see each image whole]"),
    ]
    overlap: Annotated[
        int | None,
        flag(
            "--overlap",
            type=click.IntRange(0),
            metavar="PX",
            help="Pixels that neighbouring tiles share at least.  [default: 1/8 of a tile's shorter side]",
        ),
    ]
    bits: Annotated[
        int | None,
        flag(
            "--bits",
            type=click.IntRange(LEAST_BITS, MOST_BITS),
            metavar="N",
            help="Take images of 16 bits a value that do not say so themselves for N bits, as cameras store 10 or 12.  "
            "[default: 16]",
        ),
    ]

    def options(self, recipe: FeatureOptions, network: args.NetworkFlags) -> FeatureOptions:
        """Return a recipe's options with these in place of its own."""
        return changed(
            recipe,
            image_size=self.image_size,
            crop=self.crop,
            levels=None if self.levels is None else tuple(part.strip() for part in self.levels.split(",")),
            normalisation=self.normalisation,
            neighbourhood=self.neighbourhood,
            count_include_pad=self.count_include_pad,
            dtype=self.dtype,
            bits=self.bits,
            tile=self.tile,
            overlap=self.overlap,
            batch_size=network.batch_size,
            device=network.device,
            runtime=network.runtime,
            precision=self.precision,
        )


@dataclass(frozen=True)
class IndexFlags:
    """How the image index is built; where it is rebuilt, what is not given stays as it is."""

    recall: Annotated[
        float | None,
        flag(
            "--recall",
            type=float,
            help="Share of the nearest images that the index must find.  [default: 0.99; rebuilt: as is]",
        ),
    ]
    memory: Annotated[
        int | None,
        flag(
            "--memory",
            type=Bytes(),
            help="Memory limit of the image index, e.g. 4GB.  [default: half of this machine's; rebuilt: as is]",
        ),
    ]
    nlist: Annotated[
        int | None,
        flag("--nlist", type=int, help="IVF: number of lists.  [default: from the number of images; rebuilt: as is]"),
    ]
    nprobe: Annotated[
        int | None,
        flag(
            "--nprobe",
            type=int,
            help="IVF: number of lists that a search visits.  [default: as many as the recall needs; rebuilt: as is]",
        ),
    ]
    train_images: Annotated[
        int | None,
        flag(
            "--train-images",
            type=int,
            help="IVF: number of training images.  [default: from nlist; rebuilt: as is]",
        ),
    ]

    def check(self, kind: str | None) -> None:
        """Raise a usage error if a kind of index names another number of lists than --nlist."""
        named = re.search(r"IVF(\d+)", kind or "")
        if named and self.nlist not in (None, int(named[1])):
            raise click.UsageError(
                f"--nlist: expected none, as --index {kind} has {named[1]} lists, found {self.nlist}"
            )


@dataclass(frozen=True)
class BuildFlags:
    """Options of `build`."""

    dataset: Annotated[
        Path | None,
        flag("--dataset", type=PATH, help="Take the training images of this labelled set, as `evaluate` reads it."),
    ]
    labelled: LabelledFlags
    extractor: Annotated[
        str,
        flag(
            "--extractor",
            default=DEFAULT_EXTRACTOR,
            show_default=True,
            help=f"Extract features with {DEFAULT_EXTRACTOR}, wide_resnet50_2, a ResNet, timm:NAME or toy.",
        ),
    ]
    recipe: Annotated[
        str,
        flag(
            "--recipe",
            type=click.Choice(list(RECIPES)),
            default=DEFAULT_RECIPE,
            show_default=True,
            help="Named set of options for features and queries. `info` prints it.",
        ),
    ]
    features: FeatureFlags
    patches: Annotated[
        Patches | None,
        flag(
            "--patches",
            type=click.Choice(get_args(Patches)),
            help="Store the patches of every image, or recompute those that a query needs from the image files: far "
            "less disk, slower queries.  [default: stored]",
        ),
    ]
    index: Annotated[
        str,
        flag(
            "--index",
            default="auto",
            show_default=True,
            help=f"Index of the image features: auto, {', '.join(NAMES)}, or a FAISS factory string.",
        ),
    ]
    index_options: IndexFlags
    network: args.NetworkFlags
    ingest: args.IngestFlags


@click.command()
@args.gallery
@click.argument("sources", type=PATH, nargs=-1)
@takes(BuildFlags)
def build(gallery: Path, sources: tuple[Path, ...], flags: BuildFlags) -> None:
    """Create GALLERY from the normal images in SOURCE..., files and folders.

    Or from the training images of a labelled set. Pass `build` and `evaluate` the same options. For several categories
    put {category} into GALLERY; each gets its own. Run again, `build` continues where it was stopped.
    """
    flags.index_options.check(flags.index)
    flags.ingest.check()
    options = flags.features.options(recipe_named(flags.recipe).features, flags.network)
    galleries = training_images(gallery, sources, flags.dataset, flags.labelled)
    extractor = load_extractor(flags.extractor, flags.network.weights, options)
    skipped = [item for path, images in galleries.items() for item in _build(path, images, extractor, flags)]
    exit_status(skipped)


def _build(path: Path, images: Sequence[ImageFile], extractor: Extractor, flags: BuildFlags) -> list[Skipped]:
    """Create a gallery, or continue with it; returns the images that were skipped."""
    index = changed(IndexOptions(flags.index), **vars(flags.index_options))
    opened = Gallery.open_or_create(
        path, extractor.spec, index, recipe=flags.recipe, patches=flags.patches, timeout=flags.ingest.wait
    )
    try:
        with opened:
            if not flags.ingest.quiet:
                need = estimate(images, extractor, path, opened.patches, flags.ingest.workers or 1)
                click.echo(f"this will need: {with_options(need)}", err=True)
                if need.disk_bytes > need.free_bytes:
                    note("that is more than is free on that disk")
            return _add(opened, images, extractor, flags.ingest)
    finally:
        if opened.created:
            discard_folder(path)  # if nothing could be taken: leave nothing behind


@dataclass(frozen=True)
class AddFlags:
    """Options of `add`."""

    network: args.NetworkFlags
    ingest: args.IngestFlags


@click.command()
@args.gallery
@args.sources
@takes(AddFlags)
def add(gallery: Path, sources: tuple[Path, ...], flags: AddFlags) -> None:
    """Add the normal images in SOURCE..., files and folders, to GALLERY."""
    flags.ingest.check()
    with Gallery.open(gallery) as opened:
        exit_status(_add(opened, sources, flags.network.extractor_of(opened), flags.ingest))


def _add(
    gallery: Gallery, sources: Sequence[Path | ImageFile], extractor: Extractor, flags: args.IngestFlags
) -> list[Skipped]:
    """Take images into a gallery and say what became of them; returns those that were skipped."""
    report: IngestReport = gallery.add_images(
        sources,
        extractor,
        replace=flags.replace,
        strict=flags.strict,
        progress=not flags.quiet,
        workers=flags.machines(),
        timeout=flags.wait,
    )
    print_added(gallery, report)
    if report.added and not flags.quiet:
        click.echo(f"index: {_index_line(gallery)}", err=True)
    skipped = [Skipped(item.path, with_options(item.reason)) for item in report.skipped]
    write_skipped(gallery.path / SKIPPED, skipped)
    name_skipped(skipped)
    if not flags.quiet:
        name_notes(report.notes)
    if not len(gallery):
        raise ImageError(f"{gallery.path}: expected at least one image that can be read, found none")
    return skipped


def print_added(gallery: GalleryReader, report: IngestReport) -> None:
    """Print what became of the images of a run."""
    known = {0: "", 1: ", 1 copy of another image", None: ", copies not counted"}
    copies = known.get(report.copies, f", {report.copies} copies of other images")
    taken = f"{report.added} added ({report.replaced} replaced{copies}), {report.unchanged} unchanged"
    rate, where = report.added / max(report.seconds, 1e-9), one_line(gallery.path)
    click.echo(f"{taken}, {len(report.skipped)} skipped; {held(gallery)} in {where}; {rate:.1f} images/s")


@click.command()
@args.gallery
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
@takes(args.WriteFlags)
def remove(gallery: Path, keys: tuple[str, ...], flags: args.WriteFlags) -> None:
    """Remove images from GALLERY by key. `compact` then frees their space."""
    with Gallery.open(gallery) as opened:
        opened.remove(keys, flags.wait)
        click.echo(f"{len(set(keys))} removed; {held(opened)} in {one_line(gallery)}")


@click.command()
@args.gallery
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
@click.option("--no-longer", is_flag=True, help="Take these images for ordinary ones again.")
def trust(gallery: Path, keys: tuple[str, ...], no_longer: bool) -> None:
    """Mark images of GALLERY, by key, that a person has looked at and confirmed as normal.

    A trusted image excuses its like by itself, where a recipe otherwise wants several normal images of a kind.
    """
    with Gallery.open(gallery) as opened:
        opened.distrust(keys) if no_longer else opened.trust(keys)
        click.echo(f"{len(opened.trusted())} of {held(opened)} trusted in {one_line(gallery)}")


@click.command()
@args.gallery
@takes(args.WriteFlags)
def compact(gallery: Path, flags: args.WriteFlags) -> None:
    """Rewrite the shards of GALLERY that hold removed images or are small."""
    with Gallery.open(gallery) as opened:
        saved = opened.compact(flags.wait)
        shards = len(opened.snapshot().manifest.shards)
        click.echo(f"{saved / MIB:.1f} MiB saved; {held(opened)} in {shards} shards")


@dataclass(frozen=True)
class ReindexFlags:
    """Options of `reindex`."""

    kind: Annotated[
        str | None, flag("--index", help="Change to this kind of index, as for `build`.  [default: as it is]")
    ]
    index: IndexFlags
    wait: args.Wait


@click.command()
@args.gallery
@takes(ReindexFlags)
def reindex(gallery: Path, flags: ReindexFlags) -> None:
    """Rebuild the image index of GALLERY, while others go on using the old one.

    If `info` reports the index as outgrown, run `reindex`.
    """
    flags.index.check(flags.kind)
    with Gallery.open(gallery) as opened:
        opened.reindex(flags.kind, flags.wait, **vars(flags.index))
        click.echo(_index_line(opened))


def _index_line(gallery: Gallery) -> str:
    """Return the line about a gallery's index, without the pass over all images that info takes for copies."""
    return index_line(info_of(gallery.path, gallery.snapshot().manifest)["index"], gallery.index_state())
