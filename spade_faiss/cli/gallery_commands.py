"""Commands that make and keep galleries: build, add, remove, compact, reindex, info, verify."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import click

from ..errors import GalleryError, ImageError, OptionError
from ..extractors.registry import Extractor, load_extractor
from ..extractors.spec import DEFAULT_EXTRACTOR
from ..gallery.gallery import Gallery
from ..gallery.repair import Repair
from ..images.sources import ImageFile
from ..index.factory import NAMES
from ..ingest.estimate import estimate
from ..ingest.pipeline import IngestReport, Skipped
from ..options import MIB, IndexOptions, Patches
from ..recipes import DEFAULT_RECIPE, RECIPES, recipe_named
from ..report.result_folder import write_skipped
from ..store.create import SKIPPED, discard_folder
from ..store.secondary_indexes import IndexState
from . import options as args
from .dataset_options import labelled, training_images


@click.command()
@args.gallery
@click.argument("sources", type=click.Path(path_type=Path), nargs=-1)
@click.option(
    "--dataset", type=click.Path(path_type=Path), help="Take the training images of this labelled set, for `evaluate`."
)
@labelled
@click.option(
    "--extractor", default=DEFAULT_EXTRACTOR, show_default=True, help="Or wide_resnet50_2, a ResNet, timm:NAME, toy."
)
@click.option(
    "--recipe",
    type=click.Choice(list(RECIPES)),
    default=DEFAULT_RECIPE,
    show_default=True,
    help="A named set of options, for features and queries; `info` prints it.",
)
@click.option("--image-size", type=args.Size(), help="Images are resized to this.")
@click.option("--crop", type=args.Size(), help="The centre of the resized image is used.")
@click.option("--levels", help="Pyramid levels by name, finest first, by commas.")
@click.option("--normalisation", type=click.Choice(["imagenet", "trained"]), help="Mean and std of the pixels.")
@click.option("--neighbourhood", type=int, help="Average each level over P x P, odd.")
@click.option("--dtype", type=click.Choice(["float16", "float32"]), help="Of the stored levels.")
@click.option(
    "--patches",
    type=click.Choice(get_args(Patches)),
    help="Keep the patches of every image, or recompute those that a query needs from the image files: far less disk, "
    "slower queries.  [default: stored]",
)
@click.option(
    "--index",
    default="auto",
    show_default=True,
    help=f"Of the image features: auto, {', '.join(NAMES)}, or a FAISS factory string.",
)
@args.index
@args.network
@args.workers
@args.wait
@args.replace
@args.strict
@args.quiet
def build(
    gallery: Path, sources: tuple[Path, ...], dataset: Path | None, extractor: str, weights: Path | None, **given: Any
) -> None:
    """Make GALLERY from the normal images in SOURCE..., files and folders.

    Or from the training images of a labelled set, named as for `evaluate`; with several categories GALLERY has
    {category} in it, and each gets its own. Run again, it goes on from where it was stopped.
    """
    given["levels"] = tuple(part.strip() for part in given["levels"].split(",")) if given["levels"] else None
    options = args.replaced(recipe_named(given["recipe"]).features, given)
    galleries = training_images(gallery, sources, dataset, given)
    loaded = load_extractor(extractor, weights, options)
    index = args.replaced(IndexOptions(given["index"]), given | {"device": None})
    skipped = [item for path, images in galleries.items() for item in _build(path, images, loaded, index, given)]
    args.exit_status(skipped)


def _build(
    gallery: Path, images: Sequence[ImageFile], extractor: Extractor, index: IndexOptions, given: dict[str, Any]
) -> list[Skipped]:
    """Make a gallery, or go on with it; returns the images that were skipped."""
    new = not (gallery / "gallery.json").exists()
    if new:
        patches: Patches = given["patches"] or "stored"
        try:
            opened = Gallery.create(
                gallery, extractor.spec, index, recipe=given["recipe"], patches=patches, timeout=given["wait"]
            )
        except GalleryError:
            new = not (gallery / "gallery.json").exists()
            if new:
                raise
    if not new:  # or no longer: another process has just made it
        opened = Gallery.open(gallery)
        opened.spec.require(extractor.spec, str(gallery))
        if opened.recipe != recipe_named(given["recipe"]):
            made = opened.recipe.name if opened.recipe else "none"
            raise OptionError(f"{gallery}: expected its own recipe, {made}, found {given['recipe']}")
        if given["patches"] not in (None, opened.patches):
            raise OptionError(f"{gallery}: expected patches as it has them, {opened.patches}, found {given['patches']}")
    try:
        with opened:
            if not given["quiet"]:
                need = estimate(images, extractor, gallery, opened.patches, given["workers"])
                click.echo(f"this will need: {need}", err=True)
                if need.disk_bytes > need.free_bytes:
                    click.echo("spade-faiss: note: that is more than is free on that disk", err=True)
            return _add(opened, images, extractor, given)
    finally:
        if new:
            discard_folder(gallery)  # nothing could be taken: leave nothing behind


@click.command()
@args.gallery
@args.sources
@args.network
@args.workers
@args.wait
@args.replace
@args.strict
@args.quiet
def add(gallery: Path, sources: tuple[Path, ...], weights: Path | None, **given: Any) -> None:
    """Add the normal images in SOURCE... to GALLERY."""
    with Gallery.open(gallery) as opened:
        args.exit_status(_add(opened, sources, args.extractor_of(opened, weights, given), given))


@click.command()
@args.gallery
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
@args.wait
def remove(gallery: Path, keys: tuple[str, ...], wait: float) -> None:
    """Remove images from GALLERY by key; `compact` then gives back their space."""
    with Gallery.open(gallery) as opened:
        opened.remove(keys, wait)
        click.echo(f"{len(set(keys))} removed; {len(opened)} images in {gallery}")


@click.command()
@args.gallery
@args.wait
def compact(gallery: Path, wait: float) -> None:
    """Rewrite the shards of GALLERY that hold removed images or are small."""
    with Gallery.open(gallery) as opened:
        saved = opened.compact(wait)
        click.echo(f"{saved / MIB:.1f} MiB saved; {len(opened)} images in {opened.info()['shards']} shards")


@click.command()
@args.gallery
@click.option("--index", "kind", help="Another kind, as for `build`.  [default: as it is]")
@args.index
@args.wait
def reindex(gallery: Path, wait: float, **given: Any) -> None:
    """Build the image index of GALLERY anew, for what it holds now, while others go on using the old one."""
    with Gallery.open(gallery) as opened:
        state = opened.reindex(timeout=wait, **given)
        click.echo(_index(opened.info()["index"], state))


def _index(facts: dict[str, Any], state: IndexState) -> str:
    return f"{facts['kind']}: {state}" + (f" ({facts['reason']})" if facts["file"] else "")


@click.command()
@args.gallery
@args.as_json_lines
def info(gallery: Path, as_lines: bool) -> None:
    """Tell what GALLERY holds."""
    with Gallery.open(gallery) as opened:
        facts, state = opened.info(), opened.index_state()
    if as_lines:
        click.echo(json.dumps(facts))
        return
    spec = facts["extractor"]
    size = "own features" if spec["resized"] is None else f"{_by(spec['resized'])} px, crop {_by(spec['crop'])}"
    levels = ", ".join("x".join(map(str, shape)) for shape in spec["level_shapes"])
    for name, value in (
        ("gallery", f"{facts['path']}, generation {facts['generation']}, made by {facts['created_by']}"),
        ("images", f"{facts['images']} ({facts['removed']} removed and not yet compacted)"),
        ("on disk", f"{facts['bytes'] / MIB:.1f} MiB in {facts['shards']} shards"),
        ("patches", _patches(facts)),
        ("extractor", f"{spec['name']}, {size}, neighbourhood {spec['neighbourhood']}"),
        ("levels", f"{levels} {spec['dtype']}; image feature {spec['image_dim']}"),
        ("weights", f"{spec['weights'] or 'as published'}, SHA-256 {spec['weights_sha256'][:16] or '-'}"),
        ("recipe", _recipe(facts["recipe"])),
        ("index", _index(facts["index"], state)),
    ):
        click.echo(f"{name:10} {value}")


@click.command()
@args.gallery
@click.option(
    "--repair", is_flag=True, help="Build index and key table anew, and extract damaged images from their files."
)
@click.option(
    "--drop-unreadable", is_flag=True, help="With --repair: take out images and shards that cannot be repaired."
)
@click.option(
    "--files/--no-files", default=True, help="Where patches are recomputed, read the image files too.  [default: yes]"
)
@args.originals
@args.network
@args.as_json_lines
def verify(
    gallery: Path,
    repair: bool,
    drop_unreadable: bool,
    files: bool,
    normal: tuple[Path, ...],
    weights: Path | None,
    as_lines: bool,
    **given: Any,
) -> None:
    """Read all of GALLERY and check it against what was written.

    --repair takes damaged images anew from --normal DIR, or from where a gallery keeps that its files are.
    """
    if drop_unreadable and not repair:
        raise click.UsageError("--drop-unreadable goes with --repair")
    with Gallery.open(gallery) as opened:
        problems = opened.verify(files, normal)
        if repair and problems:
            from_files = opened.spec.resized and (normal or opened.patches == "recompute")
            images = from_files and any(problem.key is not None for problem in problems)
            extractor = args.extractor_of(opened, weights, given) if images else None
            _tell(opened.repair(extractor, normal, drop_unreadable))
            problems = opened.verify(files, normal)
            if problems:
                click.echo(
                    "what is left needs the images' files (--normal DIR), or --drop-unreadable and then `add`", err=True
                )
        if as_lines:
            found = [{"file": problem.file, "key": problem.key, "what": problem.what} for problem in problems]
            click.echo(json.dumps({"images": len(opened), "problems": found}))
        else:
            for problem in problems:
                click.echo(f"{problem.key or problem.file}: {problem.what}")
            click.echo(f"{len(opened)} images checked, {len(problems)} problems")
    if problems:
        sys.exit(1)


def _tell(done: Repair) -> None:
    if done.extracted:
        click.echo(f"{len(done.extracted)} images extracted anew: {', '.join(done.extracted)}", err=True)
    if done.dropped:
        click.echo(f"{done.dropped_images} images taken out, `add` them again: {', '.join(done.dropped)}", err=True)
    if done.derived:
        click.echo("image index and key table built anew", err=True)


def _patches(facts: dict[str, Any]) -> str:
    sizes = {patches: f"{size / 1000:.1f} kB an image" for patches, size in facts["bytes_per_image_if"].items()}
    if facts["patches"] == "stored":
        return f"stored, {sizes['stored']}; recomputed at each query they would take {sizes['recompute']}"
    return (
        f"recomputed from the image files, {sizes['recompute']}; stored they would take {sizes['stored']}, "
        "and a query would not extract its K neighbours"
    )


def _recipe(recipe: dict[str, Any] | None) -> str:
    if recipe is None:
        return "none: the options' own defaults"
    values = {**recipe["features"], **recipe["search"], **recipe["score"]}
    options = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())
    return f"{recipe['name']}: {recipe['what']} ({options or 'all defaults'})"


def _by(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def _add(
    gallery: Gallery, sources: Sequence[Path | ImageFile], extractor: Extractor, given: dict[str, Any]
) -> list[Skipped]:
    report: IngestReport = gallery.add_images(
        sources,
        extractor,
        replace=given["replace"],
        strict=given["strict"],
        progress=not given["quiet"],
        workers=given["workers"],
        timeout=given["wait"],
    )
    taken = f"{report.added} added ({report.replaced} replaced), {report.unchanged} unchanged"
    rate = report.added / max(report.seconds, 1e-9)
    click.echo(f"{taken}, {len(report.skipped)} skipped; {len(gallery)} images in {gallery.path}; {rate:.1f} images/s")
    if report.added and not given["quiet"]:
        click.echo(f"index: {_index(gallery.info()['index'], gallery.index_state())}", err=True)
    write_skipped(gallery.path / SKIPPED, report.skipped)
    args.name_skipped(report.skipped)
    if not len(gallery):
        raise ImageError(f"{gallery.path}: expected at least one image that can be read, found none")
    return report.skipped
