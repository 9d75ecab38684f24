"""Hostile files: galleries and images changed at random and on purpose, each read in a process with a bound on memory.

python benchmarks/fuzz.py [--seconds 60] [--seed 0]

Of bit_rot.py it differs in that checksums are made to match, so that what is behind them is reached, and in that sizes
and numbers are put to their extremes. Whatever a file holds: an error of the package, or an answer; no crash, no hang,
no error of another kind, no memory beyond MEMORY, and no file opened outside the gallery.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import shutil
import struct
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash
from bit_rot import answers, make_gallery
from common import SERVER, end_with_the_parent, save
from PIL import Image

import spade_faiss as sf
from spade_faiss.detect import calibration
from spade_faiss.images.decode import decode
from spade_faiss.store import manifest
from spade_faiss.system.sealed_json import sealed

SECONDS = 60  # of one reading; it takes a tenth of one
MEMORY = 2**30  # bytes that a process may add to what it takes before it reads
KINDS = ("gallery.json", "calibration.json", "shard", "keys", "index", "image")

# What is put in place of any value.
EXTREMES: list[Any] = [
    0, -1, 1, 2**31, 2**63 - 1, 2**63, 10**12, 10**15, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan"), True,
    None, "", "x", "../x", "/etc/passwd", "\0", "\ud800", "9" * 5000, [], [[]], {}, {"a": 1}, [10**9] * 3,
]  # fmt: skip


def change_json(rng: np.random.Generator, values: Any) -> Any:
    """Put an extreme in place of one value, take it away, or put it there twice."""
    places = list(_places(values))
    parent, key = places[rng.integers(len(places))]
    how = rng.integers(8)
    if how == 0:
        del parent[key]
    elif how == 1 and isinstance(parent, list):
        parent.append(parent[key])
    elif how == 2 and isinstance(parent[key], int):
        parent[key] += int(rng.integers(-2, 3))
    else:
        parent[key] = EXTREMES[rng.integers(len(EXTREMES))]
    return values


def _places(values: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in list(values.items() if isinstance(values, dict) else enumerate(values)):
        yield values, key
        if isinstance(value, (dict, list)):
            yield from _places(value)


def change_bytes(rng: np.random.Generator, content: bytes) -> bytes:
    """Flip, cut, zero, double or put numbers into bytes."""
    changed = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        place, how = int(rng.integers(max(1, len(changed)))), rng.integers(6)
        if how == 0:
            del changed[place:]
        elif how == 1:
            changed[place : place + int(rng.integers(1, 64))] = rng.bytes(int(rng.integers(0, 64)))
        elif how == 2:
            changed[place : place + 8] = struct.pack("<q", int(rng.choice([0, -1, 2**31, 2**63 - 1, 10**12])))
        elif how == 3:
            changed[place:place] = changed[place : place + int(rng.integers(1, 256))]
        elif changed:
            changed[min(place, len(changed) - 1)] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def fuzz_manifest(rng: np.random.Generator, path: Path) -> None:
    values = json.loads((path / manifest.FILE).read_bytes())
    values.pop("xxh3")
    for _ in range(int(rng.integers(1, 4))):
        change_json(rng, values)
    with contextlib.suppress(ValueError):  # text that has no UTF-8
        (path / manifest.FILE).write_text(json.dumps(values), "utf-8")


def fuzz_calibration(rng: np.random.Generator, path: Path) -> None:
    values = json.loads((path / calibration.FILE).read_bytes())
    values.pop("xxh3")
    for _ in range(int(rng.integers(1, 4))):
        change_json(rng, values)
    (path / calibration.FILE).write_bytes(sealed(values))


def fuzz_shard(rng: np.random.Generator, path: Path) -> None:
    """Change the bytes of a shard, or a dataset in it, and its size in gallery.json to match."""
    file = sorted(path.glob("shards/*.h5"))[int(rng.integers(2))]
    if rng.integers(2):
        file.write_bytes(change_bytes(rng, file.read_bytes()))
    else:
        with h5py.File(file, "r+") as opened:
            name = str(rng.choice(["keys", "digests", "image", "checksums", "levels/0", "levels/1", "sources"]))
            if name in opened:
                _change_dataset(rng, opened, name)
    _edit(
        path,
        lambda values: [one.update(bytes=file.stat().st_size) for one in values["shards"] if one["file"] in str(file)],
    )


def _change_dataset(rng: np.random.Generator, file: h5py.File, name: str) -> None:
    values, how = file[name][:], rng.integers(8)
    shape, dtype = values.shape, values.dtype
    del file[name]
    if how == 0:
        file[name] = h5py.ExternalLink("/etc/passwd", "/x")
    elif how == 1:
        file[name] = h5py.SoftLink("/" + name)  # of itself
    elif how == 2:
        file.create_dataset(name, (10**12, *shape[1:]), dtype, chunks=(1, *shape[1:]))
    elif how == 3:
        file.create_dataset(name, shape, dtype, external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])
    elif how == 4:
        file.create_dataset(name, (10**7, *shape[1:]), dtype, chunks=(10**4, *shape[1:]), compression="gzip")
    elif how == 5:
        file.create_group(name)
    elif how == 6:
        wrong = rng.choice(["float64", "int8", "S1", "bool", "complex64"])
        file.create_dataset(name, shape, str(wrong))
    else:
        changed = np.frombuffer(
            change_bytes(rng, values.tobytes()).ljust(values.nbytes, b"\xff")[: values.nbytes], dtype
        )
        file.create_dataset(name, data=changed.reshape(shape), chunks=(1, *shape[1:]) if len(shape) == 4 else None)


def fuzz_keys(rng: np.random.Generator, path: Path) -> None:
    [file] = path.glob("index/*.npy")
    content = change_bytes(rng, file.read_bytes())
    if rng.integers(2):
        header = io.BytesIO()
        shape = (2, int(rng.choice([0, 14, 10**9, 10**15])))
        np.lib.format.write_array_header_1_0(header, {"descr": "<u8", "fortran_order": False, "shape": shape})
        content = header.getvalue() + content[128:]
    file.write_bytes(content)
    checksum = xxhash.xxh3_64_hexdigest(content)
    _edit(path, lambda values: values["keys"].update(bytes=len(content), xxh3=checksum))


def fuzz_index(rng: np.random.Generator, path: Path) -> None:
    """Its checksum stays as it is: FAISS trusts what it reads, so that one made to match is a limit that is stated."""
    [file] = path.glob("index/*.faiss")
    file.write_bytes(change_bytes(rng, file.read_bytes()))
    _edit(path, lambda values: values["index"].update(bytes=file.stat().st_size))


def _edit(path: Path, change: Any) -> None:
    values = json.loads((path / manifest.FILE).read_bytes())
    values.pop("xxh3", None)
    change(values)
    (path / manifest.FILE).write_text(json.dumps(values))


def an_image(rng: np.random.Generator) -> bytes:
    """Encode an image, and change its bytes, or what its header says of its size."""
    kind = str(rng.choice(["PNG", "JPEG", "TIFF", "BMP", "WEBP", "PPM"]))
    pixels = rng.integers(0, 256, (int(rng.integers(8, 40)), int(rng.integers(8, 40)), 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    content = bytearray(buffer.getvalue())
    if kind == "PNG" and rng.integers(2):  # a bomb whose header's own checksum is right
        sides = rng.choice([8, 8000, 20_000, 2**31 - 1], 2)
        content[16:24] = struct.pack(">II", *map(int, sides))
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
        return bytes(content)
    return change_bytes(rng, bytes(content))


FUZZ = {
    "gallery.json": fuzz_manifest, "calibration.json": fuzz_calibration, "shard": fuzz_shard, "keys": fuzz_keys,
    "index": fuzz_index,
}  # fmt: skip


def outcome(gallery: Path, kind: str, seed: int) -> str:
    """Change one file with a seed and read it; returns "taken", "refused", or what went wrong."""
    _opened.clear()
    found = _outcome(gallery, kind, seed)
    outside = [name for name in _opened if name.startswith("/etc/passwd")]
    return f"outside: {outside}" if outside else found


def _outcome(gallery: Path, kind: str, seed: int) -> str:
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "gallery"
        try:
            if kind == "image":
                decode(an_image(rng))
                return "taken"
            shutil.copytree(gallery, path)
            FUZZ[kind](rng, path)
            with sf.Gallery.open(path, "cpu") as reader:
                found = "refused" if reader.verify() else "taken"
            answers(path)
            return found
        except sf.SpadeError as error:
            return "refused" if "\n" not in str(error) else f"unclear: {error!r}"
        except Exception as error:
            return f"not caught: {error!r:.200}"


_opened: set[str] = set()


def _start(gallery: Path) -> None:
    """Bound the memory of a process, once all is imported and compiled, and look at what Python opens."""
    end_with_the_parent()
    answers(gallery)
    sys.addaudithook(lambda event, args: _opened.add(str(args[0])) if event == "open" else None)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def executions(gallery: Path, kinds: list[str], seeds: Iterator[int], seconds: float) -> Iterator[tuple[str, int, str]]:
    """Read one changed file after another, of each kind in turn, until the time is up."""

    def new() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, SERVER, _start, (gallery,))

    pool, end = new(), time.monotonic() + seconds
    for number, seed in enumerate(seeds):
        kind = kinds[number % len(kinds)]
        try:
            found = pool.submit(outcome, gallery, kind, seed).result(SECONDS)
        except (BrokenProcessPool, FutureTimeoutError) as error:
            for process in list(pool._processes.values()):
                process.kill()
            pool.shutdown(cancel_futures=True)
            pool, found = new(), "hang" if isinstance(error, FutureTimeoutError) else "crash"
        yield kind, seed, found
        if time.monotonic() > end:
            break
    pool.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="for each way to have patches")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    result: dict[str, Any] = {"seed": args.seed, "seconds_each": args.seconds, "memory": MEMORY}
    for patches in ("stored", "recompute"):
        counts, wrong = Counter[str](), []
        with tempfile.TemporaryDirectory() as folder:
            gallery = make_gallery(Path(folder), patches)
            seeds = iter(range(args.seed * 10**6, (args.seed + 1) * 10**6))
            for kind, seed, found in executions(gallery, list(KINDS), seeds, args.seconds):
                counts[f"{kind}: {found.split(':')[0]}"] += 1
                if found not in ("taken", "refused"):
                    wrong.append(f"{kind} with seed {seed}: {found}")
        executed = sum(counts.values())
        result[patches] = {"executions": executed, "outcomes": dict(sorted(counts.items())), "wrong": wrong}
    save("fuzz", result)


if __name__ == "__main__":
    main()
