"""Calibration in the background: where a gallery has changed, its thresholds are found again, and swapped in."""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass, replace

from ..detect.calibrate import calibrate
from ..detect.calibration import Calibration
from ..errors import CorruptGalleryError, SpadeError
from ..store.copies import Copies
from .generations import Registry, ServedGallery
from .log.changes import Changes

logger = logging.getLogger("spade_faiss.service")
NICENESS = 10  # of the thread: parts that wait come first
MOST = 1000  # images that are queried: enough for a rate of 1 in 1 000


@dataclass(frozen=True)
class Order:
    """A gallery to calibrate, and what to promise."""

    name: str
    false_alarms: float
    who: str = "service"
    request: str = "-"

    @property
    def is_automatic(self) -> bool:
        """Whether nobody asked for it: it follows a change, and is to promise what is promised."""
        return (self.who, self.request) == (Order.who, Order.request)


class Calibrations:
    """A thread that calibrates one gallery after the other."""

    def __init__(self, registry: Registry, changes: Changes) -> None:
        self._registry = registry
        self._changes = changes
        self._orders: dict[str, Order] = {}
        self._running: str | None = None
        self._changed = threading.Condition()
        self._ending = False
        self.thread = threading.Thread(target=self._work, name="calibration", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self.thread.start()

    def ask(self, order: Order) -> None:
        """Calibrate a gallery when its turn comes.

        A newer order of the same gallery takes the place of an older, but an automatic one not that of a person.
        """
        with self._changed:
            waiting = self._orders.get(order.name)
            if waiting is None or waiting.is_automatic or not order.is_automatic:
                self._orders[order.name] = order
            self._changed.notify()

    def is_at(self, name: str) -> bool:
        """Return whether a gallery is being calibrated, or waits for it."""
        return self._running == name or name in self._orders

    def close(self) -> None:
        """Take no more orders. What is being calibrated is given up with the process."""
        with self._changed:
            self._ending = True
            self._orders.clear()
            self._changed.notify()
        if self.thread.is_alive():
            self.thread.join(timeout=5)

    def _work(self) -> None:
        if hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._orders or self._ending)
                if self._ending:
                    return
                order = self._orders.pop(next(iter(self._orders)))
                self._running = order.name
            try:
                self._calibrate(order)
            except SpadeError as error:
                logger.warning("%s: cannot be calibrated: %s", order.name, error)
            except Exception:  # the thread goes on for the other galleries
                logger.exception("%s: cannot be calibrated", order.name)
            finally:
                self._running = None

    def _calibrate(self, order: Order) -> None:
        served = self._registry.named(order.name)
        before = _rate_in_force(served)
        if order.is_automatic and before is not None:
            order = replace(order, false_alarms=before)  # another one may have been chosen while it waited
        facts = {"after": order.false_alarms}
        number = self._changes.begin(order.name, "calibrate", order.who, order.request, facts=facts)
        try:
            found = self._found(served, order)
            if not self._ending:
                with served.calibration_lock:
                    now = _rate_in_force(served)
                    if now is not None and now != before:  # chosen while it was calibrated
                        found = found.promising(now)
                    found.write(served.path)
        except Exception as error:
            self._changes.fail(number, str(error) or type(error).__name__)
            raise
        self._changes.end(number, found.generation)
        self._registry.look()

    def _found(self, served: ServedGallery, order: Order) -> Calibration:
        with served.leased() as generation:
            old = generation.calibration
            images = len(Copies(generation.gallery.snapshot()).images())
            group = old.group if old else None
            return calibrate(generation.detector, order.false_alarms, sample=min(images, MOST), group=group)


def _rate_in_force(served: ServedGallery) -> float | None:
    """Return the false-alarm rate that a gallery promises; None: none."""
    try:
        calibration = Calibration.read(served.path)
    except CorruptGalleryError:  # a new one takes its place
        return None
    return calibration.false_alarms if calibration else None
