"""The demo: the sample images, a gallery of the normal ones, and a page with what was found in the others."""

from __future__ import annotations

import base64
import html
import io
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .detection import Detection
from .detector import Detector
from .errors import ImageError
from .features import load_extractor
from .gallery import Gallery
from .images import Pixels, Source, decode
from .ingest import Skipped
from .manifest import FILE
from .options import SearchOptions
from .results import ResultFolder, colour_scale, query_sources
from .storage import storage_errors, write_whole
from .visual import Scale, outline, overlay

K = 10  # of 40 sample images: enough to cover their variety, few enough that likeness still tells


def sample_folder() -> Path:
    """Return the folder of the sample set: beside the package in a checkout, inside it when installed from a wheel."""
    here = Path(__file__).parent
    for folder in (here / "samples", here.parent / "data" / "samples"):
        if (folder / "train" / "good").is_dir():
            return folder
    raise ImageError(
        f"{here / 'samples'}: expected the sample images of the demo, found none; install spade-faiss again"
    )


@dataclass(frozen=True)
class _Card:
    """What the page shows of one test image."""

    source: Source
    pixels: Pixels
    mask: NDArray[np.bool_] | None
    detection: Detection

    @property
    def kind(self) -> str:
        return self.source.key.partition("/")[0]

    @property
    def peak(self) -> tuple[int, int]:
        """Row and column of the map's maximum."""
        row, column = np.unravel_index(self.detection.anomaly_map.argmax(), self.detection.anomaly_map.shape)
        return int(row), int(column)

    @property
    def peak_on_defect(self) -> str:
        if self.mask is None:
            return "-"
        return "yes" if self.mask[self.peak] else "no"


def run_demo(output: Path, extractor_name: str, progress: bool) -> Iterator[str]:
    """Run the demo into a folder; yields the lines of its table as they are known."""
    samples = sample_folder()
    path = output / "samples.gallery"
    if (path / FILE).exists():  # of an earlier run, possibly of other images or another extractor
        with storage_errors(f"cannot replace {path}"):
            shutil.rmtree(path)
    start = time.perf_counter()
    extractor = load_extractor(extractor_name)
    with Gallery.create(path, extractor.spec) as gallery:
        report = gallery.add_images(samples / "train" / "good", extractor, progress=progress)
        yield f"{report.added} normal images, {extractor.spec.name}, in {report.seconds:.1f} s -> {path}"
        detector = Detector(gallery, extractor, SearchOptions(k=K))
        scale = colour_scale(detector)
        folder = ResultFolder(output, scale)
        skipped: list[Skipped] = []
        cards: list[_Card] = []
        yield f"{'test image':26} {'image score':>11} {'map max':>8}  {'peak on the defect':18}  nearest normal image"
        for source, pixels, detection in query_sources(detector, [samples / "test"], skipped, progress=progress):
            folder.write(source, pixels, detection)
            card = _Card(source, pixels, _mask_of(samples, source), detection)
            cards.append(card)
            yield (
                f"{source.key:26} {detection.image_score:11.4g} {detection.map_max:8.4g}  {card.peak_on_defect:18}  "
                f"{detection.neighbours.keys[0]}"
            )
        folder.close(skipped)
    page = output / "index.html"
    with storage_errors(f"cannot write {page}"):
        write_whole(page, _page(cards, samples, scale, extractor.spec.name, len(gallery)).encode())
    found = [card for card in cards if card.peak_on_defect == "yes"]
    defects = [card for card in cards if card.mask is not None]
    seconds = time.perf_counter() - start
    yield f"{len(found)} of {len(defects)} maps of defective images peak on the defect; {seconds:.0f} s in all"
    yield f"open {page} in a browser; {output / 'results.jsonl'} has the figures, {output / 'maps'} the maps"


def _mask_of(samples: Path, source: Source) -> NDArray[np.bool_] | None:
    mask = samples / "ground_truth" / Path(source.key).with_name(Path(source.key).stem + "_mask.png")
    return decode(mask)[..., 0] > 0 if mask.exists() else None


def _picture(pixels: Pixels, caption: str) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=88)
    source = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    caption = html.escape(caption)
    return f'<figure><img alt="{caption}" src="{source}"><figcaption>{caption}</figcaption></figure>'


def _page(cards: list[_Card], samples: Path, scale: Scale, extractor: str, n: int) -> str:
    sections = []
    for card in sorted(cards, key=lambda card: -card.detection.map_max):
        shown = card.pixels if card.mask is None else outline(card.pixels, card.mask)
        nearest = card.detection.neighbours.keys[0]
        pictures = [
            _picture(shown, "test image, defect outlined" if card.mask is not None else "test image, no defect"),
            _picture(
                overlay(card.pixels, card.detection.anomaly_map, scale),
                f"anomaly map, maximum {card.detection.map_max:.4g}",
            ),
            _picture(decode(samples / "train" / "good" / nearest), f"nearest normal image, {nearest}"),
        ]
        sections.append(
            f"<section><h2>{html.escape(card.source.key)}</h2>"
            f"<p>image score {card.detection.image_score:.4g} · map maximum {card.detection.map_max:.4g} · "
            f"peak on the defect: {card.peak_on_defect}</p><div>{''.join(pictures)}</div></section>"
        )
    return _TEMPLATE.format(
        n=n, extractor=html.escape(extractor), low=scale.low, high=scale.high, sections="".join(sections)
    )


_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>spade-faiss demo</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
h2 {{ font-size: 1.05rem; margin: 0; }}
section {{ border-top: 1px solid #8886; padding: 1rem 0; }}
section p {{ margin: .1rem 0 .6rem; opacity: .8; }}
section div {{ display: grid; grid-template-columns: repeat(3, 1fr); gap: .8rem; }}
figure {{ margin: 0; }} img {{ width: 100%; display: block; border-radius: 4px; }}
figcaption {{ font-size: .82rem; opacity: .8; }}
.bar {{ height: .7rem; border-radius: 4px; }}
.bar {{ background: linear-gradient(90deg, #000004, #55106d, #ba3655, #f98c0a, #fcffa4); }}
.ends {{ display: flex; margin-bottom: 1.2rem; justify-content: space-between; font-size: .82rem; opacity: .8; }}
@media (max-width: 36rem) {{ section div {{ grid-template-columns: 1fr 1fr; }} }}
</style></head><body>
<h1>spade-faiss demo</h1>
<p>Each test image was compared with {n} normal images ({extractor}); nothing was trained, and no defect was shown
to it before. Most anomalous first. One colour scale for all, from normal images compared with each other:</p>
<div class="bar"></div>
<div class="ends"><span>{low:.4g} and below: the image shows through</span><span>{high:.4g} and above</span></div>
{sections}
</body></html>
"""
