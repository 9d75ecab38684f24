"""A gallery of many real pyramids on disk: built, killed, queried cold and warm, changed, verified.

    spade-faiss bench real_gallery WORK NORMAL_DIR TEST_DIR [--images 100000] [--small 1000] [--queries 60]

Image files are made from the real ones of NORMAL_DIR: crops, flips, brightness, contrast and gamma, each from its own
seed, so that WORK/images is the same in every run. All go through the network and are stored with their patches: no
feature is synthetic. The build is killed with SIGKILL when half of the images are in, and run again. Each measurement
runs in a process of its own, with a gallery of --small images (the first of the same files) beside the large one.

Queries come in two orders. `line`: variations of one test image follow each other, as parts of one batch do on a line,
so that neighbours are shared. `random`: the same queries, mixed. Each is asked cold, after the system was told to drop
the gallery's pages, and warm, once more. WORK takes 0.3 MB an image; the gallery may be larger than memory. Steps that
are in RESULTS/real_gallery.json with the same numbers are passed over: run again, it goes on where it was. The plot
needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, available_bytes, save
from peers_rad import files_in
from PIL import Image, ImageEnhance
from scaling_work import drop_pages, peak_mib

import spade_faiss as sf

SIDE = 320  # px, of the files that are made: what the default extractor gets
QUALITY = 92  # of JPEG
FOLDER = 1000  # files in one folder
VARIATIONS = 6  # of one test image follow each other on the line
CHANGED = 100  # one image of so many is added and removed
POLL = 0.5  # s
CALIBRATED = 100  # normal images that are compared with the others, for the baseline that each detector takes
COMMANDS = ("add", "remove", "compact", "reindex", "verify")


@dataclass(frozen=True)
class Work:
    """The folder of one run, and what is in it."""

    folder: Path
    normal: Path
    test: Path
    images: int

    @property
    def gallery(self) -> Path:
        return self.folder / f"real-{self.images}.gallery"

    def listed(self, start: int, end: int) -> list[Path]:
        """Return the files of images start to end, each of which is made if it is not there."""
        return [self.folder / "images" / f"{n // FOLDER:04d}" / f"{n:07d}.jpg" for n in range(start, end)]

    def make(self, start: int, end: int) -> None:
        """Make image files, by as many processes as there are cores."""
        sources = [str(path) for path in files_in(self.normal)]
        missing = [(path, number) for number, path in enumerate(self.listed(start, end), start) if not path.exists()]
        for folder in {path.parent for path, _ in missing}:
            folder.mkdir(parents=True, exist_ok=True)
        jobs = [(sources[number % len(sources)], number, str(path)) for path, number in missing]
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(make_image, jobs, chunksize=64):
                pass

    def subset(self) -> Path:
        """Return a folder with links to the images of this gallery, and no others."""
        folder = self.folder / f"first-{self.images}"
        if not folder.exists():
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for path in self.listed(0, self.images):
                (partial / path.name).symlink_to(path.resolve())
            partial.rename(folder)
        return folder


def variation(image: Image.Image, number: int) -> Image.Image:
    """Return a crop of an image, flipped or not, in another light: always the same for the number."""
    rng = np.random.default_rng([number])
    width, height = image.size
    share = rng.uniform(0.8, 1.0)
    left, top = rng.uniform(0, 1 - share) * width, rng.uniform(0, 1 - share) * height
    box = (left, top, left + share * width, top + share * height)
    image = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    image = ImageEnhance.Brightness(image).enhance(float(rng.uniform(0.9, 1.1)))
    image = ImageEnhance.Contrast(image).enhance(float(rng.uniform(0.9, 1.1)))
    gamma = rng.uniform(0.9, 1.1)
    return image.point([round(255 * (value / 255) ** gamma) for value in range(256)] * 3)


def make_image(job: tuple[str, int, str]) -> None:
    """Write the file of one number, whole or not at all."""
    source, number, path = job
    with Image.open(source) as image:
        variation(image, number).save(f"{path}.partial", "JPEG", quality=QUALITY)
    Path(f"{path}.partial").rename(path)


def asked(work: Work, queries: int, order: str) -> list[np.ndarray]:
    """Return the pixels of the queries, in the order of a line or mixed."""
    files = files_in(work.test)
    chosen = [files[at] for at in np.linspace(0, len(files) - 1, -(-queries // VARIATIONS)).astype(int)]
    pixels = [
        np.asarray(variation(Image.open(path), 10**9 + VARIATIONS * number + again))
        for number, path in enumerate(chosen)
        for again in range(VARIATIONS)
    ][:queries]
    mixed = np.random.default_rng(0).permutation(len(pixels)) if order == "random" else range(len(pixels))
    return [pixels[number] for number in mixed]


def command(*words: object) -> subprocess.Popen[str]:
    """Start the command line, as a user does."""
    code = "from spade_faiss.cli.main import main; main()"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, words)], text=True, stderr=subprocess.PIPE)


def finish(running: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for a command, and return its seconds and the most memory that it had."""
    start = time.perf_counter()
    assert running.stderr is not None
    said = running.stderr.read()
    _, status, used = os.wait4(running.pid, 0)
    if status:
        raise SystemExit(f"{running.args}: status {os.waitstatus_to_exitcode(status)}: {said[-500:]}")
    return {"seconds": round(time.perf_counter() - start, 2), "peak_mib": used.ru_maxrss // 1024}


def build(work: Work, interrupted: bool) -> dict[str, Any]:
    """Build the gallery by the command line; interrupted: with SIGKILL when half of the images are in."""
    work.make(0, work.images)
    words = ("build", work.gallery, work.subset(), "--quiet")
    killed: dict[str, Any] = {}
    if interrupted:
        start, running = time.perf_counter(), command(*words)
        while running.poll() is None and committed(work.gallery) < work.images // 2:
            time.sleep(POLL)
        running.send_signal(signal.SIGKILL)
        running.wait()
        killed = {"seconds_to_kill": round(time.perf_counter() - start, 1), "images_at_kill": committed(work.gallery)}
    done = finish(command(*words))
    made = work.images - killed.get("images_at_kill", 0)
    with sf.Gallery.open(work.gallery, device="cpu") as gallery:
        lost = {path.name for path in work.listed(0, work.images)} - set(gallery.keys())
    stored = sum(path.stat().st_size for path in work.gallery.rglob("*") if path.is_file())
    rate = round(made / done["seconds"], 2) if made else None
    return {**killed, **done, "images_per_second": rate, "lost": len(lost), "gb": round(stored / 1e9, 2)}


def committed(path: Path) -> int:
    """Return the number of images that a gallery's manifest has, 0 before there is one."""
    try:
        shards = json.loads((path / "gallery.json").read_text())["shards"]
    except (OSError, ValueError, KeyError):
        return 0
    return sum(shard["images"] for shard in shards)


def query(work: Work, order: str, queries: int) -> dict[str, Any]:
    """Query cold, then warm, one at a time; then as a stream."""
    with sf.Gallery.open(work.gallery, device="cpu") as gallery:
        extractor = gallery.load_extractor()
        pixels = asked(work, queries, order)
        detector = sf.Detector(gallery, extractor)
        detector.query(pixels[0])  # compiles
        result: dict[str, Any] = {}
        for state in ("cold", "warm"):
            if state == "cold":
                drop_pages(work.gallery)
            detector = sf.Detector(gallery, extractor)  # with empty caches of its own
            before, rows = read_bytes(), []
            for one in pixels:
                start = time.perf_counter()
                found = detector.query(one)
                rows.append({"seconds": time.perf_counter() - start, **found.seconds})
            result[state] = {
                "median": {name: round(float(np.median([row[name] for row in rows])), 4) for name in rows[0]},
                "max_seconds": round(max(row["seconds"] for row in rows), 3),
                "read_from_disk_mb": round((read_bytes() - before) / 1e6, 1),
                "each": [round(row["seconds"], 4) for row in rows],
            }
        start = time.perf_counter()
        for _ in detector.stream(pixels):
            pass
        result["stream_seconds_a_query"] = round((time.perf_counter() - start) / len(pixels), 4)
    return {**result, "peak_mib": peak_mib()}


def read_bytes() -> int:
    """Return what this process had fetched from a disk, in bytes: what the page cache had is not in it."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def change(work: Work, name: str) -> dict[str, Any]:
    """Run one command on the gallery."""
    more = work.folder / "more"
    if name == "add":
        work.make(work.images, work.images + max(1, work.images // CHANGED))
        more.mkdir(exist_ok=True)
        for path in work.listed(work.images, work.images + max(1, work.images // CHANGED)):
            if not (more / path.name).exists():
                (more / path.name).symlink_to(path.resolve())
        return finish(command("add", work.gallery, more, "--quiet"))
    if name == "remove":
        return finish(command("remove", work.gallery, *sorted(path.name for path in more.iterdir())))
    words = ("--sample", CALIBRATED, "--quiet") if name == "calibrate" else ()
    return finish(command(name, work.gallery, *words))


def in_a_process(function: str, *arguments: object) -> dict[str, Any]:
    """Run one of this module's functions in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", json.dumps([function, *arguments])], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(f"{function}{arguments}: status {done.returncode}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def steps(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield what is measured, by name, in order."""
    places = str(args.work), str(args.normal), str(args.test)
    for images in (args.small, args.images):
        work = Work(args.work, args.normal, args.test, images)
        yield f"build {images}", partial(build, work, images == args.images)
        yield f"calibrate {images}", partial(change, work, "calibrate")
        for order in ("line", "random"):
            yield f"query {images} {order}", partial(in_a_process, "query", *places, images, order, args.queries)
    for name in COMMANDS:
        yield f"{name} {args.images}", partial(change, work, name)


def draw(measured: dict[str, Any], small: int, images: int) -> None:
    """Plot the seconds of each query, in the order they were asked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, order in zip(panels, ("line", "random"), strict=True):
        for number, colour in ((small, "tab:blue"), (images, "tab:red")):
            for state, style in (("cold", "-"), ("warm", "--")):
                row = measured[f"query {number} {order}"]
                axes.plot(row[state]["each"], style, c=colour, lw=1.4, label=f"{number} images, {state}")
        axes.set(xlabel="query", title=f"order: {order}", ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, alpha=0.3)
    panels[0].set_ylabel("seconds, one query at a time")
    panels[1].legend(frameon=False, fontsize=9)
    figure.savefig(RESULTS / "real_gallery.png")


def main() -> None:
    """Measure what is missing, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for files and galleries")
    parser.add_argument("normal", type=Path, help="folder of real normal images")
    parser.add_argument("test", type=Path, help="folder of images to query")
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--small", type=int, default=1000, help="images of the small gallery beside it")
    parser.add_argument("--queries", type=int, default=60)
    if sys.argv[1:2] == ["--one"]:
        function, folder, normal, test, images, *rest = json.loads(sys.argv[2])
        print(json.dumps(globals()[function](Work(Path(folder), Path(normal), Path(test), images), *rest)))
        return
    args = parser.parse_args()
    importlib.import_module("matplotlib")  # missing, it is said now, not after hours
    path = RESULTS / "real_gallery.json"
    measured: dict[str, Any] = json.loads(path.read_text())["measured"] if path.exists() else {}
    for name, measure in steps(args):
        if name in measured:
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        measured[name] = measure()
        save("real_gallery", {"memory_available_gib": available_bytes() // 2**30, "measured": measured})
    draw(measured, args.small, args.images)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    main()
