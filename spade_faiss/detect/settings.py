"""The options of a query: given, else calibrated, else the recipe's."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from ..options import QueryOptions, ScoreOptions, SearchOptions, filled
from ..recipes import RECIPES

if TYPE_CHECKING:
    from ..gallery.gallery import Gallery
from .calibration import Calibration


def query_options(
    gallery: Gallery, search: SearchOptions | None, score: ScoreOptions | None, calibrated: bool = True
) -> tuple[SearchOptions, ScoreOptions]:
    """Fill in what is not given: as the gallery was calibrated, or else as its recipe says, or else as published.

    Raises:
        CorruptGalleryError: calibration.json was damaged or edited.
    """
    recipe = gallery.recipe or RECIPES["paper"]
    found = Calibration.read(gallery.path) if calibrated else None
    settings = found.settings if found else {}
    return _filled(search, settings, recipe.search), _filled(score, settings, recipe.score)


def _filled(given: QueryOptions | None, settings: dict[str, Any], recipe: QueryOptions) -> QueryOptions:
    if given is None:
        known = {field.name for field in fields(recipe)}
        return replace(recipe, **{name: value for name, value in settings.items() if name in known})
    return filled(filled(given, settings), vars(recipe))
