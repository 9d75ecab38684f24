"""What the command line does where a path leads to something else than what belongs there."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import spade_faiss as sf
from spade_faiss.errors import OutputError
from spade_faiss.system.atomic_files import publish, whole_file, write_whole
from tests.helpers.command_line import TOY, Spade
from tests.helpers.images import make_images

pytestmark = pytest.mark.slow  # `make test-fast` leaves the module out

QUIET = "-k", 2, "--quiet"


@pytest.fixture
def results(tmp_path: Path, spade: Spade, gallery: Path, normal: Path) -> Path:
    """A finished query's."""
    assert spade("calibrate", gallery, *QUIET, "--false-alarms", 0.1).status == 0
    assert spade("query", gallery, normal / "000.png", *QUIET, "--output", tmp_path / "results").status == 0
    return tmp_path / "results"


def special(path: Path, kind: str) -> Path:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a pipe":
        os.mkfifo(path.with_name("pipe"))
        path.symlink_to("pipe")
    else:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(str(path))
    return path


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "socket"])
def test_a_file_does_not_take_the_place_of_something_special(tmp_path: Path, kind: str) -> None:
    place, whole = special(tmp_path / "out", kind), tmp_path / "whole"
    whole.write_bytes(b"content")
    before = place.lstat().st_mode
    for write in (
        lambda: write_whole(place, b"content"),
        lambda: whole_file(place).__enter__(),
        lambda: publish(whole, place),
    ):
        with pytest.raises(OutputError, match="expected a file, or a name that is free, found a pipe or a device"):
            write()
    assert place.lstat().st_mode == before
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_goes_on_leading_to_what_is_written(tmp_path: Path, exists: bool) -> None:
    target, link = tmp_path / "there" / "file", tmp_path / "link"
    target.parent.mkdir()
    if exists:
        target.write_bytes(b"old")
    link.symlink_to(target)
    write_whole(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


def test_an_export_refuses_a_pipe(tmp_path: Path, spade: Spade, results: Path) -> None:
    pipe = special(tmp_path / "out.json", "pipe")
    assert "found a pipe or a device" in spade("export", results, "--format", "coco", "-o", pipe).error
    assert stat.S_ISFIFO(pipe.lstat().st_mode)


@pytest.mark.parametrize("command", ["query", "audit", "evaluate"])
@pytest.mark.parametrize("place", ["gallery", "in a gallery", "in a cluster", "images"])
def test_results_are_not_written_among_what_is_somebody_elses(
    tmp_path: Path, spade: Spade, gallery: Path, normal: Path, command: str, place: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(normal, other)
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "cluster.json").write_text('{"members": [], "format": "spade-faiss cluster"}')
    output = {
        "gallery": gallery, "in a gallery": gallery / "results", "in a cluster": tmp_path / "cluster" / "results",
        "images": other,
    }[place]  # fmt: skip
    rest = {"query": (normal / "000.png",), "audit": (), "evaluate": ("--normal", normal, "--abnormal", other)}[command]
    before = sorted(tmp_path.rglob("*"))
    run = spade(command, gallery, *rest, *QUIET, "--output", output)
    assert run.status == 1
    assert run.error.startswith(f"spade-faiss: error: {output}: expected a folder for results")
    assert "choose another" in run.error
    assert sorted(tmp_path.rglob("*")) == before


def test_files_of_other_programs_do_not_make_a_gallery(
    tmp_path: Path, spade: Spade, gallery: Path, normal: Path
) -> None:
    for name in ("gallery.json", "cluster.json"):
        (tmp_path / name).write_text('{"format": "another"}')
    for output in (tmp_path / "results", tmp_path):
        assert spade("query", gallery, normal / "000.png", *QUIET, "--output", output).status == 0
    (gallery / "gallery.json").write_text("damaged")
    run = spade("query", normal, normal / "000.png", "--output", gallery / "results")
    assert "found the gallery" in run.error


def test_results_are_not_written_among_the_images_of_a_set(
    tmp_path: Path, spade: Spade, gallery: Path, normal: Path
) -> None:
    dataset = tmp_path / "set"
    shutil.copytree(normal, dataset / "train" / "good")
    for seed, kind in enumerate(("good", "crack")):
        make_images(dataset / "test" / kind, 2, seed)
    for output in (dataset, dataset / "test", dataset / "test" / "good"):
        run = spade("evaluate", gallery, dataset, *QUIET, "--output", output)
        assert run.error.startswith(f"spade-faiss: error: {output}: expected a folder for results")
    assert not list(dataset.rglob("metrics.json"))
    assert spade("evaluate", gallery, dataset, *QUIET, "--output", dataset / "new").status == 0
    assert spade("evaluate", gallery, dataset, *QUIET, "--output", dataset / "new").status == 0  # and again


@pytest.mark.parametrize("damage", ["garbage", "cut", "edited", "folder"])
@pytest.mark.parametrize("name", ["calibration.json", "trusted.json"])
def test_verify_names_whatever_a_query_would_refuse(
    spade: Spade, gallery: Path, normal: Path, damage: str, name: str
) -> None:
    assert spade("calibrate", gallery, *QUIET, "--false-alarms", 0.1).status == 0
    assert spade("trust", gallery, "000.png").status == 0
    assert spade("verify", gallery).status == 0
    place = gallery / name
    content = place.read_bytes()
    place.unlink()
    if damage == "folder":
        place.mkdir()
    else:
        changed = {"garbage": b"garbage", "cut": content[:-9], "edited": content.replace(b"1", b"2", 1)}[damage]
        place.write_bytes(changed)
    assert name in spade("query", gallery, normal, *QUIET).error
    for words in ((), ("--repair",), ("--repair", "--drop-unreadable", "--normal", normal)):
        run = spade("verify", gallery, *words)
        assert run.status == 1
        assert f"{name}: " in run.out
        assert "1 problems" in run.out
        assert "--normal" not in run.err  # which would not help
    assert sf.Gallery.open(gallery).verify()[0].file == name


@pytest.mark.parametrize(
    "name", ["index/image-000009.faiss", "index/keys-000009.npy", "shards/000077.h5", "shards/a.tmp"]
)
def test_a_folder_where_a_file_of_a_gallery_could_be_is_left_alone(
    tmp_path: Path, spade: Spade, gallery: Path, normal: Path, name: str
) -> None:
    (gallery / name).mkdir()
    (gallery / name / "own").write_text("somebody's")
    (normal / "new.png").write_bytes((normal / "001.png").read_bytes() + b" ")
    assert spade("add", gallery, normal, "--quiet").status == 0
    assert spade("remove", gallery, "000.png").status == 0
    assert spade("compact", gallery).status == 0
    assert spade("verify", gallery).status == 0
    assert (gallery / name / "own").read_text() == "somebody's"


def test_an_index_file_that_has_become_a_folder_is_repaired(spade: Spade, gallery: Path, normal: Path) -> None:
    for file in (next(gallery.glob("index/*.faiss")), next(gallery.glob("index/*.npy"))):
        file.unlink()
        file.mkdir()
    assert spade("verify", gallery).status == 1
    assert spade("verify", gallery, "--repair").status == 0
    assert spade("query", gallery, normal, *QUIET).status == 0


@pytest.mark.parametrize("words", [("--help",), ("--version",), ("info",), ("info", "--json"), ("verify",), ("query",)])
def test_what_cannot_be_printed_is_an_error_of_one_line(gallery: Path, normal: Path, words: tuple[str, ...]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    given = [str(gallery)] if words[0] in ("info", "verify") else []
    if words[0] == "query":
        given = [str(gallery), str(normal / "000.png"), "-k", "2", "--quiet"]
    with Path("/dev/full").open("w") as full:
        run = subprocess.run(
            [sys.executable, "-m", "spade_faiss.cli", words[0], *given, *words[1:]],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert run.returncode == 1
    assert run.stderr == (
        "spade-faiss: error: what is printed cannot be written to where stdout leads: No space left on device\n"
    )


def test_a_working_directory_that_is_gone_is_an_error_of_one_line(tmp_path: Path, gallery: Path, normal: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    code = (
        f"import os, sys; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r})\n"
        "from spade_faiss.cli.main import main\n"
        f"sys.argv = ['spade-faiss', 'query', {str(gallery)!r}, {str(normal)!r}]\n"
        "main()"
    )
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(sf.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert run.returncode == 1
    assert run.stderr == "spade-faiss: error: the working directory is gone; change to one that exists\n"


@pytest.mark.parametrize("seconds", ["nan", "-1", "soon"])
def test_seconds_to_wait_are_a_number(tmp_path: Path, spade: Spade, gallery: Path, normal: Path, seconds: str) -> None:
    for words in (("add", gallery, normal), ("remove", gallery, "000.png"), ("build", tmp_path / "g", normal, *TOY)):
        run = spade(*words, "--wait", seconds)
        assert run.status == 2
        assert "--wait" in run.err
        assert "Traceback" not in run.err
    assert not (tmp_path / "g").exists()


def test_python_is_told_so_too(toy_gallery: sf.Gallery) -> None:
    with pytest.raises(sf.OptionError, match="timeout: expected seconds, 0 or more, found nan"):
        toy_gallery.remove(["000.png"], timeout=float("nan"))


def test_what_is_ignored_is_refused(tmp_path: Path, spade: Spade, gallery: Path, normal: Path) -> None:
    """An option that would have no effect is a mistake of the user's."""
    for words in (("query", gallery, normal / "000.png", "-k", 2), ("audit", gallery, "-k", 2), ("verify", gallery)):
        for place, found in ((tmp_path / "nowhere", "none"), (normal / "000.png", "a file")):
            run = spade(*words, "--normal", place)
            assert run.status == 2
            assert f"--normal: expected a folder, found {found}: {place}" in run.err
    run = spade("build", tmp_path / "g", normal, *TOY, "--index", "IVF4,Flat", "--nlist", 5)
    assert run.status == 2
    assert "--nlist: expected none, as --index IVF4,Flat has 4 lists, found 5" in run.err
    run = spade("build", tmp_path / "g", normal, "--extractor", "toy", "--levels", "")
    assert run.error.startswith("spade-faiss: error: levels: expected names of at least one level")
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("query", "GALLERY", "NORMAL", "--localise", "suspicious"), "take --image-score knn"),
        (("query", "GALLERY", "NORMAL", "--block-mib", 0), "--block-mib"),
        (("query", "GALLERY", "NORMAL", "--runtime", "openvino"), "--runtime auto"),
        (("build", "NEW", "NORMAL", "--extractor", "toy", "--recipe", "rad"), "--extractor timm:"),
        (("serve", "GALLERY", "--host", "0.0.0.0"), "--tokens FILE"),
        (("serve", "GALLERY", "--data", "/dev/null/x"), "--data DIR"),
        (("serve", "NEW"), "make one with build"),
        (("export-backbone", "GALLERY", "net.onnx"), "found toy, which has none"),
    ],
    ids=lambda words: words[0] if isinstance(words, tuple) else None,
)
def test_an_error_names_options_that_the_command_has(
    tmp_path: Path, spade: Spade, gallery: Path, normal: Path, words: tuple[object, ...], said: str
) -> None:
    places = {"GALLERY": gallery, "NORMAL": normal, "NEW": tmp_path / "new"}
    run = spade(*(places.get(str(word), word) for word in words))
    assert run.status in (1, 2)
    assert said in run.err
    for python in ("=FILE", "=FOLDER", "tokens=", "Gallery.", "precision=", "block_bytes", "device='"):
        assert python not in run.err


def test_an_empty_gallery_says_that_it_is(spade: Spade, gallery: Path, normal: Path) -> None:
    assert spade("remove", gallery, *(path.name for path in normal.iterdir())).status == 0
    for words in (("query", normal), ("calibrate",), ("audit",)):
        assert spade(words[0], gallery, *words[1:]).error.endswith(": expected normal images, found none; add some")


@pytest.mark.parametrize(
    ("given", "said"),
    [("", "expected a path, found an empty text"), ("s3://bucket/out", "found the address of an object store")],
)
def test_what_is_no_path_of_this_machine_is_refused(
    tmp_path: Path, spade: Spade, gallery: Path, normal: Path, monkeypatch: pytest.MonkeyPatch, given: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for words in (
        ("add", gallery, given), ("build", "new", given, *TOY), ("query", gallery, normal, "--output", given),
        ("export", normal, "--format", "coco", "-o", given), ("demo", "--output", given),
        ("cluster", "create", "plant.cluster", gallery, f"a={given}"), ("cluster", "info", given),
    ):  # fmt: skip
        run = spade(*words)
        assert (run.status, said in run.err) == (2, True), words
    assert spade("info", "").status == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_results_that_cannot_be_written_are_refused_before_anything_is_computed(
    tmp_path: Path, spade: Spade, gallery: Path, normal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spade_faiss.cli.options.detector_of", None)
    monkeypatch.setattr("spade_faiss.cli.demo.load_extractor", None)
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    for words in (("audit", gallery), ("query", gallery, normal), ("demo",)):
        assert "cannot write" in spade(*words, "--output", tmp_path / "file").error
    for place in (normal, gallery):
        assert "choose another folder" in spade("demo", "--output", place).error
    assert sorted(tmp_path.rglob("*")) == before


def test_galleries_and_clusters_are_told_apart(tmp_path: Path, spade: Spade, gallery: Path, normal: Path) -> None:
    cluster = tmp_path / "plant.cluster"
    assert spade("cluster", "create", cluster, gallery).status == 0
    for words, said in (
        (("query", cluster, normal), "expected a gallery, found a cluster; take `cluster query`"),
        (("compact", cluster), "expected a gallery, found a cluster\n"),
        (("cluster", "query", gallery, normal), "expected a cluster, found a gallery; take `query`"),
        (("cluster", "update", gallery), "expected a cluster, found a gallery\n"),
    ):
        run = spade(*words)
        assert (run.status, said in run.err) == (2, True), run.err


def test_folders_of_the_service_that_are_none(tmp_path: Path, spade: Spade, gallery: Path) -> None:
    assert "--normal: expected a folder, found none" in spade("serve", gallery, "--normal", tmp_path / "nosuch").err
    run = spade("serve", gallery, "--label-files", tmp_path / "nosuch")
    assert "--label-files: expected a folder, found none" in run.error
