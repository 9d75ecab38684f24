"""The socket that the service listens at, and how it ends."""

from __future__ import annotations

import os
import re
import signal
import socket
from pathlib import Path

import pytest

from spade_faiss.errors import OptionError, OutputError
from spade_faiss.service.server import listening, run
from tests.helpers.processes import Program
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
