"""Results sent on, to a webhook or an MQTT broker: from a table, until they have arrived."""

from __future__ import annotations

import base64
import http.client
import json
import logging
import re
import threading
import time
import urllib.parse
from abc import ABC, abstractmethod

from ..errors import OptionError
from .log.database import Database
from .metrics import Metrics
from .settings import ServiceSettings

logger = logging.getLogger("spade_faiss.service")
PAUSE = 0.5  # seconds between looks into the table
FIRST, LONGEST = 1.0, 300.0  # seconds until a result is sent again: doubled each time, at the most this
TIMEOUT = 10.0  # seconds that a receiver may take
TOGETHER = 50  # results that are read at a time
VISIBLE = re.compile("[!-~]+")  # what a host and a path of HTTP are made of


class Target(ABC):
    """A place that results are sent to."""

    @abstractmethod
    def send(self, body: str) -> None:
        """Send a result; returns when it has arrived.

        Raises:
            OSError: it has not.
        """

    def close(self) -> None:  # noqa: B027 # most have nothing to close
        """Let go of connections."""


def _parts(url: str, *schemes: str) -> urllib.parse.SplitResult | None:
    """Return the parts of a URL of one of these schemes; None: it has another, or a host or port that cannot be."""
    try:
        url.encode()
        parts = urllib.parse.urlsplit(url)
        host = (parts.hostname or "").encode("idna").decode()
        good = parts.scheme in schemes and VISIBLE.fullmatch(host) and parts.port != 0
    except ValueError:
        return None
    return parts if good else None


def _credentials(parts: urllib.parse.SplitResult) -> tuple[str, str | None]:
    """Return the name and the password in a URL, where what would end them stands as %XX."""
    password = None if parts.password is None else urllib.parse.unquote(parts.password)
    return urllib.parse.unquote(parts.username or ""), password


class Webhook(Target):
    """An HTTP server that takes POSTs of JSON. Redirects are not followed."""

    def __init__(self, url: str) -> None:
        parts = _parts(url, "http", "https")
        if parts is None or not VISIBLE.fullmatch(f"/{parts.path}?{parts.query}"):
            raise OptionError(
                "webhook: expected http://HOST[:PORT]/PATH or https://HOST[:PORT]/PATH, what is not ASCII in PATH as "
                f"%XX, found {url!r}"
            )
        self._parts = parts
        self._headers = {"Content-Type": "application/json"}
        if parts.username:
            user = ":".join(part or "" for part in _credentials(parts)).encode()
            self._headers["Authorization"] = f"Basic {base64.b64encode(user).decode()}"

    def send(self, body: str) -> None:
        """See Target."""
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(str(self._parts.hostname), self._parts.port, timeout=TIMEOUT)
        query = f"?{self._parts.query}" if self._parts.query else ""
        try:
            connection.request("POST", (self._parts.path or "/") + query, body.encode(), self._headers)
            status = connection.getresponse().status
        except (http.client.HTTPException, ValueError) as error:  # an answer that is not HTTP
            raise OSError(f"{type(error).__name__}: {error}") from error
        finally:
            connection.close()
        if not 200 <= status < 300:
            raise OSError(f"answered with status {status}")


