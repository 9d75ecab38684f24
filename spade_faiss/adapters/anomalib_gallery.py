"""The gallery of an anomalib model: filled batch by batch, and known again by its generation and checksum."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..arrays import Pixels
from ..errors import GalleryError, GalleryNotFoundError, KeyConflictError, OptionError
from ..extractors.registry import Extractor, load_extractor
from ..extractors.spec import DEFAULT_EXTRACTOR
from ..gallery.gallery import Gallery
from ..gallery.reader import GalleryReader
from ..images.sources import ImageFile
from ..images.tiling import place_of
from ..ingest.blocks import extracted
from ..ingest.image_reader import ReadImage
from ..options import FeatureOptions, ScoreOptions, SearchOptions
from ..recipes import DEFAULT_RECIPE, recipe_named
from ..store.manifest import FILE
from ..store.snapshot import TEXTS_TOGETHER, Snapshot
from ..store.source_images import pixels_digest
from ..system.prefetch import batched

RUNNING = ("batch_size", "device", "runtime")  # options that features do not depend on


@dataclass(frozen=True)
class Options:
    """Options of features, search and score by their names, each where it belongs."""

    features: Mapping[str, Any]
    search: SearchOptions
    score: ScoreOptions

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """Sort options by their names. `device` is the network's.

        Raises:
            OptionError: no mapping, a name that no class of options has, or a value out of its range.
        """
        if not isinstance(given, Mapping):
            raise OptionError(f'options: expected names and values, as {{"k": 20}}, found {type(given).__name__}')
        names = [{field.name for field in fields(kind)} for kind in (FeatureOptions, SearchOptions, ScoreOptions)]
        for name in given:
            if not any(name in known for known in names):
                known = ", ".join(sorted(set().union(*names)))
                raise OptionError(f"options: expected names among {known}, found {name!r}")
        own = [{name: value for name, value in given.items() if name in known} for known in names]
        own[1].pop("device", None)
        FeatureOptions(**own[0])  # checked now, whatever becomes of them
        return cls(own[0], SearchOptions(**own[1]), ScoreOptions(**own[2]))


def extractor_of(
    gallery: Path | None, backbone: str | None, recipe: str | None, weights: str | Path | None, options: Options
) -> Extractor:
    """Load the extractor that was asked for; where nothing was asked for, that of the gallery, if there is one."""
    given = dict(options.features)
    if gallery is not None and (gallery / FILE).exists():
        own = Gallery.open(gallery)
        with own:
            if backbone is None and recipe is None and not set(given) - set(RUNNING):
                return own.load_extractor(weights, **given)
            backbone = backbone or own.spec.name
            recipe = recipe or (own.recipe.name if own.recipe else None)
    base = recipe_named(recipe or DEFAULT_RECIPE).features
    return load_extractor(backbone or DEFAULT_EXTRACTOR, weights, replace(base, **given))


class Filling:
    """A gallery that takes the images of one epoch, under the writer's lock until it is done."""

    def __init__(self, path: Path, extractor: Extractor, recipe: str | None) -> None:
        """Open the gallery, or create it.

        Raises:
            SpecMismatchError: it is one of another extractor, or of other settings.
            OptionError: it has another recipe.
            GalleryLockedError: another process is writing to it.
            GalleryError: no gallery can be made there.
        """
        there = (path / FILE).exists()
        self.gallery = Gallery.open_or_create(
            path, extractor.spec, recipe=recipe if there else recipe or DEFAULT_RECIPE
        )
        self._extractor, self._stack = extractor, ExitStack()
        self._writer = self._stack.enter_context(self.gallery.writer())
        self._taken: set[int] = set()  # hashes of the keys of this epoch

    def take(self, paths: Sequence[str], images: Sequence[Pixels]) -> None:
        """Add the images of a batch; those that are there with the same pixels do not go through the network.

        Args:
            paths: of the image files, which are the keys.
            images: (H, W, 3) uint8.

        Raises:
            KeyConflictError: the gallery has other pixels under a path.
        """
        tiling, wanted = self._extractor.spec.tiling, dict[str, ReadImage]()
        for path, pixels in zip(paths, images, strict=True):
            file, views = ImageFile(Path(path), Path(path).as_posix()), tiling.views(pixels)
            digest = pixels_digest(*views)
            self._taken.add(hash(file.key))
            state = self._writer.status(file.key, digest)
            if state == "differs" or (file.key in wanted and wanted[file.key].digest != digest):
                raise KeyConflictError(
                    f"{self.gallery.path}: expected {file.key!r} with the pixels that it was stored with, found "
                    "others: the file, the datamodule's augmentations or its sizes have changed; fit into a new gallery"
                )
            if state == "new":
                height, width = pixels.shape[:2]
                wanted[file.key] = ReadImage(file, digest, views, (height, width))
        for block in extracted(wanted.values(), self._extractor):
            self._writer.append(block.keys, block.features, block.digests, sources=block.paths)

    def require_own(self, paths: Collection[str]) -> None:
        """Check that the gallery holds no images but those of a datamodule, before any are added.

        Raises:
            GalleryError: it holds others.
        """
        self._require({hash(Path(path).as_posix()) for path in paths})

    def _require(self, known: set[int]) -> None:
        snapshot = self._writer.snapshot
        others = [key for key in _image_keys(snapshot) if hash(key) not in known]
        if others:
            raise GalleryError(
                f"gallery: expected only images of this datamodule in {self.gallery.path}, found {len(others)} others, "
                f"as {others[0]!r}; give the path of a new gallery, or remove them"
            )

    def finish(self) -> Gallery:
        """Commit, give the lock back, also after an error, and return the gallery.

        Raises:
            GalleryError: it holds images that were not in this epoch.
        """
        with self._stack:
            self._writer.commit()
            self._require(self._taken)
        return self.gallery

    def stop(self) -> None:
        """Commit the batches that are complete, and give the lock back, as at Ctrl-C; the next fit goes on there."""
        with suppress(KeyboardInterrupt):
            self._stack.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)


