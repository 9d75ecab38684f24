"""The service as a process of its own, and clients of it that remember what they have seen."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import spade_faiss as sf

NAME = "bench"
TOLERANCE = 1e-6  # relative, of image scores
STARTUP = 900.0  # seconds that the service may take until it is ready
SAMPLES = Path(__file__).parents[1] / "data" / "samples"
FALSE_ALARMS = 0.1


def toy_gallery(folder: Path) -> Path:
    """Make a calibrated gallery of the sample set by toy features, under `relative`: its queries take ms."""
    toy = sf.load_extractor("toy", options=sf.FeatureOptions(batch_size=4))
    with sf.Gallery.create(folder / "toy.gallery", toy.spec, recipe="relative") as gallery:
        gallery.add_images(SAMPLES / "train" / "good", toy)
        sf.calibrate(sf.Detector(gallery, toy), FALSE_ALARMS).write(gallery.path)
        return gallery.path


class Service:
    """The service as a process of its own."""

    def __init__(
        self, gallery: Path, data: Path, *more: str, environment: Mapping[str, str] | None = None, wait: bool = True
    ) -> None:
        """Start it; with `wait`, return when it is ready."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        words = [sys.executable, "-m", "spade_faiss.cli", "serve", f"{NAME}={gallery}", "--data", str(data)]
        words += ["--port", str(self.port), "--no-recalibrate", *more]
        self.log = data.parent / "service.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(words, stderr=log, env={**os.environ, **(environment or {})})
        end = time.monotonic() + STARTUP
        while wait and self.get("/health/ready")[0] != 200:
            if self.process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the service did not become ready:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.1)

    def get(self, path: str) -> tuple[int, Any]:
        """Ask for a path; status 0: nobody answers."""
        return self.ask("GET", path, None, {})

    def post(self, content: bytes, name: str) -> tuple[int, Any]:
        """Inspect an image."""
        return self.ask("POST", f"/v1/galleries/{NAME}/inspect", content, {"Content-Type": "image/*", "X-Name": name})

    def send(self, path: str, values: Mapping[str, Any]) -> tuple[int, Any]:
        """Post JSON values."""
        return self.ask("POST", path, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def ask(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
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


@dataclass
class Tally:
    """What clients have seen."""

    seconds: float = 0.0  # that they posted for
    statuses: Counter[int] = field(default_factory=Counter)
    times: list[float] = field(default_factory=list)  # seconds of what was answered
    wrong: list[str] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)  # what is kept of each: id, generation, neighbours
    memory_mib: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def facts(self) -> dict[str, Any]:
        """Return it as JSON values."""
        times = np.array(self.times or [float("nan")])
        return {
            "seconds": self.seconds,
            "requests": sum(self.statuses.values()),
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "images_per_second": len(self.times) / self.seconds,
            "p50_ms": 1000 * float(np.median(times)),
            "p99_ms": 1000 * float(np.quantile(times, 0.99)),
            "wrong": self.wrong[:5],
            "wrong_answers": len(self.wrong),
            "memory_mib": [round(one) for one in self.memory_mib],
        }


class Clients:
    """Several clients, each of which posts images at a rate or one after the other, and checks each answer."""

    def __init__(self, service: Service, images: Sequence[Path], expected: Mapping[str, float] | None = None) -> None:
        self.service = service
        self.contents = {path.name: path.read_bytes() for path in images}
        self.expected = expected or {}
        self.tally = Tally()

    def one(self, client: int, number: int) -> int:
        """Post an image and check that the answer is its own; returns the status."""
        name = list(self.contents)[number % len(self.contents)]
        own, start = f"{client}/{number}/{name}", time.monotonic()
        status, answer = self.service.post(self.contents[name], own)
        taken = time.monotonic() - start
        with self.tally.lock:
            self.tally.statuses[status] += 1
            if status == 200:
                self.tally.times.append(taken)
                kept = {part: answer[part] for part in ("id", "generation")}
                self.tally.answers.append(kept | {"keys": [one["key"] for one in answer["neighbours"]]})
                wanted = self.expected.get(name)
                if answer["name"] != own or (wanted and abs(answer["image_score"] / wanted - 1) > TOLERANCE):
                    self.tally.wrong.append(f"{own}: {answer['name']}, {answer['image_score']}, expected {wanted}")
        return status

    def at_rate(self, clients: int, rate: float, seconds: float) -> Tally:
        """Post at a rate, all clients together, whether answers come or not."""
        with ThreadPoolExecutor(16 * clients) as pool:
            self._run(clients, seconds, lambda client, number: pool.submit(self.one, client, number), clients / rate)
        return self.tally

    def in_turn(self, clients: int, seconds: float, requests: int | None = None) -> Tally:
        """Post one image after the other from each client, for some time or until so many were posted."""
        self._run(clients, seconds, self.one, 0, requests)
        return self.tally

    def _run(self, clients: int, seconds: float, post: Any, pause: float, requests: int | None = None) -> None:
        start = time.monotonic()

        def client(which: int) -> None:
            number = which
            while time.monotonic() < start + seconds and (requests is None or number < requests):
                due = start + (number // clients) * pause
                time.sleep(max(0.0, due - time.monotonic()))
                post(which, number)
                number += clients

        threads = [threading.Thread(target=client, args=(which,)) for which in range(clients)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            if self.service.process.poll() is None:
                self.tally.memory_mib.append(self.service.resident_mib())
            threads[0].join(max(0.5, seconds / 20))
            time.sleep(0 if threads[0].is_alive() else 0.5)
        for thread in threads:
            thread.join()
        self.tally.seconds = time.monotonic() - start


def lost(service: Service, answers: Sequence[Mapping[str, Any]]) -> int:
    """Count acknowledged inspections that the log does not have."""
    return sum(service.get(f"/v1/inspections/{one['id']}")[0] != 200 for one in answers)
