"""Several processes that ingest: what one process makes, whoever is killed and whatever goes wrong in them."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

import spade_faiss as sf
from spade_faiss.extractors.toy import ToyExtractor
from spade_faiss.images.sources import ImageFile
from spade_faiss.ingest import workers
from spade_faiss.ingest.runs import runs_of
from spade_faiss.options import Patches
from tests.helpers.images import write_images
from tests.helpers.processes import Program, run
from tests.helpers.workers import BATCH, Moody, create, moody_of, toy, write_images_with_white

pytestmark = pytest.mark.slow  # `make test-fast` leaves the module out


WHITE = "009.png"  # the image that a Moody extractor dislikes


@pytest.fixture
def moody(tmp_path: Path) -> Moody:
    return moody_of(tmp_path, "good")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images_with_white(tmp_path / "images", 22, WHITE)


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """None may be started."""
    monkeypatch.setattr(workers, "_Worker", None)


def content(gallery: sf.Gallery) -> list[tuple[object, ...]]:
    """All that it has of each image, in the order of the ids."""
    snapshot, extractor = gallery.snapshot(), toy() if gallery.patches == "recompute" else None
    found: list[tuple[object, ...]] = []
    for key in list(gallery.keys()):
        [row] = ids = gallery.ids([key])
        levels = [level.tobytes() for level in gallery.read(ids, extractor)]
        feature = snapshot.image_feature(row).tobytes()
        found.append((key, row, snapshot.digests(ids), snapshot.source(row), feature, levels))
    return found


def assert_clean(gallery: sf.Gallery) -> None:
    """Nothing is damaged, and nothing lies about."""
    assert gallery.verify() == []
    there = {path.relative_to(gallery.path).as_posix() for path in gallery.path.glob("shards/*")}
    assert there == {shard.file for shard in gallery.snapshot().manifest.shards}


def summary(report: sf.IngestReport) -> tuple[object, ...]:
    return report.added, report.replaced, report.unchanged, report.skipped


@pytest.mark.slow
@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("patches", ["stored", "recompute"])
def test_two_make_what_one_makes(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, patches: Patches
) -> None:
    (images / "003a.png").write_text("no image")
    (images / "017a.png").write_bytes(b"")
    Image.new("RGB", (50, 50)).save(images / "012a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # by the caller: it counts in every process
    reports, found = [], []
    for count in (1, 2):
        gallery = create(tmp_path / str(count), patches=patches)
        gallery.add_images(images / "005.png", toy())
        reports.append(gallery.add_images([images], toy(), workers=count))
        found.append(content(gallery))
        assert_clean(gallery)
    assert summary(reports[0]) == summary(reports[1])
    assert [skipped.path.name for skipped in reports[1].skipped] == ["003a.png", "012a.png", "017a.png"]
    assert found[0] == found[1]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert gallery.add_images(images, toy(), workers=2).added == 1
    monkeypatch.setattr(workers, "_Worker", None)
    for name in ("003a.png", "017a.png"):
        (images / name).unlink()
    assert summary(gallery.add_images(images, toy(), workers=2)) == (0, 0, 23, [])  # and starts no process


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("n", [0, 1, 5, 24, 60, 61, 100])
def test_runs_fill_shards_and_the_rest_is_shared_out(tmp_path: Path, toy: sf.Extractor, n: int, count: int) -> None:
    sources = [ImageFile(Path(f"{number}.png"), f"{number}.png") for number in range(n)]
    with create(tmp_path / "g", images_a_shard=10).writer() as writer:
        runs = runs_of(sources, writer, toy, count)
    assert [source for run in runs for source in run] == sources
    lengths = [len(run) for run in runs]
    assert all(length % toy.batch_size == 0 for length in lengths[:-1])  # the same batches as in one process
    assert all(0 < length <= 12 for length in lengths)
    assert len(runs) >= min(count, math.ceil(n / toy.batch_size))  # all have work, where there is some
    assert len(runs) <= n // 12 + count


@pytest.mark.slow
@pytest.mark.usefixtures("forked_workers")
def test_changed_images_are_skipped_or_replaced(tmp_path: Path, images: Path) -> None:
    """As by one process, also from a thread that is not the main one."""
    for count in (1, 2):
        create(tmp_path / str(count), images_a_shard=100).add_images(images, toy())
    for name in ("002.png", "016.png"):
        (images / name).write_bytes((write_images(tmp_path / name, 1, seed=int(name[:3])) / "000.png").read_bytes())
    (images / "020.png").write_text("no image any more")
    write_images(images / "more", 3, seed=5)
    reports: dict[int, list[object]] = {1: [], 2: []}
    for count, found in reports.items():
        gallery = sf.Gallery.open(tmp_path / str(count), "cpu")
        found.append(summary(gallery.add_images(images, toy(), workers=count)))
        assert gallery.snapshot().manifest.rows == 25
        with ThreadPoolExecutor(1) as thread:
            done = thread.submit(gallery.add_images, images, toy(), replace=True, workers=count)
            found.append(summary(done.result()))
        found.append(content(gallery))
        assert len(gallery) == 25
        assert_clean(gallery)
    assert reports[1] == reports[2]
    assert reports[2][1][:3] == (2, 2, 22)  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.usefixtures("forked_workers")
def test_strict_stops_at_the_first_in_the_order_of_the_sources(tmp_path: Path, images: Path) -> None:
    (images / "011a.png").write_text("no image")
    (images / "013a.png").write_text("no image")
    found = []
    for count in (1, 2):
        gallery = create(tmp_path / str(count))
        gallery.add_images(write_images(tmp_path / "other", 18, seed=3) / "017.png", toy())
        with pytest.raises(sf.ImageError, match=r"011a\.png"):
            gallery.add_images(images, toy(), strict=True, workers=count)
        assert_clean(gallery)
        assert len(gallery) == 13
        found.append(content(gallery))
    assert found[0] == found[1]
    for name in ("011a.png", "013a.png"):
        (images / name).unlink()
    with pytest.raises(sf.KeyConflictError, match=r"017\.png"):
        gallery.add_images(images, toy(), strict=True, workers=2)
    assert sorted(gallery.keys()) == [f"{number:03d}.png" for number in range(18)]


@pytest.mark.usefixtures("no_process")
def test_what_cannot_work_starts_no_process(tmp_path: Path, images: Path) -> None:
    gallery = create(tmp_path / "g")
    for count in (0, -1, 1.5, True):
        with pytest.raises(sf.OptionError, match="workers: expected a number >= 1, found"):
            gallery.add_images(images, toy(), workers=count)  # type: ignore[arg-type]
    other = write_images(tmp_path / "other", 1) / "000.png"
    with pytest.raises(sf.ImageError, match=r"two images would have the key '000\.png'"):
        gallery.add_images([ImageFile(path, "000.png") for path in (images / "000.png", other)], toy(), workers=2)
    bound = toy()
    bound.note = lambda: None  # type: ignore[attr-defined]
    with pytest.raises(sf.OptionError, match=r"that another process can load, by pickle, found ToyExtractor: .*; use"):
        gallery.add_images(images, bound, workers=2)
    assert len(gallery) == 0
    assert_clean(gallery)


@pytest.mark.usefixtures("forked_workers")
def test_a_key_that_no_gallery_takes(tmp_path: Path, images: Path) -> None:
    gallery = create(tmp_path / "g")
    with pytest.raises(sf.FeatureError, match="without NUL"):
        gallery.add_images([ImageFile(images / "000.png", "a\0b")], toy(), workers=2)
    assert_clean(gallery)


@pytest.mark.slow
@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize(
    ("mood", "error", "words"),
    [
        ("killed", sf.WorkerError, r"ended before its work \(killed by signal 9, .*; what was committed is kept"),
        ("broken", sf.WorkerError, r"^worker process \d+: RuntimeError: out of memory$"),
    ],
)
def test_a_worker_that_fails_is_one_line_and_the_work_goes_on(
    tmp_path: Path, images: Path, moody: Moody, mood: str, error: type[Exception], words: str
) -> None:
    gallery, before = create(tmp_path / "g"), content(create_whole(tmp_path / "whole", images))
    (tmp_path / "mood").write_text(mood)
    with pytest.raises(error, match=words) as caught:
        gallery.add_images(images, moody, workers=2)
    assert "\n" not in str(caught.value)
    assert_clean(gallery)
    kept = set(gallery.keys())
    keys = [f"{number:03d}.png" for number in range(22)]
    # It failed in the third run, after another: the first or the second is whole. The other worker was told to stop,
    # and finished the batch that it was at.
    assert set(keys[:4]) <= kept or set(keys[4:8]) <= kept
    assert all((keys[at] in kept) == (keys[at + 1] in kept) for at in range(0, 22, BATCH))
    assert WHITE not in kept
    (tmp_path / "mood").write_text("good")
    report = gallery.add_images(images, moody)
    assert summary(report) == (22 - len(kept), 0, len(kept), [])
    assert by_key(gallery) == {key: rest for key, _, *rest in before}
    assert_clean(gallery)


def create_whole(path: Path, images: Path) -> sf.Gallery:
    gallery = create(path)
    gallery.add_images(images, toy())
    return gallery


def by_key(gallery: sf.Gallery) -> dict[object, object]:
    return {key: rest for key, _, *rest in content(gallery)}


@pytest.mark.slow
@pytest.mark.usefixtures("forked_workers")
def test_what_is_ahead_of_a_slow_worker_waits_in_bounds_and_in_order(
    tmp_path: Path, images: Path, moody: Moody
) -> None:
    (tmp_path / "mood").write_text("late")
    gallery = create(tmp_path / "g", images_a_shard=BATCH)
    gallery.add_images(images, moody, workers=2)
    assert gallery.keys() == [f"{number:03d}.png" for number in range(22)]
    assert gallery.info()["shards"] == 11
    assert int((tmp_path / "waiting").read_text()) < workers.AHEAD * 2  # of the six runs after that one
    assert_clean(gallery)


PARENT = """
import os, signal, sys
from pathlib import Path
os.setsid()  # to lead a group, as the shell of a terminal has it do
signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored where the tests run in the background
import spade_faiss as sf
from tests.helpers import workers
folder = Path(sys.argv[1])
with sf.Gallery.open(folder / "g", "cpu") as gallery:
    try:
        gallery.add_images(folder / "images", workers.Moody(folder), workers=2)
    except KeyboardInterrupt:
        print("interrupted", len(gallery))
