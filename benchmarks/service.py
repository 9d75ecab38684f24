"""The service under load, commits, kills and drawn requests; its page in a browser; what its slider promises.

Each show is a command of its own, and writes service_SHOW.json. Without --gallery it takes toy features of the sample
set under `relative`.

    python benchmarks/service.py load --gallery tiles.gallery --images tiles/test --seconds 600
    python benchmarks/service.py commits --commits 20 --requests 2000
    python benchmarks/service.py kills --kills 30
    python benchmarks/service.py routes --seconds 600
    python benchmarks/service.py promise --gallery tiles.gallery --images tiles/test/good
    python benchmarks/service.py page --output shots
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from common import save
from service_client import NAME, SAMPLES, Clients, Service, lost, toy_gallery

import spade_faiss as sf
from spade_faiss.images.sources import find_images
from spade_faiss.system import failpoints

CLIENTS = 8
WARM = 5.0  # seconds of posting before anything is measured
RATES = 5  # of the slider


def load(gallery: Path, images: list[Path], data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Post twice what Detector.stream can do from 8 clients, and compare throughput and answers with it."""
    before, expected = streamed(gallery, images, options.seconds / 10)
    service = Service(gallery, data)
    Clients(service, images).in_turn(CLIENTS, WARM)
    tally = Clients(service, images, expected).at_rate(CLIENTS, 2 * before, options.seconds)
    found = tally.facts() | {"lost": lost(service, tally.answers), "offered_per_second": 2 * before}
    service.stop()
    after, _ = streamed(gallery, images, options.seconds / 10)
    found["stream_images_per_second"] = [before, after]
    found["throughput_of_stream"] = found["images_per_second"] / ((before + after) / 2)
    return found


def streamed(gallery: Path, images: list[Path], seconds: float) -> tuple[float, dict[str, float]]:
    """Return images a second of Detector.stream over these files, and their scores."""
    with sf.Gallery.open(gallery) as opened:
        detector = sf.Detector(opened, opened.load_extractor())
        scores = {path.name: found.image_score for path, found in zip(images, detector.stream(images), strict=True)}
        start, count = time.monotonic(), 0
        while time.monotonic() - start < seconds:
            count += sum(1 for _ in detector.stream(images))
        return count / (time.monotonic() - start), scores


COMMIT = """
import sys, time, spade_faiss as sf
path, count, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
gallery = sf.Gallery.open(path)
for key in gallery.keys()[:count]:
    gallery.remove([key], timeout=30)
    print(gallery.generation, key, flush=True)
    time.sleep(pause)
"""  # images taken out one by one by another process; it says which generation lacks which


