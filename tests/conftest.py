"""What the tests share: random features, a folder of small images, a toy gallery of them."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import spade_faiss as sf
from tests.helpers.command_line import Run, Spade
from tests.helpers.galleries import OWN, RandomFeatures, random_features_of
from tests.helpers.images import write_images


@pytest.fixture(scope="session", autouse=True)
def _quick_disk() -> Iterator[None]:
    """Flushing costs more than all else here, and no test cuts the power; child processes do flush."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def own_spec() -> sf.ExtractorSpec:
    """Features that were not made from images here."""
    return OWN


@pytest.fixture(scope="session")
def random_features() -> RandomFeatures:
    return random_features_of


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", 12)


@pytest.fixture(scope="session")
def toy() -> sf.Extractor:
    return sf.load_extractor("toy", options=sf.FeatureOptions(batch_size=4))


@pytest.fixture
def toy_gallery(tmp_path: Path, image_folder: Path, toy: sf.Extractor) -> sf.Gallery:
    """A gallery of the 12 images in image_folder."""
    gallery = sf.Gallery.create(tmp_path / "toy.gallery", toy.spec, index=sf.IndexOptions(device="cpu"))
    gallery.add_images(image_folder, toy)
    return gallery


@pytest.fixture
def spade(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Spade:
    """Run the command line in this process, where torch is loaded already."""
    from spade_faiss.cli.main import main

    def run(*args: object) -> Run:
        monkeypatch.setattr(sys, "argv", ["spade-faiss", *map(str, args)])
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # main() has its own
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capfd.readouterr()
        return Run(int(stopped.value.code or 0), captured.out, captured.err)

    return run
