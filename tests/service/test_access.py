"""Who may do what, from where; what is measured and told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spade_faiss.errors import OptionError
from spade_faiss.service.errors import ServiceError
from spade_faiss.service.server import run
from spade_faiss.service.tokens import Tokens
from tests.service.conftest import NAME, Served, png, settings_of
from tests.service.test_bad_input import error

TOKENS = (
    "ann read read-0123456789abcdef\ncam inspect inspect-0123456789abcdef\nboss curate curate-0123456789abcdef # all"
)


@pytest.fixture
def guarded(serve: Callable[..., Any], tmp_path: Path) -> Any:
    (tmp_path / "tokens").write_text(TOKENS)
    with serve(tokens=tmp_path / "tokens") as served:
        yield served


def as_(served: Served, scope: str, method: str, path: str, **more: Any) -> Any:
    headers = {"Authorization": f"Bearer {scope}-0123456789abcdef", **more.pop("headers", {})}
    return served.client.request(method, path, headers=headers, **more)


def test_scopes(guarded: Served) -> None:
    facts, inspect, normal = (
        f"/v1/galleries/{NAME}",
        f"/v1/galleries/{NAME}/inspect",
        f"/v1/galleries/{NAME}/normal/000.png",
    )
    image = {"content": png(), "headers": {"Content-Type": "image/png"}}
    assert error(guarded.client.get(facts), 401) == "token_missing"
    assert error(as_(guarded, "other", "GET", facts), 401) == "token_wrong"
    assert as_(guarded, "read", "GET", facts).status_code == 200
    assert error(as_(guarded, "read", "POST", inspect, **image), 403) == "scope_too_small"
    assert as_(guarded, "inspect", "POST", inspect, **image).status_code == 200
    assert error(as_(guarded, "inspect", "DELETE", normal), 403) == "scope_too_small"
    change = as_(guarded, "curate", "DELETE", normal).json()
    assert (change["who"], change["what"], change["key"]) == ("boss", "remove", "000.png")
    assert guarded.client.get("/health/live").status_code == 200
    assert error(guarded.client.get("/metrics"), 401) == "token_missing"


def test_the_page_asks_for_a_token_once(guarded: Served) -> None:
    client = guarded.client
    assert "Token" in client.get("/").text
    assert client.post("/login", data={"token": "wrong-0123456789abcdef"}).status_code == 401
    answer = client.post("/login", data={"token": "read-0123456789abcdef"}, follow_redirects=False)
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert "read-0123456789abcdef" not in cookie
    assert 'id="verdict"' in client.get("/").text
    assert error(client.put(f"/v1/galleries/{NAME}/false-alarms", json={"false_alarms": 0.2}), 403)


@pytest.mark.parametrize("headers", [{"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}])
def test_other_sites_change_nothing(shared: Served, headers: dict[str, str]) -> None:
    answer = shared.client.delete(f"/v1/galleries/{NAME}/normal/000.png", headers=headers)
    assert error(answer, 403) == "wrong_origin"


def test_other_names_are_not_ours(shared: Served) -> None:
    assert error(shared.client.get("/v1/galleries", headers={"Host": "evil.example"}), 421) == "wrong_host"
    assert shared.client.get("/v1/galleries", headers={"Host": "localhost:8000"}).status_code == 200


def test_the_page_loads_nothing_from_elsewhere(shared: Served) -> None:
    answer = shared.client.get("/")
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http://" not in answer.text.replace("http://www.w3.org", "")
    assert shared.client.get("/v1/galleries").headers["X-Content-Type-Options"] == "nosniff"


def test_an_address_for_others_needs_a_token(workspace: Path) -> None:
    with pytest.raises(OptionError, match="token"):
        run(settings_of(workspace, host="0.0.0.0"))


@pytest.mark.parametrize("text", ["", "ann read", "ann admin read-0123456789abcdef", "ann read short"])
def test_token_files_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokens").write_text(text)
    with pytest.raises(OptionError, match="tokens"):
        Tokens(tmp_path / "tokens")


@pytest.mark.parametrize("token", ["read#0123456789abcdef", "#read-0123456789abcd", "read-0123456789abcdef#"])
def test_a_token_may_have_what_begins_a_comment(tmp_path: Path, token: str) -> None:
    text = f"# who may what\nann read {token}  # a comment\n  #bob curate x\n"
    if token.startswith("#"):  # that is a comment, and says so
        (tmp_path / "tokens").write_text(text)
        with pytest.raises(OptionError, match="line 2: expected NAME SCOPE TOKEN"):
            Tokens(tmp_path / "tokens")
        return
    for mark in ("", "\ufeff"):  # as editors of Windows put in front
        (tmp_path / "tokens").write_text(mark + text, "utf-8")
        tokens = Tokens(tmp_path / "tokens")
        assert tokens.caller(token, None).name == "ann"
        with pytest.raises(ServiceError, match="not known"):
            tokens.caller(token.split("#")[0], None)


def test_metrics_count_what_happened(serve: Callable[..., Any]) -> None:
    with serve() as served:
        served.inspect(png())
        served.inspect(b"no image")
        text = served.client.get("/metrics").text
        verdict = served.get("/v1/inspections", last=2)["inspections"][1]["verdict"]
        assert f'spade_faiss_parts_total{{gallery="{NAME}",verdict="{verdict}"}} 1.0' in text
        assert f'spade_faiss_parts_total{{gallery="{NAME}",verdict="error"}} 1.0' in text
        assert 'spade_faiss_rejected_total{code="bad_image"} 1.0' in text
        assert f'spade_faiss_generation{{gallery="{NAME}"}} 2.0' in text
        counts = served.get(f"/v1/galleries/{NAME}/statistics")["counts"]
        assert (counts["parts"], counts["errors"]) == (2, 1)
        served.client.post(f"/v1/galleries/{NAME}/statistics/reset")
        assert served.get(f"/v1/galleries/{NAME}/statistics")["counts"]["parts"] == 0


def test_each_request_is_a_line_of_the_log(shared: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "spade_faiss.service.requests"):
        shared.client.get("/v1/galleries", headers={"X-Request-ID": "mine-1"})
        shared.client.get("/v1/galleries", headers={"X-Request-ID": 'not "one'})
    first, second = (json.loads(record.getMessage()) for record in caplog.records[-2:])
    assert (first["request"], first["path"], first["status"], first["who"]) == ("mine-1", "/v1/galleries", 200, "local")
    assert len(second["request"]) == 16
