"""What Detector.query and decode take from Python, and what they say about everything else."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import spade_faiss as sf
from spade_faiss.errors import ImageError
from spade_faiss.images.decode import decode

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (24, 32, 3), dtype=np.uint8)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_tensors() -> None:
    first = torch.from_numpy(PIXELS).permute(2, 0, 1)
    for tensor in (first, first.contiguous(), torch.from_numpy(PIXELS)):
        assert np.array_equal(decode(tensor), PIXELS)
    assert np.array_equal(decode(first[0]), np.repeat(PIXELS[..., :1], 3, axis=2))


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.zeros(3, 24, 32), r"found \(3, 24, 32\) float32: of \[0, 1\], convert it with"),
        (torch.zeros(3, 24, 32, dtype=torch.bfloat16), "bfloat16: of"),
        (torch.zeros(3, 24, 3, dtype=torch.uint8), "may be first or last; give"),
        (torch.zeros(2, 3, 24, 32, dtype=torch.uint8), "a batch; query_batch takes"),
        (torch.zeros(4, 24, 32, dtype=torch.uint8), "give its three channels"),
        (torch.zeros(24, dtype=torch.uint8), "give its three channels"),
    ],
)
def test_tensors_whose_meaning_is_not_clear(tensor: torch.Tensor, said: str) -> None:
    """Float tensors: the same question as anomalib's documentation answers with ToDtype(scale=True)."""
    with pytest.raises(ImageError, match=f"^image: expected a .* tensor, .*{said}"):
        decode(tensor)


def test_open_files(file: Path) -> None:
    content = file.read_bytes()
    written = io.BytesIO()
    written.write(content)  # its position is at the end, as after Image.save
    with file.open("rb") as opened:
        for one in (opened, io.BytesIO(content), written, content, bytearray(content), memoryview(content)):
            assert np.array_equal(decode(one), PIXELS)  # type: ignore[arg-type]
        assert not opened.closed


def test_open_files_that_cannot_be_read(file: Path) -> None:
    with file.open(encoding="latin-1") as text, pytest.raises(ImageError, match="open in binary mode"):
        decode(text)  # type: ignore[arg-type]
    closed = io.BytesIO(b"x")
    closed.close()
    with pytest.raises(ImageError, match=r"^image: cannot be read: "):
        decode(closed)
    with pytest.raises(ImageError, match=r"found an empty file \(0 bytes\)"):
        decode(io.BytesIO())


class Endless(io.FileIO):
    def read(self, *_: object) -> bytes:
        raise MemoryError


def test_file_larger_than_memory(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spade_faiss.images.regular_file.open", lambda path, *_, **__: Endless(path), raising=False)
    with pytest.raises(ImageError, match=rf"^{file}: too large to read .*: {file.stat().st_size} bytes$"):
        decode(file)


@pytest.mark.parametrize("given", [None, 5, object(), {"a": 1}, np.float32(1)])
def test_other_things(given: Any) -> None:
    with pytest.raises(ImageError) as caught:
        decode(given)
    said = str(caught.value)
    assert said.startswith("image: expected a path, a PIL image, ")
    assert said.endswith(f", found {type(given).__name__}")


@pytest.fixture
def detector(tmp_path: Path) -> sf.Detector:
    (tmp_path / "normal").mkdir()
    for number in range(4):
        Image.fromarray(np.roll(PIXELS, number, axis=0)).save(tmp_path / "normal" / f"{number}.png")
    toy = sf.load_extractor("toy")
    gallery = sf.Gallery.create(tmp_path / "g", toy.spec)
    gallery.add_images(tmp_path / "normal", toy)
    return sf.Detector(gallery, toy)


def test_query_takes_what_decode_takes(detector: sf.Detector, file: Path) -> None:
    for given in (file, str(file), file.read_bytes(), io.BytesIO(file.read_bytes()), PIXELS, torch.from_numpy(PIXELS)):
        assert detector.query(given).neighbours.keys[0] == "0.png"
    with pytest.raises(ImageError, match=r"found NoneType$"):
        detector.query(None)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match=r"found list; query_batch takes several$"):
        detector.query([file, file])  # type: ignore[arg-type]


def test_one_image_where_several_are_expected(detector: sf.Detector, file: Path) -> None:
    for given in (str(file), file, PIXELS, Image.fromarray(PIXELS), torch.from_numpy(PIXELS), None, io.BytesIO(b"x")):
        with pytest.raises(ImageError, match=f"expected several images, found one {type(given).__name__}; query takes"):
            detector.query_batch(given)  # type: ignore[arg-type]
        with pytest.raises(ImageError, match="expected several images"):
            next(detector.stream(given))  # type: ignore[arg-type]
    several = torch.from_numpy(np.stack([PIXELS] * 2))
    assert len(detector.query_batch(several)) == len(detector.query_batch(several.numpy())) == 2  # type: ignore[arg-type]
