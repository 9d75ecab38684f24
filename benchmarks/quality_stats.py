"""Bootstrap intervals and families of the quality benchmark."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

METRICS = ("image_AUROC", "pixel_AUROC", "pixel_AP", "pixel_AUPRO")
PEER = "patchcore"  # the method that the others are compared with
ALL = "all families"
RUN = ("extractor", "method", "shots", "contaminate", "seed", "limit_test", "image_size")  # what families are apart by
Rows = list[dict[str, Any]]
Reals = NDArray[np.float64]


def resampled_auroc(scores: ArrayLike, labels: ArrayLike, resamples: int, name: str) -> Reals:
    """Return the image AUROC of resamples of the test images, normal and anomalous ones each by themselves.

    Args:
        scores: (n,) higher is more anomalous.
        labels: (n,) True where anomalous; both kinds are there.
        resamples: how many.
        name: of the set: seeds the draw, so that all methods are judged on the same resamples.

    Returns:
        (resamples,) in [0, 1]; equal scores count half.
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels, bool)
    anomalous, normal = scores[labels], scores[~labels]
    above = (anomalous[:, None] > normal) + 0.5 * (anomalous[:, None] == normal)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    weights = [rng.multinomial(n, np.full(n, 1 / n), resamples) for n in above.shape]
    sums: Reals = np.einsum("ra,ra->r", weights[0] @ above, weights[1].astype(np.float64))
    return sums / above.size


def interval(values: ArrayLike) -> list[float]:
    """Return the middle 95 % of resampled values."""
    return [round(float(value), 4) for value in np.percentile(values, [2.5, 97.5])]


def family_rule(text: str) -> tuple[re.Pattern[str], str]:
    """Read REGEX=NAME.

    Raises:
        ValueError: it is not of that form.
    """
    pattern, equals, name = text.rpartition("=")
    if not equals or not pattern or not name:
        raise ValueError(f"expected REGEX=NAME, found {text!r}")
    try:
        return re.compile(pattern), name
    except re.error as error:
        raise ValueError(f"expected a regular expression before =, found {pattern!r}: {error}") from error


def families_of(names: Iterable[str], rules: Sequence[tuple[re.Pattern[str], str]] = ()) -> dict[str, str]:
    """Return the family of each set: by the first rule that matches its start, else by what its name begins with.

    Sets whose names share what stands before the first underscore are one family; others are families of their own.
    """
    names = list(dict.fromkeys(names))
    prefixes = Counter(name.partition("_")[0] for name in names)
    found = {}
    for name in names:
        given = next((family for pattern, family in rules if pattern.match(name)), None)
        prefix = name.partition("_")[0]
        found[name] = given or (prefix if prefixes[prefix] > 1 else name)
    return found


def summary(rows: Rows, families: dict[str, str], resamples: int) -> tuple[Rows, Rows]:
    """Return the rows with intervals and without scores, and the means of each family and of all families."""
    drawn = {id(row): _resampled(row, resamples) for row in rows}
    shown = []
    for row in rows:
        values = {name: value for name, value in row.items() if name not in ("scores", "labels", "machine")}
        auroc = drawn[id(row)]
        shown.append(
            {"family": families[row["set"]], **values, "image_AUROC_95": None if auroc is None else interval(auroc)}
        )
    found: Rows = []
    for run, some in _grouped(rows):
        other = {**run, "method": PEER}
        peers = {row["set"]: row for row in rows if _run_of(row) == other} if run != other else {}
        by_family: dict[str, list[dict[str, Any]]] = {}
        for row in some:
            by_family.setdefault(families[row["set"]], []).append(row)
        means = [_mean(members, drawn, peers) for members in by_family.values()]
        for family, (values, _, _) in zip(by_family, means, strict=True):
            found.append({"family": family, **run, "sets": [row["set"] for row in by_family[family]], **values})
        found.append({"family": ALL, **run, "sets": list(by_family), **_over(means)})
    return shown, found


def _resampled(row: dict[str, Any], resamples: int) -> Reals | None:
    if row["image_AUROC"] is None:
        return None
    return resampled_auroc(row["scores"], row["labels"], resamples, row["set"])


def _run_of(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in RUN}


def _grouped(rows: Rows) -> Iterator[tuple[dict[str, Any], Rows]]:
    groups: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in RUN), []).append(row)
    for some in groups.values():
        yield _run_of(some[0]), some


Mean = tuple[dict[str, Any], "Reals | None", "Reals | None"]  # values; resampled means; and their gain over the peer


def _mean(members: Rows, drawn: dict[int, Reals | None], peers: dict[str, dict[str, Any]]) -> Mean:
    """Average the sets of a family, and their resamples."""
    values: dict[str, Any] = {}
    for name in METRICS:
        known = [row[name] for row in members if row[name] is not None]
        values[name] = round(float(np.mean(known)), 4) if known else None  # some sets have no masks
    own = [(row, auroc) for row in members if (auroc := drawn[id(row)]) is not None]
    means = np.mean([auroc for _, auroc in own], axis=0) if own else None
    pairs = [(auroc, drawn[id(peers[row["set"]])]) for row, auroc in own if row["set"] in peers]
    both = [auroc - other for auroc, other in pairs if other is not None]
    gains = np.mean(both, axis=0) if both and len(both) == len(own) else None
    return values | _intervals(means, gains), means, gains


def _over(means: Sequence[Mean]) -> dict[str, Any]:
    """Average families, each of which counts once."""
    values: dict[str, Any] = {}
    for name in METRICS:
        known = [one[name] for one, _, _ in means if one[name] is not None]
        values[name] = round(float(np.mean(known)), 4) if known else None
    aurocs = [auroc for _, auroc, _ in means if auroc is not None]
    gains = [gain for _, _, gain in means if gain is not None]
    return values | _intervals(
        np.mean(aurocs, axis=0) if aurocs else None,
        np.mean(gains, axis=0) if gains and len(gains) == len(means) else None,
    )


def _intervals(means: Reals | None, gains: Reals | None) -> dict[str, Any]:
    return {
        "image_AUROC_95": None if means is None else interval(means),
        f"image_AUROC_over_{PEER}_95": None if gains is None else interval(gains),
    }