def _image_keys(snapshot: Snapshot) -> Iterator[str]:
    """Yield the keys of the images; of one in tiles, that of its first."""
    whole = snapshot.manifest.spec.tile is None
    for ids in batched(snapshot.ids().tolist(), TEXTS_TOGETHER):
        yield from (key for key in snapshot.keys(ids) if whole or place_of(key) is None)


def record_of(gallery: GalleryReader) -> dict[str, Any]:
    """Return what a checkpoint keeps of a gallery: path, generation, and the SHA-256 of its manifest."""
    return {
        "path": str(gallery.path.absolute()),
        "generation": gallery.generation,
        "checksum": hashlib.sha256((gallery.path / FILE).read_bytes()).hexdigest(),
    }


def recorded_gallery(record: Any, moved_to: Path | None, extractor: Extractor) -> Gallery:
    """Open the gallery of a checkpoint.

    Args:
        record: of the checkpoint; see record_of.
        moved_to: where it is now; None: where it was.
        extractor: the model's.

    Raises:
        GalleryNotFoundError: there is none.
        GalleryError: the checkpoint has no record, or the gallery has changed since.
        SpecMismatchError: it is one of another extractor than the model's.
    """
    if not isinstance(record, Mapping) or not {"path", "generation", "checksum"} <= set(record):
        raise GalleryError(
            "checkpoint: expected one of SpadeFaiss after its fit, found none of a gallery in it; fit first"
        )
    path = moved_to or Path(record["path"])
    try:
        gallery = Gallery.open(path)
    except GalleryNotFoundError as error:
        raise GalleryNotFoundError(
            f"gallery: expected the checkpoint's gallery in {path}, found none; copy it there, or load the checkpoint "
            "with gallery=PATH"
        ) from error
    gallery.spec.require(extractor.spec, str(path))
    found = record_of(gallery)
    if (found["generation"], found["checksum"]) != (record["generation"], record["checksum"]):
        gallery.close()
        raise GalleryError(
            f"gallery: expected generation {record['generation']} of the checkpoint in {path}, found generation "
            f"{found['generation']} of checksum {found['checksum'][:12]}, for which its thresholds do not hold; fit "
            "again, or test SpadeFaiss(gallery=PATH) without the checkpoint"
        )
    return gallery
