"""The stream of events: what happens is told once and in order, and so is what was missed."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest

from spade_faiss.service.service import Service
from spade_faiss.service.web import routes_page
from tests.service.conftest import NAME, png, until


def _events(answer: http.client.HTTPResponse) -> Iterator[tuple[str, str, Any]]:
    """Server-sent events but beats: number, kind and values."""
    fields, beats = dict[str, str](), 0
    while line := answer.readline().decode():
        name, _, value = line.rstrip("\n").partition(": ")
        if name:
            fields[name] = value
        elif fields.get("event", "beat") != "beat":
            yield fields.get("id", ""), fields["event"], json.loads(fields["data"])
            fields, beats = {}, 0
        else:
            fields, beats = {}, beats + 1
            assert beats < 50, "it never came"


def test_events(socketed: tuple[str, int, Service]) -> None:
    """Each part is told as it is inspected; who comes back is first told what it has missed, in order."""
    host, port, service = socketed
    posting, listening = (http.client.HTTPConnection(host, port, timeout=20) for _ in range(2))

    def post(seed: int) -> Any:
        posting.request("POST", f"/v1/galleries/{NAME}/inspect", png(seed), {"Content-Type": "image/png"})
        return json.loads(posting.getresponse().read())

    listening.request("GET", "/v1/events")
    events = _events(listening.getresponse())
    assert next(events)[1] == "hello"
    until(lambda: service.events.listeners == 1)
    parts = [post(seed) for seed in (1, 2)]
    told = [next(events) for _ in parts]
    assert [(kind, values["id"]) for _, kind, values in told] == [("inspection", part["id"]) for part in parts]
    posting.request("POST", f"/v1/galleries/{NAME}/normal", png(1), {"Content-Type": "image/png"})
    change = json.loads(posting.getresponse().read())
    following = [next(events)[1:] for _ in range(2)]
    while ("change", change) not in following:  # a generation for the trust, and one for the image
        following.append(next(events)[1:])
    assert "generation" in {kind for kind, _ in following}
    assert len(following) <= 3
    listening.close()
    missed = post(3)
    listening.request("GET", "/v1/events", headers={"Last-Event-ID": told[0][0]})
    events = _events(listening.getresponse())
    seen = [next(events) for _ in range(3)]
    assert [values["id"] for _, _, values in seen[1:]] == [parts[1]["id"], missed["id"]]
    listening.close()
    posting.close()


class Client:
    """Posts parts, and listens."""

    def __init__(self, socketed: tuple[str, int, Service]) -> None:
        host, port, self.service = socketed
        self._posting, self._listening = (http.client.HTTPConnection(host, port, timeout=20) for _ in range(2))

    def post(self, seed: int) -> int:
        """The number of the part in the log."""
        self._posting.request("POST", f"/v1/galleries/{NAME}/inspect", png(seed), {"Content-Type": "image/png"})
        return int(json.loads(self._posting.getresponse().read())["number"])

    def listen(self, last: object) -> Iterator[tuple[str, str, Any]]:
        self._listening.request("GET", "/v1/events", headers={"Last-Event-ID": str(last)})
        answer = self._listening.getresponse()
        assert answer.status == 200
        return _events(answer)

    def close(self) -> None:
        self._listening.close()
        self._posting.close()


@pytest.fixture
def client(socketed: tuple[str, int, Service], monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setattr("spade_faiss.service.events.BEAT", 0.2)
    found = Client(socketed)
    yield found
    found.close()


def numbers(events: Iterator[tuple[str, str, Any]], count: int) -> list[int]:
    """Numbers of the next parts that are told; what it says of a part is of that part."""
    told = [next(events) for _ in range(count)]
    assert {kind for _, kind, _ in told} == {"inspection"}
    assert [values["number"] for _, _, values in told] == [int(number) for number, _, _ in told]
    return [int(number) for number, _, _ in told]


def test_a_part_that_comes_while_the_missed_ones_are_read(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the log is read, or after: it is told, and told once."""
    last, inspections = client.post(1), client.service.inspections
    read = inspections.last
    posted = [client.post(2)]

    def between(*given: Any) -> Any:
        posted.append(client.post(3))
        found = read(*given)
        posted.append(client.post(4))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(inspections, "last", between)
        events = client.listen(last)
        assert next(events)[1] == "hello"
        assert numbers(events, 3) == posted
    after = client.post(5)
    assert numbers(events, 1) == [after]


@pytest.mark.parametrize("more", [0, 1, 3])
def test_more_is_missed_than_is_told(client: Client, monkeypatch: pytest.MonkeyPatch, more: int) -> None:
    """Who was away so long is told to read the log."""
    monkeypatch.setattr(routes_page, "MISSED", 2)
    last = client.post(1)
    missed = [client.post(seed) for seed in range(2 + more)]
    events = client.listen(last)
    assert next(events)[1] == "hello"
    if more:
        assert next(events)[1:] == ("missed", {})
    assert numbers(events, 2) == missed[-2:]


@pytest.mark.parametrize("last", [2**63 - 1, 2**63, 10**20 - 1, "\u00b2", "none", "-1", 10**15])
def test_numbers_that_no_part_has(client: Client, last: object) -> None:
    """Nothing was missed, and what comes is told."""
    client.post(1)
    events = client.listen(last)
    assert next(events)[1] == "hello"
    posted = client.post(2)
    assert numbers(events, 1) == [posted]
