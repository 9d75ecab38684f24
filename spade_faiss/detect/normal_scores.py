"""Normal images of one snapshot queried against the others: those of other content, and of other groups."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..arrays import Ids
from ..errors import NotEnoughImagesError, OptionError
from ..options import is_count, make_plain
from ..store.snapshot import TEXTS_TOGETHER, Snapshot
from ..system.prefetch import batched
from ..system.progress import progress_bar
from .pipeline import Pipeline

EXAMPLES = 2  # keys that an error shows


@dataclass(frozen=True)
class Sampling:
    """Which normal images are queried, and which are left out with each."""

    sample: int | None = None  # number of images of different content, drawn with the seed; None: all
    group: str | None = None  # regular expression on keys; see calibrate
    seed: int = 0

    def __post_init__(self) -> None:
        make_plain(self)
        sample, seed = self.sample, self.seed
        if not (sample is None or is_count(sample)) or not (is_count(seed) or seed == 0):
            raise OptionError(f"sample, seed: expected whole numbers >= 1 and >= 0, found {sample} and {seed}")


def draw(snapshot: Snapshot, sampling: Sampling) -> Ids:
    """Return the ids of a seeded sample of normal images, or of all, ascending; of images in tiles, all tiles."""
    tiles = snapshot.tiles
    ids = snapshot.ids() if tiles is None else tiles.first_rows()
    size = min(sampling.sample or len(ids), len(ids))
    chosen: Ids = np.random.default_rng(sampling.seed).choice(ids, size, replace=False)
    return np.sort(chosen) if tiles is None else tiles.rows_of(tiles.image_of(chosen).tolist())


def normal_scores(pipeline: Pipeline, chosen: Ids, group: str | None, what: str, progress: bool) -> NDArray[np.float64]:
    """Query normal images of one snapshot against those of other content and other groups; see calibrate.

    Args:
        pipeline: a run over the snapshot.
        chosen: which of its images, (n,).
        group: see calibrate.
        what: the bar's description.
        progress: a bar on stderr, where that is a terminal.

    Returns:
        (n, 2): image scores and maxima of maps.
    """
    groups = leave_out_groups(pipeline.snapshot, chosen.tolist(), group)
    bar = progress_bar(chosen.tolist(), what, progress)
    found = pipeline.leave_one_out(bar, groups)
    scores = np.array([(one.image_score, one.map_max) for one in found], np.float64)
    return scores.reshape(len(chosen), 2)


def image_scores(pipeline: Pipeline, chosen: Ids, group: str | None, what: str, progress: bool) -> NDArray[np.float64]:
    """Do as normal_scores; images in tiles are named by their first tiles, and have the scores of the highest one."""
    rows, image_of = pipeline.copies.tiles_of(chosen)
    scores = np.full((len(chosen), 2), -np.inf)
    np.maximum.at(scores, image_of, normal_scores(pipeline, rows, group, what, progress))
    return scores


def has_others(pipeline: Pipeline, rows: Sequence[int] | Ids) -> NDArray[np.bool_]:
    """Return for each of some rows whether there are others to compare it with.

    Where tiles are compared with those at their places alone, an image may be the only one of its size.
    """
    tiles = pipeline.snapshot.tiles
    if tiles is None or pipeline.settings.search.tile_places != "same":
        return np.ones(len(rows), np.bool_)
    ids = pipeline.snapshot.ids()
    found = (np.setdiff1d(tiles.at_same_place(int(row), ids), pipeline.copies.with_copies([row])) for row in rows)
    return np.array([len(others) > 0 for others in found], np.bool_)


def with_others(pipeline: Pipeline, images: Ids) -> Ids:
    """Return those of some images that have others to compare with; of images in tiles, all tiles: see has_others."""
    rows, image_of = pipeline.copies.tiles_of(images)
    return np.delete(images, image_of[~has_others(pipeline, rows)])


def require_others(pipeline: Pipeline, images: Ids) -> None:
    """Check that there are others to compare each of some images with; see with_others.

    Raises:
        NotEnoughImagesError: there are none.
    """
    if len(alone := np.setdiff1d(images, with_others(pipeline, images))):
        [key] = pipeline.snapshot.image_keys(alone[:1])
        raise NotEnoughImagesError(
            f"{pipeline.snapshot.folder}: expected other normal images of the size of {key!r}, found none: tile_places "
            "'same' compares images of one size; remove it, add others of its size, or take tile_places 'any'"
        )


def require_group(snapshot: Snapshot, group: str | None) -> None:
    """Check that a group is a regular expression that matches a key.

    Raises:
        OptionError: it is not.
    """
    if group is None:
        return
    pattern = _compiled(group)
    for rows in batched(snapshot.ids().tolist(), TEXTS_TOGETHER):
        if any(pattern.search(key) for key in snapshot.image_keys(rows)):
            return
    examples = " and ".join(map(repr, snapshot.keys(snapshot.ids()[:EXAMPLES])))
    raise OptionError(
        f"group: expected a pattern that matches keys of {snapshot.folder}, as {examples}, found {group!r}, "
        f"which matches none of {len(snapshot)}"
    )


def leave_out_groups(snapshot: Snapshot, ids: Sequence[int], group: str | None) -> list[Ids]:
    """Return, for each of some ids, the ids that are left out with it: its own, or all of its group.

    Raises:
        OptionError: the group is no regular expression.
    """
    if group is None:
        return [np.array([row]) for row in ids]
    pattern = _compiled(group)

    def name(key: str) -> str:
        match = pattern.search(key)
        return key if match is None else f"\0{first_group(match)}"

    names = [name(key) for key in snapshot.image_keys(ids)]
    members: dict[str, list[int]] = {name: [] for name in names}
    for rows in batched(snapshot.ids().tolist(), TEXTS_TOGETHER):
        for row, key in zip(rows, snapshot.image_keys(rows), strict=True):
            if (found := members.get(name(key))) is not None:
                found.append(row)
    if len(snapshot) == len(ids) == len(members) > 1:
        warnings.warn(f"group: {group!r} puts no two of {len(ids)} images together", stacklevel=2)
    return [np.array(members[name]) for name in names]


def first_group(match: re.Match[str]) -> str:
    """Return what the first group of a pattern that took part has matched; without groups the whole match."""
    found: str = next((one for one in match.groups() if one is not None), match[0])
    return found


def _compiled(group: str) -> re.Pattern[str]:
    if not isinstance(group, str):
        raise OptionError(f"group: expected a regular expression as text, found {group!r}")
    try:
        return re.compile(group)
    except re.error as error:
        raise OptionError(f"group: expected a regular expression, found {group!r}: {error}") from error
