"""The command line, as a person or a program uses it: output, files, exit status, one clear line for each mistake."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import spade_faiss as sf
from spade_faiss.recipes import DEFAULT_RECIPE
from tests.helpers.command_line import TOY, Spade
from tests.helpers.images import make_images
from tests.helpers.permissions import permissions_count
from tests.helpers.processes import Program


def test_build_says_what_it_needs_and_did(tmp_path: Path, normal: Path, spade: Spade) -> None:
    run = spade("build", tmp_path / "g", normal, "--extractor", "toy")
    assert run.status == 0
    assert "this will need: 12 images" in run.err
    assert "ms an image" in run.err
    assert "\r" not in run.err  # no progress bar where stderr is no terminal
    assert "12 added (0 replaced), 0 unchanged, 0 skipped; 12 images" in run.out
    again = spade("build", tmp_path / "g", normal, "--extractor", "toy", "--quiet")
    assert "0 added (0 replaced), 12 unchanged" in again.out
    assert again.err == ""


@pytest.mark.slow
@pytest.mark.usefixtures("forked_workers")
def test_build_and_add_by_two_processes(tmp_path: Path, normal: Path, spade: Spade) -> None:
    (normal / "empty.png").touch()
    options = ("--workers", 2, "--batch-size", 4)
    run = spade("build", tmp_path / "g", normal, *TOY, *options)
    assert run.status == 3
    assert "12 added (0 replaced), 0 unchanged, 1 skipped; 12 images" in run.out
    assert f"spade-faiss: skipped: {normal / 'empty.png'}: " in run.err
    assert json.loads(spade("info", tmp_path / "g", "--json").out)["shards"] == 2
    more = make_images(tmp_path / "more" / "new", 2, seed=1).parent
    assert "2 added (0 replaced), 0 unchanged" in spade("add", tmp_path / "g", more, *options).out
    assert "14 images checked, 0 problems" in spade("verify", tmp_path / "g").out


def test_add_remove_compact_info_verify(tmp_path: Path, gallery: Path, spade: Spade) -> None:
    more = make_images(tmp_path / "more ünï", 3, seed=1)
    for number, path in enumerate(sorted(more.iterdir())):
        path.rename(more / f"new {number}.png")
    assert "3 added" in spade("add", gallery, more).out
    assert "2 removed; 13 images" in spade("remove", gallery, "new 1.png", "003.png").out
    facts = json.loads(spade("info", gallery, "--json").out)
    assert (facts["images"], facts["removed"], facts["extractor"]["name"]) == (13, 2, "toy")
    assert "13 (2 removed" in spade("info", gallery).out
    assert spade("compact", gallery).status == 0
    assert json.loads(spade("info", gallery, "--json").out)["removed"] == 0
    assert json.loads(spade("verify", gallery, "--json").out) == {"images": 13, "problems": []}
    assert "13 images checked, 0 problems" in spade("verify", gallery).out


@pytest.mark.slow
def test_query_writes_results_maps_and_overlays(tmp_path: Path, normal: Path, spade: Spade) -> None:
    gallery = tmp_path / "g"
    assert spade("build", gallery, normal, "--extractor", "toy").status == 0  # at the recipe's own size
    make_images(tmp_path / "test" / "crack", 2, seed=4, size=(30, 44))
    make_images(tmp_path / "test" / "good", 1, seed=5, size=(50, 41))
    out = tmp_path / "out"
    run = spade("query", gallery, tmp_path / "test", "--output", out, "-k", 3, "--kappa", 2, "--k-score", 5)
    assert run.status == 0
    assert "crack/000.png" in run.out
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["crack/000.png", "crack/001.png", "good/000.png"]
    line = lines[0]
    assert line["path"] == str(tmp_path / "test" / "crack" / "000.png")
    assert len(line["neighbours"]) == 3
    assert line["neighbours"][0]["sq_distance"] <= line["neighbours"][1]["sq_distance"]
    assert set(line["seconds"]) == {"decode", "extract", "retrieve", "read", "match", "score"}
    scores = np.load(out / "maps" / "crack" / "000.png.npy")
    assert scores.shape == (30, 44)
    assert scores.dtype == np.float32
    assert scores.max() == pytest.approx(line["map_max"])
    with Image.open(out / "overlays" / "good" / "000.png.png") as overlay:
        assert overlay.size == (41, 50)
    with np.load(out / "matches" / "crack" / "000.png.npz", allow_pickle=False) as matches:
        assert matches["sq_distance"].shape == (*matches["grid"], 1)  # of levels apart, what became of them
        assert matches["keys"].tolist() == [neighbour["key"] for neighbour in line["neighbours"]]
    assert not (out / "skipped.jsonl").exists()
    # The same numbers as from Python.
    extractor = sf.load_extractor("toy", options=sf.RECIPES[DEFAULT_RECIPE].features)
    detector = sf.Detector(sf.Gallery.open(gallery), extractor, sf.SearchOptions(k=3, kappa=2, k_score=5))
    assert detector.query(line["path"]).image_score == pytest.approx(line["image_score"], rel=1e-6)


def test_memory_is_given_in_mib(tmp_path: Path, gallery: Path, spade: Spade, monkeypatch: pytest.MonkeyPatch) -> None:
    make_images(tmp_path / "test", 1, seed=4)
    made: list[sf.SearchOptions] = []
    init = sf.Detector.__init__

    def noted(self: sf.Detector, gallery: Any, extractor: Any, search: Any, *rest: Any) -> None:
        made.append(search)
        init(self, gallery, extractor, search, *rest)

    monkeypatch.setattr(sf.Detector, "__init__", noted)
    given = ("--block-mib", 1, "--cache-mib", 2, "--device-cache-mib", 3)
    assert spade("query", gallery, tmp_path / "test", "--quiet", *given).status == 0
    [search] = made
    assert (search.block_bytes, search.cache_bytes, search.device_cache_bytes) == (2**20, 2 * 2**20, 3 * 2**20)


def test_reading_with_a_small_cache_or_unverified(tmp_path: Path, gallery: Path, spade: Spade) -> None:
    make_images(tmp_path / "test", 3, seed=4)
    expected = spade("query", gallery, tmp_path / "test", "--quiet").out
    assert spade("query", gallery, tmp_path / "test", "--quiet", "--cache-mib", 0).out == expected
    with sf.Gallery.open(gallery) as opened:
        [level, *_] = opened.read([4])
    [shard] = gallery.glob("shards/*")
    content = bytearray(shard.read_bytes())
    content[content.index(level.tobytes())] ^= 1
    shard.write_bytes(content)
    damaged = spade("query", gallery, tmp_path / "test", "--quiet")
    assert damaged.status == 1
    assert "004.png" in damaged.err
    assert spade("query", gallery, tmp_path / "test", "--quiet", "--no-verify").status == 0


def test_a_calibrated_gallery_gives_verdicts(tmp_path: Path, normal: Path, spade: Spade) -> None:
    gallery = tmp_path / "g"
    spade("build", gallery, normal, "--extractor", "toy", "--recipe", "paper", "--image-size", 32, "--crop", 32)
    run = spade("calibrate", gallery, "-k", 2, "--false-alarms", 0.1)
    assert run.status == 0
    assert "12 images: image score above" in run.out
    run = spade("query", gallery, normal / "001.png", "--json")
    assert "all images of the gallery" not in run.err  # K is the calibration's
    line = json.loads(run.out)
    assert (line["verdict"], line["regions"]) == ("normal", [])
    assert line["p_value"] == 1.0
    other = make_images(tmp_path / "other", 1, seed=321)
    Image.new("RGB", (40, 40), "white").save(other / "000.png")
    line = json.loads(spade("query", gallery, other, "--json").out)
    assert line["verdict"] == "anomalous"
    assert set(line["regions"][0]) == {"box", "area", "peak"}
    assert "anomalous  000.png" in spade("query", gallery, other, "--localise", "suspicious").out
    assert "expected at least 99 normal images to calibrate with, found 12" in spade("calibrate", gallery).error


def test_query_writes_a_report(tmp_path: Path, gallery: Path, normal: Path, spade: Spade) -> None:
    images = make_images(tmp_path / "test", 3, seed=4)
    page = tmp_path / "out" / "report.html"
    options = ("-k", 3, "--output", page.parent)
    assert spade("query", gallery, images, *options).status == 0
    text = page.read_text()
    assert "<title>Query against toy.gallery</title>" in text
    assert text.count("<article") == 3
    assert "no folder of normal images given" in text
    # The normal images are looked for in each folder that is given.
    spade("query", gallery, images, *options, "--normal", tmp_path, "--normal", normal, "--report-images", 1)
    text = page.read_text()
    assert text.count("<article") == 1
    assert text.count('src="data:image/jpeg') == 2 + 3 + 2
    page.unlink()
    assert spade("query", gallery, images, *options, "--no-report").status == 0
    assert not page.exists()
    assert (page.parent / "results.jsonl").exists()


def test_query_prints_json_lines(tmp_path: Path, gallery: Path, normal: Path, spade: Spade) -> None:
    run = spade("query", gallery, normal / "001.png", "--json", "-k", 1, "--quiet")
    assert json.loads(run.out)["neighbours"] == [{"key": "001.png", "sq_distance": 0.0}]
    assert run.err == ""
    assert "K = 12, all images of the gallery" in spade("query", gallery, normal / "001.png").err


def test_skipped_images_are_named_and_exit_with_3(tmp_path: Path, gallery: Path, normal: Path, spade: Spade) -> None:
    mixed = make_images(tmp_path / "mixed", 2, seed=8)
    (mixed / "empty.png").touch()
    (mixed / "text.png").write_text("not an image")
    build = spade("build", tmp_path / "g", mixed, *TOY)
    assert build.status == 3
    assert "2 added (0 replaced), 0 unchanged, 2 skipped" in build.out
    for name in ("empty.png", "text.png"):
        assert f"spade-faiss: skipped: {mixed / name}: " in build.err
    skipped = [json.loads(line) for line in (tmp_path / "g" / "skipped.jsonl").read_text().splitlines()]
    assert [Path(line["path"]).name for line in skipped] == ["empty.png", "text.png"]

    query = spade("query", gallery, mixed, "--output", tmp_path / "out")
    assert query.status == 3
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 2
    assert len((tmp_path / "out" / "skipped.jsonl").read_text().splitlines()) == 2

    strict = spade("build", tmp_path / "strict", mixed, *TOY, "--strict")
    assert strict.status == 1
    assert str(mixed / "empty.png") in strict.error
    assert json.loads(spade("info", tmp_path / "strict", "--json").out)["images"] == 2
    assert spade("query", gallery, mixed, "--strict").status == 1


def test_a_build_that_takes_nothing_leaves_nothing(tmp_path: Path, spade: Spade) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "text.png").write_text("not an image")
    run = spade("build", tmp_path / "g", tmp_path / "bad", *TOY)
    assert run.status == 1
    assert "expected at least one image that can be read" in run.error
    assert "text.png" in run.err
    assert not (tmp_path / "g").exists()


def test_an_image_that_changed_is_refused_unless_replace(gallery: Path, normal: Path, spade: Spade) -> None:
    make_images(normal, 1, seed=77)
    run = spade("add", gallery, normal)
    assert run.status == 3
    assert "'000.png' is in the gallery with other content; --replace" in run.err
    assert "1 added (1 replaced), 11 unchanged" in spade("add", gallery, normal, "--replace").out
    assert spade("verify", gallery).status == 0


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["build", "{tmp}/g", "{tmp}/nowhere"], "expected an image or a folder of images, found nothing there"),
        (["build", "{tmp}/g", "{tmp}/empty"], "expected a folder with images"),
        (["build", "{tmp}/g", "{normal}", "--extractor", "bogus"], "efficientnet_lite0, toy, timm:<model> or one of"),
        (["build", "{tmp}/g", "{normal}", "--extractor", "toy", "--index", "Bogus"], "FAISS factory string"),
        (["build", "{tmp}/g", "{normal}", "--extractor", "toy", "--neighbourhood", "2"], "expected odd, found 2"),
        (["build", "{tmp}/g", "{normal}", "--extractor", "toy", "--image-size", "33"], "multiples of 32 px"),
        (["build", "{tmp}/g", "{normal}", "--extractor", "toy", "--crop", "64", "--image-size", "32"], "crop: expect"),
        (["build", "{tmp}/g", "{normal}", "--extractor", "resnet18", "--weights", "{tmp}/n.pth"], "nothing there"),
        (["build", "{gallery}", "{normal}", "--extractor", "toy", "--image-size", "96"], "resized: expected (64, 64"),
        (["build", "{tmp}/empty/../normal", "{normal}", "--extractor", "toy"], "to make a gallery in, found something"),
        (["add", "{tmp}/nowhere", "{normal}"], "a folder with gallery.json), found none; make one with build"),
        (["add", "{gallery}", "{normal}", "--workers", "0"], "workers: expected a number >= 1, found 0"),
        (["build", "{tmp}/g", "{normal}", "--extractor", "toy", "--workers", "-1"], "workers: expected a number >= 1"),
        (["query", "{tmp}", "{normal}"], "a folder with gallery.json), found none; make one with build"),
        (["query", "{gallery}", "{normal}", "-k", "13"], "12, found 13"),
        (["query", "{gallery}", "{normal}", "--kappa", "0"], "kappa: expected a number >= 1, found 0"),
        (["query", "{gallery}", "{normal}", "-k", "1", "--kappa", "9999"], "kappa: expected at most 1,"),
        (["query", "{gallery}", "{normal}", "--engine", "warp"], "engine"),
        (["query", "{gallery}", "{normal}", "--device", "tpu"], "expected auto, cpu, cuda or cuda:N, found 'tpu'"),
        (["query", "{gallery}", "{normal}", "--device", "cuda:99"], "sees"),
        (["remove", "{gallery}", "nobody.png"], "found 'nobody.png', which is not"),
        (["info", "{normal}"], "expected a gallery"),
    ],
)  # fmt: skip
def test_mistakes_get_one_clear_line(
    tmp_path: Path, normal: Path, gallery: Path, spade: Spade, args: list[str], expected: str
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"tmp": tmp_path, "normal": normal, "gallery": gallery}
    before = sorted(path for path in tmp_path.rglob("*") if not path.name.startswith("writer."))
    run = spade(*[arg.format(**places) for arg in args])
    assert run.status == 1
    assert expected in run.error
    assert sorted(path for path in tmp_path.rglob("*") if not path.name.startswith("writer.")) == before


def test_wrong_usage_exits_with_2(spade: Spade, gallery: Path) -> None:
    assert spade("build").status == 2
    assert spade("query", gallery, "x", "--sigma", "wide").status == 2
    assert spade("build", gallery, "x", "--image-size", "224xx").status == 2
    assert spade("nonsense").status == 2


@pytest.mark.filterwarnings("always:image index is rebuilt")
def test_damage_is_found_and_the_index_repaired(gallery: Path, normal: Path, spade: Spade) -> None:
    keys = next(gallery.glob("index/*.npy"))
    keys.write_bytes(keys.read_bytes()[:-5])
    assert f"index/{keys.name}: " in spade("verify", gallery).out
    assert "key table rebuilt" in spade("verify", gallery, "--repair").err
    assert spade("verify", gallery).status == 0
    index = next(gallery.glob("index/*.faiss"))
    index.write_bytes(index.read_bytes()[:-5])
    assert spade("verify", gallery).status == 1
    queried = spade("query", gallery, normal / "001.png", "-k", 1)
    assert queried.status == 0  # from the shards, and it says so
    assert "note: image index is rebuilt from the shards" in queried.err
    assert spade("verify", gallery, "--repair").status == 0
    assert spade("verify", gallery).status == 0

    shard = next(gallery.glob("shards/*.h5"))
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    run = spade("verify", gallery)
    assert run.status == 1
    assert f"expected {len(content)} bytes, found {len(content) // 2}" in run.out
    assert "bytes, found" in spade("query", gallery, normal / "001.png").error
    shard.unlink()
    assert "found nothing there" in spade("verify", gallery).out


def test_another_format_version_is_refused(gallery: Path, spade: Spade) -> None:
    path = gallery / "gallery.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))
    assert "expected format version 1, found 99" in spade("info", gallery).error


def test_no_permission_to_write(tmp_path: Path, normal: Path, gallery: Path, spade: Spade) -> None:
    (tmp_path / "file").touch()  # a file where a folder is needed stops even the superuser
    assert "cannot make the gallery" in spade("build", tmp_path / "file" / "g", normal, *TOY).error
    assert "cannot write" in spade("query", gallery, normal, "--output", tmp_path / "file").error


def test_a_folder_without_write_permission(tmp_path: Path, normal: Path, spade: Spade) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    with permissions_count():
        run = spade("build", tmp_path / "locked" / "g", normal, *TOY)
    assert "Permission denied; check who owns it" in run.error


def test_an_extreme_header_is_skipped_without_decoding(tmp_path: Path, normal: Path, spade: Spade) -> None:
    buffer = bytearray((normal / "000.png").read_bytes())
    buffer[16:24] = (50_000).to_bytes(4, "big") * 2
    buffer[29:33] = zlib.crc32(buffer[12:29]).to_bytes(4, "big")  # of the header, which says 50 000 x 50 000 now
    (normal / "bomb.png").write_bytes(bytes(buffer))
    run = spade("build", tmp_path / "g", normal, *TOY)
    assert run.status == 3
    assert "bomb.png: expected at most" in run.err


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(fcntl, "F_SETPIPE_SZ"), reason="the size of a pipe cannot be set here")
def test_a_process_of_its_own(gallery: Path, normal: Path) -> None:
    """What a shell sees: no progress bar where stderr is no terminal, and a reader of stdout that goes away."""
    code = "import sys; from spade_faiss.cli.main import main; sys.stdin.read(); main()"
    with Program(code, "query", gallery, normal, "--json") as running:
        # The pipe holds less than the lines of 12 images: it is closed before all are written.
        fcntl.fcntl(running.stdout, fcntl.F_SETPIPE_SZ, 4096)
        running.stdin.close()
        assert json.loads(running.stdout.readline())["key"] == "000.png"
        running.stdout.close()
        said = running.stderr.read()
        running.wait()
        assert running.returncode == 1
    assert "\r" not in said
    assert "Traceback" not in said
    assert "Broken pipe" not in said


@pytest.mark.slow
def test_the_log_is_notes_unless_a_command_is_quiet() -> None:
    code = (
        "import logging; from spade_faiss.cli import main\n"
        "command = main.cli.commands['demo']\n"
        "command.callback = lambda **_: logging.getLogger('spade_faiss').info('loops are compiled')\n"
        "main.main()"
    )

    def said(*options: str) -> str:
        run = subprocess.run([sys.executable, "-c", code, "demo", *options], capture_output=True, text=True, check=True)
        assert not run.stdout
        return run.stderr

    assert said() == "spade-faiss: note: loops are compiled\n"
    assert said("--quiet") == ""


def test_help_is_there_for_every_command(spade: Spade) -> None:
    listed = spade("--help").out
    for command in ("demo", "build", "add", "remove", "compact", "calibrate", "query", "info", "verify"):
        assert command in listed
        assert "Usage: spade-faiss" in spade(command, "--help").out
