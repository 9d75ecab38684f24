"""Which member a key is placed on."""

from __future__ import annotations

import re
from collections.abc import Sequence

import xxhash

from ..detect.normal_scores import first_group
from ..errors import OptionError


def placed(keys: Sequence[str], names: Sequence[str], place_by: str | None) -> list[str]:
    """Return the name of the member that each key belongs to.

    By hash, a key goes to the member whose name and the key together have the highest hash: with one more member, only
    the keys that it gets are placed elsewhere.

    Args:
        keys: of images.
        names: of the members.
        place_by: a regular expression whose match in a key, or first group in it, names the member; None: by hash.

    Raises:
        OptionError: place_by is no regular expression, or gives a key no member.
    """
    if place_by is None:
        return [max(names, key=lambda name: xxhash.xxh3_64_intdigest(f"{name}\0{key}".encode())) for key in keys]
    pattern, found = compiled(place_by), list[str]()
    for key in keys:
        match = pattern.search(key)
        name = first_group(match) if match else ""
        if name not in names:
            raise OptionError(
                f"place_by: expected {place_by!r} to give {' or '.join(names)} for every key, found "
                f"{'no match' if match is None else repr(name)} for {key!r}"
            )
        found.append(name)
    return found


def compiled(place_by: str) -> re.Pattern[str]:
    """Return a place_by compiled.

    Raises:
        OptionError: it is no regular expression.
    """
    try:
        return re.compile(place_by)
    except re.error as error:
        raise OptionError(f"place_by: expected a regular expression, found {place_by!r}: {error}") from error
