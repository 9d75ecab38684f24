"""A gallery: a folder with the features of normal images, and the ways to fill, search and read it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import GalleryError, OptionError
from ..extractors.registry import Extractor
from ..extractors.spec import ExtractorSpec
from ..images.inputs import ImageLike
from ..images.sources import ImageFile, Listing
from ..ingest.pipeline import IngestOptions, IngestReport, ingest, ingest_given
from ..ingest.runs import Machines
from ..ingest.workers import Processes, ingest_in_processes
from ..object_store.address import refuse_address
from ..options import IndexOptions, Patches, is_count
from ..store.create import create_folder
from ..store.manifest import FILE
from .creation import new_manifest, require_agreement
from .editor import GalleryEditor
from .info import copies_from


class Gallery(GalleryEditor):
    """One generation of a gallery, open for reading; writing makes the next generation and moves on to it.

    Shapes: (n, d) image features; [(n, c, h, w), ...] pyramid levels, finest first. Ids are int64, are valid for one
    generation, and change with compact; keys stay. Threads may share a Gallery for reading. A forked process may go on
    reading the one that its parent opened. A pickled Gallery, as for a spawned process, opens at the last commit there.

    Example:
        >>> gallery
        Gallery('toy.gallery', 12 images, toy, generation 2)
        >>> len(gallery), "003.png" in gallery, gallery.patches
        (12, True, 'stored')
    """

    created: bool = False  # whether this object made the gallery, rather than opened it

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
        """Create an empty gallery for features of one spec.

        Args:
            path: a folder that does not exist, or is empty.
            spec: what makes the features: an extractor's spec, or one of your own.
            index: auto, flat, ivf, a FAISS factory string, or IndexOptions.
            shard_bytes: the size at which a shard is closed and committed; None: 256 MiB, or 16 MiB if patches are
                recomputed.
            recipe: a name in RECIPES, whose query options are a Detector's defaults. Its options for features are for
                load_extractor: RECIPES[name].features.
            patches: "stored", or "recompute": keep no pyramid levels, but the path of each image file, and extract the
                levels of a query's neighbours from there: a fiftieth of the disk or less, and more seconds a query.
            timeout: seconds to wait for another process that is making a gallery there.

        Raises:
            GalleryError: the folder is not empty, or cannot be made.
            OptionError: FAISS has no such index, `shard_bytes` is no whole number >= 1, the recipe or `patches` is
                unknown, or patches are to be recomputed for features that are not made from images.

        Example:
            >>> sf.Gallery.create("new.gallery", toy.spec, recipe="paper")
            Gallery('new.gallery', 0 images, toy, generation 0)
        """
        refuse_address(path)
        options = IndexOptions(kind=index) if isinstance(index, str) else index
        create_folder(Path(path), new_manifest(spec, options, shard_bytes, recipe, patches), timeout)
        gallery = cls(Path(path), options.device)
        gallery.created = True
        return gallery

    @classmethod
    def open_or_create(
        cls,
        path: str | Path,
        spec: ExtractorSpec,
        index: str | IndexOptions = "auto",
        shard_bytes: int | None = None,
        recipe: str | None = None,
        patches: Patches | None = None,
        timeout: float = 0,
    ) -> Gallery:
        """Open the gallery at a path, or create it if there is none; `created` says which.

        Two processes may call this at once: one creates the gallery, the other opens it.

        Args:
            path: as for create.
            spec: as for create; an existing gallery must have the same.
            index: as for create. An existing gallery keeps its own; see reindex.
            shard_bytes: as for create. An existing gallery keeps its own.
            recipe: as for create; an existing gallery must have the same. None: whatever it has.
            patches: likewise; None: whatever an existing gallery has, "stored" for a new one.
            timeout: as for create.

        Raises:
            SpecMismatchError: the existing gallery has another spec.
            OptionError: it has another recipe or other patches; or as create.
            GalleryError: as open and create.

        Example:
            >>> for _ in range(2):
            ...     sf.Gallery.open_or_create("new.gallery", toy.spec).created
            True
            False
        """
        refuse_address(path)
        path = Path(path)
        if not (path / FILE).exists():
            try:
                return cls.create(path, spec, index, shard_bytes, recipe, patches or "stored", timeout)
            except GalleryError:
                if not (path / FILE).exists():  # else another process has just created it
                    raise
        gallery = cls(path, index.device if isinstance(index, IndexOptions) else "auto")
        require_agreement(path, gallery.snapshot().manifest, spec, recipe, patches)
        return gallery

    def add_images(
        self,
        sources: str | Path | Sequence[str | Path | ImageFile],
        extractor: Extractor,
        *,
        replace: bool = False,
        strict: bool = False,
        progress: bool = False,
        workers: int | Machines = 1,
        timeout: float = 0,
    ) -> IngestReport:
        """Extract and store the features of every image in files and folders.

        It streams: memory does not grow with the number of images. It resumes: images that are there with the same
        content are passed over, so the same call continues an interrupted one.

        Args:
            sources: files and folders, where a key is the path relative to its source (or to the nearest folder that
                holds all sources, if two would have the same key); or a Category's normal images.
            extractor: of the gallery's spec.
            replace: take changed content under a key that is there; False: skip and report such an image.
            strict: stop at the first image that cannot be taken; those before it are kept.
            progress: show a bar where standard error is a terminal.
            workers: processes that decode, extract and write shards; 1: this process. Each loads the network and takes
                its share of the cores. Shards are committed in the order of the sources: keys and ids are those of one
                process. After an interruption there may be gaps, which the next run fills at the end. A network with
                fewer threads may round differently. A killed run loses at most two shards for each worker. A script
                must call this under `if __name__ == "__main__":`, as multiprocessing requires. Or the machines of a Ray
                cluster, see cluster.RayMachines.
            timeout: seconds to wait for another process that is writing.

        Raises:
            GalleryLockedError: another process is writing.
            SpecMismatchError: another extractor, or one with other settings.
            ImageError: a source without images; with strict, the first image that cannot be read.
            KeyConflictError: with strict, an image that has changed; see replace.
            OptionError: fewer than one worker, or several with an extractor that cannot be pickled.
            WorkerError: a worker was killed or failed; what was committed stays.

        Example:
            >>> report = gallery.add_images("test", toy, replace=True)  # test/000.png is another image
            >>> report.added, report.replaced, len(gallery)
            (1, 1, 12)
        """
        if not (is_count(workers) or hasattr(workers, "makers")):
            raise OptionError(f"workers: expected a number >= 1, found {workers!r}")
        self.spec.require(extractor.spec, str(self.path))
        paths = [sources] if isinstance(sources, (str, Path)) else sources
        paths = paths if isinstance(paths, Listing) else list(paths)
        options = IngestOptions(replace, strict, progress)
        with self.writer(timeout) as writer:
            writer.snapshot.manifest.spec.require(extractor.spec, str(self.path))  # another may have made it again
            first = writer.snapshot.manifest.rows
            if workers == 1:
                report = ingest(writer, paths, extractor, options)
            else:
                machines = Processes(workers) if isinstance(workers, int) else workers
                report = ingest_in_processes(writer, paths, extractor, machines, options)
        report.copies = copies_from(self._snapshot, first) if report.added else 0
        return report

    def add(
        self,
        images: Iterable[tuple[str, ImageLike]],
        extractor: Extractor,
        *,
        replace: bool = False,
        strict: bool = False,
        progress: bool = False,
        timeout: float = 0,
    ) -> IngestReport:
        """Extract and store the features of images that an iterable gives, each with its key.

        It streams, resumes, and commits as add_images does; the iterable is read in the caller's thread, up to two
        batches ahead. What an image without a file is known by is its pixels, so that the same pixels under the same
        key are unchanged.

        Args:
            images: pairs (key, image), where an image is anything that Detector.query takes. A gallery that recomputes
                patches takes paths alone.
            extractor: of the gallery's spec.
            replace: take changed content under a key that is there; False: skip and report such an image.
            strict: stop at the first image that cannot be taken; those before it are kept.
            progress: show a bar where standard error is a terminal.
            timeout: seconds to wait for another process that is writing.

        Raises:
            GalleryLockedError: another process is writing.
            SpecMismatchError: another extractor, or one with other settings.
            ImageError: an item that is no pair; with strict, the first image that cannot be read.
            FeatureError: a key that is no text, is empty, or is too long.
            KeyConflictError: with strict, an image that has changed, or a key that two images have.

        Example:
            >>> noise = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
            >>> report = gallery.add(((f"noise/{n}", pixels) for n, pixels in enumerate(noise)), toy)
            >>> report.added, len(gallery), "noise/2" in gallery
            (3, 15, True)
        """
        self.spec.require(extractor.spec, str(self.path))
        with self.writer(timeout) as writer:
            writer.snapshot.manifest.spec.require(extractor.spec, str(self.path))  # another may have made it again
            first = writer.snapshot.manifest.rows
            report = ingest_given(writer, images, extractor, IngestOptions(replace, strict, progress))
        report.copies = copies_from(self._snapshot, first) if report.added else 0
        return report
