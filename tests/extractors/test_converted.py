"""Networks converted for OpenVINO, kept in the user's cache folder: damaged files and full disks."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from spade_faiss.extractors import converted, openvino_network, runtimes
from spade_faiss.extractors.runtimes import TorchNetwork, choose
from spade_faiss.system import user_cache
from tests.helpers.runtimes import chosen, small

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.skipif(not openvino_network.is_installed(), reason="there is no OpenVINO for this machine"),
]


def truncated(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def half_written(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path, _: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # in the weights
    path.write_bytes(content)


def of_another_network(path: Path, other: Path) -> None:
    shutil.copy(other, path)


def with_weights_of_another(path: Path, other: Path) -> None:
    """Whole as a file, but not what about.json speaks of."""
    rewritten(path, lambda name, content: zipfile.ZipFile(other).read(name) if name == "model.bin" else content)


def of_another_version(path: Path, _: Path) -> None:
    def change(name: str, content: bytes) -> bytes:
        about = json.loads(content) if name == "about.json" else None
        return json.dumps({**about, "identity": {**about["identity"], "openvino": "1"}}).encode() if about else content

    rewritten(path, change)


def not_a_zip(path: Path, _: Path) -> None:
    path.write_bytes(b"")


def rewritten(path: Path, change: Callable[[str, bytes], bytes]) -> None:
    with zipfile.ZipFile(path) as file:
        parts = {name: change(name, file.read(name)) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in parts.items():
            file.writestr(name, content)


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (truncated, "cut short or changed"),
        (half_written, "cut short or changed"),
        (flipped, "cut short or changed"),
        (not_a_zip, "cut short or changed"),
        (of_another_network, r"another network or machine \(name\)"),
        (of_another_version, r"another network or machine \(openvino\)"),
        (with_weights_of_another, "a model with another checksum"),
    ],
)
def test_a_file_that_is_not_the_converted_network(own_cache: Path, damage: Any, found: str) -> None:
    """It is never loaded: the network is converted again, in its place."""
    network = small()
    other = replace(
        network, identity={"name": "other"}, exact=lambda x: scaled(network, x), forward=lambda x: scaled(network, x)
    )
    assert chosen(network, "openvino") == "openvino"
    [path] = own_cache.rglob("*.zip")
    assert chosen(other, "openvino") == "openvino"
    [another] = set(own_cache.rglob("*.zip")) - {path}
    damage(path, another)
    with pytest.warns(UserWarning, match=rf"^{path}: expected a converted network, found .*{found}.*; it is converted"):
        _, forward = choose("openvino", network, "cpu")
    batch = runtimes._probes(network.crop)
    assert runtimes.difference(forward(batch), network.exact(batch)) < 1e-5
    assert chosen(network, "openvino") == "openvino"  # it was written again, and is loaded without a warning
    assert not list(own_cache.rglob("*.tmp"))


def scaled(network: TorchNetwork, batch: Tensor) -> tuple[Tensor, list[Tensor]]:
    image, [level] = network.exact(batch)
    return image, [level * 3.0]


def test_a_cache_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    said = (
        r"^the network is converted in memory, in each process: .* cannot be used: Not a directory; set XDG_CACHE_HOME"
    )
    with pytest.warns(UserWarning, match=said) as caught:
        assert chosen(small(), "openvino") == "openvino"
    assert len(caught) == 1


def test_a_full_disk_leaves_nothing(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(user_cache, "publish", full)
    with pytest.warns(UserWarning, match="cannot be used: No space left on device; set XDG_CACHE_HOME"):
        assert chosen(small(), "openvino") == "openvino"
    assert [path for path in own_cache.rglob("*") if path.is_file()] == []


def test_the_oldest_converted_networks_are_dropped(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converted, "MOST", 2)
    for number in range(4):
        identity = {"name": "toy", "number": number}
        path = converted.path_of(identity)
        converted.write(path, identity, converted.Conversion(error=str(number)))
        os.utime(path, (number, number))
    kept = [
        converted.read(converted.path_of(found), found) for found in ({"name": "toy", "number": n} for n in range(4))
    ]
    assert [one and one.error for one in kept] == [None, None, "2", "3"]
