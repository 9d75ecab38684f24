"""The page in a browser, and every route with drawn requests."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from spade_faiss.service.app import create_app
from spade_faiss.service.service import Service
from tests.service.conftest import NAME, png, settings_of, until

pytestmark = pytest.mark.slow

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run",
)  # fmt: skip
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed: apt-get install chromium, or name it in CHROMIUM")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, socketed: tuple[str, int, Service]) -> Iterator[Any]:
    host, port, _ = socketed
    page = browser.new_page(viewport={"width": 1280, "height": 860}, base_url=f"http://{host}:{port}")
    messages: list[str] = []
    page.on("console", lambda message: messages.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: messages.append(str(error)))
    yield page
    page.close()
    assert messages == []


def red() -> bytes:
    """A part as no normal image is, whose patches differ from each other."""
    pixels = np.full((40, 48, 3), 255, np.uint8)
    pixels[..., 1] = 5 * np.arange(48)
    pixels[..., 2] = 6 * np.arange(40)[:, None]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def post(page: Any, content: bytes) -> Any:
    headers = {"Content-Type": "image/png", "X-Name": "part 7"}
    answer = page.request.post(f"/v1/galleries/{NAME}/inspect", data=content, headers=headers)
    assert answer.ok, answer.text()
    return answer.json()


def test_a_person_at_the_line(page: Any) -> None:
    from playwright.sync_api import expect

    page.goto("/")
    page.wait_for_selector(".live.on")
    assert post(page, red())["verdict"] == "anomalous"
    page.wait_for_selector("#sub:has-text('part 7')")
    assert page.inner_text("#word") == "DEFECT"
    page.wait_for_selector("#why-text:has-text('Matched with')")
    before = page.inner_text("#why-text")
    box = page.locator("#canvas").bounding_box()

    def hover(number: int) -> bool:
        share = (number + 1) / 10
        page.mouse.move(box["x"] + box["width"] * share, box["y"] + box["height"] * share)
        page.wait_for_timeout(100)
        return bool(page.inner_text("#why-text") != before)

    assert any(hover(number) for number in range(9))
    page.keyboard.press("f")  # a false alarm
    page.wait_for_selector("#undo-what:has-text('is normal')")
    assert post(page, red())["verdict"] == "normal"  # its twin
    page.wait_for_selector("#word:has-text('OK')")
    page.keyboard.press("z")
    page.wait_for_selector("#undo-what:has-text('nothing more')")
    assert post(page, red())["verdict"] == "anomalous"
    page.wait_for_selector("#word:has-text('DEFECT')")  # else the key would be about the part before it
    page.keyboard.press("d")
    page.wait_for_selector("#defect.chosen")
    page.goto("/#threshold")
    page.wait_for_selector("#rate:not([disabled])")
    page.fill("#rate", page.get_attribute("#rate", "max"))
    expect(page.locator("#rate-changes")).to_contain_text("would change")
    page.goto("/#normal")
    page.wait_for_selector("#normal-images li")
    page.fill("#search", "003")
    expect(page.locator("#normal-images li")).to_have_count(1)
    page.wait_for_selector("#changes tr")


def test_a_part_between_the_list_and_the_stream(page: Any) -> None:
    """It came after the page read the log, and before the page listened."""
    streams: list[Any] = []
    page.route("**/v1/events", lambda route: streams.append(route))
    page.goto("/")
    until_held(page, streams)  # the list has been read
    ids = [post(page, content)["id"] for content in (png(1), red())]
    streams[0].continue_()
    page.wait_for_selector(f"#parts .part[data-id='{ids[1]}'][aria-current]")
    found = page.eval_on_selector_all("#parts .part", "rows => rows.map((row) => row.dataset.id)")
    assert found[:2] == ids[::-1]
    live = post(page, png(2))["id"]
    page.wait_for_selector(f"#parts .part[data-id='{live}'][aria-current]")
    assert page.eval_on_selector_all("#parts .part", "rows => rows.map((row) => row.dataset.id)") == [live, *found]


def test_a_part_while_the_list_is_read_again(page: Any) -> None:
    """An older answer of the log takes no part away that has come since."""
    page.goto("/")
    page.wait_for_selector(".live.on")
    held: list[Any] = []
    page.route("**/v1/inspections?gallery=*&last=50", lambda route: held.append((route, route.fetch())))
    page.evaluate("void trying(begin)")
    until_held(page, held)
    ids = [post(page, content)["id"] for content in (png(1), png(2))]
    page.wait_for_selector(f"#parts .part[data-id='{ids[1]}'][aria-current]")
    route, answer = held[0]
    with page.expect_response("**/statistics?*"):  # which `begin` asks for in the end
        route.fulfill(response=answer)
    found = page.eval_on_selector_all("#parts .part", "rows => rows.map((row) => row.dataset.id)")
    assert found[:2] == ids[::-1]
    assert len(set(found)) == len(found)
    assert page.locator(f"#parts .part[data-id='{ids[1]}'][aria-current]").count() == 1


def until_held(page: Any, held: list[Any]) -> None:
    for _ in range(200):
        if held:
            return
        page.wait_for_timeout(50)
    raise AssertionError("nothing was asked for")


def test_the_page_is_accessible(page: Any) -> None:
    axe = pytest.importorskip("axe_core_python.sync_playwright", reason="axe-core-python is not installed")
    post(page, png(1))
    for view in ("line", "threshold", "normal"):
        page.goto(f"/?{view}#{view}")
        page.wait_for_selector(".live.on")
        page.wait_for_load_state("load")
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_timeout(300)
            found = axe.Axe().run(page, options={"resultTypes": ["violations"]})["violations"]
            assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == [], scheme


def test_every_route_as_it_says(workspace: Path) -> None:
    """Drawn requests: no answer of 500, none that the description does not have, or has otherwise."""
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    import jsonschema_rs
    from hypothesis import HealthCheck, Phase, given, settings
    from starlette.testclient import TestClient

    app = create_app(settings_of(workspace))
    with TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False) as client:
        until(lambda: app.state.service.is_ready)
        description = client.get("/openapi.json").json()
        schema, components = schemathesis.openapi.from_dict(description), description["components"]
        wrong: list[str] = []
        for operation in (found.ok() for found in schema.get_all_operations()):

            @given(case=operation.as_strategy())
            @settings(
                max_examples=4, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            def check(case: Any) -> None:
                arguments = case.as_transport_kwargs(base_url="http://127.0.0.1:8000")
                arguments = {
                    name: value for name, value in arguments.items() if value is not None and name != "cookies"
                }
                if isinstance(arguments.get("data"), (bytes, str)):
                    arguments["content"] = arguments.pop("data")
                answer = client.request(**arguments)
                known = case.operation.definition.raw["responses"]
                content = known.get(str(answer.status_code), {}).get("content", {}).get("application/json")
                if content and answer.headers["content-type"] == "application/json":
                    jsonschema_rs.validate({**content["schema"], "components": components}, answer.json())
                if answer.status_code == 500 or str(answer.status_code) not in known:
                    wrong.append(f"{case.method} {case.formatted_path}: {answer.status_code} {answer.text[:200]}")

            check()
        assert wrong == []
