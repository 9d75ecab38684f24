"""Evaluation over random draws of a labelled set: a temporary gallery for each draw, mean and deviation over all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .datasets.category import Category, few
from .datasets.check import Checked
from .datasets.draws import Draws, draw
from .errors import OptionError
from .evaluate import METRICS, Evaluation, means, with_settings
from .extractors.registry import Extractor
from .gallery.gallery import Gallery
from .images.tiling import image_key
from .metrics.curves import write_curves
from .store.snapshot import TEXTS_TOGETHER, Snapshot
from .system.atomic_files import output_errors, write_csv, write_json
from .system.prefetch import batched

Values = dict[str, float | None]


@dataclass(frozen=True)
class Draw:
    """One draw from a category."""

    seed: int
    category: Category  # as it was drawn
    checked: Checked  # what is known of its test images; for `evaluate`
    shots: list[str] | None  # keys of the normal images that were drawn; None: all of them
    contamination: list[str]  # keys of the anomalous images in the gallery
    copies: list[str]  # keys of test images left out, as their content is that of an anomalous image in the gallery


@dataclass
class Repeats:
    """The metrics of one category over its draws."""

    category: str
    draws: list[tuple[Draw, Evaluation]] = field(default_factory=list)

    @property
    def metrics(self) -> Values:
        """The mean of each metric over the draws; None where a draw has none."""
        return means([evaluation for _, evaluation in self.draws])

    @property
    def std(self) -> Values:
        """The sample standard deviation (n - 1) of each metric over the draws; None with one draw."""
        return _deviations([evaluation.metrics for _, evaluation in self.draws])

    @property
    def reasons(self) -> dict[str, str]:
        """For each metric that is None, why."""
        return {name: reason for _, evaluation in self.draws for name, reason in evaluation.reasons.items()}

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values: mean and deviation, and each draw's images and metrics."""
        draws = []
        for one, evaluation in self.draws:
            drawn = {"seed": one.seed, "shots": one.shots, "contamination": one.contamination, "copies": one.copies}
            draws.append({**drawn, **evaluation.to_json()})
        values = {"metrics": self.metrics, "std": self.std, "reasons": self.reasons}
        return {"category": self.category, **values, "draws": draws}


def each_draw(
    gallery: Gallery, category: Category, draws: Draws, extractor: Extractor, checked: Checked, progress: bool = False
) -> Iterator[tuple[Draw, Gallery]]:
    """Yield each draw of a category with a gallery of its images, made like another one.

    The galleries lie in the system's folder for temporary files and are gone when the next draw is asked for. The other
    gallery is only read.

    Args:
        gallery: of the category's normal images; gives index, recipe and patches.
        category: to draw from.
        draws: what to draw, and how often.
        extractor: of the gallery's spec.
        checked: what check_categories found in the category.
        progress: a bar on stderr, where that is a terminal.

    Raises:
        OptionError: the category does not have what is to be drawn, or its normal images are not in the gallery.
        ImageError: an image that was drawn to train with cannot be read.
    """
    for seed in draws.seeds:
        drawn = drawn_from(category, draws, seed, checked)
        manifest = gallery.snapshot().manifest
        options, recipe = manifest.index_options, manifest.recipe
        with (
            tempfile.TemporaryDirectory(prefix="spade-faiss-draw-") as folder,
            Gallery.create(f"{folder}/gallery", extractor.spec, options, None, recipe, manifest.patches) as own,
        ):
            own.add_images(drawn.category.normal, extractor, strict=True, progress=progress)
            _require_same_set(gallery, own.snapshot(), drawn)
            yield drawn, own


