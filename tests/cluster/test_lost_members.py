"""Clusters whose members are missing, damaged, half copied or cannot be written: nothing is taken in silence."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.cluster.members import Members
from spade_faiss.store.locks import WriterLock
from tests.helpers.clusters import make_members
from tests.helpers.images import make_images

ALLOW = sf.MemberOptions(partial="allow")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A cluster of two galleries of the toy extractor, of 6 and 5 images."""
    sf.Cluster.create(tmp_path / "c", make_members(tmp_path, 6, 5)).close()
    return tmp_path / "c"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    [file] = make_images(tmp_path / "query", 1, seed=99).iterdir()
    return file


def damage(gallery: Path) -> None:
    for shard in (gallery / "shards").iterdir():
        content = bytearray(shard.read_bytes())
        content[len(content) // 4 :: 7] = bytes(255 - byte for byte in content[len(content) // 4 :: 7])
        shard.write_bytes(content)


@pytest.mark.parametrize("find_out", [sf.calibrate, sf.find_suspects])
def test_nothing_is_found_out_about_normal_images_without_a_member(
    path: Path, toy: sf.Extractor, image: Path, find_out: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"false_alarms": 0.3} if find_out is sf.calibrate else {}
    away = (path.parent / "south.gallery").rename(path.parent / "away")
    cluster = sf.Cluster.open(path, options=ALLOW)
    assert sf.Federation(cluster, toy).query(image).missing == ("south",)
    with pytest.raises(sf.MemberError, match=r"c: expected all members, found 'south' missing"):
        find_out(sf.Federation(cluster, toy), **options)
    away.rename(path.parent / "south.gallery")
    cluster.refresh()
    assert find_out(sf.Federation(cluster, toy), **options)
    looked = Members.look_again

    def lost_meanwhile(members: Members) -> None:
        """At the first look all are there, at those after it one is not."""
        looked(members)
        monkeypatch.setattr(Members, "look_again", lambda members: members._lost.update({1: float("inf")}))

    monkeypatch.setattr(Members, "look_again", lost_meanwhile)
    with pytest.raises(sf.MemberError, match=r"c: expected all members, found 'south' missing"):
        find_out(sf.Federation(cluster, toy), **options)


@pytest.mark.filterwarnings("ignore:image index is rebuilt")
@pytest.mark.parametrize("kind", ["moved away", "damaged"])
def test_a_member_whose_files_are_lost_after_opening(path: Path, toy: sf.Extractor, image: Path, kind: str) -> None:
    north, south = path.parent / "north.gallery", path.parent / "south.gallery"
    refusing, allowing = sf.Cluster.open(path), sf.Cluster.open(path, options=ALLOW)
    refused, allowed = sf.Federation(refusing, toy), sf.Federation(allowing, toy)
    if kind == "damaged":
        damage(south)
    else:
        south.rename(path.parent / "away")
    with pytest.raises(sf.MemberError, match=r"^member 'south': ") as raised:
        refused.query(image)
    assert isinstance(raised.value.__cause__, sf.CorruptGalleryError)
    found = allowed.query(image)
    assert found.missing == ("south",)
    with sf.Gallery.open(north) as alone:
        expected = sf.Detector(alone, toy).query(image)
    assert found.neighbours.keys == expected.neighbours.keys
    np.testing.assert_array_equal(found.anomaly_map, expected.anomaly_map)


def test_an_addition_that_fails_at_one_member_leaves_a_cluster_that_answers(
    path: Path, toy: sf.Extractor, image: Path
) -> None:
    new = make_images(path.parent / "new", 12, seed=5)
    with sf.Cluster.open(path) as cluster:
        with (
            WriterLock(path.parent / "south.gallery", 0),
            pytest.raises(sf.GalleryLockedError, match=r"south\.gallery"),
        ):
            cluster.add_images(new, toy)
        with sf.Cluster.open(path) as again:
            assert again.generation == 1
            assert 11 < len(again) < 23
            assert sf.Federation(again, toy).query(image).missing == ()
            added = len(again) - 11
        report = cluster.add_images(new, toy)
        assert (report.added, report.unchanged, len(cluster)) == (12 - added, added, 23)


def test_what_a_member_had_committed_before_it_failed_is_in_the_cluster(
    path: Path, toy: sf.Extractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(gallery: sf.Gallery, *_: Any, **__: Any) -> None:
        gallery.remove([gallery.keys()[0]])
        raise sf.GalleryError("no space left")

    new = make_images(path.parent / "new", 12, seed=5)
    with sf.Cluster.open(path) as cluster, monkeypatch.context() as patch:
        patch.setattr(sf.Gallery, "add_images", fail)
        with pytest.raises(sf.GalleryError, match="no space left"):
            cluster.add_images(new, toy)
    with sf.Cluster.open(path) as again:
        assert len(again) == 10


def test_a_calibration_of_another_cluster_is_refused(path: Path, toy: sf.Extractor) -> None:
    cluster = sf.Cluster.open(path)
    found = sf.calibrate(sf.Federation(cluster, toy), false_alarms=0.3)
    shutil.copytree(path.parent / "north.gallery", path.parent / "elsewhere")
    sf.Cluster.move(path, "north", path.parent / "elsewhere").close()
    cluster.write_calibration(found)  # the same images
    (path / "cluster.json").unlink()
    sf.Cluster.create(path, {"south": path.parent / "south.gallery"}).close()
    with pytest.raises(sf.GalleryError, match="expected the members that were opened, found others"):
        cluster.write_calibration(found)
    assert sf.Cluster.open(path).calibration is None


@pytest.mark.parametrize("what", ["shards", "index", "keys"])
def test_a_member_moves_with_all_its_files(path: Path, what: str) -> None:
    to = shutil.copytree(path.parent / "north.gallery", path.parent / "elsewhere")
    with sf.Gallery.open(to) as gallery:
        manifest = gallery.snapshot().manifest
    entry = {"shards": manifest.shards[0], "index": manifest.index, "keys": manifest.keys}[what]
    assert entry is not None
    content = (to / entry.file).read_bytes()
    for spoil, found in (
        (lambda: (to / entry.file).write_bytes(content[:-1]), entry.bytes - 1),
        ((to / entry.file).unlink, "no such file"),
    ):
        spoil()
        with pytest.raises(sf.MemberError, match=f"member 'north': .*{entry.file}.*{entry.bytes} bytes, found {found}"):
            sf.Cluster.move(path, "north", to)
    (to / entry.file).write_bytes(content)
    assert len(sf.Cluster.move(path, "north", to)) == 11
