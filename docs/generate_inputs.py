"""Writes docs/inputs.md: what the commands print for folders that hold one of everything.

    python docs/generate_inputs.py

The suite compares the page with what this makes. Times and rates are left out, as they differ from run to run.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
from PIL import Image, PngImagePlugin

from spade_faiss.cli.main import main

PAGE = Path(__file__).with_name("inputs.md")
GALLERY = "build line.gallery normal --extractor toy --image-size 64"

HEAD = """# Inputs as they are found

This page is made by `python docs/generate_inputs.py`, and the suite compares it with what the commands print. It shows
folders that hold one of everything that has been met in the field, and what each command says of them. Every file that
is not taken is counted with its reason. What should have been taken and could not be is a skip, and the exit status is
3; `--strict` stops there instead. What the formats themselves mean is in [Limits](limits.md#images) and
[Labelled sets](evaluation.md#masks).
"""


def texture(seed: int) -> np.ndarray:
    """Make a fine texture."""
    pixels = np.random.default_rng(seed).normal(120, 12, (64, 64, 3))
    return pixels.clip(0, 255).astype(np.uint8)


def write_normal(folder: Path) -> Iterator[tuple[str, str]]:
    """Write the normal images, and yield each odd file with what it stands for."""
    for number in range(12):
        save(folder / f"{number:03d}.png", texture(number))
    save(folder / "backup" / "003.bmp", texture(3))
    yield "backup/003.bmp", "an image of the set again, in another format and folder"
    save(folder / "part.png", texture(20))
    mask = np.zeros((64, 64), np.uint8)
    mask[10:20, 10:20] = 255
    save(folder / "part_GT.png", mask)
    yield "part_GT.png", "a mask beside its photo"
    Image.fromarray((texture(21)[..., 0].astype(np.uint16)) * 16).save(folder / "camera12.png")
    yield "camera12.png", "12 bits in a file of 16, which does not say so"
    first, second = (Image.fromarray(texture(seed)) for seed in (22, 23))
    first.save(folder / "pages.tiff", save_all=True, append_images=[second])
    yield "pages.tiff", "two pages"
    profile = PngImagePlugin.PngInfo()
    profile.add_text("note", "x" * 1_200_000)
    Image.fromarray(texture(24)).save(folder / "metadata.png", pnginfo=profile)
    yield "metadata.png", "1.2 MB of text beside the pixels"
    save(folder / "phone.jfif", texture(25), "JPEG")
    yield "phone.jfif", "a JPEG by another suffix"
    save(folder / "检查.png", texture(26))
    yield "检查.png", "a name that not every console can print"
    (folder / "empty.png").touch()
    yield "empty.png", "no bytes"
    whole = (folder / "phone.jfif").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    yield "cut.jpg", "half of a JPEG, as an interrupted copy leaves it"
    (folder / "notes.txt").write_text("no image")
    (folder / "raw.cr2").write_bytes(b"II*\0")
    yield "notes.txt, raw.cr2", "other files"
    save(folder / "@eaDir" / "000.png" / "SYNOPHOTO_THUMB_M.png", texture(0))
    (folder / "._000.png").write_bytes(b"\0\5\x16\7")
    yield "@eaDir/, ._000.png", "what a NAS and a Mac leave behind"
    os.mkfifo(folder / "stream.png")
    yield "stream.png", "a named pipe"
    (folder / "loop").symlink_to("loop")
    yield "loop", "a link to itself"


def write_labelled(folder: Path) -> None:
    """Write a set in MVTec AD's layout, whose masks are as people save them."""
    for number in range(12):
        save(folder / "train" / "good" / f"{number:03d}.png", texture(number))
    save(folder / "test" / "good" / "000.png", texture(40))
    for number in range(4):
        pixels, mask = texture(50 + number), np.zeros((64, 64), np.uint8)
        pixels[20:36, 20:36] = (200, 60, 60)
        mask[20:36, 20:36] = 255
        save(folder / "test" / "scratch" / f"{number:03d}.png", pixels)
        target = folder / "ground_truth" / "scratch" / f"{number:03d}_mask.png"
        if number == 1:
            save(target.with_suffix(".jpg"), mask, "JPEG")
        elif number == 2:
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.merge("LA", (Image.fromarray(mask), Image.new("L", (64, 64), 255))).save(target)
        else:
            save(target, mask)
    (folder / "test" / "scratch" / "003.png").write_bytes(b"\x89PNG")


def save(path: Path, pixels: np.ndarray, kind: str | None = None) -> None:
    """Write an image, and the folder for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, kind)


def printed(command: str) -> str:
    """Run a command in this folder; returns what it prints, without times, and its exit status."""
    said, status = io.StringIO(), 0
    with (
        warnings.catch_warnings(),
        patch.object(sys, "argv", ["spade-faiss", *shlex.split(command)]),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        warnings.simplefilter("always")  # whatever has been shown before
        try:
            main()
        except SystemExit as ended:
            status = int(ended.code or 0)
    text = said.getvalue().replace(str(Path.cwd()), "...")
    text = re.sub(r"[\d.]+ images/s", "... images/s", text)
    text = re.sub(r"(this will need:) .*", r"\1 ...", text)
    text = re.sub(r"made by spade-faiss \S+", "made by spade-faiss ...", text)
    text = re.sub(r"\b\d+\.\d+ (s|ms|MiB)\b", r"... \1", text)
    return f"$ spade-faiss {command}\n{text}(exit status {status})\n"


def page() -> str:
    """Make the page."""
    with tempfile.TemporaryDirectory() as temporary, contextlib.chdir(temporary):
        odd = list(write_normal(Path("normal")))
        write_labelled(Path("labelled"))
        for number in range(2):
            save(Path("test", f"{number:03d}.png"), texture(60 + number))
        bad = texture(62)
        bad[20:36, 20:36] = (200, 60, 60)
        save(Path("test", "bad.png"), bad)
        Path("test", "cut.png").write_bytes(Path("test", "bad.png").read_bytes()[:400])
        parts = [HEAD, "## Normal images\n\nBeside `000.png` to `011.png` the folder `normal` holds:\n"]
        parts.append(
            "| file | what it is |\n| --- | --- |\n" + "".join(f"| `{name}` | {what} |\n" for name, what in odd)
        )
        for command in (
            GALLERY, GALLERY + " --strict", "info line.gallery", "verify line.gallery",
            "calibrate line.gallery --false-alarms 0.1 --quiet", "audit line.gallery --normal normal --top 3 --quiet",
        ):  # fmt: skip
            parts.append(f"```text\n{printed(command)}```\n")
        parts.append(
            "The image that was taken for nearly black has spoilt the threshold, and the note of `build` says what to "
            "do:\n"
        )
        for command in (
            GALLERY.replace("line.gallery", "bits.gallery") + " --bits 12 --quiet",
            "calibrate bits.gallery --false-alarms 0.1 --quiet",
        ):
            parts.append(f"```text\n{printed(command)}```\n")
        parts.append("## Images to look at\n\n`test` holds three images, and one that was cut short.\n")
        parts.append(f"```text\n{printed('query bits.gallery test --normal normal --output results --quiet')}```\n")
        parts.append(f"```text\n{printed('query bits.gallery test --output test')}```\n")
        parts.append(
            "## A labelled set\n\n`labelled` has the layout of MVTec AD. Of its masks one is a JPEG, and one has an "
            "alpha channel;\none test image is cut short.\n"
        )
        for command in (
            "build parts.gallery --dataset labelled --extractor toy --image-size 64 --quiet",
            "evaluate parts.gallery labelled --quiet",
            "evaluate parts.gallery labelled --skip-bad-images --quiet",
        ):
            parts.append(f"```text\n{printed(command)}```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
