"""The settings of a query: options that are given, else the calibration's, else the recipe's."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from ..errors import OptionError
from ..options import DEFAULT_K, QueryOptions, ScoreOptions, SearchOptions, filled
from ..recipes import RECIPES, Recipe
from .level_matches import POWERS

SEARCH = ("k", "kappa", "k_score", "nprobe", "level_weights")  # what scores depend on, of SearchOptions
SCORE = ("image_score", "positions", "sigma")  # ... and of ScoreOptions
# What releases before these options did: settings name them only if they differ.
EARLIER = {
    "matching": "concatenated",
    "metric": "l2",
    "window": "all",
    "distinct": False,
    "leave_out": 0,
    "tile_places": "any",
}
EARLIER_SCORE = {"fusion": "mean", "truncate": 4.0}
UNNAMED: dict[str, Any] = EARLIER | EARLIER_SCORE


@dataclass(frozen=True)
class Settings:
    """The search and score options of a query, all filled in.

    Attributes:
        search: all filled in but k, whose default depends on the gallery.
        score: how distances become scores.
        default_k: k, where none is given and the gallery has so many images.
        neighbours: how many a new image has; None: as many as the query, which is one.
    """

    search: SearchOptions
    score: ScoreOptions
    default_k: int = DEFAULT_K
    neighbours: int | None = None

    @classmethod
    def of(
        cls,
        search: SearchOptions | None,
        score: ScoreOptions | None,
        calibrated: dict[str, Any] | None,
        recipe: Recipe | None,
    ) -> Settings:
        """Fill in what is not given.

        Args:
            search: as given; None: nothing was given.
            score: likewise.
            calibrated: the settings that a calibration holds for, as to_json gives them.
            recipe: the gallery's; None: the published settings.
        """
        recipe = recipe or RECIPES["paper"]
        # What a calibration does not name is what it was before there was that option.
        known = UNNAMED | calibrated if calibrated else {}
        filled_search = _filled(search, known, replace(recipe.search, k=None))
        filled_search = filled(filled_search, {"kappa": 1, **EARLIER})
        if filled_search.distinct and filled_search.k:  # each neighbour gives one match
            filled_search = replace(filled_search, kappa=min(filled_search.kappa or 1, filled_search.k))
        filled_score = filled(_filled(score, known, recipe.score), {"sigma": 4.0, **EARLIER_SCORE})
        return cls(filled_search, filled_score, recipe.search.k or DEFAULT_K)

    def check(self, gallery: str, grids: list[tuple[int, int]]) -> None:
        """Check that the options go together, before anything is read.

        Args:
            gallery: its name, for an error.
            grids: (h, w) of the levels.

        Raises:
            OptionError: they do not; names every option that has to be another one.
        """
        search, score, largest = self.search, self.score, max(max(grid) for grid in grids)
        apart, is_relative, fusion = search.matching == "by_level", self.is_relative, f"fusion={score.fusion!r}"
        spread, cosine = search.level_weights == "spread", search.metric == "cosine"
        left_out = bool(search.leave_out)
        together_with = f"goes with fusion='harmonic_squares' or another that is relative, found {score.fusion!r}"
        equal = "goes with level_weights='equal', found 'spread': give level_weights='equal'"
        together = "goes with matching='by_level', found 'concatenated'"
        rules = [
            (is_relative and not apart, f"{fusion} {together}: give fusion='mean'"),
            (is_relative and cosine, f"{fusion} goes with metric='l2', found 'cosine': give fusion='mean'"),
            (is_relative and spread, f"{fusion} {equal}"),
            (cosine and spread, f"metric='cosine' {equal}"),
            (
                cosine and not apart and len(set(grids)) > 1,
                f"metric='cosine' goes with levels of one grid, found {grids}: give matching='by_level'",
            ),
            (search.distinct and not apart, f"distinct=True {together}: give distinct=False"),
            (left_out and not apart, f"leave_out {together}: give leave_out=0"),
            (left_out and not search.distinct, "leave_out goes with distinct=True, found False: give leave_out=0"),
            (left_out and not is_relative, f"leave_out {together_with}: give leave_out=0"),
        ]  # fmt: skip
        for name, expected in (("window", "all"), ("engine", "auto"), ("metric", "l2")):
            found = getattr(search, name)
            wrong = bool(search.distinct) and found != expected
            rules.append((wrong, f"distinct=True goes with {name}={expected!r}, found {found!r}: give distinct=False"))
        wide = isinstance(search.window, int) and search.window >= largest
        rules.append((wide, f"window: expected fewer than {largest} cells, found {search.window}: give window='all'"))
        broken = [message for wrong, message in rules if wrong]
        if broken:
            raise OptionError(f"{'; '.join(broken)} ({gallery})")

    def to_json(self) -> dict[str, Any]:
        """Return the settings that scores depend on, as JSON values: thresholds hold for these only."""
        values: dict[str, Any] = {}
        for options, names, earlier in ((self.search, SEARCH, EARLIER), (self.score, SCORE, EARLIER_SCORE)):
            values |= {name: getattr(options, name) for name in names}
            found = {name: getattr(options, name) for name in earlier}
            values |= {name: value for name, value in found.items() if value not in (None, earlier[name])}
        return values

    def searching(self, k: int, images: int) -> Settings:
        """Return the settings with k neighbours instead.

        Raises:
            OptionError: the gallery has not so many images, or too few give the kappa matches.
        """
        least = self.search.kappa if self.search.distinct else 1
        if not (least or 1) <= k <= images:
            raise OptionError(f"k: expected {least or 1} to {images}, the number of normal images, found {k}")
        return replace(self, search=replace(self.search, k=k, k_score=None, localise="all"))

    def k_of(self, images: int) -> int:
        """Return the number of neighbours that are searched, in a gallery of so many images."""
        return self.search.k or min(self.default_k, images)

    @property
    def need_baseline(self) -> bool:
        """Whether scores are on the scale of normal images."""
        equal = self.search.level_weights == self.score.positions == "equal"
        return not equal or self.score.image_score == "map" or self.is_relative

    @property
    def is_relative(self) -> bool:
        """Whether the scores of levels are relative to those of normal images, and need the spacing of matches."""
        return self.score.fusion in POWERS


def _filled(given: QueryOptions | None, calibrated: dict[str, Any], recipe: QueryOptions) -> QueryOptions:
    if given is None:
        known = {field.name for field in fields(recipe)}
        return replace(recipe, **{name: value for name, value in calibrated.items() if name in known})
    return filled(filled(given, calibrated), vars(recipe))
