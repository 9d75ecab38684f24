"""The log of inspections: a line each for ever, and pictures, maps and matches of the last ones."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ServiceError
from .database import Database

LABELS = ("false_alarm", "defect", "unsure")
COLUMNS = (
    "uid", "at", "request", "who", "gallery", "name", "sha256", "error", "message", "verdict", "image_score", "score",
    "p_value", "map_max", "peak", "generation", "calibration", "stale", "searched", "ms", "facts",
)  # fmt: skip
SINCE = "since:"  # mark of a gallery: the id after which its statistics begin


@dataclass(frozen=True)
class Line:
    """An inspection as the log has it."""

    id: int
    values: dict[str, Any]  # by column; `facts` is parsed

    @classmethod
    def of(cls, row: sqlite3.Row) -> Line:
        """Read a row of the table."""
        values = dict(row)
        number = values.pop("id")
        values["facts"] = json.loads(values["facts"])
        for name in ("stale", "searched"):
            values[name] = None if values[name] is None else bool(values[name])
        return cls(number, values)

    def __getitem__(self, name: str) -> Any:
        return self.values[name]


class Inspections:
    """The inspections in the log."""

    def __init__(self, database: Database, kept: int) -> None:
        self._database = database
        self._kept = kept

    def add(self, values: Mapping[str, Any], artifacts: Mapping[str, bytes], outbox: Sequence[str] = ()) -> int:
        """Write an inspection with its pictures, and what is to be sent of it, in one transaction.

        Args:
            values: by column; `facts` are JSON values.
            artifacts: contents by kind.
            outbox: targets that the line is sent to.

        Returns:
            its number in the log.
        """
        given = {**dict.fromkeys(COLUMNS), **values, "facts": json.dumps(values.get("facts", {}))}
        holes = ", ".join("?" * len(COLUMNS))
        with self._database.writing() as connection:
            cursor = connection.execute(
                f"INSERT INTO inspections ({', '.join(COLUMNS)}) VALUES ({holes})", [given[name] for name in COLUMNS]
            )
            number = int(cursor.lastrowid or 0)
            for kind, content in artifacts.items():
                connection.execute("INSERT INTO artifacts VALUES (?, ?, ?)", (number, kind, content))
            connection.execute(
                "DELETE FROM artifacts WHERE inspection <= ? AND inspection IN "
                "(SELECT id FROM inspections WHERE id <= ? AND label IS NULL)",
                (number - self._kept, number - self._kept),
            )
            line = Line(number, {**given, "facts": values.get("facts", {}), "label": None})
            connection.executemany(
                "INSERT INTO outbox (target, body, due) VALUES (?, ?, ?)",
                [(target, json.dumps(as_result(line)), time.time()) for target in outbox],
            )
        return number

    def named(self, uid: str) -> Line:
        """Return an inspection.

        Raises:
            ServiceError: the log has none of that id.
        """
        rows = self._database.rows("SELECT * FROM inspections WHERE uid = ?", (uid,))
        if not rows:
            raise ServiceError(
                404, "unknown_inspection", f"Expected the id of an inspection in the log, found {uid!r}."
            )
        return Line.of(rows[0])

    def artifact(self, uid: str, kind: str) -> bytes:
        """Return what was kept of an inspection: picture, thumbnail, map, matches.

        Raises:
            ServiceError: there is no such inspection, or it was let go of to make room for newer ones.
        """
        line = self.named(uid)
        rows = self._database.rows("SELECT content FROM artifacts WHERE inspection = ? AND kind = ?", (line.id, kind))
        if not rows:
            raise ServiceError(
                404, "not_kept", f"The {kind} of inspection {uid} is not kept: only those of the last {self._kept} are."
            )
        return bytes(rows[0][0])

    def last(self, gallery: str | None, count: int, before: int | None = None, after: int | None = None) -> list[Line]:
        """Return the newest inspections, newest first.

        Args:
            gallery: of one gallery; None: of all.
            count: how many.
            before: older than this number of the log; None: any.
            after: newer than this one.
        """
        conditions, values = ["1"], list[Any]()
        for condition, value in (("gallery = ?", gallery), ("id < ?", before), ("id > ?", after)):
            if value is not None:
                conditions.append(condition)
                values.append(value)
        rows = self._database.rows(
            f"SELECT * FROM inspections WHERE {' AND '.join(conditions)} ORDER BY id DESC LIMIT ?", (*values, count)
        )
        return [Line.of(row) for row in rows]

    def label(self, uid: str, label: str | None, who: str) -> Line:
        """Keep what a person says of a part; None takes it back."""
        line = self.named(uid)
        with self._database.writing() as connection:
            connection.execute(
                "UPDATE inspections SET label = ?, labelled_by = ?, labelled_at = ? WHERE id = ?",
                (label, who, time.time(), line.id),
            )
        return self.named(uid)

    def since(self, gallery: str) -> int:
        """Return the number in the log after which a gallery's statistics begin."""
        return int(self._database.mark(SINCE + gallery, "0"))

    def reset(self, gallery: str) -> None:
        """Let a gallery's statistics begin now. The log keeps all lines."""
        newest = self._database.rows("SELECT MAX(id) FROM inspections")[0][0] or 0
        self._database.set_mark(SINCE + gallery, str(newest))

    def counts(self, gallery: str) -> dict[str, Any]:
        """Return how many parts came out how since the reset, and their milliseconds."""
        row = self._database.rows(
            "SELECT COUNT(*) AS parts, SUM(verdict = 'normal') AS normal, SUM(verdict = 'anomalous') AS anomalous, "
            "SUM(error IS NOT NULL) AS errors, SUM(error IS NULL AND verdict IS NULL) AS unjudged, "
            "MIN(ms) AS ms_min, AVG(ms) AS ms_mean, MAX(ms) AS ms_max, MIN(at) AS since "
            "FROM inspections WHERE gallery = ? AND id > ?",
            (gallery, self.since(gallery)),
        )[0]
        found = {name: row[name] for name in row.keys()}  # noqa: SIM118 # a Row iterates over its values
        return {name: value or 0 if name in ("normal", "anomalous", "errors", "unjudged") else value
                for name, value in found.items()}  # fmt: skip


def as_result(line: Line) -> dict[str, Any]:
    """Return an inspection as the JSON that answers, exports, events and webhooks have."""
    values, facts = line.values, line.values["facts"]
    return {
        "id": values["uid"],
        "number": line.id,
        "at": values["at"],
        "gallery": values["gallery"],
        "name": values["name"],
        "sha256": values["sha256"],
        "verdict": values["verdict"],
        "image_score": values["image_score"],
        "score": values["score"],
        "p_value": values["p_value"],
        "map_max": values["map_max"],
        "generation": values["generation"],
        "stale": values.get("stale"),
        "label": values.get("label"),
        "error": {"code": values["error"], "message": values["message"]} if values["error"] else None,
        "ms": values["ms"],
        "width": facts.get("width"),
        "height": facts.get("height"),
        "regions": facts.get("regions", []),
        "neighbours": facts.get("neighbours", []),
        "thresholds": facts.get("thresholds"),
        "seconds": facts.get("seconds", {}),
        "searched": values.get("searched"),
    }
