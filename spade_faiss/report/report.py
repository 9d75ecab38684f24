"""A run as one HTML file that opens anywhere: a table of all images, and pictures of those with the highest scores."""

from __future__ import annotations

import heapq
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from ..arrays import Pixels
from ..detect.detection import Detection
from ..metrics.curves import Curve
from ..store.source_images import SourceImages
from ..system.atomic_files import output_errors, whole_file
from .colour_scale import Scale, css_colours
from .image_card import CardMaker, Row
from .page import style_and_script, template
from .run_facts import RunFacts

CARDS = 200  # images with pictures; one takes 50 to 200 kB
ESCAPED = "backslashreplace"  # names whose bytes are no text, which UTF-8 cannot hold


@dataclass(frozen=True)
class Column:
    """A column of the table."""

    name: str
    number: bool = False
    first: str = "ascending"  # the order of the first press
    sorted: bool = False


class Report:
    """Collects the images of a run, then writes the page. A context manager: left early, it writes nothing.

    Cards are kept as files in a temporary folder, and only those of the highest scores so far: memory grows by no more
    than a line of the table for each image.
    """

    def __init__(
        self,
        path: Path,
        run: RunFacts,
        scale: Scale,
        title: str,
        source_images: SourceImages,
        cards: int = CARDS,
    ) -> None:
        """Begin.

        Args:
            path: the HTML file.
            run: what is compared with what.
            scale: colours of the maps.
            title: the page's heading.
            source_images: where the normal images' files are.
            cards: how many images get pictures.

        Raises:
            OutputError: the folder of the file cannot be made.
        """
        with output_errors(f"cannot write {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._scale = scale
        self._title = title
        self._run = run
        self._maker = CardMaker(run.view, scale, source_images)
        self._cards = cards
        self._rows: list[Row] = []
        self._worst: list[tuple[float, int]] = []  # heap of (score, -number) of the images that have a card
        self._folder = tempfile.TemporaryDirectory(prefix="spade-faiss-")

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def add(
        self,
        key: str,
        pixels: Pixels,
        detection: Detection,
        mask: NDArray[np.bool_] | None = None,
        label: str | None = None,
    ) -> None:
        """Take an image.

        Args:
            key: its name.
            pixels: (H, W, 3) uint8.
            detection: what the detector found in it.
            mask: (H, W) ground truth, if there is one.
            label: its kind, where it is known.
        """
        judgement, searched = detection.judgement, detection.is_searched
        row = Row(
            len(self._rows), key, label, detection.verdict, detection.image_score,
            judgement.p_value if judgement else None, detection.map_max if searched else None,
            sum(detection.seconds.values()),
        )  # fmt: skip
        self._rows.append(row)
        rank = (row.score, -row.number)
        if len(self._worst) == self._cards and (not self._worst or rank < self._worst[0]):
            return
        card = self._maker.card(row, pixels, detection, mask)
        with output_errors(f"cannot write to {self._folder.name}"):
            self._card_file(row.number).write_text(card, encoding="utf-8", errors=ESCAPED)
            heapq.heappush(self._worst, rank)
            if len(self._worst) > self._cards:
                self._card_file(-heapq.heappop(self._worst)[1]).unlink()

    def close(
        self,
        metrics: Mapping[str, float | None] | None = None,
        curves: Sequence[Curve] = (),
        notes: Sequence[str] = (),
    ) -> None:
        """Write the page, card by card.

        Args:
            metrics: the run's metrics by name.
            curves: whose areas are among the metrics.
            notes: sentences for the head of the page.

        Raises:
            OutputError: the file cannot be written.
        """
        rows = sorted(self._rows, key=lambda row: -row.score)
        order = [-number for _, number in sorted(self._worst, reverse=True)]
        page = template("report.html").stream(
            title=self._title, run=self._facts(), notes=notes, metrics=metrics or {}, curves=curves,
            scale=self._scale, mark=self._mark(), colours=css_colours(), view=self._run.view,
            columns=self._columns(), labelled=self._labelled, judged=self._judged, rows=rows, with_card=set(order),
            cards=(Markup(self._card_file(number).read_text("utf-8")) for number in order), **style_and_script(),
        )  # fmt: skip
        with output_errors(f"cannot write {self.path}"), whole_file(self.path) as file:
            page.dump(file, "utf-8", ESCAPED)
        self._folder.cleanup()

    def _card_file(self, number: int) -> Path:
        return Path(self._folder.name, f"{number}.html")

    @property
    def _labelled(self) -> bool:
        return any(row.label for row in self._rows)

    @property
    def _judged(self) -> bool:
        return any(row.verdict for row in self._rows)

    def _mark(self) -> float | None:
        """Return where the pixel threshold is on the colour scale, in per cent."""
        scale = self._scale
        if scale.pixel_threshold is None:
            return None
        return round(100 * float(scale.apply(np.array(scale.pixel_threshold, np.float32))), 2)

    def _columns(self) -> list[Column]:
        columns = [
            Column("image"),
            Column("kind"),
            Column("verdict"),
            Column("score", number=True, first="descending", sorted=True),
            Column("p-value", number=True),
            Column("map max", number=True, first="descending"),
            Column("seconds", number=True, first="descending"),
        ]
        unknown = set() if self._labelled else {"kind"}
        if not self._judged:
            unknown |= {"verdict", "p-value"}
        return [column for column in columns if column.name not in unknown]

    def _facts(self) -> list[tuple[str, object]]:
        """Return how the images came out, and what they were compared with."""
        found: list[tuple[str, object]] = [("images", len(self._rows))]
        if self._judged:
            anomalous = sum(row.verdict == "anomalous" for row in self._rows)
            found += [("anomalous", anomalous), ("normal", len(self._rows) - anomalous)]
        return [*found, *self._run.lines]
