"""Opening sets whose tables name each image's role: VisA as published, and Real-IAD."""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ImageError
from ..images.sources import ImageFile
from .category import GOOD, Category, Sample, checked_category, few

VISA_TABLE = "split_csv/1cls.csv"
REAL_IAD_TABLES = "realiad_jsons"  # a folder of CATEGORY.json


def open_visa(path: Path) -> list[Category]:
    """Open the raw VisA set by its table of one-class splits."""
    normal: dict[str, list[ImageFile]] = {}
    test: dict[str, list[Sample]] = {}
    named: set[str] = set()
    for (name, part, label, image, mask), where in sorted(_visa_rows(path), key=lambda row: row[0][3]):
        if (part, label) not in (("train", "normal"), ("test", "normal"), ("test", "anomaly")):
            raise ImageError(f"{where}: expected train,normal or test,normal or test,anomaly, found {part},{label}")
        if image in named or image.split("/")[0] != name:
            raise ImageError(f"{where}: expected an image in {name}/ that no other line names, found {image!r}")
        named.add(image)
        source = ImageFile(_inside(path, image, where), image.removeprefix(f"{name}/"))
        drawn = _inside(path, mask, where) if mask else None
        if part == "train":
            normal.setdefault(name, []).append(source)
        else:
            kind, bad = (GOOD, False) if label == "normal" else (label, True)
            sample = Sample(source.path, source.key, kind, bad, drawn if bad else None)
            test.setdefault(name, []).append(sample)
    masks = any(sample.mask for samples in test.values() for sample in samples)
    found = [
        Category(n, normal.get(n, []), test.get(n, []), "visa", masks) for n in sorted(normal.keys() | test.keys())
    ]
    return [checked_category(path, category) for category in found]


def _visa_rows(path: Path) -> list[tuple[list[str], str]]:
    """Read VisA's table: (object, split, label, image, mask) of each line, and where the line is."""
    table = path / VISA_TABLE
    columns = ("object", "split", "label", "image", "mask")
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.DictReader(file)
            lacking = sorted(set(columns) - set(lines.fieldnames or ()))
            if lacking:
                raise csv.Error(f"expected columns {', '.join(columns)}, found no {', '.join(lacking)}")
            return [([line[name] or "" for name in columns], f"{table} line {lines.line_num}") for line in lines]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ImageError(f"{table}: cannot be read: {error}") from error


def is_resolution_of_real_iad(path: Path) -> bool:
    """Return whether a folder holds Real-IAD's images at one resolution, with the tables beside it."""
    real = path.resolve()
    return real.name.startswith("realiad_") and real.name != REAL_IAD_TABLES and _tables(real.parent).is_dir()


def open_real_iad(path: Path) -> list[Category]:
    """Open Real-IAD: realiad_jsons/CATEGORY.json names the images in [realiad_RESOLUTION/]CATEGORY/.

    Categories of which there are no images are left out, with a warning.
    """
    if is_resolution_of_real_iad(path):
        tables, folders = _tables(path.resolve().parent), [path]
    else:
        tables = _tables(path)
        folders = [path, *sorted(one for one in path.glob("realiad_*") if is_resolution_of_real_iad(one))]
    found, missing = [], []
    for table in sorted(tables.glob("*.json")):
        meta, rows = _real_iad_table(table)
        prefix = str(meta.get("prefix") or table.stem).strip("/")
        places = [folder for folder in folders if (folder / prefix).is_dir()]
        if len(places) > 1:
            raise ImageError(
                f"{path}: expected {prefix} at one resolution, found {few(places)}; open one of those folders"
            )
        if not places:
            missing.append(table.stem)
            continue
        category = _real_iad_category(places[0] / prefix, table, str(meta.get("normal_class", "OK")), rows)
        found.append(checked_category(path, category))
    if not found:
        raise ImageError(f"{path}: expected images of the categories in {tables}, found none of {few(missing)}")
    if missing:
        warnings.warn(f"{path}: left out {len(missing)} categories without images: {few(missing)}", stacklevel=4)
    return found


def _tables(path: Path) -> Path:
    """Return the folder of tables: the archive unpacks to realiad_jsons/realiad_jsons/."""
    outer = path / REAL_IAD_TABLES
    return outer / REAL_IAD_TABLES if (outer / REAL_IAD_TABLES).is_dir() else outer


def _real_iad_table(table: Path) -> tuple[dict[str, Any], Iterator[tuple[str, str, str, str | None]]]:
    """Read a table: its meta data, and (part, class, image, mask) of each row.

    Raises:
        ImageError: the file is not such a table.
    """
    try:
        values = json.loads(table.read_text(encoding="utf-8-sig"))
        meta = dict(values.get("meta") or {})
        rows = [
            (part, row["anomaly_class"], row["image_path"], row.get("mask_path") or None)
            for part in ("train", "test")
            for row in values[part]
        ]
        if not all(isinstance(name, str) for row in rows for name in (*row[:3], row[3] or "")):
            raise TypeError("a class or a path is not a text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        wanted = "lists train and test of rows with anomaly_class, image_path and mask_path"
        raise ImageError(f"{table}: expected {wanted}, found none: {type(error).__name__}: {error}") from error
    return meta, iter(rows)


def _real_iad_category(
    folder: Path, table: Path, normal_class: str, rows: Iterator[tuple[str, str, str, str | None]]
) -> Category:
    """Make a category of a table's rows, whose paths are relative to the folder."""
    normal: list[ImageFile] = []
    test: list[Sample] = []
    named: set[str] = set()
    for part, kind, image, mask in sorted(rows, key=lambda row: row[2]):
        if image in named:
            raise ImageError(f"{table}: expected each image once, found {image!r} again")
        named.add(image)
        path, bad = _inside(folder, image, str(table)), kind != normal_class
        if part == "test":
            drawn = _inside(folder, mask, str(table)) if bad and mask else None
            test.append(Sample(path, image, kind if bad else GOOD, bad, drawn))
        elif bad:
            raise ImageError(
                f"{table}: expected training images of the class {normal_class}, found {image!r} of {kind}"
            )
        else:
            normal.append(ImageFile(path, image))
    return Category(table.stem, normal, test, "real_iad", any(sample.mask for sample in test))


def _inside(root: Path, name: str, where: str) -> Path:
    """Return the path of a file that a table names; it must be in the data set, with all links followed."""
    try:
        real = (root / name).resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ImageError(f"{where}: expected a file in {root}, found nothing called {name!r}") from error
    if not real.is_file() or not real.is_relative_to(root.resolve()) or {"", ".", ".."} & set(name.split("/")):
        raise ImageError(f"{where}: expected a file that is inside {root}, found {name!r}")
    return root / name
