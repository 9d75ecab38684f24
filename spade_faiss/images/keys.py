"""Keys under Unicode normalisation: file systems and archives change the form of a name, which stays the same name."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from itertools import product

MIXED = 6  # parts of a path whose forms are combined; beyond these all parts have the same form


def comparable(key: str) -> str:
    """Return the form of a key to compare it by: NFC.

    Two keys of a gallery stay two, even if they differ in form alone; see Snapshot.find_all.
    """
    return key if key.isascii() else unicodedata.normalize("NFC", key)


def other_forms(key: str) -> Iterator[str]:
    """Yield the other forms that a key may have: each part of the path composed (NFC) or decomposed (NFD)."""
    if key.isascii():
        return
    forms = [
        dict.fromkeys((unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part)))
        for part in key.split("/")
    ]
    if sum(len(parts) > 1 for parts in forms) <= MIXED:
        found = ("/".join(parts) for parts in product(*forms))
    else:
        found = (unicodedata.normalize(form, key) for form in ("NFC", "NFD"))
    yield from (form for form in found if form != key)
