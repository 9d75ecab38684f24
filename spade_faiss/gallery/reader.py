"""The reading half of a gallery: what it holds, search by image features, pyramid levels, verification."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..arrays import Array, Ids
from ..extractors.registry import Extractor, load_extractor
from ..extractors.spec import ExtractorSpec
from ..images.sources import ImageFile
from ..images.tiling import listed_keys
from ..object_store.address import Address, is_address
from ..object_store.files import RemoteFiles, open_snapshot
from ..options import FeatureOptions, Patches, Runtime
from ..pyramids.cache import PyramidCache
from ..pyramids.recomputed import Places, pyramids_of
from ..recipes import Recipe
from ..store.locks import ReaderLock
from ..store.manifest import Manifest
from ..store.secondary_indexes import IndexState
from ..store.snapshot import Snapshot
from ..store.trusted import FILE as TRUSTED
from ..store.trusted import read_trusted_file, trusted_ids
from .info import copies_in, info_of, recipe_of
from .own_extractor import own_extractor
from .verify import Problem, problems_of

Self = TypeVar("Self", bound="GalleryReader")


class GalleryReader:
    """What a Gallery does without writing; see Gallery."""

    def __init__(
        self, path: Path, device: str = "auto", cache: Path | None = None, cache_bytes: int | None = None
    ) -> None:
        """Open a gallery; see open."""
        self.path = path
        self._place = _kept_place(path)
        self._device = device
        self._cache = cache, cache_bytes
        self._snapshot = self._last_commit()

    @classmethod
    def open(
        cls: type[Self],
        path: str | Path,
        device: str = "auto",
        cache: str | Path | None = None,
        cache_bytes: int | None = None,
    ) -> Self:
        """Open a gallery at its last commit.

        Args:
            path: its folder; or the address that it was pushed to, as s3://bucket/tiles.gallery, which is read only.
            device: of the image index: auto (a GPU from 10 000 images on, if FAISS sees one), cpu, cuda, cuda:N.
            cache: folder for what is fetched from an address, which processes and galleries may share; None:
                $SPADE_FAISS_CACHE, or spade-faiss among the user's caches.
            cache_bytes: limit of what is kept there, which evicts what was used least recently; None: 10 GiB.

        Raises:
            GalleryNotFoundError: there is no gallery at that path.
            CorruptGalleryError: gallery.json is damaged or of another format version.
            GalleryError: the address cannot be read, there is no such bucket, there are no credentials, or the cache
                cannot be written.
            OptionError: the scheme of the address is unknown, or its package is not installed.

        Example:
            >>> sf.Gallery.open("toy.gallery")
            Gallery('toy.gallery', 12 images, toy, generation 2)
        """
        place = Address(path) if is_address(path) else Path(path)
        return cls(place, device, Path(cache) if cache is not None else None, cache_bytes)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._place, self._device, *self._cache), {"path": self.path}

    def __repr__(self) -> str:
        manifest = self._snapshot.manifest  # once: another thread may refresh
        images = manifest.rows - manifest.removed
        name = type(self).__name__
        return f"{name}({str(self.path)!r}, {images} images, {manifest.spec.name}, generation {manifest.generation})"

    def _last_commit(self) -> Snapshot:
        if is_address(self._place):
            return open_snapshot(Address(self._place), self._device, *self._cache)
        lock = ReaderLock(self._place)  # taken before the manifest names the files
        return Snapshot(self._place, Manifest.read(self._place).on(self._device), lock)

    def refresh(self) -> None:
        """Move on to the last commit. Ids from before are no longer valid.

        Example:
            >>> sf.Gallery.open("toy.gallery").remove(["000.png"])
            >>> gallery.refresh()
            >>> len(gallery)
            11
        """
        self._snapshot = self._last_commit()  # the old one closes when the last thread has done with it

    def file(self, name: str) -> Path:
        """Return where a file beside the manifest can be read, as calibration.json: in the folder, or in the cache.

        Args:
            name: of the file, which may not exist.

        Example:
            >>> gallery.file("calibration.json").exists()  # not calibrated yet
            False
        """
        return self._snapshot.files.path(name)

    def snapshot(self) -> Snapshot:
        """Return the open generation, for several calls that must agree on ids while others write.

        Example:
            >>> snapshot = gallery.snapshot()
            >>> gallery.remove(["000.png"])
            >>> len(snapshot), len(gallery)
            (12, 11)
        """
        return self._snapshot

    def close(self) -> None:
        """Close the files. A gallery in a `with` statement closes at its end.

        Example:
            >>> with sf.Gallery.open("toy.gallery") as gallery:
            ...     len(gallery)
            12
        """
        self._snapshot.close()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def spec(self) -> ExtractorSpec:
        """What makes its features."""
        return self._snapshot.manifest.spec

    @property
    def patches(self) -> Patches:
        """Whether pyramid levels are stored, or recomputed from the image files."""
        return self._snapshot.manifest.patches

    @property
    def generation(self) -> int:
        """The number of the open commit."""
        return self._snapshot.manifest.generation

    @property
    def recipe(self) -> Recipe | None:
        """The recipe that it was made with, if any.

        Raises:
            GalleryError: this release does not know the recipe.
        """
        return recipe_of(self.path, self._snapshot.manifest)

    def load_extractor(
        self,
        weights: str | Path | None = None,
        batch_size: int = FeatureOptions.batch_size,
        device: str = "auto",
        runtime: Runtime = "auto",
    ) -> Extractor:
        """Load the extractor that made the gallery.

        Args:
            weights: load them from this file. None: from where the file was that the gallery was built with, or, if
                it was built with the published weights, the library's cache or a download.
            batch_size: images in one pass through the network.
            device: of the network: auto, cpu, cuda, cuda:N.
            runtime: what runs the network on the CPU: auto, torch, openvino.

        Raises:
            OptionError: no extractor of this release has the name, the features were not made by one, or OpenVINO was
                asked for and cannot run it.
            WeightsError: the weights are missing or do not fit the network.
            SpecMismatchError: the weights or the settings are others than the gallery's.

        Example:
            >>> extractor = gallery.load_extractor(batch_size=8)
            >>> extractor.spec == gallery.spec, extractor.batch_size
            (True, 8)
        """
        options = self.spec.options(batch_size, device, runtime)
        if weights is None and self.spec.weights:
            extractor = own_extractor(self.path, self.spec, options)
        else:
            extractor = load_extractor(self.spec.name, weights, options)
        self.spec.require(extractor.spec, str(self.path))
        return extractor

    def __len__(self) -> int:
        return len(self._snapshot)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._snapshot.find(key) is not None

    def keys(self, ids: Sequence[int] | Ids | None = None) -> list[str]:
        """Return the keys of images, in the order of `ids`; None: of all images.

        Raises:
            OptionError: an id that is not in the gallery.

        Example:
            >>> gallery.keys([11, 0])
            ['011.png', '000.png']
        """
        snapshot = self._snapshot
        return snapshot.keys(snapshot.ids() if ids is None else snapshot.present(ids))

    def ids(self, keys: Iterable[str]) -> list[int]:
        """Return the ids of keys.

        Raises:
            KeyError: a key that is not in the gallery.
            OptionError: one text in place of several, or something else than texts.

        Example:
            >>> gallery.ids(["011.png", "000.png"])
            [11, 0]
        """
        keys = listed_keys(keys)
        found = self._snapshot.find_all(keys)
        if None in found:
            raise KeyError(keys[found.index(None)])
        return [row_id for row_id in found if row_id is not None]

    def trusted(self) -> list[str]:
        """Return the keys of the gallery's trusted images, in the order of their ids; see Gallery.trust.

        Raises:
            CorruptGalleryError: trusted.json was damaged or edited.

        Example:
            >>> gallery.trusted()
            []
        """
        snapshot = self._snapshot
        return snapshot.keys(trusted_ids(snapshot, read_trusted_file(self.file(TRUSTED))))

    def search(
        self, image_features: Array, k: int, without: Ids | None = None, nprobe: int | None = None
    ) -> tuple[Ids, Array]:
        """Find the k normal images nearest to each query by squared L2 of image features.

        Args:
            image_features: (m, d) float32.
            k: number of images.
            without: (n,) ids to leave out, such as the query itself.
            nprobe: IVF lists to visit; None: as the index was made.

        Returns:
            ids (m, k) int64 and squared distances (m, k) float32, ascending.

        Raises:
            NotEnoughImagesError: the gallery has fewer than k images.
            FeatureError: another shape, NaN or infinity.

        Example:
            >>> query = toy.extract([np.zeros((32, 32, 3), np.uint8)]).image
            >>> ids, sq_distances = gallery.search(query, k=3)
            >>> query.shape, ids.shape, sq_distances.shape
            ((1, 12), (1, 3), (1, 3))
        """
        return self._snapshot.search(image_features, k, without, nprobe)

    def read(
        self,
        ids: Sequence[int] | Ids,
        extractor: Extractor | None = None,
        normal: Sequence[str | Path | ImageFile] = (),
    ) -> list[Array]:
        """Read the pyramid levels of images: [(len(ids), c, h, w), ...] in the stored dtype, in the order of `ids`.

        Args:
            ids: the images.
            extractor: the one that made the gallery; needed if it recomputes patches.
            normal: where the image files may be, besides where they were: folders, or the files; or one of them.

        Raises:
            CorruptGalleryError: a shard is missing, cut short, or not what was written, naming file, key and level.
            OptionError: an id that is not in the gallery, or the gallery recomputes patches and extractor is None.
            SourceError: an image file that it recomputes patches from is gone or has changed.
            SpecMismatchError: another extractor, or one with other settings.

        Example:
            >>> [level.shape for level in gallery.read([4, 7])]
            [(2, 3, 8, 8), (2, 3, 4, 4), (2, 3, 2, 2)]
        """
        snapshot = self._snapshot
        ids = snapshot.present(ids)
        if extractor is None:
            return snapshot.levels(ids)
        snapshot.manifest.spec.require(extractor.spec, str(self.path))
        return PyramidCache(0).read(pyramids_of(snapshot, extractor, normal), ids)

    def index_state(self) -> IndexState:
        """Return how the image index is made and searched, and whether the gallery has outgrown it.

        Example:
            >>> gallery.index_state().outgrown
            ()
        """
        return IndexState.of(self._snapshot.manifest)

    def info(self) -> dict[str, Any]:
        """Return what the gallery holds, as JSON values; sizes in bytes.

        `copies` is the number of images whose content another image of it has too; None where that is not counted, as
        there are many images or some are damaged. `trusted` is the number of trusted images, see Gallery.trust.

        Example:
            >>> info = gallery.info()
            >>> info["images"], info["copies"], info["patches"], info["index"]["kind"]
            (12, 0, 'stored', 'flat')
        """
        snapshot = self._snapshot
        trusted = len(trusted_ids(snapshot, read_trusted_file(self.file(TRUSTED))))
        return {**info_of(self.path, snapshot.manifest), "copies": copies_in(snapshot), "trusted": trusted}

    def verify(self, files: bool = True, normal: Sequence[str | Path | ImageFile] = ()) -> list[Problem]:
        """Read everything and compare it with what was written; an empty list is a clean gallery.

        Args:
            files: if the gallery recomputes patches, read every image file as well.
            normal: where those may be, besides where they were: folders, or the files; or one of them.

        Example:
            >>> gallery.verify()
            []
        """
        if isinstance(remote := self._snapshot.files, RemoteFiles):
            return [Problem(file, message) for file, message in remote.problems()]
        snapshot = self._last_commit()  # a file that is open already reads well even when it has been deleted
        try:
            return problems_of(snapshot, files, normal)
        finally:
            snapshot.close()

    def needs_extractor(self, problems: Sequence[Problem], normal: Places = ()) -> bool:
        """Return whether repair needs an extractor to mend some of these problems.

        That is so if one of them is about an image, the features were made from images, and it is known where the
        files may be.

        Args:
            problems: what verify found.
            normal: as for repair.

        Example:
            >>> gallery.needs_extractor(gallery.verify(), ["normal"])
            False
        """
        known = bool(normal) or self.patches == "recompute"
        return known and self.spec.resized is not None and any(problem.key is not None for problem in problems)


def _kept_place(path: Path) -> Path:
    """Return a path that stays the same folder's when the process moves to another one.

    A user who may not pass through the folders above it has only the relative path.
    """
    return path.absolute() if not is_address(path) and os.path.exists(path.absolute()) else path  # noqa: PTH110
