"""What happens, told to every page that listens (server-sent events)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

WAITING = 100  # events that a slow page may be behind; then it is told to read all again
BEAT = 5.0  # seconds after which a silent stream says that it is alive


class Events:
    """Passes events on to all streams. Any thread may tell."""

    def __init__(self) -> None:
        self._listeners: set[asyncio.Queue[str | None]] = set()
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
        text = f"{head}event: {kind}\ndata: {json.dumps(values)}\n\n"
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._pass_on, text)

    def _pass_on(self, text: str | None) -> None:
        for queue in self._listeners:
            if text is not None and queue.qsize() >= WAITING:
                while not queue.empty():
                    queue.get_nowait()
                text_for_it: str | None = "event: missed\ndata: {}\n\n"
            else:
                text_for_it = text
            queue.put_nowait(text_for_it)

    def end(self) -> None:
        """End all streams."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._pass_on, None)

    async def stream(self, hello: str, is_gone: Callable[[], Any]) -> AsyncIterator[str]:
        """Yield events as they come, after a first text, until the page has gone or the service ends."""
        queue: asyncio.Queue[str | None] = asyncio.Queue()
        self._listeners.add(queue)
        try:
            yield hello
            while True:
                try:
                    text = await asyncio.wait_for(queue.get(), BEAT)
                except asyncio.TimeoutError:
                    text = "event: beat\ndata: {}\n\n"
                if text is None or await is_gone():
                    return
                yield text
        finally:
            self._listeners.discard(queue)
