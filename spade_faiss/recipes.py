"""Named sets of options that belong together, from the size of the images to the score."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .errors import OptionError
from .options import FeatureOptions, ScoreOptions, SearchOptions


@dataclass(frozen=True)
class Recipe:
    """A named set of options: those of a gallery's features, and the defaults of its queries.

    Attributes:
        name: by which `build` takes it.
        description: one sentence.
        features: of the gallery's images.
        search: defaults of its queries.
        score: likewise.

    Example:
        >>> sf.RECIPES["robust"].features.strides, sf.RECIPES["robust"].score.positions
        ((8, 16, 32), 'damped')
    """

    name: str
    description: str
    features: FeatureOptions
    search: SearchOptions
    score: ScoreOptions

    @property
    def what(self) -> str:
        """The description, under its earlier name."""
        return self.description

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as JSON values, with those options that differ from their defaults.

        Example:
            >>> sf.RECIPES["paper"].to_json()["features"]
            {'image_size': (256, 256), 'crop': (224, 224)}
        """
        values: dict[str, Any] = {"name": self.name, "what": self.description}
        for part, options in (("features", self.features), ("search", self.search), ("score", self.score)):
            default = asdict(type(options)())
            values[part] = {name: value for name, value in asdict(options).items() if value != default[name]}
        return values


# Averaged over 3 x 3 positions: borders, which see the network's own padding, differ less.
AVERAGED = FeatureOptions(
    image_size=320, strides=(8, 16, 32), normalisation="trained", neighbourhood=3, count_include_pad=True
)
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "paper",
            "as published: 256 px, centre crop 224, three levels as they are, image score by the nearest images",
            FeatureOptions(image_size=256, crop=224, strides=(4, 8, 16)),
            SearchOptions(level_weights="equal", kappa=1),
            ScoreOptions(image_score="knn", positions="equal", sigma=4.0),
        ),
        Recipe(
            "robust",
            "the whole image at 320 px, three coarser levels of equal weight, borders damped, image score from the map",
            FeatureOptions(image_size=320, strides=(8, 16, 32), normalisation="trained"),
            SearchOptions(level_weights="spread", kappa=1),
            ScoreOptions(image_score="map", positions="damped", sigma=4.0),
        ),
        Recipe(
            "relative",
            "as sharp, softer: the nearest patches of 8 neighbours, the geometric mean of levels, and more smoothing",
            AVERAGED,
            SearchOptions(matching="by_level", kappa=8, distinct=True, level_weights="equal"),
            ScoreOptions(image_score="map_top", positions="equal", fusion="relative", sigma=4.0),
        ),
        Recipe(
            "sharp",
            "the whole image at 320 px, three coarser levels searched apart in 3 neighbours each, distances relative "
            "to those of normal images where they match, image score from the map's highest 1 %",
            AVERAGED,
            SearchOptions(matching="by_level", kappa=3, distinct=True, level_weights="equal"),
            ScoreOptions(image_score="map_top", positions="equal", fusion="harmonic_squares", sigma=2.8),
        ),
        Recipe(
            "wary",
            "as sharp, and no verdict rests on a tenth of the neighbours: those without which the image is the most "
            "anomalous are left out, as a defect may hide among them",
            AVERAGED,
            SearchOptions(matching="by_level", kappa=3, distinct=True, leave_out=0.1, level_weights="equal"),
            ScoreOptions(image_score="map_top", positions="equal", fusion="harmonic_squares", sigma=2.8),
        ),
        Recipe(
            "rad",
            "as RAD (arXiv 2601.22763), for vision transformers: class tokens retrieve 150 images, patches are matched "
            "by cosine within one cell of their position, image score from the map's highest 1 %",
            FeatureOptions(
                image_size=512,
                crop=448,
                normalisation="imagenet",
                blocks=(0.25, 0.5, 0.75, 1),
                tokens="normalised",
                image_feature="class_token",
            ),
            SearchOptions(k=150, matching="by_level", metric="cosine", window=1, kappa=1, level_weights="equal"),
            ScoreOptions(image_score="map_top", positions="equal", fusion="mean", sigma=0.5, truncate=2.0),
        ),
    )
}
DEFAULT_RECIPE = "wary"  # the command line's default


def recipe_named(name: str) -> Recipe:
    """Return a recipe by its name.

    Raises:
        OptionError: no recipe has that name.
    """
    if name not in RECIPES:
        raise OptionError(f"recipe: expected {' or '.join(RECIPES)}, found {name!r}")
    return RECIPES[name]
