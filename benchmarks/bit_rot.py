"""Single bytes of a gallery's files flipped, files cut short and zeroed: what becomes of each, in a process of its own.

python benchmarks/bit_rot.py [--flips 500] [--seed 0]

Galleries of the toy extractor, patches stored and recomputed, with removed rows, index, key table and calibration. Each
damage must be reported by verify, or refused with an error of the package when it is met, or change no answer at all.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from common import SERVER, end_with_the_parent, save
from PIL import Image

import spade_faiss as sf
from spade_faiss.options import Patches

SECONDS = 60  # of one reading; it takes a tenth of one
IMAGES = 14

Damage = tuple[str, str, int]  # file, how, place

OUTCOMES = ("reported", "refused", "harmless")  # what may become of damage


def make_gallery(folder: Path, patches: Patches) -> Path:
    """Make a gallery of two shards or more, with what a gallery can have; returns its folder."""
    rng = np.random.default_rng(1)
    normal = folder / "normal"
    normal.mkdir(parents=True)
    base = rng.integers(60, 190, (40, 48, 3))
    for number in range(IMAGES):
        noisy = np.clip(base + rng.normal(0, 12, base.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(normal / f"{number:03d}.png")
    toy = sf.load_extractor("toy", options=sf.FeatureOptions(batch_size=4))
    path = folder / "gallery"
    size = 8 * 600 if patches == "stored" else 8 * 304  # of a shard: 8 images, about
    gallery = sf.Gallery.create(path, toy.spec, sf.IndexOptions(device="cpu"), size, patches=patches)
    gallery.add_images(normal, toy)
    gallery.remove(["003.png"])
    detector = sf.Detector(
        gallery, toy, sf.SearchOptions(k=3, level_weights="spread"), sf.ScoreOptions("map", "damped")
    )
    sf.calibrate(detector, 0.2).write(path)
    gallery.close()
    return path


def answers(path: Path) -> dict[str, Any]:
    """Read all of a gallery, in every way that a caller can."""
    toy = sf.load_extractor("toy", options=sf.FeatureOptions(batch_size=4))
    rng = np.random.default_rng(2)
    query = rng.integers(60, 190, (40, 48, 3)).astype(np.uint8)
    with sf.Gallery.open(path, "cpu") as gallery:
        snapshot, ids = gallery.snapshot(), gallery.snapshot().ids()
        keys = gallery.keys()
        probes = np.stack([snapshot.image_feature(row_id) for row_id in ids[:4].tolist()])
        found, sq_distances = gallery.search(probes, 5)
        detection = sf.Detector(gallery, toy).query(query)
        levels = gallery.read(ids, None if gallery.patches == "stored" else toy)
        return {
            "images": len(gallery),
            "spec": str(gallery.spec),
            "keys": keys,
            "ids": snapshot.find_all(keys) == ids.tolist(),
            "digests": snapshot.digests(ids),
            "sources": [snapshot.source(row_id) for row_id in ids.tolist()],
            "image features": _digest([snapshot.image_feature(row_id) for row_id in ids.tolist()]),
            "rows": _digest([snapshot.rows.read(ids)]),
            "levels": _digest(levels),
            "neighbours": found.tolist(),
            "sq_distances": sq_distances.tolist(),
            "score": detection.image_score,
            "map": _digest([detection.anomaly_map]),
            "verdict": str(detection.judgement),
        }


def _digest(arrays: list[Any]) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


def damaged(path: Path, damage: Damage) -> None:
    """Do it to a file of a gallery."""
    file, how, place = damage
    content = bytearray((path / file).read_bytes())
    if how == "flipped":
        content[place // 8] ^= 1 << place % 8
    elif how == "cut":
        del content[place:]
    else:
        content[place:] = bytes(len(content) - place)
    (path / file).write_bytes(content)


def outcome(gallery: Path, expected: dict[str, Any], damage: Damage) -> str:
    """Tell what becomes of one damage: one of OUTCOMES, or what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gallery"
        shutil.copytree(gallery, path)
        damaged(path, damage)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an index that is rebuilt: the answers say whether it is as it was
                try:
                    with sf.Gallery.open(path, "cpu") as opened:
                        reported = bool(opened.verify())
                except sf.SpadeError as error:
                    return "refused" if _is_clear(error) else f"unclear: {error}"
                try:
                    same = answers(path) == expected
                except sf.SpadeError as error:
                    clear = "reported" if reported else "refused"
                    return clear if _is_clear(error) else f"unclear: {error}"
        except Exception as error:
            return f"not caught: {error!r}"
        # Reported or not: what is answered all the same is right.
        return "WRONG" if not same else "reported" if reported else "harmless"


def _is_clear(error: sf.SpadeError) -> bool:
    return len(str(error)) > 20 and "\n" not in str(error)


def damages(gallery: Path, flips: int, seed: int) -> list[Damage]:
    """Draw flips over all bytes of all files, and cut and zero each file in a few places."""
    rng = np.random.default_rng(seed)
    sizes = {
        path.relative_to(gallery).as_posix(): path.stat().st_size
        for path in sorted(gallery.rglob("*"))
        if path.is_file() and path.stat().st_size
    }
    names, ends = list(sizes), np.cumsum(list(sizes.values()))
    chosen: list[Damage] = []
    for place in rng.choice(int(ends[-1]), flips, replace=False).tolist():
        file = int(np.searchsorted(ends, place, "right"))
        start = int(ends[file]) - sizes[names[file]]
        chosen.append((names[file], "flipped", 8 * (place - start) + int(rng.integers(8))))
    for name, size in sizes.items():
        for how in ("cut", "zeroed"):
            chosen += [(name, how, place) for place in (0, size // 2, size - 1)]
    return chosen


def outcomes(gallery: Path, chosen: list[Damage], seconds: float = SECONDS) -> Iterator[tuple[Damage, str]]:
    """Do each damage to a fresh copy and read that in another process, so that a crash or a hang is seen."""
    expected = answers(gallery)
    pool = ProcessPoolExecutor(1, SERVER, end_with_the_parent)
    try:
        for damage in chosen:
            try:
                yield damage, pool.submit(outcome, gallery, expected, damage).result(seconds)
            except (BrokenProcessPool, FutureTimeoutError) as error:
                for process in list(pool._processes.values()):
                    process.kill()
                pool.shutdown(cancel_futures=True)
                pool = ProcessPoolExecutor(1, SERVER, end_with_the_parent)
                yield damage, "hang" if isinstance(error, FutureTimeoutError) else "crash"
    finally:
        pool.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=500, help="of each gallery")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    result: dict[str, Any] = {"flips": args.flips, "seed": args.seed}
    for patches in ("stored", "recompute"):
        with tempfile.TemporaryDirectory() as folder:
            gallery = make_gallery(Path(folder), patches)
            start, counts, wrong = time.perf_counter(), Counter[str](), []
            for (file, how, place), found in outcomes(gallery, damages(gallery, args.flips, args.seed)):
                counts[f"{how}: {found.split(':')[0]}"] += 1
                counts[f"{how}: {Path(file).suffix} {found.split(':')[0]}"] += 1
                if found not in OUTCOMES:
                    wrong.append(f"{file} {how} at {place}: {found}")
            result[patches] = {
                "bytes": sum(path.stat().st_size for path in gallery.rglob("*") if path.is_file()),
                "outcomes": dict(sorted(counts.items())),
                "wrong": wrong,
                "seconds": round(time.perf_counter() - start, 1),
            }
    save("bit_rot", result)


if __name__ == "__main__":
    main()