def commits(gallery: Path, images: list[Path], data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Post while another process commits: nothing fails, and no answer has an image that its generation lacks."""
    service = Service(gallery, data)
    Clients(service, images).in_turn(CLIENTS, WARM)
    words = [sys.executable, "-c", COMMIT, str(gallery), str(options.commits), str(options.pause)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as writer:
        tally = Clients(service, images).in_turn(CLIENTS, 1e9, options.requests)
        said = [line.split(" ", 1) for line in writer.communicate()[0].splitlines()]
    taken_out = {key: int(generation) for generation, key in said}
    mixed = [
        one
        for one in tally.answers
        if any(taken_out.get(key, one["generation"] + 1) <= one["generation"] for key in one["keys"])
    ]
    seen = sorted({one["generation"] for one in tally.answers})
    found = tally.facts() | {
        "commits": len(said),
        "generations_seen": len(seen),
        "answers_of_two_generations": len(mixed),
    }
    found["lost"] = lost(service, tally.answers)
    found["stopped"] = service.stop()
    return found


def kills(gallery: Path, images: list[Path], data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Kill the service at random times under load, then at each step of a false alarm; see what is left."""
    found, draw = [], random.Random(0)
    for _ in range(options.kills):
        service = Service(gallery, data)
        timer = threading.Timer(draw.uniform(0.2, 3), service.process.kill)
        timer.start()
        tally = Clients(service, images).in_turn(4, 3.2)
        service.process.wait()
        again = Service(gallery, data)
        found.append({"acknowledged": len(tally.answers), "lost": lost(again, tally.answers), "stopped": again.stop()})
        print(found[-1], flush=True)
    steps = [killed_at(step, gallery, images, data.parent) for step in steps_of_a_false_alarm(gallery, data.parent)]
    acknowledged = sum(one["acknowledged"] for one in found)
    return {
        "kills": len(found), "acknowledged": acknowledged, "lost": sum(one["lost"] for one in found),
        "stopped": sorted({one["stopped"] for one in found}), "steps": steps,
        "wrong_steps": [one["step"] for one in steps if not one["whole"]],
    }  # fmt: skip


def steps_of_a_false_alarm(gallery: Path, folder: Path) -> list[str]:
    """Return the steps that a false alarm passes, in their order, as failpoints name them."""
    from spade_faiss.service.normal_set import Author
    from spade_faiss.service.service import Service as Parts
    from spade_faiss.service.settings import ServiceSettings

    copied, passed = folder / "steps.gallery", list[str]()
    shutil.copytree(gallery, copied)
    parts = Parts(ServiceSettings({NAME: copied}, data=folder / "steps", recalibrate=False))
    parts.start()
    parts.registry.loaded(NAME)
    failpoints.action = passed.append
    try:
        parts.normal_set.add(NAME, (SAMPLES / "test/smudge/000.jpg").read_bytes(), Author("a", "b"))
    finally:
        failpoints.action = None
        parts.close()
        shutil.rmtree(copied)
    return list(dict.fromkeys(passed))


def killed_at(step: str, gallery: Path, images: list[Path], folder: Path) -> dict[str, Any]:
    """Press *false alarm* in a service that is killed at a step; start it again, and say what is there."""
    copied, data = folder / "killed.gallery", folder / "killed"
    shutil.copytree(gallery, copied)
    service = Service(copied, data, environment={failpoints.VARIABLE: step})
    alarm = next(
        (one for one in images if service.post(one.read_bytes(), "part")[1]["verdict"] == "anomalous"), images[0]
    )
    part = service.post(alarm.read_bytes(), "alarm")[1]
    status, _ = service.send(f"/v1/galleries/{NAME}/normal", {"inspection": part["id"]})
    died = service.process.wait() == -signal.SIGKILL
    again = Service(copied, data)
    [change] = again.get("/v1/changes")[1]["changes"]
    with sf.Gallery.open(copied) as opened:
        problems, there = opened.verify(), change["key"] in opened
        trusted = change["key"] in opened.trusted()
    label = again.get(f"/v1/inspections/{part['id']}")[1]["label"]
    twin = again.post(alarm.read_bytes(), "twin")[1]["verdict"]
    pressed = again.send(f"/v1/galleries/{NAME}/normal", {"inspection": part["id"]})[0]
    then = again.post(alarm.read_bytes(), "twin")[1]["verdict"]
    again.stop()
    whole = died and status == 0 and not problems and change["state"] == ("done" if there else "failed")
    whole = whole and trusted == there and label == ("false_alarm" if there else None)
    whole = whole and twin == ("normal" if there else part["verdict"]) and (pressed, then) == (200, "normal")
    for path in (copied, data):
        shutil.rmtree(path)
    found = {"step": step, "in_gallery": there, "change": change["state"], "twin": twin, "pressed_again": then}
    print(found, whole, flush=True)
    return found | {"whole": whole}


def routes(gallery: Path, images: list[Path], data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Draw requests for all routes with schemathesis, for some time from a fixed seed."""
    service = Service(gallery, data)
    for image in images[:4]:
        service.post(image.read_bytes(), image.name)
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    words = [Path(sys.executable).with_name("schemathesis"), "run", f"http://127.0.0.1:{service.port}/openapi.json"]
    words += ["--seed", "1", "--max-time", str(int(options.seconds)), "--checks", checks, "--continue-on-failure"]
    words += ["--request-timeout", "60", "--suppress-health-check", "all"]
    run = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, cwd=data.parent)
    alive = service.process.poll() is None
    print(run.stdout[-6000:], run.stderr[-2000:])
    found = {
        "status": run.returncode,
        "seconds": options.seconds,
        "alive": alive,
        "summary": run.stdout.splitlines()[-25:],
    }
    return found | {"stopped": service.stop()}


def promise(gallery: Path, images: list[Path], data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Post normal images, and ask what share would be called anomalous at several positions of the slider."""
    service = Service(gallery, data, "--kept", "1")
    tally = Clients(service, images).in_turn(2, 1e9, len(images))
    settings = service.get(f"/v1/galleries/{NAME}/statistics")[1]["rates"]
    chosen = [settings[round(at * (len(settings) - 1) / (RATES - 1))] for at in range(RATES)]
    found = []
    for rate in chosen:
        answer = service.get(f"/v1/galleries/{NAME}/rejudge?false_alarms={rate}&last={len(images)}")[1]
        alarms = answer["anomalous_after"]
        found.append({"promised": rate, "seen": alarms / len(answer["parts"]), "alarms": alarms})
    service.stop()
    return {
        "normal_images": answer["images"],
        "parts": len(answer["parts"]),
        "settings": found,
        "statuses": tally.facts()["statuses"],
    }


def page(gallery: Path, images: list[Path], data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Go through the page of `make serve-demo` in a browser; see service_page."""
    from service_page import walk

    return walk(options.output)


SHOWS = {show.__name__: show for show in (load, commits, kills, routes, promise, page)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("show", choices=SHOWS)
    parser.add_argument("--gallery", type=Path, help="calibrated; it is copied  [default: of the sample set]")
    parser.add_argument("--images", type=Path, default=SAMPLES / "test")
    parser.add_argument("--seconds", type=float, default=60, help="of load and routes")
    parser.add_argument("--commits", type=int, default=20)
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between commits")
    parser.add_argument("--requests", type=int, default=2000, help="during the commits")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("service-page"), help="folder of the page's screenshots")
    options = parser.parse_args()
    images = [file.path for file in find_images([options.images])]
    with tempfile.TemporaryDirectory() as folder:
        if options.show == "page":
            gallery = Path(folder)  # it has its own
        elif options.gallery is None:
            gallery = toy_gallery(Path(folder))
        else:
            gallery = Path(folder) / "bench.gallery"
            shutil.copytree(options.gallery, gallery)
        result = SHOWS[options.show](gallery, images, Path(folder) / "data", options)
    given = "toy features of the sample set" if options.gallery is None else options.gallery.name
    given = "that of make serve-demo" if options.show == "page" else given
    save(f"service_{options.show}", {"gallery": given, "images": len(images), **result})


if __name__ == "__main__":
    main()
