"""The audit log: every change of a gallery, begun before it is made and done after, so that no kill hides one."""

from __future__ import annotations

import json
import sqlite3
import time
from typing import Any

from ..errors import ServiceError
from .database import Database

BEGUN, DONE, FAILED = "begun", "done", "failed"


class Changes:
    """Who changed what, when, and which generation it was before and after."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def begin(self, gallery: str, what: str, who: str, request: str, **more: Any) -> int:
        """Write that a change is about to be made; returns its number."""
        known = {"key": None, "inspection": None, "generation_before": None, "undoes": None, "facts": {}} | more
        known["facts"] = json.dumps(known["facts"])
        values = {"at": time.time(), "gallery": gallery, "what": what, "who": who, "request": request, "state": BEGUN}
        values |= known
        with self._database.writing() as connection:
            cursor = connection.execute(
                f"INSERT INTO changes ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})",
                list(values.values()),
            )
            return int(cursor.lastrowid or 0)

    def end(
        self,
        number: int,
        generation: int | None,
        label: tuple[str, str] | None = None,
        facts: dict[str, Any] | None = None,
    ) -> None:
        """Write that a change was made, and in the same transaction what it says of an inspection.

        Args:
            number: of the change.
            generation: that it made.
            label: id of an inspection and its label.
            facts: what is known of it now, beside what was when it began.
        """
        known = json.dumps(self.numbered(number)["facts"] | (facts or {}))
        with self._database.writing() as connection:
            connection.execute(
                "UPDATE changes SET state = ?, generation_after = ?, facts = ? WHERE id = ?",
                (DONE, generation, known, number),
            )
            if label is not None:
                connection.execute(
                    "UPDATE inspections SET label = ?, labelled_at = ?, labelled_by = "
                    "(SELECT who FROM changes WHERE id = ?) WHERE uid = ?",
                    (label[1] or None, time.time(), number, label[0]),
                )

    def fail(self, number: int, message: str) -> None:
        """Write that a change was not made."""
        with self._database.writing() as connection:
            connection.execute("UPDATE changes SET state = ?, message = ? WHERE id = ?", (FAILED, message, number))

    def unfinished(self) -> list[dict[str, Any]]:
        """Return the changes that a kill has interrupted, oldest first."""
        rows = self._database.rows("SELECT * FROM changes WHERE state = ? ORDER BY id", (BEGUN,))
        return [_of(row) for row in rows]

    def numbered(self, number: int) -> dict[str, Any]:
        """Return a change.

        Raises:
            ServiceError: the log has none of that number.
        """
        rows = self._database.rows("SELECT * FROM changes WHERE id = ?", (number,))
        if not rows:
            raise ServiceError(404, "unknown_change", f"Expected the number of a change in the log, found {number}.")
        return _of(rows[0])

    def undone_by(self, number: int) -> int | None:
        """Return the change that took another one back; None: none did."""
        rows = self._database.rows("SELECT id FROM changes WHERE undoes = ? AND state = ?", (number, DONE))
        return int(rows[0][0]) if rows else None

    def last(self, gallery: str | None, count: int) -> list[dict[str, Any]]:
        """Return the newest changes, newest first."""
        rows = self._database.rows(
            "SELECT * FROM changes WHERE ? IS NULL OR gallery = ? ORDER BY id DESC LIMIT ?", (gallery, gallery, count)
        )
        return [_of(row) for row in rows]


def _of(row: sqlite3.Row) -> dict[str, Any]:
    values = dict(row)
    values["facts"] = json.loads(values["facts"])
    return values
