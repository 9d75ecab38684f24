"""A gallery: a folder with the features of normal images, and the ways to fill, search and read it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from .._version import __version__
from ..arrays import Array, Ids
from ..errors import CorruptGalleryError, GalleryError, OptionError
from ..extractors.features import Features
from ..extractors.registry import Extractor
from ..extractors.spec import ExtractorSpec
from ..images.sources import ImageFile
from ..index.factory import check_kind
from ..ingest.pipeline import IngestReport, ingest
from ..ingest.workers import ingest_in_processes
from ..options import MIB, IndexOptions, Patches, is_count
from ..pyramids.cache import PyramidCache
from ..pyramids.recomputed import pyramids_of
from ..recipes import RECIPES, Recipe, recipe_named
from ..store.create import create_folder
from ..store.locks import ReaderLock
from ..store.manifest import Manifest
from ..store.secondary_indexes import IndexState
from ..store.snapshot import Snapshot
from ..store.writer import Appended, GalleryWriter
from .repair import Repair, repair
from .verify import Problem, problems_of

# Of a shard, which is what is lost at most when a build is killed: without levels, a byte stands for more work.
SHARD_BYTES: dict[Patches, int] = {"stored": 256 * MIB, "recompute": 16 * MIB}


class Gallery:
    """One generation of a gallery, open for reading; writing makes the next generation and moves on to it.

    Shapes: (n, d) image features; [(n, c, h, w), ...] pyramid levels, finest first. Ids are int64, hold for one
    generation, and change with compact; keys stay. Threads may share a Gallery for reading. A forked process may go on
    reading the one that its parent opened; pickled, as for a spawned process, it is opened there at the last commit.
    """

    def __init__(self, path: Path, device: str = "auto") -> None:
        """Open a gallery; see open."""
        self.path = path
        self._device = device
        self._generation = self._read_generation()

    @classmethod
    def open(cls, path: str | Path, device: str = "auto") -> Gallery:
        """Open a gallery at its last commit.

        Args:
            path: its folder.
            device: of the image index: auto (the CPU, until the index has been measured on a GPU), cpu, cuda, cuda:N.

        Raises:
            GalleryNotFoundError: there is none.
            CorruptGalleryError: gallery.json is damaged or of another format version.
        """
        return cls(Path(path), device)

    @classmethod
    def create(
        cls,
        path: str | Path,
        spec: ExtractorSpec,
        index: str | IndexOptions = "auto",
        shard_bytes: int | None = None,
        recipe: str | None = None,
        patches: Patches = "stored",
        timeout: float = 0,
    ) -> Gallery:
        """Make an empty gallery for features of one spec.

        Args:
            path: a folder that does not exist, or is empty.
            spec: what makes the features: an extractor's, or one of your own.
            index: auto, flat, ivf, a FAISS factory string, or IndexOptions.
            shard_bytes: the size at which a shard is closed and committed; None: 256 MiB, or 16 where patches are
                recomputed.
            recipe: a name in RECIPES, whose query options a Detector then takes unless it is given others. What it
                says of features is for load_extractor: RECIPES[name].features.
            patches: "stored", or "recompute": keep no pyramid levels, but where each image file is, and extract the
                levels of a query's neighbours from there: a fiftieth of the disk or less, and more seconds a query.
            timeout: seconds to wait for another process that is making a gallery there.

        Raises:
            GalleryError: something is there already, or the folder cannot be made.
            OptionError: FAISS has no such index, there is no such recipe or way to have patches, or patches are to be
                recomputed of features that are not made from images.
        """
        options = IndexOptions(kind=index) if isinstance(index, str) else index
        check_kind(options, spec.image_dim)
        if recipe is not None:
            recipe_named(recipe)
        if patches not in get_args(Patches) or (patches == "recompute" and spec.resized is None):
            choice = " or ".join(get_args(Patches)) if spec.resized else "stored, as features are not made from images"
            raise OptionError(f"patches: expected {choice}, found {patches!r}")
        by, size = f"spade-faiss {__version__}", shard_bytes or SHARD_BYTES[patches]
        create_folder(Path(path), Manifest(spec, options, size, created_by=by, recipe=recipe, patches=patches), timeout)
        return cls(Path(path), options.device)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self._device)

    def _read_generation(self) -> Snapshot:
        lock = ReaderLock(self.path)  # before it is read which files there are
        return Snapshot(self.path, Manifest.read(self.path).on(self._device), lock)

    def refresh(self) -> None:
        """Move on to the last commit. Ids of before hold no longer."""
        self._generation = self._read_generation()  # the old one closes when the last thread has done with it

    def snapshot(self) -> Snapshot:
        """Return the open generation, for several calls that must agree on ids while others write."""
        return self._generation

    def close(self) -> None:
        """Close the files."""
        self._generation.close()

    def __enter__(self) -> Gallery:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def spec(self) -> ExtractorSpec:
        """What makes its features."""
        return self._generation.manifest.spec

    @property
    def patches(self) -> Patches:
        """Whether pyramid levels are stored, or recomputed from the image files."""
        return self._generation.manifest.patches

    @property
    def generation(self) -> int:
        """The number of the commit that is open."""
        return self._generation.manifest.generation

    def __len__(self) -> int:
        return len(self._generation)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._generation.find(key) is not None

    def keys(self, ids: Sequence[int] | Ids | None = None) -> list[str]:
        """Return the keys of images, in that order; of all images where no ids are given."""
        generation = self._generation
        return generation.keys(generation.ids() if ids is None else ids)

    def ids(self, keys: Sequence[str]) -> list[int]:
        """Return the ids of keys.

        Raises:
            KeyError: a key that is not in the gallery.
        """
        found = self._generation.find_all(keys)
        if None in found:
            raise KeyError(keys[found.index(None)])
        return [row_id for row_id in found if row_id is not None]

    def search(
        self, image_features: Array, k: int, without: Ids | None = None, nprobe: int | None = None
    ) -> tuple[Ids, Array]:
        """Find the k normal images nearest to each query by squared L2 of image features.

        Args:
            image_features: (m, d) float32.
            k: how many.
            without: ids to leave out, such as the query itself.
            nprobe: IVF lists to visit; None: as the index was made.

        Returns:
            ids (m, k) int64 and squared distances (m, k) float32, ascending.

        Raises:
            NotEnoughImagesError: fewer than k images.
            FeatureError: another shape, NaN or infinity.
        """
        return self._generation.search(image_features, k, without, nprobe)

    def read(
        self,
        ids: Sequence[int] | Ids,
        extractor: Extractor | None = None,
        normal: Sequence[str | Path | ImageFile] = (),
    ) -> list[Array]:
        """Read the pyramid levels of images: [(len(ids), c, h, w), ...] in the stored dtype, in that order.

        Args:
            ids: the images.
            extractor: the one that made the gallery: needed where it recomputes patches.
            normal: where the image files may be, besides where they were: folders, or the files.

        Raises:
            CorruptGalleryError: a shard is missing, cut short, or not what was written, naming file, key and level.
            OptionError: the gallery recomputes patches, and there is no extractor.
            SourceError: an image file that it recomputes patches from is gone or has changed.
            SpecMismatchError: the extractor is another, or has other settings.
        """
        if extractor is None:
            return self._generation.levels(ids)
        self.spec.require(extractor.spec, str(self.path))
        return PyramidCache(0).read(pyramids_of(self._generation, extractor, normal), ids)

    def append(
        self,
        keys: Sequence[str],
        features: Features,
        digests: Sequence[str] | None = None,
        replace: bool = False,
        timeout: float = 0,
    ) -> Appended:
        """Append the features of n images as one commit; see GalleryWriter.append."""
        with self.writer(timeout) as writer:
            return writer.append(keys, features, digests, replace)

    def add_images(
        self,
        sources: str | Path | Sequence[str | Path | ImageFile],
        extractor: Extractor,
        *,
        replace: bool = False,
        strict: bool = False,
        progress: bool = False,
        workers: int = 1,
        timeout: float = 0,
    ) -> IngestReport:
        """Extract and store the features of every image in files and folders.

        It streams: memory does not grow with the number of images. It resumes: images that are there with the same
        content are passed over, so that the same call goes on from where it was stopped.

        Args:
            sources: files and folders, where a key is the path relative to its source; or a Category's normal images.
            extractor: of the gallery's spec.
            replace: take changed content under a key that is there; otherwise such an image is skipped and reported.
            strict: stop at the first image that cannot be taken; those before it are kept.
            progress: a bar on stderr, where that is a terminal.
            workers: processes that decode, extract and write shards; 1: this one. Each loads the network and takes its
                share of the cores. Shards are committed in the order of the sources, so that keys and ids are those of
                one process; only after an interruption may there be gaps, which the next run fills at the end. Features
                are those of a network with fewer threads, which may round differently. Killed, it loses up to two
                shards for each worker. A script calls this under `if __name__ == "__main__":`, as multiprocessing asks.
            timeout: seconds to wait for another process that is writing.

        Raises:
            GalleryLockedError: another process is writing.
            SpecMismatchError: the extractor is another, or has other settings.
            ImageError: a source without images; with strict, the first image that cannot be read.
            OptionError: fewer than one worker, or several with an extractor that cannot be pickled.
            WorkerError: a worker was killed or failed; what was committed stays.
        """
        if not is_count(workers):
            raise OptionError(f"workers: expected a number >= 1, found {workers!r}")
        self.spec.require(extractor.spec, str(self.path))
        paths = [sources] if isinstance(sources, (str, Path)) else list(sources)
        take = ingest if workers == 1 else partial(ingest_in_processes, workers=workers)
        with self.writer(timeout) as writer:
            return take(writer, paths, extractor, replace=replace, strict=strict, progress=progress)

    def remove(self, keys: Sequence[str], timeout: float = 0) -> None:
        """Remove images by key, without rewriting shards; see compact. `timeout` is that of writer.

        Raises:
            GalleryLockedError: another process is writing.
            OptionError: a key that is not in the gallery; then none is removed.
        """
        with self.writer(timeout) as writer:
            writer.remove(keys)

    def compact(self, timeout: float = 0) -> int:
        """Rewrite shards that hold removed images or are small; returns the bytes saved. `timeout` is that of writer.

        Raises:
            GalleryLockedError: another process is writing.
        """
        with self.writer(timeout) as writer:
            return writer.compact()

    def reindex(self, kind: str | None = None, timeout: float = 0, **options: Any) -> IndexState:
        """Build the image index anew from the shards, beside the old one, which readers go on using.

        Args:
            kind: see IndexOptions; None: as the gallery has it.
            timeout: seconds to wait for another process that is writing.
            options: memory, recall, nlist, nprobe, train_images of IndexOptions, likewise.

        Raises:
            GalleryLockedError: another process is writing.
            OptionError: FAISS has no such index, or it does not reach the recall; the old one stays.
        """
        old = self._generation.manifest.index_options
        given = {"kind": kind, **options}
        new = replace(old, **{name: value for name, value in given.items() if value is not None})
        check_kind(new, self.spec.image_dim)
        with self.writer(timeout) as writer:
            writer.write_index(new)
        return self.index_state()

    def rebuild_index(self) -> None:
        """Build the image index anew as it is."""
        self.reindex()

    def index_state(self) -> IndexState:
        """Return how the image index is made and searched, and whether it has been outgrown."""
        return IndexState.of(self._generation.manifest)

    @contextmanager
    def writer(self, timeout: float = 0) -> Iterator[GalleryWriter]:
        """Write in several steps: with gallery.writer() as writer: writer.append(...); see GalleryWriter.

        Args:
            timeout: seconds to wait for another process that is writing.

        Raises:
            GalleryLockedError: it did not finish by then; the message has its process id.
        """
        try:
            with GalleryWriter(self.path, timeout) as writer:
                yield writer
                writer.finish()
                self.refresh()
                # Files of older generations go, unless somebody still reads one. Nobody else can sweep meanwhile.
                self._generation.release()
                writer.sweep()
                self._generation.hold(ReaderLock(self.path))
        finally:
            self.refresh()

    def verify(self, files: bool = True, normal: Sequence[str | Path | ImageFile] = ()) -> list[Problem]:
        """Read everything and check it against what was written; an empty list is a clean gallery.

        Args:
            files: of a gallery that recomputes patches, read every image file as well.
            normal: where those may be, besides where they were: folders, or the files.
        """
        generation = self._read_generation()  # afresh: a file that is open looks well even when it is gone
        try:
            return problems_of(generation, files, normal)
        finally:
            generation.close()

    def repair(
        self,
        extractor: Extractor | None = None,
        normal: Sequence[str | Path] = (),
        drop_unreadable: bool = False,
    ) -> Repair:
        """Mend what verify finds: image index and key table from the shards, damaged images from their files.

        What cannot be mended stays as it is, and verify goes on to report it; good images are not touched.

        Args:
            extractor: the one that made the gallery. None: images are not mended.
            normal: folders that the gallery was built from. A file counts only with the digest that the gallery has.
            drop_unreadable: take out what is left: damaged images, and whole shards that cannot be opened. Their keys
                may be lost with them: add the images again.

        Raises:
            SpecMismatchError: the extractor is another, or has other settings.
        """
        if extractor is not None:
            self.spec.require(extractor.spec, str(self.path))
        with self.writer() as writer:
            done = repair(writer, extractor, [Path(folder) for folder in normal], drop_unreadable)
            snapshot = writer.snapshot
            if snapshot.manifest.rows and not snapshot.indexes.files_are_good():
                with suppress(CorruptGalleryError):  # of a shard that is left as it is, and reported
                    writer.write_index(snapshot.manifest.index_options)
                    done.derived = True
        return done

    @property
    def recipe(self) -> Recipe | None:
        """The recipe that the gallery was made with; None: no recipe.

        Raises:
            GalleryError: a later release made the gallery, with a recipe that this release does not know.
        """
        manifest = self._generation.manifest
        if manifest.recipe is not None and manifest.recipe not in RECIPES:
            raise GalleryError(
                f"{self.path}: made by a later release ({manifest.created_by}): expected recipe "
                f"{' or '.join(RECIPES)}, found {manifest.recipe!r}; query it with that release"
            )
        return None if manifest.recipe is None else RECIPES[manifest.recipe]

    def info(self) -> dict[str, Any]:
        """Return what the gallery holds, as JSON values."""
        manifest = self._generation.manifest  # once: another thread may refresh
        return {
            "path": str(self.path),
            "generation": manifest.generation,
            "images": manifest.rows - manifest.removed,
            "removed": manifest.removed,
            "shards": len(manifest.shards),
            "bytes": sum(file.bytes for file in (*manifest.shards, manifest.index, manifest.keys) if file),
            "patches": manifest.patches,
            "bytes_per_image": manifest.schema.bytes_per_image,
            "bytes_per_image_if": {patches: manifest.spec.bytes_with(patches) for patches in get_args(Patches)},
            "index": asdict(manifest.index_options) | IndexState.of(manifest).to_json(),
            "extractor": manifest.spec.to_json(),
            "recipe": _recipe_to_json(manifest.recipe),
            "created_by": manifest.created_by,
        }


def _recipe_to_json(name: str | None) -> dict[str, Any] | None:
    if name is None:
        return None
    if name not in RECIPES:
        return {"name": name, "what": "unknown to this release", "features": {}, "search": {}, "score": {}}
    return RECIPES[name].to_json()
