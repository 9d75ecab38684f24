"""Commands that look at a gallery: info, verify."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import click

from ..gallery.reader import GalleryReader
from ..gallery.repair import Repair
from ..gallery.verify import Problem
from ..images.tiling import shared
from ..object_store.address import refuse_address
from ..options import MIB
from ..store.secondary_indexes import IndexState
from . import options as args
from .cache_options import CacheFlags
from .device_info import print_devices
from .flags import flag, require_folders, takes
from .messages import one_line, with_options, without_repair


@dataclass(frozen=True)
class InfoFlags:
    """Options of `info`."""

    cache: CacheFlags
    as_json: args.AsJson
    device: Annotated[
        bool,
        flag("--device", is_flag=True, help="Print which GPUs torch and FAISS see, and where `auto` puts each stage."),
    ]


@click.command()
@args.gallery_if_any
@takes(InfoFlags)
def info(gallery: Path | None, flags: InfoFlags) -> None:
    """Print what GALLERY holds or, with --device, which GPUs there are."""
    if gallery is None:
        if not flags.device:
            raise click.UsageError("expected GALLERY or --device")
        print_devices(None, flags.as_json)
        return
    with flags.cache.open(gallery) as opened:
        if flags.device:
            print_devices(opened, flags.as_json)
            return
        facts, state = opened.info(), opened.index_state()
    if flags.as_json:
        click.echo(json.dumps(facts))
        return
    spec = facts["extractor"]
    size = "own features" if spec["resized"] is None else f"{_by(spec['resized'])} px, crop {_by(spec['crop'])}"
    levels = ", ".join("x".join(map(str, shape)) for shape in spec["level_shapes"])
    weights = spec.get("weights_path") or spec["weights"] or "as published"
    for name, value in (
        ("gallery", f"{facts['path']}, generation {facts['generation']}, made by {facts['created_by']}"),
        (
            _rows(spec),
            f"{facts['images']} ({facts['removed']} removed and not yet compacted), {_copies(facts['copies'])}",
        ),
        ("trusted", f"{facts['trusted']} of them, which a person has confirmed" if facts["trusted"] else ""),
        ("on disk", f"{facts['bytes'] / MIB:.1f} MiB in {facts['shards']} shards"),
        ("patches", _patches(facts)),
        ("extractor", f"{spec['name']}, {size}, neighbourhood {spec['neighbourhood']}"),
        ("tiling", _tiling(spec)),
        ("levels", f"{levels} {spec['dtype']}; image feature {spec['image_dim']}"),
        ("weights", f"{weights}, SHA-256 {spec['weights_sha256'][:16] or '-'}"),
        ("recipe", _recipe(facts["recipe"])),
        ("index", index_line(facts["index"], state)),
    ):
        if value:
            click.echo(f"{name:10} {one_line(value)}")


def _rows(spec: dict[str, Any]) -> str:
    return "tiles" if spec.get("tile") else "images"


def _tiling(spec: dict[str, Any]) -> str:
    if not spec.get("tile"):
        return ""
    return (
        f"larger images in tiles of {_by(spec['tile'])} px, which share {shared(spec['tile'], spec.get('overlap'))} px"
    )


def held(gallery: GalleryReader) -> str:
    """Return how many images a gallery holds, or tiles of them, in words."""
    return f"{len(gallery)} {_rows(gallery.spec.to_json())}"


def _copies(copies: int | None) -> str:
    if copies is None:
        return "copies not counted"
    return f"{copies} of them {'a copy of another' if copies == 1 else 'copies of others'}" if copies else "no copies"


def _by(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


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


def index_line(facts: dict[str, Any], state: IndexState) -> str:
    """Return the kind and the state of an image index, and why that kind was chosen."""
    return f"{facts['kind']}: {state}" + (f" (when it was made: {facts['reason']})" if facts["file"] else "")


@dataclass(frozen=True)
class VerifyFlags:
    """Options of `verify`."""

    repair: Annotated[
        bool,
        flag(
            "--repair",
            is_flag=True,
            help="Rebuild image index and key table, and re-extract damaged images from their files.",
        ),
    ]
    drop_unreadable: Annotated[
        bool,
        flag(
            "--drop-unreadable",
            is_flag=True,
            help="With --repair, remove the images and shards that cannot be repaired.",
        ),
    ]
    files: args.Files
    normal: args.Normal
    network: args.NetworkFlags
    cache: CacheFlags
    as_json: args.AsJson


@click.command()
@args.gallery_to_read
@takes(VerifyFlags)
def verify(gallery: Path, flags: VerifyFlags) -> None:
    """Read all of GALLERY and compare it with what was written.

    --repair re-extracts damaged images from the files in --normal DIR, or from where GALLERY keeps that they are.
    """
    if flags.drop_unreadable and not flags.repair:
        raise click.UsageError("--drop-unreadable goes with --repair")
    if flags.repair:
        refuse_address(gallery)
    require_folders(flags.normal)
    with flags.cache.open(gallery) as opened:
        args.check_normal(opened, flags.normal, flags.repair, quiet=False)
        problems = opened.verify(flags.files, flags.normal)
        if flags.repair and problems:
            needs = opened.needs_extractor(problems, flags.normal)
            extractor = flags.network.extractor_of(opened) if needs else None
            _print_repair(opened.repair(extractor, flags.normal, flags.drop_unreadable))
            problems = opened.verify(flags.files, flags.normal)
            if any(problem.is_of_images for problem in problems):
                click.echo(
                    "what is left needs the images' files (--normal DIR), or --drop-unreadable and then `add`", err=True
                )
        print_problems(len(opened), problems, flags.as_json)
    if problems:
        sys.exit(1)


def _print_repair(done: Repair) -> None:
    if done.extracted:
        click.echo(f"{len(done.extracted)} images re-extracted: {one_line(', '.join(done.extracted))}", err=True)
    if done.dropped:
        click.echo(
            f"{done.dropped_images} images removed, `add` them again: {one_line(', '.join(done.dropped))}", err=True
        )
    if done.derived:
        click.echo("image index and key table rebuilt", err=True)


def print_problems(images: int, problems: Sequence[Problem], as_json: bool) -> None:
    """Print what verify has found."""
    messages = [with_options(without_repair(problem.message)) for problem in problems]
    if as_json:
        found = [
            {"file": problem.file, "key": problem.key, "what": message}
            for problem, message in zip(problems, messages, strict=True)
        ]
        click.echo(json.dumps({"images": images, "problems": found}))
        return
    for problem, message in zip(problems, messages, strict=True):
        click.echo(f"{one_line(problem.key or problem.file)}: {message}")
    click.echo(f"{images} images checked, {len(problems)} problems")
