"""Clusters: cluster.json, what is refused, placing and adding, members that are lost; all in this process."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spade_faiss as sf
from spade_faiss.cluster.federation import FederatedPipeline
from spade_faiss.cluster.manifest import FILE, writing
from spade_faiss.cluster.member import Answer, LocalMember
from spade_faiss.cluster.placing import placed
from spade_faiss.system import failpoints
from tests.helpers.clusters import make_members
from tests.helpers.command_line import Spade
from tests.helpers.galleries import random_features_of
from tests.helpers.images import make_images


@pytest.fixture
def members(tmp_path: Path) -> dict[str, Path]:
    """Two galleries of the toy extractor, of 3 and 2 images."""
    return make_members(tmp_path, 3, 2)


@pytest.fixture
def cluster(tmp_path: Path, members: dict[str, Path]) -> sf.Cluster:
    return sf.Cluster.create(tmp_path / "plant.cluster", members)


def edited(cluster: sf.Cluster, **values: Any) -> None:
    path = cluster.path / FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def an_image(tmp_path: Path) -> Path:
    [file] = make_images(tmp_path / "query", 1, seed=99).iterdir()
    return file


def test_it_reads_like_a_gallery(cluster: sf.Cluster) -> None:
    assert (len(cluster), cluster.names(), cluster.generation) == (5, ["north", "south"], 0)
    assert cluster.keys([4, 0]) == ["south-001.png", "north-000.png"]
    assert cluster.ids(["south-000.png"]) == [3]
    assert "north-002.png" in cluster
    assert "west" not in cluster
    with sf.Gallery.open(cluster.cluster.members[1].path) as south:
        for level, expected in zip(cluster.read([3, 4]), south.read([0, 1]), strict=True):
            np.testing.assert_array_equal(level, expected)
    assert pickle.loads(pickle.dumps(cluster)).keys() == cluster.keys()
    assert cluster.verify() == []


def test_calibration_is_global_and_kept_with_the_members(cluster: sf.Cluster, toy: sf.Extractor) -> None:
    found = sf.calibrate(sf.Federation(cluster, toy), false_alarms=0.3)
    assert len(found.image_scores) == 5
    cluster.write_calibration(found)
    again = sf.Cluster.open(cluster.path).calibration
    assert again is not None
    assert again.image_threshold == found.image_threshold
    with sf.Gallery.open(cluster.cluster.members[0].path) as north:
        north.remove(["north-000.png"])
    changed = sf.Cluster.update(cluster.path)
    assert changed.generation == 1
    with pytest.warns(UserWarning, match="has changed since it was calibrated"):
        sf.Federation(changed, toy)
    with pytest.raises(sf.GalleryError, match="expected generation 0, which was calibrated, found 1"):
        changed.write_calibration(found)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: edited(c, format_version=2), "expected format version 1, found 2"),
        (lambda c: edited(c, generation=7), "damaged or edited"),
        (lambda c: edited(c, format="x"), "does not say format"),
        (lambda c: (c.path / FILE).write_text("{"), "cannot be read"),
    ],
)
def test_a_cluster_file_that_is_not_as_written(cluster: sf.Cluster, spoil: Any, message: str) -> None:
    spoil(cluster)
    with pytest.raises(sf.CorruptGalleryError, match=message):
        sf.Cluster.open(cluster.path)


def test_a_folder_without_a_cluster(tmp_path: Path) -> None:
    with pytest.raises(sf.GalleryNotFoundError, match="expected a cluster"):
        sf.Cluster.open(tmp_path)


@pytest.mark.parametrize("kind", ["ahead", "behind", "another", "gone", "other version"])
def test_a_member_that_is_not_as_the_cluster_knows_it(cluster: sf.Cluster, kind: str, tmp_path: Path) -> None:
    path = Path(cluster.cluster.members[1].path)
    saved = shutil.copytree(path, tmp_path / "saved")
    if kind in ("ahead", "behind"):
        with sf.Gallery.open(path) as south:
            south.remove(["south-000.png"])
        if kind == "behind":
            sf.Cluster.update(cluster.path).close()
            shutil.rmtree(path)
            saved.rename(path)
    elif kind == "another":
        generation = cluster.cluster.members[1].generation
        shutil.rmtree(path)
        with sf.Gallery.create(path, cluster.spec) as other:
            while other.generation < generation:
                other.append([f"{other.generation}"], random_features_of(1, cluster.spec))
    elif kind == "gone":
        shutil.rmtree(path)
    else:
        text = (path / "gallery.json").read_text()
        (path / "gallery.json").write_text(text.replace('"format_version": 1', '"format_version": 9'))
    expected = {
        "ahead": "at generation [0-9]+, found [0-9]+, ahead",
        "behind": "found [0-9]+, behind",
        "another": "found another gallery",
        "gone": "expected a gallery",
        "other version": "format version 1, found 9",
    }
    with pytest.raises(sf.MemberError, match=f"member 'south': .*{expected[kind]}"):
        sf.Cluster.open(cluster.path)


def test_members_that_do_not_go_together(tmp_path: Path, members: dict[str, Path]) -> None:
    path, north = tmp_path / "c", members["north"]
    with sf.Gallery.create(tmp_path / "own", sf.ExtractorSpec("own", ((3, 2, 2),), 4)) as own:
        own.append(["a"], random_features_of(1, own.spec))
    toy = sf.load_extractor("toy")
    sf.Gallery.create(tmp_path / "recipe", toy.spec, recipe="paper").close()
    sf.Gallery.create(tmp_path / "recompute", toy.spec, patches="recompute").close()
    for member, message in (
        ("own", "member 'other': .*expected"),
        ("recipe", "expected recipe None, as 'north' has, found 'paper'"),
        ("recompute", "expected patches 'stored', as 'north' has, found 'recompute'"),
        ("missing", "expected a gallery"),
    ):
        with pytest.raises(sf.MemberError, match=message):
            sf.Cluster.create(path, {"north": north, "other": tmp_path / member})
    shutil.copytree(north, tmp_path / "copy")
    with pytest.raises(sf.KeyConflictError, match=r"'north-00.*' on 'north' and 'other'"):
        sf.Cluster.create(path, {"north": north, "other": tmp_path / "copy"})
    with pytest.raises(sf.OptionError, match="each gallery once"):
        sf.Cluster.create(path, {"north": north, "other": north})
    with pytest.raises(sf.OptionError, match="each name once"):
        sf.Cluster.create(path, [north, tmp_path / "images" / "north"])
    with pytest.raises(sf.OptionError, match="expected a name of letters"):
        sf.Cluster.create(path, {"../x": north})
    with pytest.raises(sf.OptionError, match="place_by: expected a regular expression"):
        sf.Cluster.create(path, {"north": north}, place_by="(")
    with pytest.raises(sf.OptionError, match="partial: expected refuse or allow"):
        sf.MemberOptions(partial="some")  # type: ignore[arg-type]
    with pytest.raises(sf.GalleryError, match="found the address of an object store"):
        sf.Cluster.create(path, {"north": "s3://bucket/north.gallery"})
    assert not path.exists()
    sf.Cluster.create(path, {"north": north}).close()
    with pytest.raises(sf.GalleryError, match="expected no cluster there"):
        sf.Cluster.create(path, {"north": north})
    with writing(path, 0), pytest.raises(sf.GalleryLockedError, match="another process is changing it"):
        sf.Cluster.update(path)


def test_keys_are_placed_by_hash_or_by_name() -> None:
    keys = [f"{n % 3}/{n}.png" for n in range(300)]
    two, three = placed(keys, ["a", "b"], None), placed(keys, ["a", "b", "c"], None)
    assert 100 < two.count("a") < 200
    assert all(new in (old, "c") for old, new in zip(two, three, strict=True))  # the others stay
    assert placed(keys[:3], ["0", "1", "2"], r"^(\d)/") == ["0", "1", "2"]
    with pytest.raises(sf.OptionError, match=r"found '2' for '2/2.png'"):
        placed(keys[:3], ["0", "1"], r"^(\d)/")


def test_added_images_go_where_they_are_placed(cluster: sf.Cluster, toy: sf.Extractor, tmp_path: Path) -> None:
    new = make_images(tmp_path / "new", 6, seed=5)
    make_images(tmp_path / "new2", 1, seed=6).joinpath("000.png").rename(new / "north-000.png")  # north has that key
    report = cluster.add_images(new, toy, replace=True)
    assert (report.added, report.replaced, len(cluster), cluster.generation) == (7, 1, 11, 1)
    assert cluster.ids(["north-000.png"])[0] < cluster.snapshot().members.starts[1]
    again = cluster.add_images(new, toy)
    assert (again.added, again.unchanged, cluster.generation) == (0, 7, 1)


def test_an_interrupted_addition_goes_on(
    cluster: sf.Cluster, toy: sf.Extractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(step: str) -> None:
        if step == f"written {FILE}":
            raise KeyboardInterrupt

    new = make_images(tmp_path / "new", 6, seed=5)
    with monkeypatch.context() as patch:
        patch.setattr(failpoints, "action", stop)
        with pytest.raises(KeyboardInterrupt):
            cluster.add_images(new, toy)
    with pytest.raises(sf.MemberError, match="ahead"):
        sf.Cluster.open(cluster.path)
    report = cluster.add_images(new, toy)
    assert (report.added, report.unchanged, len(cluster)) == (0, 6, 11)


def test_a_member_moves(cluster: sf.Cluster, tmp_path: Path) -> None:
    shutil.move(tmp_path / "north.gallery", tmp_path / "elsewhere")
    with pytest.raises(sf.MemberError, match="member 'north'"):
        sf.Cluster.open(cluster.path)
    with pytest.raises(sf.MemberError, match=r"found .*(behind|ahead|another)"):
        sf.Cluster.move(cluster.path, "north", tmp_path / "south.gallery")
    with pytest.raises(sf.OptionError, match="expected north or south, found 'west'"):
        sf.Cluster.move(cluster.path, "west", tmp_path / "elsewhere")
    moved = sf.Cluster.move(cluster.path, "north", tmp_path / "elsewhere")
    assert (len(moved), moved.generation) == (5, 0)


class Flaky(LocalMember):
    """A member that is lost after some calls of a method."""

    def __init__(self, member: LocalMember, method: str, calls: int) -> None:
        super().__init__(member.gallery.entry, member.gallery)
        self.method, self.left, self.lost = method, calls, False

    def call(self, method: str, *args: Any) -> Answer:
        if method == self.method:
            self.left -= 1
        if self.left < 0 or self.lost:
            self.lost = True
            raise sf.MemberError(f"member {self.name!r}: lost")
        return super().call(method, *args)


@pytest.mark.parametrize("method", ["search", "match", "texts"])
def test_a_member_that_is_lost(members: dict[str, Path], toy: sf.Extractor, tmp_path: Path, method: str) -> None:
    image, path = an_image(tmp_path), tmp_path / "c"
    sf.Cluster.create(path, members).close()
    for partial in ("refuse", "allow"):
        cluster = sf.Cluster.open(path, options=sf.MemberOptions(partial=partial))  # type: ignore[arg-type]
        inner = cluster.snapshot().members
        flaky = Flaky(inner.members[1], method, 0)  # type: ignore[arg-type]
        inner.members = inner.members[0], flaky
        federation = sf.Federation(cluster, toy, sf.SearchOptions(k=3))
        if partial == "refuse":
            with pytest.raises(sf.MemberError, match="member 'south': lost"):
                federation.query(image)
            continue
        found = federation.query(image)
        assert found.missing == ("south",)
        with sf.Gallery.open(members["north"]) as north:
            expected = sf.Detector(north, toy, sf.SearchOptions(k=3)).query(image)
        assert found.neighbours.keys == expected.neighbours.keys
        np.testing.assert_array_equal(found.anomaly_map, expected.anomaly_map)
        flaky.left, flaky.lost = 10**6, False
        inner._lost[1] -= 60
        assert federation.query(image).missing == ()  # it is back


@pytest.mark.parametrize("stage", ["_match", "_score"])
def test_a_member_that_comes_back_during_a_query_was_missing_all_the_same(
    members: dict[str, Path], toy: sf.Extractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    sf.Cluster.create(tmp_path / "c", members).close()
    cluster = sf.Cluster.open(tmp_path / "c", options=sf.MemberOptions(partial="allow"))
    inner = cluster.snapshot().members
    federation = sf.Federation(cluster, toy, sf.SearchOptions(k=3))
    original = getattr(FederatedPipeline, stage)

    def back(*args: Any) -> Any:
        inner._lost.clear()
        return original(*args)

    monkeypatch.setattr(FederatedPipeline, stage, back)
    for images in ([an_image(tmp_path)], sorted((tmp_path / "images" / "north").iterdir())):
        inner._lost[1] = time.monotonic()
        assert next(federation.stream(images)).missing == ("south",)
        assert not inner._lost


def test_a_member_that_is_lost_from_the_beginning(members: dict[str, Path], toy: sf.Extractor, tmp_path: Path) -> None:
    sf.Cluster.create(tmp_path / "c", members).close()
    shutil.rmtree(members["north"])
    cluster = sf.Cluster.open(tmp_path / "c", options=sf.MemberOptions(partial="allow"))
    assert len(cluster) == 2
    found = sf.Federation(cluster, toy).query(an_image(tmp_path))
    assert (found.missing, len(found.neighbours.keys)) == (("north",), 2)
    shutil.rmtree(members["south"])
    with pytest.raises(sf.MemberError):
        sf.Cluster.open(tmp_path / "c", options=sf.MemberOptions(partial="allow"))


def test_what_is_passed_over_is_told(cluster: sf.Cluster, toy: sf.Extractor, tmp_path: Path) -> None:
    new = make_images(tmp_path / "new", 1, seed=5)
    (new / ".DS_Store").write_bytes(b"\0")
    (new / "notes.txt").write_text("of the line")
    with sf.Gallery.create(tmp_path / "one", toy.spec) as one:
        expected = one.add_images(new, toy)
    assert any("passed over" in text for text in expected.notes)
    assert cluster.add_images(new, toy).notes == expected.notes


def test_commands(spade: Spade, members: dict[str, Path], tmp_path: Path) -> None:
    path, image = tmp_path / "plant.cluster", an_image(tmp_path)
    run = spade("cluster", "create", path, f"north={members['north']}", members["south"])
    assert (run.status, "5 images on 2 members" in run.out) == (0, True), run.err
    run = spade("cluster", "create", path, members["north"])
    assert (run.status, "expected no cluster there" in run.err) == (1, True)
    run = spade("cluster", "query", path, image, "--json", "--output", tmp_path / "out")
    assert run.status == 0, run.err
    one = sf.Gallery.create(tmp_path / "one", sf.load_extractor("toy").spec)
    with one:
        for name in members:
            one.add_images(tmp_path / "images" / name, sf.load_extractor("toy"))
    expected = json.loads(spade("query", tmp_path / "one", image, "--json").out)
    found = json.loads(run.out)
    for name in ("image_score", "map_max", "neighbours"):
        assert found[name] == expected[name]
    assert "missing" not in found
    new = make_images(tmp_path / "new", 2, seed=5)
    assert "2 added" in spade("cluster", "add", path, new, "--quiet").out
    run = spade("cluster", "calibrate", path, "--false-alarms", 0.3)
    assert "7 images: image score above" in run.out, run.err
    assert json.loads(spade("cluster", "query", path, image, "--json").out)["verdict"] is not None
    info = json.loads(spade("cluster", "info", path, "--json").out)
    assert (info["images"], info["calibrated"]) == (7, True)
    assert "7 images checked, 0 problems" in spade("cluster", "verify", path).out
    shutil.move(members["north"], tmp_path / "elsewhere")
    run = spade("cluster", "query", path, image)
    assert (run.status, "member 'north'" in run.err) == (1, True)
    run = spade("cluster", "query", path, image, "--json", "--partial", "allow", "--output", tmp_path / "partial")
    assert json.loads(run.out)["missing"] == ["north"]
    assert "north" in run.err
    assert spade("cluster", "move", path, "north", tmp_path / "elsewhere").status == 0
    with sf.Gallery.open(tmp_path / "elsewhere") as north:
        north.remove(["north-000.png"])
    run = spade("cluster", "info", path)
    assert (run.status, "cluster update" in run.err) == (1, True)
    assert "6 images on 2 members" in spade("cluster", "update", path).out
    for words in (("evaluate", path, "--shots", 2, tmp_path), ("query", path, image, "--cache", tmp_path)):
        assert "No such option" in spade("cluster", *words).err


def test_evaluate(spade: Spade, members: dict[str, Path], tmp_path: Path) -> None:
    for kind, seed in (("good", 50), ("scratch", 60)):
        make_images(tmp_path / "set" / "test" / kind, 2, seed)
    make_images(tmp_path / "set" / "train" / "good", 1, seed=70)
    spade("cluster", "create", tmp_path / "c", *members.values())
    run = spade("cluster", "evaluate", tmp_path / "c", tmp_path / "set", "--json", "--quiet")
    assert run.status == 0, run.err
    [found] = json.loads(run.out)
    assert (found["normal"], found["anomalous"]) == (2, 2)


def test_queries_run_ahead_only_where_members_have_processes(cluster: sf.Cluster, toy: sf.Extractor) -> None:
    pipeline = sf.Federation(cluster, toy).pipeline()
    assert isinstance(pipeline, FederatedPipeline)
    assert pipeline.members.parallel == 0


def test_ray_that_is_not_installed(cluster: sf.Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(sf.OptionError, match=r"install spade-faiss\[ray\]"):
        sf.Cluster.open(cluster.path, options=sf.MemberOptions(ray="local"))


def test_a_relative_path_is_that_of_when_it_was_opened(
    cluster: sf.Cluster, toy: sf.Extractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(cluster.path.parent)
    opened = sf.Cluster.open(cluster.path.name)
    pickled, keys = pickle.dumps(opened), cluster.keys()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for one in (opened, pickle.loads(pickled)):
        one.refresh()
        assert (one.keys(), str(one.path)) == (keys, cluster.path.name)
        one.write_calibration(sf.calibrate(sf.Federation(one, toy), false_alarms=0.3))
    assert not list((tmp_path / "elsewhere").iterdir())
