"""What lies in the user's cache folder in place of what a network is: it is never used, and the network is made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from spade_faiss.extractors import openvino_network
from spade_faiss.system import user_cache
from spade_faiss.system.sealed_json import sealed
from tests.helpers.kept_networks import assert_same, load

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread", "timm_is_not_imported"),
    pytest.mark.skipif(not openvino_network.is_installed(), reason="there is no OpenVINO for this machine"),
]


def kept(cache: Path) -> list[Path]:
    """What is kept of a network, by the options that were given and by those of its spec."""
    paths = sorted(cache.rglob("networks/*.json"))
    assert len(paths) == 2
    return paths


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flipped(path: Path) -> None:
    content = path.read_text()
    path.write_text(content.replace('"image_dim": ', '"image_dim": 1'))


def of_another(path: Path) -> None:
    """Whole, of another network."""
    values = json.loads(path.read_bytes())
    values["request"]["name"] = "other"
    del values["xxh3"]
    path.write_bytes(sealed(values))


def without_a_field(path: Path) -> None:
    values = json.loads(path.read_bytes())
    del values["spec"]["image_dim"], values["xxh3"]
    path.write_bytes(sealed(values))


def with_a_bad_value(path: Path) -> None:
    values = json.loads(path.read_bytes())
    values["spec"]["image_dim"] = -1
    del values["xxh3"]
    path.write_bytes(sealed(values))


def a_list(path: Path) -> None:
    path.write_text("[]")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage", [truncated, flipped, of_another, without_a_field, with_a_bad_value, a_list, a_folder]
)
def test_what_cannot_be_used_is_made_again(
    own_cache: Path, weights: Path, made: list[str], damage: Callable[[Path], None]
) -> None:
    first = load(weights)
    for path in kept(own_cache):
        damage(path)
    assert_same(load(weights), first)
    assert len(made) == 2
    assert_same(load(weights), first)
    assert len(made) == (3 if damage is a_folder else 2)


def test_a_converted_network_that_is_gone_or_damaged(own_cache: Path, weights: Path, made: list[str]) -> None:
    first = load(weights)
    [path] = own_cache.rglob("*.zip")
    path.unlink()
    assert_same(load(weights), first)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="expected a converted network, found a file that is cut short or changed"):
        assert_same(load(weights), first)
    assert len(made) == 3


def test_a_full_disk_leaves_nothing(own_cache: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(user_cache, "publish", full)
    with pytest.warns(UserWarning, match="cannot be used: No space left on device") as caught:
        load(weights)
    assert len(caught) == 1
    assert not [path for path in own_cache.rglob("*") if path.is_file()]
