"""The sample set as a service: builds a gallery, serves it, and posts the samples as a camera would.

`make serve-demo`, or `python deploy/serve_demo.py [FOLDER] [PORT]`. Then open http://127.0.0.1:8000/. Ctrl-C ends it;
run again, it goes on with the gallery and the log that are there.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from pathlib import Path

from spade_faiss.cli.demo import run_demo, sample_folder
from spade_faiss.extractors.spec import DEFAULT_EXTRACTOR

PORT = int(sys.argv[2]) if len(sys.argv) > 2 else 8000
PAUSE = 1.5  # seconds between parts, as on a slow line


def request(method: str, path: str, body: bytes | None = None, name: str = "") -> tuple[int, bytes]:
    """Send one request to the service; returns status and body."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
    connection.request(method, path, body, {"Content-Type": "image/jpeg", "X-Name": name} if body else {})
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


def is_ready() -> bool:
    """Return whether the first search has compiled."""
    try:
        return request("GET", "/health/ready")[0] == 200
    except OSError:
        return False


def post(image: Path) -> str:
    """Post an image as a camera would; returns the verdict in a line."""
    name = f"{image.parent.name}/{image.name}"
    status, body = request("POST", "/v1/galleries/samples/inspect", image.read_bytes(), name)
    answer = json.loads(body)
    if status != 200:
        return f"{name:26} {answer['error']['message']}"
    return f"{name:26} {answer['verdict']:10} {answer['image_score']:.2f}  {answer['ms']:.0f} ms"


def main() -> None:
    """Build, serve, post."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "spade-serve-demo")
    gallery = folder / "samples.gallery"
    if not (gallery / "calibration.json").exists():
        for line in run_demo(folder, DEFAULT_EXTRACTOR, progress=False):
            print(line)
    words = ["serve", f"samples={gallery}", "--data", folder / "service", "--port", PORT]
    words += ["--normal", sample_folder() / "train" / "good"]
    service = subprocess.Popen([sys.executable, "-m", "spade_faiss.cli", *map(str, words)], stderr=subprocess.DEVNULL)
    try:
        while not is_ready():
            if service.poll() is not None:
                sys.exit(f"the service ended with status {service.returncode}: is port {PORT} taken?")
            time.sleep(0.2)
        print(f"open http://127.0.0.1:{PORT}/ in a browser; Ctrl-C ends the service")
        for image in sorted(sample_folder().glob("test/*/*.jpg"), key=lambda path: path.name):
            print(post(image))
            time.sleep(PAUSE)
        service.wait()
    except KeyboardInterrupt:
        pass
    finally:
        service.terminate()
        service.wait()


if __name__ == "__main__":
    main()
