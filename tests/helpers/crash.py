"""What is interrupted by crash tests, and how its result is compared."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import spade_faiss as sf
from spade_faiss.options import Patches
from tests.helpers.galleries import OWN, random_features_of

N_IMAGES = 16


KEYS = [f"{number:02d}" for number in range(9)]


Content = dict[str, bytes]


def toy() -> sf.Extractor:
    return sf.load_extractor("toy", options=sf.FeatureOptions(batch_size=2))


def reopen(path: Path) -> sf.Gallery:
    return sf.Gallery.open(path, device="cpu")


def create(path: Path, spec: sf.ExtractorSpec = OWN, shard_bytes: int = 1, patches: Patches = "stored") -> sf.Gallery:
    return sf.Gallery.create(path, spec, sf.IndexOptions(device="cpu"), shard_bytes, patches=patches)


def content(gallery: sf.Gallery) -> Content:
    """The levels of each image, by key."""
    keys = gallery.keys()
    levels = gallery.read(gallery.ids(keys), toy() if gallery.patches == "recompute" else None)
    return {key: b"".join(level[row].tobytes() for level in levels) for row, key in enumerate(keys)}


# What is interrupted: each may be run again, and says on stdout what it has finished.


def add_images(gallery: sf.Gallery, images: Path) -> None:
    gallery.add_images(images, toy())


def add_images_recompute(gallery: sf.Gallery, images: Path) -> None:
    gallery.add_images(images, toy(), replace=True)


def append(gallery: sf.Gallery, images: Path) -> None:
    for number, key in enumerate(KEYS):
        gallery.append([key, f"{key}+"], random_features_of(2, seed=number))
        print(f"has {key}", flush=True)


def remove(gallery: sf.Gallery, images: Path) -> None:
    for key in KEYS:
        if key in gallery:
            gallery.remove([key])
        print(f"lacks {key}", flush=True)


def compact(gallery: sf.Gallery, images: Path) -> None:
    gallery.compact()
    gallery.rebuild_index()


COMMANDS = {command.__name__: command for command in (add_images, add_images_recompute, append, remove, compact)}


STEPS: dict[str, Callable[[sf.Gallery], Any]] = {
    # More than fits one shard, of which the beginning must not be there without the rest.
    "append": lambda gallery: gallery.append([f"new {n}" for n in range(7)], random_features_of(7, seed=7)),
    "replace": lambda gallery: gallery.append(["new", *KEYS[2:8]], random_features_of(7, seed=8), replace=True),
    "remove": lambda gallery: gallery.remove(KEYS[1:9:2]),
    "compact": lambda gallery: gallery.compact(),
    "rebuild_index": lambda gallery: gallery.rebuild_index(),
}


def failing_flush(monkeypatch: pytest.MonkeyPatch, *errors: BaseException) -> Callable[[int], int]:
    """Make the nth flush to disk from now on fail, 0: none; returns a function that says so and how many there were.

    The errors take turns from one n to the next.
    """
    real, calls, failing = os.fsync, 0, 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise errors[failing % len(errors)]
        real(descriptor)

    def fail_at(nth: int) -> int:
        nonlocal calls, failing
        done, calls, failing = calls, 0, nth
        return done

    monkeypatch.setattr(os, "fsync", fsync)
    return fail_at
