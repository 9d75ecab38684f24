"""Examples in docstrings: each public function and method has one, and it runs.

They run in a folder with `normal/` (12 images, the last of them calibration's), `test/000.png`, and with these names:
`sf`, `np`, `toy` (an extractor), `gallery` (of the 12 images, at toy.gallery, each docstring's own), `detector`.
"""

from __future__ import annotations

import doctest
import inspect
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.datasets import draw, open_dataset
from spade_faiss.labels import LabelledImage, joined, outlines
from tests.helpers.images import write_images

WITHOUT = {"Detector.after_fork", "Federation.after_fork"}  # the system calls it


def public() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Functions of the contents page, and what its classes define under public names; errors are only raised."""
    for name in sf.__all__:
        value = getattr(sf, name)
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value) and not issubclass(value, Exception):
            yield name, value
            for base in value.__mro__:  # a public class may be made of halves, as Gallery is
                if base.__module__.startswith("spade_faiss."):
                    for method, member in vars(base).items():
                        function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
                        if not method.startswith("_") and inspect.isfunction(function):
                            yield f"{name}.{method}", function


LABELS = {"labels.LabelledImage": LabelledImage, "labels.joined": joined, "labels.outlines": outlines}
SETS = {"datasets.draw": draw, "datasets.open_dataset": open_dataset}
PUBLIC = dict(public()) | SETS | LABELS


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docstrings")
    write_images(folder / "normal", 12)
    write_images(folder / "test", 1, seed=1)
    toy = sf.load_extractor("toy", options=sf.FeatureOptions(batch_size=4))
    with sf.Gallery.create(folder / "toy.gallery", toy.spec, index="flat") as gallery:
        gallery.add_images(folder / "normal", toy)
    return folder


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_run(name: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [test] = doctest.DocTestFinder(recurse=False).find(PUBLIC[name], name) or [None]
    assert test is not None
    assert test.examples or name in WITHOUT
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    toy = sf.load_extractor("toy", options=sf.FeatureOptions(batch_size=4))
    gallery = sf.Gallery.open("toy.gallery", device="cpu")
    test.globs.update(sf=sf, np=np, shutil=shutil, toy=toy, gallery=gallery, detector=sf.Detector(gallery, toy))
    printed: list[str] = []
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.DocTestRunner(optionflags=options).run(test, out=printed.append)
    assert result.failed == 0, "".join(printed)
