"""The page of `make serve-demo` in a browser, as a person at the line would use it, with screenshots to look at."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from service_client import SAMPLES

ROOT = Path(__file__).parents[1]
STARTUP = 1800.0  # seconds that a demonstration may take until it is ready: it builds its gallery first
PARTS = 30
SIZES = {1280: 860, 390: 844, 2560: 1440}
SCHEMES = ("light", "dark")
VIEWS = ("line", "threshold", "normal")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run")
SERIOUS = ("serious", "critical")
SLOW = 120_000  # ms that the page may take to show something on a machine that is busy


class Demo:
    """`make serve-demo` in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        words = [sys.executable, str(ROOT / "deploy" / "serve_demo.py"), str(self.folder), str(self.port)]
        self.process = subprocess.Popen(words, start_new_session=True, stdout=subprocess.DEVNULL)
        end = time.monotonic() + STARTUP
        while True:
            try:
                urllib.request.urlopen(f"{self.address}/health/ready", timeout=5)
                return
            except (urllib.error.URLError, OSError):
                if self.process.poll() is not None or time.monotonic() > end:
                    self.kill()
                    raise SystemExit("make serve-demo did not become ready") from None
                time.sleep(0.2)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def ask(self, path: str) -> Any:
        return json.loads(urllib.request.urlopen(self.address + path, timeout=60).read())


def walk(output: Path) -> dict[str, Any]:
    """Post parts, move the slider, hover, press *false alarm*, kill the service, start it again, look at the twin."""
    from playwright.sync_api import sync_playwright

    output.mkdir(parents=True, exist_ok=True)
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        demo = Demo(Path(folder) / "demo")
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        try:
            demo.start()
            return _walk(demo, browser, output)
        finally:
            demo.kill()
            browser.close()


def _walk(demo: Demo, browser: Any, output: Path) -> dict[str, Any]:
    errors: list[str] = []
    page = _page(browser, demo, 1280, "light", errors)
    page.goto("/")
    images = sorted(SAMPLES.glob("test/*/*.jpg"), key=lambda path: path.name)
    while ((known := demo.ask("/v1/inspections?last=100")["inspections"]) and len(known) < len(images)) or not known:
        time.sleep(1)  # the demo posts each image once
    for number in range(PARTS - len(known)):
        _post(page, images[number % len(images)])
    alarm = SAMPLES / "test" / "smudge" / "000.jpg"
    first = _post(page, alarm)
    page.wait_for_selector("#sub:has-text('smudge/000')", timeout=SLOW)
    page.wait_for_selector("#why-text:has-text('Matched with')", timeout=SLOW)
    hovered = _hover(page)
    found: dict[str, Any] = {"parts": len(demo.ask("/v1/inspections?last=100")["inspections"]), "hovered": hovered}
    found["serious_accessibility"] = _shots(browser, demo, output, errors)
    page.goto("/#threshold")
    page.wait_for_selector("#rate:not([disabled])", timeout=SLOW)
    page.fill("#rate", page.get_attribute("#rate", "max"))
    page.wait_for_function("document.querySelector('#rate-changes').textContent.includes('would change')", timeout=SLOW)
    found["slider"] = page.inner_text("#rate-changes").splitlines()[0]
    page.goto("/#line")
    page.wait_for_selector("#sub:has-text('smudge/000')", timeout=SLOW)
    page.keyboard.press("f")
    page.wait_for_selector("#undo-what:has-text('is normal')", timeout=SLOW)
    before = demo.ask("/v1/inspections?last=1000")["inspections"]
    demo.kill()
    page.wait_for_selector(".live:not(.on)", timeout=SLOW)
    page.screenshot(path=output / "gone.png")
    errors[:] = [text for text in errors if "ERR_" not in text]  # the browser's own, of a server that is not there
    demo.start()
    page.wait_for_selector(".live.on", timeout=SLOW)
    errors[:] = [text for text in errors if "ERR_" not in text]
    after = {one["id"]: one for one in demo.ask("/v1/inspections?last=1000")["inspections"]}
    [change] = [one for one in demo.ask("/v1/changes")["changes"] if one["what"] == "add"]
    keys = [one["key"] for one in demo.ask(f"/v1/galleries/samples/normal?search={change['key']}")["images"]]
    twin, other = _post(page, alarm), _post(page, SAMPLES / "test" / "misweave" / "001.jpg")
    page.screenshot(path=output / "after.png")
    return found | {
        "before": [first["verdict"], first["image_score"]],
        "log_whole": all(one["id"] in after for one in before),
        "in_gallery": keys == [change["key"]],
        "label": after[first["id"]]["label"],
        "twin": [twin["verdict"], twin["image_score"]],
        "another_defect": [other["verdict"], other["image_score"]],
        "console_errors": errors,
        "screenshots": sorted(path.name for path in output.glob("*.png")),
    }


def _page(browser: Any, demo: Demo, width: int, scheme: str, errors: list[str]) -> Any:
    size = {"width": width, "height": SIZES[width]}
    page = browser.new_page(viewport=size, base_url=demo.address, color_scheme=scheme)
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    return page


def _post(page: Any, image: Path) -> Any:
    headers = {"Content-Type": "image/jpeg", "X-Name": f"{image.parent.name}/{image.stem}"}
    answer = page.request.post("/v1/galleries/samples/inspect", data=image.read_bytes(), headers=headers, timeout=SLOW)
    assert answer.ok, answer.text()
    return answer.json()


def _hover(page: Any) -> bool:
    """Point at several places; return whether the normal patch that is shown changed."""
    before, box = page.inner_text("#why-text"), page.locator("#canvas").bounding_box()
    for tenth in range(1, 10):
        page.mouse.move(box["x"] + box["width"] * tenth / 10, box["y"] + box["height"] * tenth / 10)
        page.wait_for_timeout(200)
        if page.inner_text("#why-text") != before:
            return True
    return False


def _shots(browser: Any, demo: Demo, output: Path, errors: list[str]) -> list[str]:
    """Photograph each view at each size, light and dark; return what axe-core finds serious."""
    from axe_core_python.sync_playwright import Axe

    serious = []
    for width in SIZES:
        for scheme in SCHEMES:
            page = _page(browser, demo, width, scheme, errors)
            for view in VIEWS:
                page.goto(f"/?{view}#{view}")
                page.wait_for_selector(".live.on", timeout=SLOW)
                page.wait_for_load_state("load")
                page.wait_for_timeout(2500)
                page.screenshot(path=output / f"{view}-{width}-{scheme}.png", full_page=width == 390)
                if width != 2560:
                    found = Axe().run(page)["violations"]
                    serious += [f"{view} {width} {scheme}: {one['id']}" for one in found if one["impact"] in SERIOUS]
            page.close()
    return serious
