"""The command `export-backbone`: a gallery's network for other programs."""

from __future__ import annotations

from pathlib import Path

import click

from ..gallery.gallery import Gallery
from . import options as args
from .flags import PATH
from .messages import one_line


@click.command("export-backbone")
@args.gallery_to_read
@click.argument("output", type=PATH, metavar="FILE")
@click.option("--weights", type=PATH, help="Load the network's weights from this file.")
def export_backbone(gallery: Path, output: Path, weights: Path | None) -> None:
    """Write the network of GALLERY to FILE, for other programs: .onnx, or .xml for OpenVINO.

    It takes views of uint8 RGB, (n, height, width, 3), resized and cropped as `info` says. It gives the image feature
    and each level in float32.
    """
    from ..extractors.export import export_backbone as export

    with Gallery.open(gallery) as opened:
        extractor = opened.load_extractor(weights, device="cpu", runtime="torch")
        names = export(extractor, output)
    click.echo(f"{one_line(output)}: views {'x'.join(map(str, extractor.spec.view.crop))}x3 to {', '.join(names)}")