class Mqtt(Target):
    """A topic of an MQTT broker; a result has arrived when the broker says so (QoS 1)."""

    def __init__(self, url: str) -> None:
        parts = _parts(url, "mqtt")
        topic = parts.path.strip("/") if parts else ""
        # '+' and '#' are for subscribers; what follows '?' or '#' would be no part of the topic.
        if parts is None or not topic or "+" in topic or "?" in url or "#" in url:
            raise OptionError(f"mqtt: expected mqtt://HOST[:PORT]/TOPIC, TOPIC without '+', '#' and '?', found {url!r}")
        try:
            from paho.mqtt import client as paho
            from paho.mqtt.enums import CallbackAPIVersion
        except ImportError as error:
            raise OptionError("mqtt: expected the package paho-mqtt; pip install 'spade-faiss[service]'") from error
        self._topic = topic
        self._client = paho.Client(CallbackAPIVersion.VERSION2)
        if parts.username:
            self._client.username_pw_set(*_credentials(parts))
        self._client.connect_async(str(parts.hostname), parts.port or 1883)
        self._client.loop_start()

    def send(self, body: str) -> None:
        """See Target."""
        if not self._client.is_connected():
            raise OSError("not connected")
        try:
            info = self._client.publish(self._topic, body, qos=1)
            info.wait_for_publish(TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise OSError(str(error)) from error
        if not info.is_published():
            raise OSError(f"no acknowledgement in {TIMEOUT:g} s")

    def close(self) -> None:
        """See Target."""
        self._client.loop_stop()
        self._client.disconnect()


def targets_of(settings: ServiceSettings) -> tuple[str, ...]:
    """Return the names of the places that results are sent to."""
    return tuple(name for name in ("webhook", "mqtt") if getattr(settings, name))


class Delivery:
    """A thread that sends what lies in the outbox, oldest first; what has arrived is deleted."""

    def __init__(self, database: Database, settings: ServiceSettings, metrics: Metrics) -> None:
        """Prepare to send.

        Raises:
            OptionError: a URL that is none.
        """
        self._database = database
        self._metrics = metrics
        self._targets: dict[str, Target] = {}
        self._arrived: dict[str, int] = {}  # by target: its last result, not sent again if it cannot be deleted
        if settings.webhook:
            self._targets["webhook"] = Webhook(settings.webhook)
        if settings.mqtt:
            self._targets["mqtt"] = Mqtt(settings.mqtt)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="delivery", daemon=True)

    def start(self) -> None:
        """Begin to send, if there is where to."""
        if self._targets:
            self._thread.start()

    def _run(self) -> None:
        problems: dict[str, str] = {}
        while not self._stop.wait(PAUSE):
            for name in self._targets:
                try:
                    self.send_due(name)
                    problems.pop(name, None)
                except Exception as error:  # as of a log that cannot be written for now: what waits is sent later
                    if repr(error) != problems.get(name):  # told once, not at each look
                        logger.exception("results cannot be sent to the %s", name)
                    problems[name] = repr(error)

    def send_due(self, name: str) -> int:
        """Send what is due to a target, in order; returns how many have arrived. The first failure ends the round."""
        sent = 0
        while not self._stop.is_set():
            rows = self._database.rows("SELECT * FROM outbox WHERE target = ? ORDER BY id LIMIT ?", (name, TOGETHER))
            self._metrics.outbox.set(self.waiting)
            for row in rows:
                if row["due"] > time.time() or self._stop.is_set():
                    return sent
                try:
                    if self._arrived.get(name) != row["id"]:
                        self._targets[name].send(row["body"])
                        self._arrived[name] = row["id"]
                except OSError as error:
                    self._postpone(row["id"], row["attempts"] + 1, str(error) or type(error).__name__)
                    return sent
                with self._database.writing() as connection:
                    connection.execute("DELETE FROM outbox WHERE id = ?", (row["id"],))
                sent += 1
            if not rows:
                return sent
        return sent

    def _postpone(self, number: int, attempts: int, why: str) -> None:
        due = time.time() + min(LONGEST, FIRST * 2 ** min(attempts - 1, 20))
        logger.warning(json.dumps({"event": "not delivered", "result": number, "attempts": attempts, "why": why}))
        with self._database.writing() as connection:
            connection.execute(
                "UPDATE outbox SET attempts = ?, due = ?, error = ? WHERE id = ?", (attempts, due, why, number)
            )

    @property
    def waiting(self) -> int:
        """Number of results that have not arrived."""
        return int(self._database.rows("SELECT COUNT(*) FROM outbox")[0][0])

    def close(self) -> None:
        """Stop sending. What has not arrived stays in the table."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(TIMEOUT + 1)
        for target in self._targets.values():
            target.close()
