"""anomalib's Engine and folders, and this package's own gallery of the same images.

A test module that imports this is skipped where anomalib is not installed.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

import spade_faiss as sf

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its dependencies' own
    pytest.importorskip("anomalib", reason="anomalib is not installed: make test-anomalib")
    from anomalib.data import Folder
    from anomalib.engine import Engine

TOY = {"backbone": "toy", "recipe": "paper", "options": {"image_size": 32, "crop": 32, "k": 3}}
OPTIONS = sf.FeatureOptions(image_size=32, crop=32, strides=(4, 8, 16))


def folder(root: Path, **options: Any) -> Any:
    given = {"num_workers": 0, "train_batch_size": 3, "eval_batch_size": 3, "val_split_mode": "same_as_test"} | options
    return Folder(
        name="parts", root=root, normal_dir="good", abnormal_dir="bad", normal_test_dir="test_good", mask_dir="masks",
        **given,
    )  # fmt: skip


def engine(root: Path, **options: Any) -> Any:
    return Engine(default_root_dir=root / "results", **{"logger": False, "barebones": True} | options)


def own_gallery(root: Path, path: Path) -> tuple[sf.Gallery, Any]:
    extractor = sf.load_extractor("toy", options=OPTIONS)
    gallery = sf.Gallery.create(path, extractor.spec, recipe="paper")
    gallery.add_images(root / "good", extractor)
    return gallery, extractor
