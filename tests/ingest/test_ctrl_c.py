"""Ctrl-C while messages go to and from workers: none is lost, and neither is what they have made."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spade_faiss.ingest import workers
from tests.helpers.images import write_images
from tests.helpers.workers import create, toy

pytestmark = pytest.mark.slow  # `make test-fast` leaves the module out


@pytest.fixture(autouse=True)
def as_in_a_terminal() -> Iterator[None]:
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_it_waits_for_the_end_of_a_block() -> None:
    done = []

    def block() -> None:
        with workers._interrupts_after():
            press()
            done.append(1)

    with pytest.raises(KeyboardInterrupt):
        block()
    assert done
    with pytest.raises(KeyboardInterrupt):  # the handler is as it was
        press()


def test_it_is_ignored_where_it_was() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with workers._interrupts_after():
        press()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.parametrize("where", ["recv", "send"])
@pytest.mark.parametrize("turn", [1, 3, 5])
def test_what_workers_have_made_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, turn: int
) -> None:
    """Shards that workers close because of it are committed, and the next call goes on from there."""
    images, calls = write_images(tmp_path / "images", 22), list[int]()
    connection = workers.Connection
    really = getattr(connection, where)

    def pressed(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == turn:
            press()
        return really(self, *args)

    gallery = create(tmp_path / "g", images_a_shard=100)
    with monkeypatch.context() as patch:
        patch.setattr(connection, where, pressed)
        if where == "send" and turn > 2:  # each of two workers gets one shard's images
            gallery.add_images(images, toy(), workers=2)
        else:
            with pytest.raises(KeyboardInterrupt):
                gallery.add_images(images, toy(), workers=2)
            assert len(gallery) < 22
            assert (len(gallery) > 0) == (where == "send" or turn > 2)  # a worker says first that it is ready
    gallery.add_images(images, toy())
    assert len(gallery) == 22
    assert gallery.verify() == []
