"""What is said of damaged files names what mends them; what is no damage does not."""

from __future__ import annotations

import errno
import os
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

import spade_faiss as sf
from spade_faiss.cli.main import cli
from spade_faiss.cli.messages import with_options, without_repair
from spade_faiss.errors import CorruptGalleryError
from spade_faiss.object_store.address import Address
from spade_faiss.store.damage import damaged
from spade_faiss.store.file_pool import PooledFile
from tests.helpers.command_line import TOY
from tests.helpers.images import make_images


def flipped(path: Path, share: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 4
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "long": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "levels": lambda path: [flipped(path, share) for share in (0.3, 0.4, 0.5, 0.6, 0.7)],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_query_names_the_command_that_mends_it(tmp_path: Path, damage: str) -> None:
    gallery = tmp_path / "my tiles.gallery"  # a shell needs quotes
    normal = make_images(tmp_path / "normal", 6)
    run = CliRunner().invoke(cli, [str(word) for word in ("build", gallery, normal, *TOY)])
    assert run.exit_code == 0
    [shard] = gallery.glob("shards/*.h5")
    DAMAGES[damage](shard)
    run = CliRunner().invoke(cli, [str(word) for word in ("query", gallery, normal, "-k", 6)])
    assert isinstance(run.exception, CorruptGalleryError)
    said = with_options(run.exception, cli.commands["query"])
    assert said.endswith(f"; mend it: `spade-faiss verify {shlex.quote(str(gallery))} --repair`")
    assert str(shard) in said
    assert str(run.exception).endswith(f"; mend {gallery} with Gallery.repair")
    checked = CliRunner().invoke(cli, ["verify", str(gallery)])
    assert checked.exit_code == 1
    assert "--repair" not in checked.stdout  # which is at it
    assert "Gallery.repair" not in checked.output


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.EACCES, errno.ENOMEM])
def test_what_is_no_damage_is_not_to_be_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refused(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(CorruptGalleryError, match=os.strerror(number)) as caught:
        PooledFile(tmp_path / "g" / "shards" / "000000.h5", 3)
    assert "repair" not in str(caught.value)


def test_an_object_store_is_pushed_to_again() -> None:
    error = damaged(Address("s3://b/tiles.gallery") / "shards" / "000000.h5", "cut short")
    assert str(error).endswith("; mend the folder that was pushed with Gallery.repair, and push it again")
    said = with_options(error, cli.commands["query"])
    assert said.endswith("mend the folder that was pushed (`spade-faiss verify GALLERY --repair`), and push it again")
    assert without_repair(str(error)) == "s3://b/tiles.gallery/shards/000000.h5: cut short"


@pytest.mark.parametrize("content", [b"{}", b"", b"[1]", b'{"format": "spade-faiss gallery", "format_version": 1}'])
def test_a_damaged_manifest_says_that_nothing_repairs_it(toy_gallery: sf.Gallery, content: bytes) -> None:
    (toy_gallery.path / "gallery.json").write_bytes(content)
    with pytest.raises(CorruptGalleryError, match="put a copy of it back, or build the gallery again"):
        sf.Gallery.open(toy_gallery.path)