"""


def start(folder: Path) -> Program:
    """Start a slow build by two workers in a process of its own, which leads a group as that of a terminal."""
    (folder / "mood").write_text("slow")
    return Program(PARENT, folder)


def wait_until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def batches_of(folder: Path) -> dict[int, int]:
    """How many batches each worker has extracted."""
    pids = [int(path.name.split()[1]) for path in folder.glob("extracted *")]
    return {pid: pids.count(pid) for pid in pids}


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_parent_killed_its_workers_end_and_the_next_run_goes_on(tmp_path: Path, images: Path) -> None:
    create(tmp_path / "g")
    parent = start(tmp_path)
    shards = tmp_path / "g" / "shards"
    wait_until(lambda: any(shards.glob("000*.h5")))
    (tmp_path / "mood").write_text("stuck")
    wait_until(lambda: any(tmp_path.glob("stuck *")))
    parent.kill()
    parent.communicate(timeout=60)  # its pipes end with the last worker, whatever that was doing
    stuck = [int(path.name.split()[1]) for path in tmp_path.glob("stuck *")]
    wait_until(lambda: not any(map(is_running, stuck)))
    assert any(shards.glob("*.tmp"))  # nobody was left to take it away
    gallery = sf.Gallery.open(tmp_path / "g", "cpu")
    assert 4 <= len(gallery) < 22
    assert gallery.verify() == []
    gallery.add_images(images, toy())
    assert_clean(gallery)
    assert content(gallery) == content(create_whole(tmp_path / "whole", images))


@pytest.mark.slow
def test_at_ctrl_c_what_is_whole_is_committed(tmp_path: Path, images: Path) -> None:
    create(tmp_path / "g", images_a_shard=100)  # a shard for each worker, neither of them complete
    parent = start(tmp_path)
    wait_until(lambda: len(batches_of(tmp_path)) == 2)
    os.killpg(parent.pid, signal.SIGINT)
    out, err = parent.communicate(timeout=60)
    assert err == ""
    gallery = sf.Gallery.open(tmp_path / "g", "cpu")
    assert out == f"interrupted {len(gallery)}\n"
    assert len(gallery) == BATCH * sum(batches_of(tmp_path).values()) < 22  # none extracted in vain
    assert_clean(gallery)
    gallery.add_images(images, toy())
    assert by_key(gallery) == by_key(create_whole(tmp_path / "whole", images))


FULL_DISK = """
import resource, sys
from pathlib import Path
import spade_faiss as sf
from tests.helpers import workers
folder = Path(sys.argv[1])
gallery = workers.create(folder / "g", images_a_shard=100)
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))  # stands for a full disk
try:
    gallery.add_images(folder / "images", workers.toy(), workers=2)
