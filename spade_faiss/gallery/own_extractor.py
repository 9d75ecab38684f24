"""Loading the extractor that made a gallery, with the weights that it was made with."""

from __future__ import annotations

from pathlib import Path

from ..errors import SpecMismatchError, WeightsError
from ..extractors.registry import Extractor, load_extractor
from ..extractors.spec import DEFAULT_EXTRACTOR, ExtractorSpec
from ..options import FeatureOptions


def own_extractor(folder: Path, spec: ExtractorSpec, options: FeatureOptions) -> Extractor:
    """Load the extractor of a spec whose weights came from a file, from where that was; nothing is downloaded.

    Raises:
        WeightsError: the file is not there, and the library's cache does not have these weights.
        SpecMismatchError: the file has other weights now.
    """
    path = Path(spec.weights_path or spec.weights)
    if spec.weights_path and path.is_file():
        extractor = load_extractor(spec.name, path, options)
        if extractor.spec.weights_sha256 != spec.weights_sha256:
            raise SpecMismatchError(
                f"{path}: expected the weights of {folder}, with SHA-256 {spec.weights_sha256}, found "
                f"{extractor.spec.weights_sha256}; pass the file that it was built with as weights=FILE"
            )
        return extractor
    published = _published(spec, options)
    if published is None:
        raise WeightsError(
            f"{folder}: expected its weights in {path}, with SHA-256 {spec.weights_sha256}, found no such file; pass "
            "the file that it was built with as weights=FILE"
        )
    return published


def _published(spec: ExtractorSpec, options: FeatureOptions) -> Extractor | None:
    """Load the published weights if they are on this machine, and are those of a spec."""
    from ..extractors.weights import published_weights  # late: torch takes seconds to import

    path = None
    if spec.name != DEFAULT_EXTRACTOR and (path := published_weights(spec.name)) is None:
        return None
    try:
        extractor = load_extractor(spec.name, path, options)
    except WeightsError:
        return None
    return extractor if extractor.spec.weights_sha256 == spec.weights_sha256 else None
