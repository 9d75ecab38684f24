"""anomalib's datamodules as labelled sets of this package."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from anomalib.data import AnomalibDataModule

from ..datasets.category import GOOD, Category, Sample, checked_category
from ..errors import OptionError
from ..images.sources import ImageFile


def category_of(datamodule: AnomalibDataModule) -> Category:
    """Return the training and test images of a datamodule, for Gallery.add_images and evaluate.

    Files are read as this package reads them. Keys are paths below the folder that holds all images.

    Args:
        datamodule: any of anomalib's with image files. Its validation images are left out, unless they are test images.

    Raises:
        OptionError: it is something else, or of videos.
        ImageError: it has no images to train or to test with, or masks of only some anomalous images.

    >>> from anomalib.data import MVTecAD  # doctest: +SKIP
    >>> category = category_of(MVTecAD(category="bottle"))  # doctest: +SKIP
    >>> len(category.normal), len(category.test)  # doctest: +SKIP
    (209, 83)
    """
    if not isinstance(datamodule, AnomalibDataModule):
        raise OptionError(f"datamodule: expected one of anomalib.data, found {type(datamodule).__name__}")
    if not hasattr(datamodule, "train_data"):  # else it may draw its splits again
        datamodule.setup()
    parts = [_rows(getattr(datamodule, f"{name}_data"), str(datamodule.name)) for name in ("train", "test")]
    paths = [row["image_path"] for rows in parts for row in rows]
    root = Path(os.path.commonpath([str(Path(path).absolute().parent) for path in paths]) if paths else ".")

    def key(row: dict[str, Any]) -> str:
        return Path(row["image_path"]).absolute().relative_to(root).as_posix()

    normal = [ImageFile(Path(row["image_path"]), key(row)) for row in parts[0] if not row["label_index"]]
    test = []
    for row in parts[1]:
        bad = bool(row["label_index"])
        kind = str(row.get("label") or "anomaly") if bad else GOOD
        mask = _mask(row.get("mask_path")) if bad else None
        test.append(Sample(Path(row["image_path"]), key(row), kind, bad, mask))
    masks = any(sample.mask is not None for sample in test)
    return checked_category(root, Category(str(datamodule.name), normal, test, "anomalib", masks))


def _mask(given: Any) -> Path | None:
    """Return the mask of a row; of several, as MVTec LOCO has them, the folder of them all."""
    if isinstance(given, (list, tuple)):
        return Path(given[0]).parent if given else None
    return Path(given) if isinstance(given, (str, os.PathLike)) and os.fspath(given) else None


def _rows(data: Any, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = data.samples.to_dict("records")
    if not all({"image_path", "label_index"} <= row.keys() for row in rows):
        raise OptionError(
            f"datamodule: expected images with labels, found none in the rows of {name}, as of videos; write the "
            "frames as image files, and read them with spade_faiss.datasets"
        )
    return rows
