"""Extractors and galleries for tests of several processes, which other processes can import."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

import spade_faiss as sf
from spade_faiss.arrays import Pixels
from spade_faiss.extractors.toy import ToyExtractor
from spade_faiss.options import Patches
from tests.helpers.images import write_images

BATCH = 2


class Moody(ToyExtractor):
    """The toy, in a mood that is read from a file, in whichever process it is; it may fail at a white image."""

    def __init__(self, folder: Path) -> None:
        super().__init__(sf.FeatureOptions(batch_size=BATCH))
        self.folder = folder

    def extract(self, views: Sequence[Pixels]) -> sf.Features:
        mood = (self.folder / "mood").read_text()
        if mood == "slow":
            time.sleep(0.3)
            (self.folder / f"extracted {os.getpid()} {time.monotonic_ns()}").touch()
        elif mood == "stuck" and any(self.folder.glob(f"g/shards/{os.getpid()}-*.tmp")):
            (self.folder / f"stuck {os.getpid()}").touch()
            time.sleep(600)
        elif any(view.min() == 255 for view in views):
            if mood == "killed once" and not (self.folder / "was killed").exists():
                (self.folder / "was killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if mood == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if mood == "late":
                time.sleep(1.5)
                (self.folder / "waiting").write_text(str(len(list(self.folder.glob("g/shards/*.tmp")))))
            if mood == "refusing":
                raise sf.FeatureError("not white")
            if mood == "broken":
                raise RuntimeError("out of memory\nand more")
        return super().extract(views)


def create(path: Path, images_a_shard: int = 4, patches: Patches = "stored") -> sf.Gallery:
    spec = sf.load_extractor("toy").spec
    size = images_a_shard * spec.bytes_with(patches)
    return sf.Gallery.create(path, spec, sf.IndexOptions(device="cpu"), size, patches=patches)


def toy() -> sf.Extractor:
    return sf.load_extractor("toy", options=sf.FeatureOptions(batch_size=BATCH))


def write_images_with_white(folder: Path, n: int, name: str) -> Path:
    """Write n images, one of which a Moody extractor dislikes."""
    write_images(folder, n)
    Image.new("RGB", (40, 40), "white").save(folder / name)
    return folder


def moody_of(folder: Path, mood: str) -> Moody:
    """Return an extractor in a mood."""
    (folder / "mood").write_text(mood)
    return Moody(folder)
