"""The command `serve`: galleries over HTTP, and the page for the person at the line."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import click

from ..errors import OptionError
from ..options import FeatureOptions
from . import options as args
from .flags import PATH, Bytes, Seconds, flag, require_folders, takes

TOKEN = "SPADE_FAISS_TOKEN"


@dataclass(frozen=True)
class AddressFlags:
    """Where the service listens, and who may call."""

    host: Annotated[
        str,
        flag(
            "--host",
            default="127.0.0.1",
            show_default=True,
            help="Listen at this address. One that others can reach needs a token.",
        ),
    ]
    port: Annotated[int, flag("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port.")]
    allowed_host: Annotated[
        tuple[str, ...],
        flag("--allowed-host", multiple=True, metavar="NAME", help="Answer under this name too. May be given again."),
    ]
    tokens: Annotated[
        Path | None,
        flag(
            "--tokens",
            type=PATH,
            metavar="FILE",
            help="Take only requests with a token of FILE: a line NAME SCOPE TOKEN each, scope read, inspect or "
            f"curate. The environment variable {TOKEN} is one more, which may do everything.",
        ),
    ]


@dataclass(frozen=True)
class BoundFlags:
    """Within which bounds the service works."""

    queue: Annotated[
        int,
        flag("--queue", type=click.IntRange(1), default=32, show_default=True, help="Number of images that may wait."),
    ]
    deadline: Annotated[
        float,
        flag(
            "--deadline",
            type=Seconds(positive=True),
            default=30,
            show_default=True,
            metavar="SECONDS",
            help="Refuse an image that has waited longer than this.",
        ),
    ]
    max_body: Annotated[
        int, flag("--max-body", type=Bytes(), default="64MiB", show_default=True, help="Size limit of a request.")
    ]
    max_image_pixels: Annotated[
        int,
        flag(
            "--max-image-pixels",
            type=click.IntRange(1),
            default=64_000_000,
            show_default=True,
            metavar="N",
            help="Decode images of up to N pixels.",
        ),
    ]
    loaded: Annotated[
        int,
        flag("--loaded", type=click.IntRange(1), default=4, show_default=True, help="Number of galleries in memory."),
    ]
    kept: Annotated[
        int,
        flag(
            "--kept",
            type=click.IntRange(1),
            default=2000,
            show_default=True,
            help="Number of inspections whose pictures and maps are kept.",
        ),
    ]


@dataclass(frozen=True)
class SourceFlags:
    """Where images come from beside requests, and where results go."""

    watch: Annotated[
        tuple[Path, ...],
        flag("--watch", type=PATH, multiple=True, metavar="DIR", help="Inspect the images that arrive in this folder."),
    ]
    label_files: Annotated[
        Path | None,
        flag(
            "--label-files",
            type=PATH,
            metavar="DIR",
            help="Root of Label Studio's local files, which its tasks may name.",
        ),
    ]
    webhook: Annotated[str | None, flag("--webhook", metavar="URL", help="Post each result to this URL, as JSON.")]
    mqtt: Annotated[
        str | None, flag("--mqtt", metavar="mqtt://HOST[:PORT]/TOPIC", help="Publish each result to this topic.")
    ]


@dataclass(frozen=True)
class ServeFlags:
    """Options of `serve`."""

    address: AddressFlags
    data: Annotated[
        Path,
        flag(
            "--data",
            type=PATH,
            default=Path("spade-service"),
            show_default=True,
            help="Keep the log and the added images in this folder.",
        ),
    ]
    normal: args.Normal
    bounds: BoundFlags
    sources: SourceFlags
    no_recalibrate: Annotated[
        bool, flag("--no-recalibrate", is_flag=True, help="Do not calibrate again where the normal set has changed.")
    ]
    weights: Annotated[Path | None, flag("--weights", type=PATH, help="Load the network's weights from this file.")]
    batch_size: Annotated[
        int,
        flag(
            "--batch-size",
            type=click.IntRange(1),
            default=FeatureOptions.batch_size,
            show_default=True,
            help="Images in one pass through the network.",
        ),
    ]
    device: Annotated[str, flag("--device", default="auto", show_default=True, help="Run on this device.")]


@click.command()
@click.argument("galleries", nargs=-1, required=True, metavar="[NAME=]GALLERY...")
@takes(ServeFlags)
def serve(galleries: tuple[str, ...], flags: ServeFlags) -> None:
    """Serve GALLERY... over HTTP: images in, verdicts out, and a page for the person at the line.

    The page is at http://127.0.0.1:8000/, and /openapi.json describes what programs may ask.
    """
    try:
        from ..service.server import run
        from ..service.settings import ServiceSettings, named_galleries
    except ModuleNotFoundError as error:
        raise OptionError(
            f"serve: expected the package {error.name}, found none; pip install 'spade-faiss[service]'"
        ) from error

    require_folders(flags.normal)
    address, bounds, sources = flags.address, flags.bounds, flags.sources
    token = os.environ.get(TOKEN)
    settings = ServiceSettings(
        named_galleries(galleries),
        data=flags.data,
        normal=flags.normal,
        host=address.host,
        port=address.port,
        allowed_hosts=address.allowed_host,
        tokens=address.tokens,
        queue=bounds.queue,
        deadline=bounds.deadline,
        body_bytes=bounds.max_body,
        pixels=bounds.max_image_pixels,
        loaded=bounds.loaded,
        kept=bounds.kept,
        batch_size=flags.batch_size,
        device=flags.device,
        weights=flags.weights,
        recalibrate=not flags.no_recalibrate,
        watch=sources.watch,
        label_files=sources.label_files,
        webhook=sources.webhook,
        mqtt=sources.mqtt,
        extra={} if token is None else {TOKEN: token},
    )
    run(settings)
