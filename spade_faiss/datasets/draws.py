"""Random draws from a labelled set: a few of its normal images to train with, anomalous images among them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from ..errors import OptionError
from ..images.sources import ImageFile
from ..options import is_count, is_share, make_plain
from .category import Category

Item = TypeVar("Item")


@dataclass(frozen=True)
class Draws:
    """What is drawn from each category, and how often."""

    shots: int | None = None  # normal training images; None: all of them
    contaminate: float | None = None  # anomalous images in the gallery, as a share of the normal ones' number
    repeat: int = 1  # draws, with the seeds `seed`, `seed` + 1, ...
    seed: int = 0

    def __post_init__(self) -> None:
        make_plain(self)
        if self.shots is not None and not is_count(self.shots):
            raise OptionError(f"shots: expected a number of normal images >= 1, found {self.shots!r}")
        if self.contaminate is not None and not (is_share(self.contaminate) and self.contaminate < 1):
            raise OptionError(
                f"contaminate: expected a share of the normal images in (0, 1), as 0.05, found {self.contaminate!r}"
            )
        if not is_count(self.repeat):
            raise OptionError(f"repeat: expected a number of draws >= 1, found {self.repeat!r}")
        if self.seed != 0 and not is_count(self.seed):
            raise OptionError(f"seed: expected a whole number >= 0, found {self.seed!r}")
        if self.repeat > 1 and not self:
            raise OptionError(
                f"repeat={self.repeat}: expected shots=N or contaminate=SHARE, or there is nothing to draw"
            )

    def __bool__(self) -> bool:
        """Return whether anything is drawn."""
        return self.shots is not None or self.contaminate is not None

    @property
    def seeds(self) -> range:
        """The seed of each draw."""
        return range(self.seed, self.seed + self.repeat)


def draw(category: Category, shots: int | None = None, contaminate: float | None = None, seed: int = 0) -> Category:
    """Draw a category from a category: fewer normal images, or some anomalous images among them, or both.

    No file is read or copied. A seed draws the same images in every release of Python. Draws of one seed are nested:
    3 shots are among the 5 shots of that seed. Anomalous images that are drawn to train with are not in the test set.

    Args:
        category: of a labelled set.
        shots: normal images to train with; None: all of them.
        contaminate: share in (0, 1) of the number of normal images to train with. As many anomalous test images,
            rounded, half up, train as well, under their own keys; None: none.
        seed: a whole number >= 0.

    Returns:
        the category with the images drawn to train with and the others to test with, each in their order.

    Raises:
        OptionError: a number outside its range; more shots than normal images; a share that draws no image, or all
            anomalous ones.

    Example:
        >>> from pathlib import Path
        >>> from spade_faiss.datasets import Category, Sample, draw
        >>> from spade_faiss.images.sources import ImageFile
        >>> normal = [ImageFile(Path(f"train/{i}.png"), f"train/{i}.png") for i in range(60)]
        >>> test = [Sample(Path(f"cut/{i}.png"), f"cut/{i}.png", "cut", anomalous=True) for i in range(8)]
        >>> tiles = Category("tiles", normal, test, "mvtec", masks=False)
        >>> few = draw(tiles, shots=3, seed=1)
        >>> len(few.normal), len(few.test), few == draw(tiles, shots=3, seed=1), few == draw(tiles, shots=3, seed=2)
        (3, 8, True, False)
        >>> unclean = draw(tiles, contaminate=0.05)
        >>> len(unclean.normal), len(unclean.test)
        (63, 5)
    """
    draws = Draws(shots, contaminate, seed=seed)
    normal = list(category.normal)
    if draws.shots is not None:
        if draws.shots > len(normal):
            raise OptionError(
                f"shots: expected at most the {len(normal)} normal training images of {category.name}, "
                f"found {draws.shots}; ask for fewer"
            )
        normal = _chosen(normal, draws.shots, f"{seed} shots {category.name}")
    if draws.contaminate is None:
        return replace(category, normal=normal)
    anomalous = [sample for sample in category.test if sample.anomalous]
    count = _count_of(draws.contaminate, len(normal), len(anomalous), category.name)
    taken = _chosen(anomalous, count, f"{seed} contaminate {category.name}")
    keys = {sample.key for sample in taken}
    return replace(
        category,
        normal=[*normal, *(ImageFile(sample.path, sample.key) for sample in taken)],
        test=[sample for sample in category.test if sample.key not in keys],
    )


def _chosen(items: Sequence[Item], count: int, seed: str) -> list[Item]:
    """Draw some of the items, and return them in their order; fewer are among more."""
    numbers = random.Random(seed)  # only its random() is guaranteed to give the same numbers in all Python versions
    order = sorted(range(len(items)), key=lambda _: numbers.random())
    return [items[i] for i in sorted(order[:count])]


def _count_of(share: float, normal: int, anomalous: int, name: str) -> int:
    """Return how many anomalous images a share is.

    Raises:
        OptionError: none, or so many that none is left to test with.
    """
    count = int(share * normal + 0.5)
    if anomalous < 2:
        raise OptionError(
            f"contaminate: expected at least 2 anomalous test images in {name}, one to draw and one to test with, "
            f"found {anomalous}"
        )
    if count < 1:
        raise OptionError(
            f"contaminate: expected a share of at least 1 image, found {share:g} of the {normal} normal images of "
            f"{name}; give {min(1 / normal, 0.5):.2g} or more"
        )
    if count >= anomalous:
        raise OptionError(
            f"contaminate: expected a share that leaves anomalous images of {name} to test with, found {share:g} of "
            f"{normal} normal images, which is {count} of the {anomalous} anomalous ones; give a smaller share"
        )
    return count