except sf.GalleryError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_full_disk_is_one_line(tmp_path: Path, images: Path) -> None:
    done = run(FULL_DISK, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "cannot write" in done.stdout
    assert "raise the limit on file size" in done.stdout
    assert_clean(sf.Gallery.open(tmp_path / "g", "cpu"))


SCRIPT = """
import sys
from pathlib import Path
import spade_faiss as sf
folder = Path(sys.argv[1])
extractor = sf.load_extractor("toy")
gallery = sf.Gallery.open(folder / "g", "cpu")
try:
    gallery.add_images(folder / "images", extractor, workers=2)
except sf.WorkerError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_script_without_a_guard_is_told_of_it(tmp_path: Path, images: Path) -> None:
    create(tmp_path / "g")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "before it was ready; a script has to call add_images under `if __name__ == '__main__':`" in done.stdout
    assert_clean(sf.Gallery.open(tmp_path / "g", "cpu"))


@pytest.mark.slow
@pytest.mark.usefixtures("forked_workers")
def test_features_of_another_network_are_not_written(tmp_path: Path, images: Path) -> None:
    """As when the file of the weights has been changed since the parent loaded it."""
    gallery = create(tmp_path / "g")
    with pytest.raises(sf.SpecMismatchError, match=r"worker process \d+: .*resized: expected \(32, 32\), found"):
        gallery.add_images(images, Changing(), workers=2)
    assert len(gallery) == 0
    assert_clean(gallery)


class Changing(ToyExtractor):
    """Loaded anew, it is another."""

    def __init__(self) -> None:
        super().__init__(sf.FeatureOptions())

    def __reduce__(self) -> tuple[object, ...]:
        return ToyExtractor, (sf.FeatureOptions(image_size=64),)
