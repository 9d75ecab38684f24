"""What leaving neighbours out contributes to the recipe `wary`, clean and with 5 % defects among the normal images.

    spade-faiss bench leave_out DATASET... [--shots 30] [--draws 2] [--limit-test 40] [--family '^piped_=papers']

Each draw of normal images is a gallery, which is queried by every variant. The table has means over draws, then within
families, then over families; of pixel AP over the families that have masks. A second table has the places of the
defects among the normal images in an audit, the first being the most suspicious.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from common import RESULTS, save
from quality import judged, temporary_gallery
from relative import arguments, draws_of, rows_of, table

import spade_faiss as sf
from spade_faiss.datasets import open_dataset
from spade_faiss.datasets.category import Category
from spade_faiss.detect import leave_out
from spade_faiss.options import SearchOptions

RECIPE = sf.RECIPES["wary"]


@dataclass(frozen=True)
class Variant:
    """A way to leave neighbours out."""

    name: str
    search: SearchOptions = RECIPE.search
    places: int = leave_out.PLACES
    one_by_one: bool = True
    rarity: float | None = None  # of what is left out; None: as the recipe has it


SHARP = Variant("`sharp`: none", replace(RECIPE.search, leave_out=0))
WARY = Variant("**`wary`**: a tenth")
VARIANTS = [
    SHARP,
    WARY,
    Variant("a twentieth", replace(RECIPE.search, leave_out=0.05)),
    Variant("a seventh", replace(RECIPE.search, leave_out=1 / 7)),
    Variant("of one place, what is nearest and neighbour by neighbour", places=1),
    Variant("of 64 places", places=64),
    Variant("what is nearest at 16 places alone", one_by_one=False),
    Variant("what is nearest at one place", one_by_one=False, places=1),
    Variant("the spacing of the matches that stay", rarity=1),
    Variant("the spacing of the matches that are left out", rarity=0),
    Variant("a tenth, one neighbour for a distance", replace(RECIPE.search, kappa=1)),
    Variant("a tenth, two neighbours", replace(RECIPE.search, kappa=2)),
    Variant("a tenth, five neighbours", replace(RECIPE.search, kappa=5)),
]


def figures(category: Category, extractor: sf.Extractor) -> Iterator[tuple[str, float, float | None]]:
    """Yield each variant's name, image AUROC and pixel AP on a set."""
    with temporary_gallery(category, extractor, RECIPE.name) as gallery:
        for variant in VARIANTS:
            of_recipe, rarity = leave_out.LeaveOut, variant.rarity
            one_by_one = of_recipe._one_by_one if variant.one_by_one else lambda *_: []
            rank = of_recipe._rarity if rarity is None else lambda *_, rarity=rarity: rarity
            with (
                patch.object(leave_out, "PLACES", variant.places),
                patch.object(of_recipe, "_one_by_one", one_by_one),
                patch.object(of_recipe, "_rarity", rank),
            ):
                detector = sf.Detector(gallery, extractor, variant.search, RECIPE.score)
                found = detector.stream(sample.path for sample in category.test)
                scored = (
                    (sample, one.image_score, one.anomaly_map) for sample, one in zip(category.test, found, strict=True)
                )
                values = judged(category, scored)
            yield variant.name, values["image_AUROC"], values.get("pixel_AP")


def audited(category: Category, extractor: sf.Extractor, normal: set[Path]) -> Iterator[list[int]]:
    """Yield the places of the images that are not normal in an audit by `sharp`, and by `wary`."""
    with temporary_gallery(category, extractor, RECIPE.name) as gallery:
        wrong = {image.key for image in category.normal if image.path not in normal}
        for variant in (SHARP, WARY):
            suspects = sf.find_suspects(sf.Detector(gallery, extractor, variant.search, RECIPE.score))
            yield [place for place, one in enumerate(suspects, start=1) if one.key in wrong]


def main() -> None:
    """Measure every variant on every set, and write the table."""
    args = arguments(__doc__, shots=30, draws=2, limit_test=40)
    rows: list[dict[str, Any]] = []
    asked = {"shots": args.shots, "draws": args.draws, "limit_test": args.limit_test}
    audits = list[str]()
    extractor = sf.load_extractor("efficientnet_lite0", options=RECIPE.features)
    for category in [one for path in args.dataset for one in open_dataset(path)]:
        for facts, drawn in draws_of(category, args):
            rows += rows_of(facts, figures(drawn, extractor))
            if facts["contaminate"]:
                found = audited(drawn, extractor, {image.path for image in category.normal})
                places = [", ".join(map(str, one)) for one in found]
                audits.append(f"| {category.name}, {len(drawn.normal)} images | {' | '.join(places)} |")
            print(rows[-len(VARIANTS) + 1], flush=True)
            save("leave_out", asked | {"rows": rows, "audits": audits}, part=True)
    lines = table(rows, args.family)
    lines += ["", "| places of the defects in an audit | `sharp` | `wary` |", "| --- | --- | --- |", *audits]
    save("leave_out", asked | {"rows": rows, "audits": audits})
    (RESULTS / "leave_out.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
