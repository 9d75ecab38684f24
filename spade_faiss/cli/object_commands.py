"""Commands that copy a gallery to an object store and back: push, pull."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import click

from ..errors import OptionError
from ..object_store.address import is_address
from ..object_store.pull import pull as pull_gallery
from ..object_store.push import push as push_gallery
from ..options import MIB
from . import options as args
from .flags import PATH, flag, takes
from .messages import one_line


@dataclass(frozen=True)
class PushFlags:
    """Options of `push`."""

    replace: Annotated[
        bool,
        flag("--replace", is_flag=True, help="Replace whatever is there, even if another folder has pushed it."),
    ]
    check: Annotated[
        bool,
        flag(
            "--check",
            is_flag=True,
            help="Read every object that is there already, and upload those whose content is not what it should be.",
        ),
    ]
    sweep: Annotated[
        bool,
        flag(
            "--sweep",
            is_flag=True,
            help="Delete the objects that the new generation does not name. Readers of older ones lose them.",
        ),
    ]
    as_json: args.AsJson
    quiet: args.Quiet


@click.command()
@args.gallery
@click.argument("url")
@takes(PushFlags)
def push(gallery: Path, url: str, flags: PushFlags) -> None:
    """Upload GALLERY to an object store, as URL s3://bucket/tiles.gallery.

    Readers see the old generation until the new one is complete. After an interruption the same command goes on. A
    push replaces only what this GALLERY has pushed or pulled last.
    """
    done = push_gallery(
        gallery, _address(url), replace=flags.replace, check=flags.check, sweep=flags.sweep, progress=not flags.quiet
    )
    if flags.as_json:
        click.echo(json.dumps({"url": url, **asdict(done)}))
        return
    click.echo(
        f"generation {done.generation} in {one_line(url)}: {done.uploaded} objects uploaded "
        f"({done.uploaded_bytes / MIB:.1f} MiB), {done.kept} there already, {done.swept} swept"
    )


@dataclass(frozen=True)
class PullFlags:
    """Options of `pull`."""

    wait: args.Wait
    as_json: args.AsJson
    quiet: args.Quiet


@click.command()
@click.argument("url")
@click.argument("gallery", type=PATH)
@takes(PullFlags)
def pull(url: str, gallery: Path, flags: PullFlags) -> None:
    """Download the gallery at URL, as s3://bucket/tiles.gallery, to the folder GALLERY, or bring GALLERY up to date.

    After an interruption the same command goes on.
    """
    done = pull_gallery(_address(url), gallery, timeout=flags.wait, progress=not flags.quiet)
    if flags.as_json:
        click.echo(json.dumps({"url": url, **asdict(done)}))
        return
    click.echo(
        f"generation {done.generation} in {one_line(gallery)}: {done.fetched} files downloaded "
        f"({done.fetched_bytes / MIB:.1f} MiB), {done.kept} there already"
    )


def _address(url: str) -> str:
    if not is_address(url):
        raise OptionError(f"url: expected an address, as s3://bucket/tiles.gallery, found {url!r}")
    return url
