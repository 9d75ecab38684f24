"""The service under load: throughput beside Detector.stream, latencies, refusals, commits by others, kills.

Clients post more than the service can take. What it answers must be what a query finds, every refusal a 429, and
nothing lost or mixed up. Then another process commits while it runs, and it is killed at random times.

    python benchmarks/service.py tiles.gallery tiles/test --seconds 60 --commits 5 --kills 3
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common import save

import spade_faiss as sf
from spade_faiss.images.sources import find_images

TOLERANCE = 1e-6  # relative, of image scores
STARTUP = 120.0  # seconds that the service may take until it is ready


@dataclass
class Tally:
    """What clients have seen."""

    statuses: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    generations: Counter[int] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Service:
    """The service as a process of its own."""

    def __init__(self, gallery: Path, data: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        words = [sys.executable, "-m", "spade_faiss.cli", "serve", f"bench={gallery}", "--data", str(data)]
        words += ["--port", str(self.port), "--no-recalibrate"]
        self.process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
        end = time.monotonic() + STARTUP
        while self.get("/health/ready")[0] != 200:
            if self.process.poll() is not None or time.monotonic() > end:
                raise SystemExit("the service did not become ready")
            time.sleep(0.1)

    def get(self, path: str) -> tuple[int, Any]:
        """Ask for a path; status 0: nobody answers."""
        return self.ask("GET", path, None, {})

    def post(self, content: bytes, name: str) -> tuple[int, Any]:
        """Inspect an image."""
        headers = {"Content-Type": "image/png", "X-Name": name}
        return self.ask("POST", "/v1/galleries/bench/inspect", content, headers)

    def ask(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        except (OSError, http.client.HTTPException, ValueError):
            return 0, None
        finally:
            connection.close()

    def resident_mib(self) -> float:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        return self.process.wait()


def load(service: Service, images: list[Path], expected: dict[str, float], clients: int, seconds: float) -> Tally:
    """Post images from several clients for some seconds; each checks that the answer is its own image's."""
    tally, end = Tally(), time.monotonic() + seconds
    contents = {path.name: path.read_bytes() for path in images}

    def client(seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < end:
            path = draw.choice(images)
            name, start = f"{seed}/{path.name}", time.monotonic()
            status, answer = service.post(contents[path.name], name)
            with tally.lock:
                tally.statuses[status] += 1
                if status == 200:
                    tally.seconds.append(time.monotonic() - start)
                    tally.ids.append(answer["id"])
                    tally.generations[answer["generation"]] += 1
                    wanted = expected.get(path.name)
                    if answer["name"] != name or (wanted and abs(answer["image_score"] / wanted - 1) > TOLERANCE):
                        tally.wrong.append(f"{name}: {answer['name']}, {answer['image_score']}, expected {wanted}")
            if status == 429:
                time.sleep(0.05)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tally


def facts(tally: Tally, seconds: float) -> dict[str, Any]:
    """Return what clients have seen as JSON values."""
    times = np.array(tally.seconds or [float("nan")])
    return {
        "statuses": dict(tally.statuses),
        "images_per_second": len(tally.seconds) / seconds,
        "p50_ms": 1000 * float(np.median(times)),
        "p99_ms": 1000 * float(np.quantile(times, 0.99)),
        "wrong": tally.wrong[:5],
        "wrong_answers": len(tally.wrong),
        "generations": {str(number): count for number, count in sorted(tally.generations.items())},
    }


def lost(service: Service, ids: list[str]) -> int:
    """Count acknowledged inspections that the log does not have."""
    return sum(service.get(f"/v1/inspections/{uid}")[0] != 200 for uid in ids)


def streamed(gallery: Path, images: list[Path], seconds: float) -> tuple[float, dict[str, float]]:
    """Return images a second of Detector.stream over these files, and their scores."""
    opened = sf.Gallery.open(gallery)
    detector = sf.Detector(opened, opened.load_extractor())
    scores = {path.name: found.image_score for path, found in zip(images, detector.stream(images), strict=True)}
    start, count = time.monotonic(), 0
    while time.monotonic() - start < seconds:
        count += sum(1 for _ in detector.stream(images))
    return count / (time.monotonic() - start), scores


def commit(gallery: Path, key: str, count: int, pause: float) -> None:
    """Take an image out of the gallery and back in, from another process, one commit each."""
    code = (
        "import sys, time, spade_faiss as sf\n"
        "path, key, count, pause = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])\n"
        "gallery = sf.Gallery.open(path)\n"
        "for key in gallery.keys()[:count]:\n"
        "    gallery.remove([key], timeout=10)\n"
        "    time.sleep(pause)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(gallery), key, str(count), str(pause)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gallery", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--clients", type=int, default=40, help="more than the queue takes are refused")
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--commits", type=int, default=5)
    parser.add_argument("--kills", type=int, default=3)
    options = parser.parse_args()
    images = [file.path for file in find_images([options.images])]
    with tempfile.TemporaryDirectory() as folder:
        gallery, data = Path(folder) / "bench.gallery", Path(folder) / "data"
        shutil.copytree(options.gallery, gallery)
        before, expected = streamed(gallery, images, options.seconds / 4)
        service = Service(gallery, data)
        load(service, images, expected, 4, 3)  # warm
        start = service.resident_mib()
        tally = load(service, images, expected, options.clients, options.seconds)
        result: dict[str, Any] = {"load": facts(tally, options.seconds) | {"lost": lost(service, tally.ids)}}
        result["load"]["memory_mib"] = [start, service.resident_mib()]
        writer = threading.Thread(target=commit, args=(gallery, "", options.commits, 1.0))
        writer.start()
        during = load(service, images, {}, 4, options.commits * 1.5 + 4)
        writer.join()
        result["commits"] = facts(during, options.commits * 1.5 + 4)
        service.stop()
        after, _ = streamed(gallery, images, options.seconds / 4)
        stream = (before + after) / 2
        result["stream_images_per_second"] = [before, after]
        result["throughput_of_stream"] = result["load"]["images_per_second"] / stream
        result["kills"] = killed(gallery, data, images, options.kills)
    save("service", result)


def killed(gallery: Path, data: Path, images: list[Path], kills: int) -> list[dict[str, Any]]:
    """Kill the service at random times under load; count what was acknowledged and is not there after a restart."""
    found, draw = [], random.Random(0)
    for _ in range(kills):
        service = Service(gallery, data)
        timer = threading.Timer(draw.uniform(0.5, 4), service.process.kill)
        timer.start()
        tally = load(service, images, {}, 4, 4.5)
        service.process.wait()
        again = Service(gallery, data)
        found.append({"acknowledged": len(tally.ids), "lost": lost(again, tally.ids), "stopped": again.stop()})
    return found


if __name__ == "__main__":
    main()
