"""Pushes and pulls stopped at every step: the old gallery stays whole, and the same command finishes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.system import failpoints
from spade_faiss.system.forks import FORKS
from tests.helpers.stores import N, append, same


class Stopped(BaseException):
    """In the place of a kill."""


def steps_of(call: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    passed: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(failpoints, "action", passed.append)
        call()
    return passed


def one_of_each(steps: list[str]) -> list[int]:
    """Return where one step of each kind is, at any time: `bench object_store` kills a push at all of them."""
    rng = np.random.default_rng(0)
    return [int(rng.choice([at for at, step in enumerate(steps) if step == kind])) for kind in sorted(set(steps))]


def stopped_at(number: int, call: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Stop a call at the step of that number, and return the step."""
    passed: list[str] = []

    def stop(step: str) -> None:
        passed.append(step)
        if len(passed) == number + 1:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(failpoints, "action", stop)
        with pytest.raises(Stopped):
            call()
    return passed[-1]


def test_a_push_stopped_at_any_step(
    gallery: sf.Gallery, memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sf.push(gallery.path, memory)
    with sf.Gallery.open(memory, cache=tmp_path / "cache") as old:
        before = old.keys()
    append(gallery, N, N + 1)
    gallery.remove(["000"])
    gallery.compact()
    files, origin = fsspec.filesystem("memory"), (gallery.path / "remote.json").read_bytes()
    objects = {name: files.cat_file(name) for name in files.find("/bucket")}

    def push() -> sf.Pushed:
        return sf.push(gallery.path, memory, sweep=True)

    steps = steps_of(push, monkeypatch)
    assert {step.split()[0] for step in steps} >= {"uploaded", "remembered", "pushed", "swept"}
    for number in one_of_each(steps):
        files.rm("/bucket", recursive=True)
        for name, content in objects.items():
            files.pipe_file(name, content)
        (gallery.path / "remote.json").write_bytes(origin)
        where = stopped_at(number, push, monkeypatch)
        with sf.Gallery.open(memory, cache=tmp_path / "cache") as there:
            assert there.verify() == [], where
            if number < steps.index("pushed gallery.json"):
                assert there.keys() == before, where
            else:
                assert same(there, gallery), where
        push()
        with sf.Gallery.open(memory, cache=tmp_path / "cache") as there:
            assert same(there, gallery), where
        assert len(files.find("/bucket/tiles.gallery/objects")) == len(steps_up(steps)), where


def steps_up(steps: list[str]) -> list[str]:
    """Return the steps of objects that the new generation has."""
    return [step for step in steps if step.startswith("uploaded")]


def test_a_push_goes_on_with_what_is_there(gallery: sf.Gallery, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_at(3, lambda: sf.push(gallery.path, memory), monkeypatch)
    done = sf.push(gallery.path, memory)
    assert (done.kept, done.uploaded) == (4, 2)


def test_a_pull_stopped_at_any_step(
    gallery: sf.Gallery, memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sf.push(gallery.path, memory)
    steps = steps_of(lambda: sf.pull(memory, tmp_path / "whole"), monkeypatch)
    assert steps.count("published gallery.json") == 1
    for number in one_of_each(steps):
        folder = tmp_path / str(number)
        where = stopped_at(number, lambda: sf.pull(memory, folder), monkeypatch)  # noqa: B023 (called at once)
        if (folder / "gallery.json").exists():
            assert same(sf.Gallery.open(folder), gallery), where
        sf.pull(memory, folder)
        assert same(sf.Gallery.open(folder), gallery), where
        assert not list(folder.rglob("*.tmp")), where


@pytest.mark.skipif(not FORKS, reason="needs fork")
def test_a_process_that_was_killed(gallery: sf.Gallery, client: Any, tmp_path: Path) -> None:
    """By SIGKILL, before its gallery.json: nothing is there yet, and the next push uploads what is missing."""
    url = "s3://bucket/tiles.gallery"
    child = os.fork()
    if not child:
        failpoints.action = failpoints.killing("2 uploaded N.h5")
        sf.push(gallery.path, url)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    with pytest.raises(sf.GalleryNotFoundError, match=r"found no object gallery.json"):
        sf.Gallery.open(url, cache=tmp_path / "cache")
    assert (found := sf.push(gallery.path, url)).kept == 4, found
    assert same(sf.Gallery.open(url, cache=tmp_path / "cache"), gallery)
