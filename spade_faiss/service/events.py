"""What happens, told to every page that listens (server-sent events)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

WAITING = 100  # events that a slow page may be behind; then it is told to read all again
BEAT = 5.0  # seconds after which a silent stream says that it is alive


@dataclass(frozen=True)
class Event:
    """What a stream is told."""

    text: str
    number: int | None = None  # in the log, of an inspection


BEHIND = Event("event: missed\ndata: {}\n\n")


class Events:
    """Passes events on to all streams. Any thread may tell."""

    def __init__(self) -> None:
        self._listeners: set[asyncio.Queue[Event | None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(self) -> None:
        """Begin, in the loop that the streams run in."""
        self._loop = asyncio.get_running_loop()

    @property
    def listeners(self) -> int:
        """Number of open streams."""
        return len(self._listeners)

    def tell(self, kind: str, values: dict[str, Any], number: int | None = None) -> None:
        """Tell all streams; the number lets a page that was away ask for what it has missed."""
        head = f"id: {number}\n" if number is not None else ""
        event = Event(f"{head}event: {kind}\ndata: {json.dumps(values)}\n\n", number)
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._pass_on, event)

    def _pass_on(self, event: Event | None) -> None:
        for queue in self._listeners:
            is_behind = event is not None and queue.qsize() >= WAITING
            while is_behind and not queue.empty():
                queue.get_nowait()
            queue.put_nowait(BEHIND if is_behind else event)

    def end(self) -> None:
        """End all streams."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._pass_on, None)

    async def stream(
        self, hello: Callable[[], Awaitable[tuple[str, set[int]]]], is_gone: Callable[[], Awaitable[bool]]
    ) -> AsyncIterator[str]:
        """Yield events as they come, after a first text, until the page has gone or the service ends.

        Args:
            hello: returns the first text, and the numbers of the inspections in it, which are not told again. What
                happens while it runs is told after it.
            is_gone: whether the page has gone.
        """
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self._listeners.add(queue)
        try:
            text, told = await hello()
            yield text
            while True:
                try:
                    event = await asyncio.wait_for(queue.get(), BEAT)
                except asyncio.TimeoutError:
                    event = Event("event: beat\ndata: {}\n\n")
                if event is None or await is_gone():
                    return
                if event.number not in told:
                    yield event.text
        finally:
            self._listeners.discard(queue)
