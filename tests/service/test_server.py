"""The socket that the service listens at, and how it ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from spade_faiss.errors import OptionError, OutputError
from spade_faiss.service.server import all_listening, listening, run
from spade_faiss.service.service import Service
from tests.helpers.processes import ROOT, Program
from tests.service.conftest import settings_of


def test_a_port_in_use_is_an_error_before_anything_begins(workspace: Path) -> None:
    with listening("127.0.0.1", 0) as other:
        port = other.getsockname()[1]
        with pytest.raises(OptionError, match=f"port: {port} is in use; choose another"):
            run(settings_of(workspace, port=port))
    assert not (workspace / "service").exists()


@pytest.mark.parametrize("host", ["203.0.113.1", "a" * 70])
def test_an_address_of_no_machine(host: str) -> None:
    with pytest.raises(OptionError, match=f"host, port: expected an address to listen at, found '{host}' and 0: "):
        listening(host, 0)


def test_the_log_is_not_put_into_a_gallery(workspace: Path) -> None:
    with pytest.raises(OutputError, match="found the gallery"):
        run(settings_of(workspace, data=workspace / "tiles.gallery" / "service", port=0))


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_that_is_asked_for_is_no_error(workspace: Path, how: signal.Signals) -> None:
    code = "from spade_faiss.cli.main import main; main()"
    words = ("serve", workspace / "tiles.gallery", "--port", 0, "--data", workspace / "service")
    with Program(code, *words) as running:
        said = running.stderr.readline()
        [port] = re.findall(r"serving tiles at http://127.0.0.1:(\d+)/", said)
        with socket.create_connection(("127.0.0.1", int(port)), timeout=60) as client:
            client.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert client.recv(20).startswith(b"HTTP/1.1 200")
        os.kill(running.pid, how)
        assert "Aborted" not in running.communicate()[1]
        assert running.returncode == 0


@pytest.mark.parametrize("host", ["localhost", "both.example"])
def test_a_name_is_listened_at_by_all_its_addresses(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", named("::1", "127.0.0.1"))
    opened = all_listening(host, 0)
    monkeypatch.undo()
    if not socket.has_ipv6 or opened[0].family != socket.AF_INET6:
        opened[0].close()
        pytest.skip("this machine has no ::1")
    try:
        addresses = [one.getsockname()[:2] for one in opened]
        assert [address for address, _ in addresses] == ["::1", "127.0.0.1"]
        assert len({port for _, port in addresses}) == 1
        for address in addresses:
            socket.create_connection(address, timeout=10).close()
    finally:
        for one in opened:
            one.close()


def named(*addresses: str) -> Callable[..., list[tuple[object, ...]]]:
    kinds = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in addresses]

    def found(*_: object, **__: object) -> list[tuple[object, ...]]:
        return [(kind, socket.SOCK_STREAM, 6, "", (one, 0)) for kind, one in zip(kinds, addresses, strict=True)]

    return found


def test_an_address_of_a_name_that_is_not_here_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", named("203.0.113.1", "127.0.0.1"))
    [one] = all_listening("localhost", 0)
    with one:
        assert one.getsockname()[0] == "127.0.0.1"
    monkeypatch.setattr(socket, "getaddrinfo", named("203.0.113.1", "203.0.113.2"))
    with pytest.raises(OptionError, match=r"found '203\.0\.113\.1' and 0: "):
        all_listening("localhost", 0)


def test_a_port_in_use_at_one_address_of_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", named("127.0.0.1", "127.0.0.2"))
    with listening("127.0.0.2", 0) as other:
        port = other.getsockname()[1]
        with pytest.raises(OptionError, match=f"port: {port} is in use"):
            all_listening("localhost", port)
        listening("127.0.0.1", port).close()  # what was opened is closed again


@pytest.mark.parametrize("where", ["Generation.__init__", "Generation.warmed"])
def test_a_stop_does_not_wait_for_a_gallery_that_is_loaded(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def slow(*_: object) -> bool:
        begun.set()
        may_end.wait(60)
        raise OSError("its gallery was closed")

    how: object = slow if where.endswith("__init__") else property(slow)
    monkeypatch.setattr(f"spade_faiss.service.generations.{where}", how)
    service = Service(settings_of(workspace, port=0))
    service.start()
    assert begun.wait(60)
    ended = threading.Thread(target=service.close, daemon=True)
    ended.start()
    ended.join(30)
    is_alive = ended.is_alive()
    may_end.set()
    ended.join()
    assert not is_alive
    for thread in threading.enumerate():
        if thread.name == "warming":
            thread.join()
    assert caplog.text == ""
    assert service.problem is None


LEFT = """
import atexit, sys, threading, time
from spade_faiss.service import server
server.GRACE = 0.05
atexit.register(print, "the interpreter was ended")
left = {name: threading.Thread(target=time.sleep, args=(float(sys.argv[2]),), daemon=True) for name in ("own", "other")}
left[sys.argv[1]].start()
sys.stderr.write("said")
server._let_go([left["own"]])
"""


def test_a_thread_that_is_given_up_ends_with_the_process() -> None:
    """The interpreter would abort where that thread is in compiled code."""
    run = subprocess.run([sys.executable, "-c", LEFT, "own", "300"], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "said")


def test_threads_that_have_ended_or_are_others_keep_nothing() -> None:
    for name, seconds in (("own", "0"), ("other", "300")):
        run = subprocess.run([sys.executable, "-c", LEFT, name, seconds], cwd=ROOT, capture_output=True, text=True)
        assert (run.returncode, run.stdout) == (0, "the interpreter was ended\n")
