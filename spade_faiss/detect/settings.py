"""The settings of a query: options that are given, else the calibration's, else the recipe's."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from ..options import DEFAULT_K, QueryOptions, ScoreOptions, SearchOptions, filled
from ..recipes import RECIPES, Recipe

SEARCH = ("k", "kappa", "k_score", "nprobe", "level_weights")  # what scores depend on, of SearchOptions
SCORE = ("image_score", "positions", "sigma")  # ... and of ScoreOptions


@dataclass(frozen=True)
class Settings:
    """The search and score options of a query, all filled in."""

    search: SearchOptions
    score: ScoreOptions

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
        recipe, known = recipe or RECIPES["paper"], calibrated or {}
        return cls(_filled(search, known, recipe.search), _filled(score, known, recipe.score))

    def to_json(self) -> dict[str, Any]:
        """Return the settings that scores depend on, as JSON values: thresholds hold for these only."""
        search = {name: getattr(self.search, name) for name in SEARCH}
        if self.search.tile_places == "same":  # "any" is what releases without tiles did
            search["tile_places"] = "same"
        return search | {name: getattr(self.score, name) for name in SCORE}

    def k_of(self, images: int) -> int:
        """Return the number of neighbours that are searched, in a gallery of so many images."""
        return self.search.k or min(DEFAULT_K, images)

    @property
    def need_baseline(self) -> bool:
        """Whether scores are on the scale of normal images."""
        equal = self.search.level_weights == self.score.positions == "equal"
        return not equal or self.score.image_score == "map"


def _filled(given: QueryOptions | None, calibrated: dict[str, Any], recipe: QueryOptions) -> QueryOptions:
    if given is None:
        known = {field.name for field in fields(recipe)}
        return replace(recipe, **{name: value for name, value in calibrated.items() if name in known})
    return filled(filled(given, calibrated), vars(recipe))