def drawn_from(category: Category, draws: Draws, seed: int, checked: Checked) -> Draw:
    """Draw from the readable images of a category, and leave copies of what was drawn out of the test set.

    Raises:
        OptionError: the category does not have what is to be drawn.
    """
    bad = [sample for sample in category.test if sample.key in checked.bad_images]
    readable = [sample for sample in category.test if sample.key not in checked.bad_images]
    found = draw(replace(category, test=readable), draws.shots, draws.contaminate, seed)
    left = {sample.key for sample in found.test}
    contamination = [sample.key for sample in readable if sample.key not in left]
    taken = {checked.digests.get(key) for key in contamination}
    copies = [sample.key for sample in found.test if checked.digests.get(sample.key, "") in taken]
    test = [sample for sample in (*found.test, *bad) if sample.key not in copies]
    keys = {sample.key for sample in test}
    known = replace(checked, digests={key: digest for key, digest in checked.digests.items() if key in keys})
    trained = {image.key for image in found.normal}.difference(contamination)
    shots = None if draws.shots is None else [image.key for image in category.normal if image.key in trained]
    return Draw(seed, replace(found, test=test), known, shots, contamination, copies)


def _require_same_set(gallery: Gallery, own: Snapshot, drawn: Draw) -> None:
    """Raise an OptionError if normal images that were drawn are not in the gallery that the draw is made like."""
    there, contamination = gallery.snapshot(), set(drawn.contamination)
    wanted: dict[str, str] = {}
    for ids in batched(own.ids().tolist(), TEXTS_TOGETHER):
        wanted |= dict(zip(own.digests(ids), map(image_key, own.keys(ids)), strict=True))  # tiles: of the whole image
    missing = {digest: key for digest, key in wanted.items() if key not in contamination}
    for ids in batched(there.ids().tolist(), TEXTS_TOGETHER):
        for digest in there.digests(ids):
            missing.pop(digest, None)
    if missing:
        raise OptionError(
            f"{gallery.path}: expected a gallery of the normal training images of {drawn.category.name}, found "
            f"{len(missing)} that were drawn and are not in it ({few(missing.values())}); name the gallery that was "
            "built from this set, or build one"
        )


def over_categories(repeats: Sequence[Repeats]) -> tuple[Values, Values]:
    """Return the mean of the categories' means, and the deviation over the draws of the mean over the categories."""
    seeds = zip(*(one.draws for one in repeats), strict=True)
    by_seed = [means([evaluation for _, evaluation in draws]) for draws in seeds]
    return _means(by_seed), _deviations(by_seed)


def _means(rows: Sequence[Values]) -> Values:
    return {name: None if None in found else float(np.mean(found)) for name, found in _columns(rows)}  # type: ignore[arg-type]


def _deviations(rows: Sequence[Values]) -> Values:
    return {
        name: None if None in found or len(found) < 2 else float(np.std(found, ddof=1))  # type: ignore[arg-type]
        for name, found in _columns(rows)
    }


def _columns(rows: Sequence[Values]) -> list[tuple[str, list[float | None]]]:
    return [(name, [row[name] for row in rows]) for name in METRICS]


def write_repeats(folder: Path, repeats: Sequence[Repeats], settings: Sequence[dict[str, Any]]) -> None:
    """Write metrics.json, results.csv with a row a category, and the points of each draw's curves.

    Args:
        folder: to write to.
        repeats: of the categories.
        settings: of each of them.

    Raises:
        OutputError: the folder cannot be written.
    """
    mean, std = over_categories(repeats)
    with output_errors(f"cannot write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        values = {**with_settings([one.to_json() for one in repeats], settings), "mean": mean, "std": std}
        write_json(folder / "metrics.json", values, indent=1)
        rows = [("category", *METRICS, *(f"{name}_std" for name in METRICS))]
        for name, *parts in [*((one.category, one.metrics, one.std) for one in repeats), ("Mean", mean, std)]:
            figures = [part[metric] for part in parts for metric in METRICS]
            rows.append((name, *("" if figure is None else f"{figure:.6f}" for figure in figures)))
        write_csv(folder / "results.csv", rows)
    curves = {f"{one.category}, seed {draw.seed}": found.curves for one in repeats for draw, found in one.draws}
    write_curves(folder, curves)
